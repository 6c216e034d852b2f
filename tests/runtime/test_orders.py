"""Plans whose heads have blocks in another order of tokens: against masks and means in the space of the tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditopt.backend import Session
from ditopt.decisions import Dense, Reuse, Sparse, decision_from_data, decision_to_data, pattern_text
from ditopt.errors import PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import blocks, kernel_blocks
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.listed import Listed
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.passes._infra import Ordered
from ditopt.passes.sparse import list_names, order_names
from ditopt.plan import Rule
from ditopt.profiler.interpret import Edit
from ditopt.sites import STEP
from tests.kernels.test_draft_lists import literal
from tests.runtime.test_draft import always
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    call,
    check_plan_file,
    distance,
    emulated_by,
    joint,
    plan_of,
    rule,
    sparse,
    steps_of,
    wan_inputs,
)
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.tiny import tiny_wan
from tests.trace.models import capture, compiled, interpreted

RULES = (
    rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.25, order="tiles", rest={"pooled": 16})),
    rule("blocks.0.attn1", "2", sparse("window", tile=[2, 4, 8], reach=[0, 1, 1], order={"tiles": [2, 4, 8]})),
    rule("blocks.0.attn1", "3", sparse("temporal", rows=1, columns=1, order="pixels"), "0"),
    rule("blocks.0.attn1", "3", Dense(), "1"),
    rule("blocks.1.attn1", "2", sparse("band", width=2), "1"),
    rule("blocks.1.attn1", "3", sparse("draft", mass=0.6, order="hilbert"), "0"),
    rule("blocks.1.attn1", "3", sparse("skip"), "1"),
    rule("blocks.1.attn1", "4", sparse("spatial")),
)
"""Heads of block 0 have one order in every step, those of block 1 two in step 2; step 4 has raster order there."""


def tokens_in(order: TokenOrder | None, geometry: Geometry, key_block: int) -> np.ndarray[Any, Any]:
    """Which token stands at each place of the sequence."""
    return np.arange(geometry.tokens) if order is None else order.of_sequence(geometry, key_block)


def in_token_space(decided: list[Any], geometry: Geometry) -> Edit:
    """Attention with a mask of tokens, and of groups of tokens behind them, for every sparse head, in float64."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        query, key, values = (each.double() for each in given[:3])
        out, scale, tokens = value.clone(), query.shape[-1] ** -0.5, geometry.tokens
        sizes = kernel_blocks(tokens, tokens)
        for head, do in enumerate(decided):
            if not isinstance(do, Sparse):
                continue
            choice = SparseChoice.from_data(do.settings)
            order = tokens_in(choice.order, geometry, sizes[1])
            place = torch.from_numpy(np.argsort(order))
            of_video = None if choice.order is None else choice.order.of_video(geometry, sizes[1])
            group = head * key.shape[1] // query.shape[1]
            for sample in range(len(query)):
                q, k, v = query[sample, head], key[sample, group], values[sample, group]
                assert not isinstance(choice.pattern, Listed)
                if isinstance(choice.pattern, Draft):
                    limit = [choice.pattern.room(blocks(tokens, sizes[1]))]
                    own, mass = always(geometry, sizes)[None, None], [choice.pattern.mass or math.inf]
                    one, other = (part[order].float()[None, None] for part in (q, k))
                    kept = torch.tensor(literal(one, other, own, sizes, limit, mass, scale)).view(own.shape[2:])
                else:
                    kept = torch.from_numpy(choice.pattern.block_map(geometry, *sizes, of_video))
                of_query = kept[place // sizes[0]]
                hidden = [~of_query[:, place // sizes[1]]]
                keys, means, counts = [k], [v], [torch.ones(tokens)]
                if choice.pooled is not None:
                    pool = choice.pooled.of(sizes[1])
                    groups = torch.from_numpy(order).split(pool)
                    keys.append(torch.stack([k[each].mean(0) for each in groups]))
                    means.append(torch.stack([v[each].mean(0) for each in groups]))
                    counts.append(torch.tensor([float(len(each)) for each in groups]))
                    hidden.append(of_query[:, torch.arange(len(groups)) * pool // sizes[1]])
                scores = scale * q @ torch.cat(keys).T + torch.cat(counts).log()
                scores = scores.masked_fill(torch.cat(hidden, 1), -math.inf)
                out[sample, head] = (scores.softmax(-1).nan_to_num(0.0) @ torch.cat(means)).to(value.dtype)
        return out

    return edit


emulated = emulated_by(in_token_space)


def test_a_compiled_plan_file_has_its_blocks_in_orders(wan: nn.Module, structure: str, tmp_path: Path) -> None:
    program = check_plan_file(wan, plan_of(structure, *RULES), tmp_path / "plan.yaml", emulated)
    bound = program.bound
    assert bound is not None and len({step.variant for step in bound.steps[1:4]}) == 1, "other orders are other inputs"
    assert [each.order for each in bound.steps[1].variant.sparse] == [Ordered.SITE, Ordered.HEADS]
    names = [order_names(f"blocks.{at}.attn1")[0] for at in range(2)]
    first, second = ([bound.steps[step].lists[name] for step in range(1, 5)] for name in names)
    assert [each.shape for each in (first[0], second[0])] == [(1024,), (2, 1024)]
    assert first[0] is first[3] and not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert torch.equal(second[0][0], first[0]) and torch.equal(second[1][1], torch.arange(1024))
    assert torch.equal(second[2][0], second[2][1]), "a head to which it is all one goes with the other"
    assert torch.equal(second[3], torch.arange(1024).expand(2, -1))
    for each in bound.steps[1].variant.sparse:
        there, back = (bound.steps[1].lists[name] for name in order_names(each.site))
        assert there.dtype == back.dtype == torch.int64
        assert torch.equal(there.gather(-1, back), torch.arange(1024).expand(there.shape))


def test_sites_in_raster_order_have_no_gathers(wan: nn.Module, structure: str) -> None:
    rules = (rule("blocks.*.attn1", "1", sparse("spatial")), rule("blocks.1.attn1", "2", sparse("skip", order="tiles")))
    session = Session(plan=plan_of(structure, *rules), check_passes=True)
    with interpreted():
        call(compiled(wan, session=session), wan_inputs(), TIMES[1])
    (program,) = session.programs
    assert program.bound is not None
    for step in program.bound.steps[1:3]:
        assert {each.order for each in step.variant.sparse} == {Ordered.NOT}
        assert set(step.lists) == {name for each in step.variant.sparse for name in list_names(each.site)}


@pytest.mark.parametrize("order", ["tiles", "heads"])
def test_it_goes_with_a_dtype_simplified_and_predicted_steps_and_a_batch(order: str) -> None:
    model, inputs = tiny_wan(attention_head_dim=16), wan_inputs(batch=2)
    with interpreted():
        wide = capture(model, inputs).program.variants.trace.structure
        torch._dynamo.reset()
        rules: tuple[Rule, ...] = (
            rule(STEP, "0-5", Dense(dtype="bfloat16", simplify=True)),
            rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.25, order="tiles", rest="pooled")),
            rule("blocks.1", "2", Reuse()),
        )
        if order == "heads":
            rules = (*rules, rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.4, order="hilbert"), "1"))
        plan = plan_of(wide, *rules)
        session = Session(plan=plan, check_passes=True)
        for step, found, arguments in steps_of(session, compiled(model, session=session), inputs):
            if step in (1, 4):
                assert 1e-5 < distance(found, emulated(session.programs[0], plan, step, arguments, FRAMES)) < 2e-2


@pytest.mark.parametrize("name", ["Flux", "CogVideoX"])
def test_text_stays_where_it_is_in_joint_attention(name: str) -> None:
    model, inputs, geometry = joint(name)
    with interpreted():
        found = capture(model, inputs).program.variants.trace
        rules = (
            rule("*", "1-5", sparse("window", tile=[1, 4, 4], reach=[0, 0, 0], order="tiles"), "0"),
            rule("*", "3", sparse("draft", keep=0.3, order="hilbert", rest="pooled"), "0"),
            rule("*", "4", sparse("draft", keep=0.3, order="hilbert"), "1"),
        )
        plan = plan_of(found.structure, *rules, tokens=geometry)
        session = Session(plan=plan, check_passes=True)
        torch._dynamo.reset()
        for step, given, arguments in steps_of(session, compiled(model, session=session), inputs):
            if step in (1, 3, 4):
                expected = emulated(session.programs[0], plan, step, arguments, geometry)
                torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    (program,) = session.programs
    assert program.bound is not None
    for each in program.bound.steps[3].variant.sparse:
        there = program.bound.steps[3].lists[order_names(each.site)[0]]
        assert torch.equal(there[..., :6], torch.arange(6).expand(there[..., :6].shape)), "text is first"


def test_at_another_size_it_is_the_order_of_the_tokens_there(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, *RULES, geometry={"transformer": (1, 4, 4, 32, 32)})
    smaller, half = wan_inputs(16), Geometry(4, 8, 16)
    with interpreted():
        session = Session(plan=plan, on_mismatch="retarget")
        for step, found, arguments in steps_of(session, compiled(wan, session=session), smaller):
            if step in (1, 2, 3):
                expected = emulated(session.programs[0], plan, step, arguments, half)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            rule("blocks.0.attn1", "1", sparse("spatial", order="tile")),
            r"rule 0 \(blocks\.0\.attn1\): order 'tile' is unknown; write one of hilbert, pixels, tiles, clusters, or",
        ),
        (
            rule("blocks.0.attn1", "1", sparse("spatial", order={"tiles": [4, 4]})),
            r"rule 0 \(blocks\.0\.attn1\): order \{tiles: \[4, 4\]\}: a tile is frames, rows and columns of tokens, at",
        ),
        (
            rule("blocks.0.attn2", "1", sparse("skip", order="tiles")),
            r"rule 0 .*: blocks\.0\.attn2 is no self-attention of the latents' tokens; an order is for that only",
        ),
        (
            rule("blocks.0.attn1", "1", sparse("union", of=["sink", {"pattern": "spatial", "order": "tiles"}])),
            r"rule 0 \(blocks\.0\.attn1\): pattern .*order: Extra inputs are not permitted; spatial has",
        ),
    ],
)
def test_orders_that_do_not_fit_are_named(wan: nn.Module, structure: str, bad: Rule, message: str) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan_of(structure, bad)), wan_inputs(), TIMES[0])


@pytest.mark.parametrize("order", ["tiles", {"tiles": [1, 2, 3]}, "hilbert", "pixels", "clusters"])
def test_a_decision_is_written_as_it_is_read(order: Any) -> None:
    data = {"sparse": {"pattern": "draft", "keep": 0.25, "rest": "pooled", "order": order}}
    decision = decision_from_data(data)
    assert isinstance(decision, Sparse) and decision_to_data(decision) == data
    choice = SparseChoice.from_data(decision.settings)
    assert choice.order is not None and choice.order.to_data() == order
    assert pattern_text(choice.to_data()) == decision.pattern


@pytest.mark.parametrize(
    "order", ["", "raster", 3, True, {"tiles": [0, 1, 1]}, {"tiles": [1, 1, True]}, {"hilbert": 1}, {"tiles": 4}, {}]
)
def test_other_orders_are_told(order: Any) -> None:
    with pytest.raises(ValueError, match=r"^order .*e\.g\. \{tiles: \[4, 4, 4\]\}$|is unknown; write one of hilbert"):
        SparseChoice.from_data({"pattern": "spatial", "order": order})
