"""Plans whose heads have their lists from the file beside them: compiled, audited, laid over other sizes, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.backend import Session
from ditopt.decisions import Dense, Sparse
from ditopt.errors import AuditError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.head_tensors import BlockMaps
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import own_blocks
from ditopt.passes.sparse import list_names, rest_name
from ditopt.plan import Plan, Rule
from ditopt.plan_tensors import PlanTensors
from ditopt.profiler.head_edits import BlockMask
from ditopt.profiler.interpret import Edit, Watched
from ditopt.runtime.program import Program
from tests.literal_rest import under_blocks_and_means
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    call,
    check_plan_file,
    distance,
    plan_of,
    rule,
    sparse,
    steps_of,
    wan_inputs,
)
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import compiled, interpreted

pytest.importorskip("diffusers")

QUARTER, TILES = sparse("listed", keep=0.25), sparse("listed", mass=0.9, order="tiles")
STARTS = (0, 2, 4)
RULES = (
    rule("blocks.*.attn1", "1-4", QUARTER),
    rule("blocks.0.attn1", "2, 4", TILES, "1"),
    rule("blocks.1.attn1", "3", sparse("spatial"), "0"),
    rule("blocks.1.attn1", "4", Dense(), "1"),
)


def maps(site: str, do: Sparse, seed: int, geometry: Geometry = FRAMES, heads: tuple[int, ...] = (0, 1)) -> BlockMaps:
    order = SparseChoice.from_data(do.settings).order
    own = own_blocks(geometry, 64, order)
    drawn = np.random.default_rng(seed).random((len(STARTS), len(heads), *own.shape)) < 0.2
    text = BlockMaps.text_of(do.pattern)
    assert text is not None
    return BlockMaps.of(drawn | own, "transformer", site, text, heads, STARTS, geometry, 64)


EVERY = PlanTensors(
    (
        *(maps(f"blocks.{block}.attn1", QUARTER, block) for block in range(2)),
        maps("blocks.0.attn1", TILES, 2),
        maps("blocks.1.attn1", sparse("listed", columns=0.1), 3),
    )
)


def listed_plan(structure: str, *rules: Rule, **settings: Any) -> Plan:
    return plan_of(structure, *(rules or RULES), **settings).with_beside(EVERY)


def kept_tokens(plan: Plan, site: str, head: int, step: int, geometry: Geometry) -> Tensor | None:
    """``[S, S]`` boolean: what a head attends to, in raster order; None: everything."""
    do = plan.head_decisions(site)[step].of(head + 1)[head]
    if not isinstance(do, Sparse):
        return None
    choice = SparseChoice.from_data(do.settings)
    if do.settings["pattern"] == "spatial":
        kept, order = choice.pattern.block_map(geometry, 64), None  # type: ignore[union-attr]  # it has a map
    else:
        of_site = plan.beside.maps_for("transformer", site, do.pattern)
        assert of_site is not None
        kept, order = of_site.kept(head, step), choice.order
    block_of = np.arange(geometry.tokens) // 64
    if order is not None:
        block_of[order.of_sequence(geometry, 64)] = np.arange(geometry.tokens) // 64
    return torch.from_numpy(kept[block_of][:, block_of])


def under_masks(masks: dict[int, Tensor]) -> Edit:
    """Heads anew, each under its mask of tokens ``[S, S]``."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        found = value.clone()
        for head, mask in masks.items():
            query, key, values = (part[:, head] for part in given[:3])
            found[:, head] = F.scaled_dot_product_attention(query, key, values, attn_mask=mask)
        return found

    return edit


def emulated(program: Program, plan: Plan, step: int, arguments: list[Any], geometry: Geometry) -> Tensor:
    """The captured graph, node by node, with heads under masks of tokens as the plan's file has them."""
    trace, edits = program.variants.trace, {}
    for block in range(2):
        site = f"blocks.{block}.attn1"
        each = {head: kept_tokens(plan, site, head, step, geometry) for head in range(2)}
        edits[trace.site_nodes[site]] = under_masks({head: kept for head, kept in each.items() if kept is not None})
    with torch.no_grad():
        found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
    return found


