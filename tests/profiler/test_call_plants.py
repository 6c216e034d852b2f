"""Errors planted in single calls: going on from the plant, and where there is something to plant in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry
from ditopt.profiler.call_plants import CallPlants, chosen_modules
from ditopt.profiler.head_edits import BlockMask
from ditopt.profiler.interpret import Moment, Watched, of_branches
from ditopt.profiler.places import attentions
from ditopt.profiler.rollout_plants import HeadsPlant
from tests.profiler.watched_models import ONE, Keeper, captured, trace_of
from tests.tiny import Silent

GUIDED = NetworkCalls(ONE.timesteps, ONE.calls, 2, True)
APART = NetworkCalls(ONE.timesteps, tuple((t, b) for t, _ in ONE.calls for b in (0, 1)), 2, False)


@pytest.mark.parametrize(("name", "calls"), [("Wan", ONE), ("Wan", APART), ("SD3", GUIDED), ("PixArt", GUIDED)])
def test_going_on_from_a_plant_gives_what_running_all_anew_gives(name: str, calls: NetworkCalls) -> None:
    trace, arguments = trace_of(name), captured(name).arguments
    planting = CallPlants(trace, calls, Silent(), Geometry(2, 4, 4))
    with torch.no_grad():
        outputs = Watched(trace).run(*arguments)
        for _ in calls.calls:
            planting(list(arguments), lambda _: outputs)
    assert planting.complete and planting.found
    kinds = set()
    for (site, head, error, step), ratios in planting.found.items():
        module = next(each for each in planting.modules if each.site == site)
        edits = planting._edits(module, step)
        ((node, edit),) = [(n, e) for n, of_node in edits.items() for h, k, e in of_node if (h, k) == (head, error)]
        values = {}
        for changed in (False, True):
            keeper = Keeper(frozenset({module.node.name}))
            run = Watched(trace, [keeper], {node.name: edit} if changed else {})
            run.moment = Moment(step, (0, 1) if calls.batched else (0,))
            with torch.no_grad():
                values[changed] = run.run(*arguments)[0], keeper
        expected = []
        for branch, moved in of_branches(run.moment, values[True][0] - values[False][0]):
            one, other = (values[each][1].values[module.node.name, step, branch] for each in (True, False))
            expected.append(float(moved.double().norm() / (one - other).double().norm()))
        assert ratios[: len(expected)] == pytest.approx(expected, rel=1e-5), (site, head, error, step)
        kinds.add(error)
    assert kinds == {"noise", "head", "pattern"} if name == "Wan" else {"noise", "head"} <= kinds


def test_errors_are_planted_where_attention_is_in_no_module_of_its_own() -> None:
    joint = trace_of("SD3")
    alone = {entry.site.name for entry in attentions(joint) if not entry.cross}
    assert alone <= {each.site for each in chosen_modules(joint, ONE)}, "it hands on two values"


def test_what_guidance_branches_cannot_share_is_left_out() -> None:
    assert chosen_modules(trace_of("Wan"), GUIDED) == () != chosen_modules(trace_of("Wan"), ONE)


def test_heads_are_masked_from_a_step_on_and_before_it_is_as_it_was() -> None:
    trace, arguments = trace_of("Wan"), captured("Wan").arguments
    entry = next(each for each in attentions(trace) if not each.cross)
    blocks = torch.ones(8, 8, dtype=torch.bool).tril()
    mask = BlockMask(blocks.numpy(), 4, 4)
    dense = [(torch.full((1, 2), float(step)),) for step, _ in ONE.calls]
    plant = HeadsPlant(trace, ONE, dense, 2, {entry.node.name: {1: mask}})

    def masked(given: tuple[Any, ...], value: Tensor) -> Tensor:
        tokens = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
        found = value.clone()
        query, key, values = (part[:, 1] for part in given[:3])
        found[:, 1] = F.scaled_dot_product_attention(query, key, values, attn_mask=tokens)
        return found

    with torch.no_grad():
        expected = Watched(trace, (), {entry.node.name: masked}).run(*arguments)[0]
        usual = Watched(trace).run(*arguments)[0]
        given = [plant(list(arguments), lambda _: dense[0])[0] for _ in ONE.calls]
    assert not torch.allclose(expected, usual, rtol=1e-3), "the mask does something"
    for step, found in enumerate(given):
        wanted = dense[step][0] if step < 2 else expected
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
