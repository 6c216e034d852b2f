"""Plans whose heads find their blocks in the call, against eager models under masks computed block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Dense, Reuse, Sparse
from ditopt.errors import PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import blocks, kernel_blocks
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.passes.sparse import draft_names, list_names, selector_name
from ditopt.plan import Plan, Rule
from ditopt.profiler.interpret import Edit
from ditopt.sites import STEP
from tests.kernels.test_draft_lists import literal
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    _fresh,
    call,
    check_plan_file,
    distance,
    emulated_by,
    joint,
    plan_of,
    rule,
    sparse,
    steps_of,
    structure,
    wan,
    wan_inputs,
)
from tests.tiny import tiny_wan
from tests.trace.models import capture, compiled, interpreted

__all__ = ["_fresh", "structure", "wan"]  # fixtures

RULES = (
    rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.25)),
    rule("blocks.*.attn1", "1-4", sparse("temporal", rows=1, columns=2), "1"),
    rule("blocks.0.attn1", "2", sparse("draft", keep=0.4), "0"),
    rule("blocks.0.attn1", "3", sparse("draft", mass=0.3), "0"),
    rule("blocks.1.attn1", "3", Dense(), "0"),
    rule("blocks.1.attn1", "3", sparse("draft", mass=0.9, most=0.3), "1"),
    rule("blocks.1.attn1", "4", sparse("skip"), "0"),
)
"""Step 0 and 5 are dense; drafts of other shares beside static, dense and skipped heads in the others."""


def always(geometry: Geometry, sizes: tuple[int, int]) -> Tensor:
    """``[Qb, Kb]``: blocks that share a token, and rows and columns of blocks with text."""
    own = torch.eye(geometry.tokens, dtype=torch.bool)
    text = slice(0, geometry.text) if geometry.text_first else slice(geometry.video, None)
    if geometry.text:
        own[text], own[:, text] = True, True
    return torch.stack([
        torch.stack([part.any() for part in rows.split(sizes[1], 1)]) for rows in own.split(sizes[0], 0)
    ])  # fmt: skip


def under_plan(decided: list[Any], geometry: Geometry) -> Edit:
    """Attention with heads under what a plan decides for them, row by row and sample by sample."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        query, key, values = given[:3]
        scale, tokens = query.shape[-1] ** -0.5, geometry.tokens
        sizes = kernel_blocks(tokens, tokens)
        key_blocks = blocks(tokens, sizes[1])
        out = value.clone()
        for head, do in enumerate(decided):
            if not isinstance(do, Sparse):
                continue
            settings = do.settings
            for sample in range(len(query)):
                if settings["pattern"] == "draft":
                    share = settings.get("keep", settings.get("most", 0.5))
                    keep, mass = [int(np.ceil(share * key_blocks - 1e-9))], [settings.get("mass", np.inf)]
                    one, other, third = (part[sample, head][None, None] for part in (query, key, values))
                    own, by = always(geometry, sizes)[None, None], [settings.get("by", "means")]
                    kept = torch.tensor(literal(one, other, own, sizes, keep, mass, scale, third, by))
                else:
                    kept = torch.from_numpy(pattern_from_data(settings).block_map(geometry, *sizes))
                mask = kept.repeat_interleave(sizes[0], 0)[:tokens].repeat_interleave(sizes[1], 1)[:, :tokens]
                scores = (scale * query[sample, head] @ key[sample, head].T).masked_fill(~mask, -torch.inf)
                out[sample, head] = scores.softmax(-1).nan_to_num(0.0) @ values[sample, head]
        return out

    return edit


emulated = emulated_by(under_plan)


def test_a_compiled_plan_file_finds_its_blocks_in_the_call(wan: nn.Module, structure: str, tmp_path: Path) -> None:
    program = check_plan_file(wan, plan_of(structure, *RULES), tmp_path / "plan.yaml", emulated)
    assert program.bound is not None and len(program.variants.compiled) == 2
    assert len({step.variant for step in program.bound.steps[1:5]}) == 1, "other heads and shares are other inputs"


def test_samples_of_a_batch_find_blocks_of_their_own(wan: nn.Module, structure: str) -> None:
    plan, session = plan_of(structure, *RULES), None
    session = Session(plan=plan, check_passes=True)
    inputs = wan_inputs(batch=2)
    with interpreted():
        for step, found, arguments in steps_of(session, compiled(wan, session=session), inputs):
            if step in (1, 3):
                expected = emulated(session.programs[0], plan, step, arguments, FRAMES)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_a_step_reads_says_how_much_its_heads_find(wan: nn.Module, structure: str) -> None:
    session = Session(plan=plan_of(structure, *RULES))
    with interpreted():
        call(compiled(wan, session=session), wan_inputs(), TIMES[0])
    (program,) = session.programs
    assert program.bound is not None
    keeps, masses = {}, {}
    for step, bound in enumerate(program.bound.steps):
        for each in bound.variant.sparse:
            keep, mass = (bound.lists[name] for name in draft_names(each.site))
            assert each.draft and keep.dtype == torch.int32 and mass.dtype == torch.float32
            keeps[step, each.site], masses[step, each.site] = keep.tolist(), [round(m, 4) for m in mass.tolist()]
            indices, counts = (bound.lists[name] for name in list_names(each.site))
            assert indices.shape == (1, 2, 16, 16) and (counts[0, 0] == 1).all() == (keep[0] > 0)
    first, second = "blocks.0.attn1", "blocks.1.attn1"
    assert [keeps[step, first] for step in range(1, 5)] == [[4, 0], [7, 0], [8, 0], [4, 0]]
    assert [keeps[step, second] for step in range(1, 5)] == [[4, 0], [4, 0], [0, 5], [0, 0]]
    inf = float("inf")
    assert masses[3, first] == [0.3, inf] and masses[3, second] == [inf, 0.9] and masses[1, first] == [inf, inf]