def test_a_plan_file_and_the_file_beside_it_are_the_model_with_heads_under_these_masks(
    wan: nn.Module, structure: str, tmp_path: Path
) -> None:
    """In other periods by other maps, of other heads, static and dense ones beside them, in two orders of tokens."""
    program = check_plan_file(wan, listed_plan(structure), tmp_path / "plan.yaml", emulated)
    assert program.bound is not None and program.bound.refused is None
    steps = program.bound.steps
    assert steps[2].variant == steps[3].variant, "another period is another input, not another graph"
    name, _ = list_names("blocks.0.attn1")
    assert not torch.equal(steps[1].lists[name], steps[3].lists[name])
    assert len(list(tmp_path.glob("tensors-*.safetensors"))) == 1


def with_means(pools: dict[int, int]) -> Any:
    """The captured graph, node by node, under the maps of the file and the means of groups of other tokens."""

    def emulated(program: Program, plan: Plan, step: int, arguments: list[Any]) -> Tensor:
        trace, edits = program.variants.trace, {}
        for block in range(2):
            each = {head: BlockMask(EVERY.maps[block].kept(head, step), 64, 64) for head in range(2)}
            masks = {head: (mask, pools[head]) for head, mask in each.items()}
            edits[trace.site_nodes[f"blocks.{block}.attn1"]] = under_blocks_and_means(masks)
        with torch.no_grad():
            found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
        return found

    return emulated


def test_a_rest_goes_with_the_same_maps(wan: nn.Module, structure: str) -> None:
    """Of one head and not of the other, by the formula; the lists are the same with it and without."""
    plain, pooled = (sparse("listed", keep=0.25, **more) for more in ({}, {"rest": {"pooled": 16}}))
    rules = rule("blocks.*.attn1", "1-4", plain), rule("blocks.*.attn1", "1-4", pooled, "1")
    plan = listed_plan(structure, *rules)
    session, expected, without = (
        Session(plan=plan, check_passes=True),
        with_means({0: 0, 1: 16}),
        with_means({0: 0, 1: 0}),
    )
    with interpreted():
        for step, found, arguments in steps_of(session, compiled(wan, session=session), wan_inputs()):
            (program,) = session.programs
            if step not in (2, 4):  # of other periods
                continue
            torch.testing.assert_close(found, expected(program, plan, step, arguments), rtol=1e-4, atol=1e-5)
            assert distance(found, without(program, plan, step, arguments)) > 1e-4
            assert program.bound is not None
            lists = program.bound.steps[step].lists
            for block in range(2):
                indices, counts = (lists[name] for name in list_names(f"blocks.{block}.attn1"))
                of_heads = BlockLists(indices, counts, 64, 64).to_map(16)[0].numpy()
                assert (of_heads == np.stack([EVERY.maps[block].kept(head, step) for head in range(2)])).all()
                assert lists[rest_name(f"blocks.{block}.attn1")].tolist() == [0, 1]


def test_the_audit_proves_that_lists_are_the_files(
    wan: nn.Module, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = BlockLists.from_map

    def wrong(attended: Tensor, *sizes: Any) -> BlockLists:
        attended[0, 1, 3, 7] ^= True
        return made(attended, *sizes)

    monkeypatch.setattr(BlockLists, "from_map", wrong)
    told = r"blocks\.0\.attn1: head 1 in step 1 is to attend to the lists of the file .* 1 of 256 blocks .* differ"
    with interpreted(), pytest.raises(AuditError, match=told):
        call(compiled(wan, plan=listed_plan(structure)), wan_inputs(), TIMES[2])


SEEN = np.array(
    [
        [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]],
        [[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]],
    ],
    dtype=bool,
)
"""Which of four frames a frame attends to; one for each period and head in turn."""
IN_FRAMES = sparse("listed", keep=0.5), sparse("listed", mass=0.5, order={"tiles": [1, 8, 8]})
"""Blocks lie within frames in either order, at 16 rows and at 24: four of them, and six."""


def of_frames(site: str, do: Sparse) -> BlockMaps:
    drawn = np.stack([[SEEN[(period + head) % 3] for head in range(2)] for period in range(3)])
    text = BlockMaps.text_of(do.pattern)
    assert text is not None
    return BlockMaps.of(drawn.repeat(4, 2).repeat(4, 3), "transformer", site, text, (0, 1), STARTS, FRAMES, 64)


