"""Plans with ``qk: int8``, from a file to compiled graphs, against eager attention with the numbers written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts, has_byte_dot_products
from ditopt.backend import Session
from ditopt.decisions import Dense, HeadDecision, Sparse
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.plan import Plan
from ditopt.profiler.interpret import Edit
from tests.literal_int8 import int8_scores
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    call,
    distance,
    emulated_by,
    plan_of,
    rule,
    sparse,
    steps_of,
    wan_inputs,
)
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import compiled

needs_bytes = pytest.mark.skipif(not has_byte_dot_products(), reason="no dot products of bytes (avx512_vnni)")
BLOCK = 64
"""Tokens of a block of queries and of keys, of 1,024 tokens."""
RULES = (
    rule("blocks.*.attn1", "1-4", sparse("dense", qk="int8")),
    rule("blocks.0.attn1", "2, 4", sparse("spatial", qk="int8"), "1"),
    rule("blocks.1.attn1", "2", Dense(), "0"),
    rule("blocks.1.attn1", "3", sparse("spatial"), "0"),
)
"""Steps 0 and 5 are dense; in the others every site has a head with int8 scores, one of them among other heads."""


def by_heads(int8: bool) -> Any:
    """Heads as a plan has them, with int8 scores where it says so, or (not ``int8``) nowhere."""

    def edit_of(decided: list[HeadDecision], geometry: Geometry) -> Edit:
        def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
            query, key, values = given[:3]
            found = value.clone()
            for head, do in enumerate(decided):
                if not isinstance(do, Sparse):
                    continue
                choice = SparseChoice.from_data(do.settings)
                kept = torch.from_numpy(choice.pattern.block_map(geometry, BLOCK, BLOCK))  # type: ignore[union-attr]
                attended = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
                one, other = query[0, head], key[0, head]
                whole = int8_scores(one, other, BLOCK) if int8 and choice.qk else one.double() @ other.double().T
                scores = (whole * one.shape[-1] ** -0.5).masked_fill(~attended, -torch.inf)
                found[0, head] = (scores.softmax(-1) @ values[0, head].double()).to(value.dtype)
            return found

        return edit

    return edit_of


@needs_bytes
def test_a_compiled_plan_file_is_the_eager_model_with_int8_scores_written_out(
    wan: nn.Module, structure: str, tmp_path: Path
) -> None:
    plan, path = plan_of(structure, *RULES), tmp_path / "plan.yaml"
    plan.save(path)
    assert Plan.load(path).rules == plan.rules
    session = Session.from_options({"plan": path, "check_passes": True})
    before, inputs = None, wan_inputs()
    for step, found, arguments in steps_of(session, compiled(wan, fullgraph=True, session=session), inputs):
        (program,) = session.programs
        before = before or compile_counts()
        written, without = (
            distance(found, emulated_by(by_heads(int8))(program, plan, step, arguments, FRAMES))
            for int8 in (True, False)
        )
        if step in (0, 5):
            assert distance(found, call(wan, inputs, TIMES[step])) < 1e-5
        else:  # a number that is rounded the other way moves little; one in a wrong scale as much as all of them
            assert written < 0.1 * without and without > 1e-5, f"step {step}: {written:.2g}, without {without:.2g}"
    assert compile_counts() == before, "no graph break and no recompilation"
    assert program.bound is not None and program.statistics.unplanned_calls == program.statistics.cold_calls == 0
    assert len(program.variants.compiled) == len(program.bound.variants) == 2, "which heads have int8 is an input"