BY = (
    rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.25, by="error")),
    rule("blocks.0.attn1", "1,3", sparse("draft", keep=0.4), "1"),
    rule("blocks.0.attn1", "3", sparse("draft", mass=0.6, by="mass"), "0"),
    rule("blocks.1.attn1", "4", sparse("skip"), "0-1"),
)
"""Heads of a site differ in what they choose by; the true mass is asked for in one step, at one site."""


def test_heads_choose_their_blocks_by_what_the_plan_says(wan: nn.Module, structure: str, tmp_path: Path) -> None:
    plan, inputs = plan_of(structure, *BY), wan_inputs()
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").rules == plan.rules
    session = Session.from_options({"plan": tmp_path / "plan.yaml", "check_passes": True})
    before = None
    for step, found, arguments in steps_of(session, compiled(wan, session=session), inputs):
        (program,) = session.programs
        expected = emulated(program, plan, step, arguments, FRAMES)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        before = compile_counts() if step == 3 else before  # three graphs: dense, with and without the true mass
    assert compile_counts() == before, "no graph break and no recompilation"
    assert program.bound is not None and len(program.variants.compiled) == 3
    first, second = zip(*(step.variant.sparse for step in program.bound.steps[1:5]), strict=True)
    assert [each.by for each in first] == [("means", "error")] * 2 + [("means", "mass", "error"), ("means", "error")]
    assert {each.by for each in second} == {("error",)}, (
        "a site that needs one takes no codes, also where none is dynamic"
    )
    codes = [program.bound.steps[step].lists[selector_name("blocks.0.attn1")].tolist() for step in (1, 2, 3)]
    assert codes == [[2, 0], [2, 2], [1, 0]]
    assert not any(selector_name("blocks.1.attn1") in step.lists for step in program.bound.steps)


def test_a_share_that_rounds_up_to_all_blocks_is_dense(wan: nn.Module, structure: str) -> None:
    session = Session(plan=plan_of(structure, rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.99))))
    with interpreted():
        found = call(compiled(wan, session=session), wan_inputs(), TIMES[2])
    torch.testing.assert_close(found, call(wan, wan_inputs(), TIMES[2]), rtol=1e-4, atol=1e-5)
    (program,) = session.programs
    assert program.bound is not None and [each.sparse for each in program.bound.variants] == [()]


def test_it_goes_with_a_dtype_simplified_and_predicted_steps() -> None:
    model = tiny_wan(attention_head_dim=16)
    with interpreted():
        wide = capture(model, wan_inputs()).program.variants.trace.structure
        torch._dynamo.reset()
        rules = (
            rule(STEP, "0-5", Dense(dtype="bfloat16", simplify=True)),
            rule("blocks.*.attn1", "1-4", sparse("draft", keep=0.25)),
            rule("blocks.1", "2", Reuse()),
        )
        plan = plan_of(wide, *rules)
        session = Session(plan=plan, check_passes=True)
        for step, found, arguments in steps_of(session, compiled(model, session=session), wan_inputs()):
            if step in (1, 4):
                assert 1e-5 < distance(found, emulated(session.programs[0], plan, step, arguments, FRAMES)) < 2e-2


@pytest.mark.parametrize("name", ["Flux", "CogVideoX"])
def test_text_stays_dense_in_joint_attention(name: str) -> None:
    model, inputs, geometry = joint(name)
    with interpreted():
        found = capture(model, inputs).program.variants.trace
        plan = plan_of(found.structure, rule("*", "1-5", sparse("draft", keep=0.3), "0"), tokens=geometry)
        session = Session(plan=plan, check_passes=True)
        torch._dynamo.reset()
        for step, given, arguments in steps_of(session, compiled(model, session=session), inputs):
            if step in (0, 3):
                expected = emulated(session.programs[0], plan, step, arguments, geometry)
                torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            rule("blocks.0.attn1", "1", sparse("draft", keep=0.5, mass=0.5)),
            r"rule 0 \(blocks\.0\.attn1\): pattern .*: exactly one of keep and mass is needed, e\.g\. {pattern: draft",
        ),
        (
            rule("blocks.0.attn1", "1", sparse("union", of=["sink", {"pattern": "draft", "keep": 0.1}])),
            r"rule 0 .*draft finds its blocks anew in every call; it has no map, and no union takes it",
        ),
        (
            rule("blocks.0.attn2", "1", sparse("draft", keep=0.5)),
            r"blocks\.0\.attn2 is no self-attention .* 1024 queries and 6 keys; of patterns only dense and skip are",
        ),
    ],
)
def test_wrong_settings_are_told(wan: nn.Module, structure: str, bad: Rule, message: str) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan_of(structure, bad)), wan_inputs(), TIMES[0])


def test_at_another_size_shares_are_of_the_blocks_there(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, *RULES, geometry={"transformer": (1, 4, 4, 32, 32)})
    smaller, half = wan_inputs(16), Geometry(4, 8, 16)
    with interpreted():
        session = Session(plan=plan, on_mismatch="retarget")
        for step, found, arguments in steps_of(session, compiled(wan, session=session), smaller):
            if step in (2, 3):
                expected = emulated(session.programs[0], plan, step, arguments, half)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (program,) = session.programs
    assert program.bound is not None
    keep, _ = draft_names("blocks.0.attn1")
    assert program.bound.steps[2].lists[keep].tolist() == [13, 0], "of 32 blocks of 16 keys"