def by_frame(program: Program, step: int, arguments: list[Any], tokens: int) -> Tensor:
    """The captured graph, node by node, whose heads attend to whole frames of so many ``tokens``."""
    trace, edits = program.variants.trace, {}
    for block in range(2):
        seen = {head: torch.from_numpy(SEEN[(step // 2 + head) % 3]) for head in range(2)}
        masks = {head: each.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1) for head, each in seen.items()}
        edits[trace.site_nodes[f"blocks.{block}.attn1"]] = under_masks(masks)
    with torch.no_grad():
        found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
    return found


def test_at_another_size_lists_are_laid_over_it_or_refused(wan: nn.Module, structure: str) -> None:
    """What attends to whole frames does so at half as many rows again, in either order of tokens."""
    larger = wan_inputs(48)
    rules = [rule(f"blocks.{block}.attn1", "1-4", do) for block, do in enumerate(IN_FRAMES)]
    beside = PlanTensors(tuple(of_frames(f"blocks.{block}.attn1", do) for block, do in enumerate(IN_FRAMES)))
    plan = plan_of(structure, *rules, geometry={"transformer": (1, 4, 4, 32, 32)}).with_beside(beside)
    with interpreted():
        with pytest.raises(PlanMismatchError, match="the plan was made for"):
            call(compiled(wan, plan=plan), larger, TIMES[2])
        torch._dynamo.reset()
        session = Session(plan=plan, on_mismatch="retarget", check_passes=True)
        for step, found, arguments in steps_of(session, compiled(wan, session=session), larger):
            dense = call(wan, larger, TIMES[step])
            expected = by_frame(session.programs[0], step, arguments, 24 * 16) if 1 <= step <= 4 else dense
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert (distance(found, dense) > 1e-4) == (1 <= step <= 4)
    reasons = session.programs[0].variants.reasons
    told = "blocks.1.attn1: its lists were chosen for the geometry of 4 x 16 x 16 tokens in blocks of 64, and are laid "
    assert any(reason.startswith(f"{told}over the geometry of 4 x 24 x 16 tokens") for reason in reasons)


def test_lists_for_other_tokens_are_refused_where_nobody_says_to_lay_them_over(wan: nn.Module, structure: str) -> None:
    other = PlanTensors((maps("blocks.0.attn1", QUARTER, 0, Geometry(4, 8, 32)),))
    plan = plan_of(structure, rule("blocks.0.attn1", "1-4", QUARTER)).with_beside(other)
    told = (
        r"blocks\.0\.attn1: its lists were chosen for the geometry of 4 x 8 x 32 tokens in blocks of 64, here are the "
        r"geometry of 4 x 16 x 16 tokens in blocks of 64; make a plan at this size, or lay them over it"
    )
    with interpreted(), pytest.raises(PlanMismatchError, match=told):
        call(compiled(wan, plan=plan), wan_inputs(), TIMES[2])
    few = PlanTensors((maps("blocks.0.attn1", QUARTER, 0, Geometry(4, 8, 16)),))
    torch._dynamo.reset()
    small = plan_of(structure, rule("blocks.0.attn1", "1-4", QUARTER), tokens=Geometry(4, 8, 16)).with_beside(few)
    with interpreted(), pytest.raises(PlanMismatchError, match="512 tokens are too few for lists of a file"):
        call(compiled(wan, plan=small), wan_inputs(16), TIMES[2])


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (
            rule("blocks.0.attn1", "1", sparse("listed", keep=0.5)),
            r"rule 0 \(blocks\.0\.attn1\): blocks\.0\.attn1: the file beside the plan has no lists for "
            r"{\"keep\": 0\.5, .*; it has transformer, blocks\.0\.attn1, {\"keep\": 0\.25.*Lists are chosen from a",
        ),
        (rule("blocks.0.attn2", "1", QUARTER), "blocks.0.attn2 is no self-attention of the latents' tokens"),
        (rule("blocks.0.attn1", "1", sparse("listed")), "exactly one of keep, mass and columns is needed"),
    ],
)
def test_rules_without_lists_are_named(wan: nn.Module, structure: str, bad: Rule, told: str) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=told):
        call(compiled(wan, plan=listed_plan(structure, bad)), wan_inputs(), TIMES[0])


def test_a_head_that_the_file_leaves_out_is_named(wan: nn.Module, structure: str) -> None:
    one = PlanTensors((maps("blocks.0.attn1", QUARTER, 0, heads=(1,)),))
    plan = plan_of(structure, rule("blocks.0.attn1", "1", QUARTER)).with_beside(one)
    with interpreted(), pytest.raises(PlanMismatchError, match=r"has no lists for .* of head 0, only of 1; it has"):
        call(compiled(wan, plan=plan), wan_inputs(), TIMES[0])
