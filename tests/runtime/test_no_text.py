"""Prompts of no length: the models' own numbers, or a clear error, under plans with sparse heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ditopt.backend import Session
from ditopt.geometry import Geometry
from ditopt.plan import Rule
from ditopt.runtime.sparse import places_of
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    call,
    distance,
    emulated,
    joint,
    plan_of,
    rule,
    sparse,
    steps_of,
    wan_inputs,
)
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import capture, compiled, interpreted

pytest.importorskip("diffusers")


def structure_of(model: nn.Module, inputs: dict[str, Any]) -> str:
    found: str = capture(model, inputs).program.variants.trace.structure
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("text", [0, 6])
def test_joint_attention_to_the_picture_alone(text: int) -> None:
    """Where the plan says that there is none, and where it says that there is some."""
    model, inputs, geometry = joint("Flux")
    inputs |= {name: inputs[name][..., :0, :] for name in ("encoder_hidden_states", "txt_ids")}
    alone = Geometry(*geometry.sizes)
    rules = (
        rule("*", "1-4", sparse("temporal", rows=1, columns=1), "0"),
        rule("*", "2-3", sparse("spatial"), "1"),
        rule("*", "4", sparse("skip"), "1"),
    )
    with interpreted():
        told = alone if text == 0 else geometry
        session = Session(plan=plan_of(structure_of(model, inputs), *rules, tokens=told), check_passes=True)
        for step, found, arguments in steps_of(session, compiled(model, session=session), inputs):
            (program,) = session.programs
            assert session.plan is not None
            torch.testing.assert_close(
                found, emulated(program, session.plan, step, arguments, alone), rtol=1e-4, atol=1e-5
            )
            assert (distance(found, call(model, inputs, TIMES[step])) > 1e-4) == (1 <= step <= 4)
    places = places_of(program.variants.trace).values()
    assert {place.site.keys for place in places} == {256} and program.statistics.cold_calls == 0


@pytest.mark.parametrize(
    "of_text",
    [
        (),
        (rule("blocks.*.attn2", "2-4", sparse("skip")),),
        (rule("blocks.*.attn2", "2-4", sparse("dense")),),
        (rule("blocks.*.attn2", "2-4", sparse("dense", qk="int8")),),
    ],
    ids=["dense", "skip", "all", "int8"],
)
def test_cross_attention_to_no_text(wan: nn.Module, of_text: tuple[Rule, ...]) -> None:
    """Which gives zero, as torch's attention to no key does, whatever its heads are to do."""
    inputs, heads = wan_inputs(text=0), rule("blocks.*.attn1", "1-3", sparse("spatial"), "0")
    with interpreted():
        plan = plan_of(structure_of(wan, inputs), heads, *of_text)
        session = Session(plan=plan, check_passes=True)
        for step, found, arguments in steps_of(session, compiled(wan, session=session), inputs):
            (program,) = session.programs
            heads_alone = plan_of(plan.model.structure, heads)
            expected = emulated(program, heads_alone, step, arguments, FRAMES)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert found.isfinite().all()
            assert (distance(found, call(wan, inputs, TIMES[step])) > 1e-4) == (1 <= step <= 3)
    assert program.bound is not None and program.bound.refused is None
    assert {place.site.keys for place in places_of(program.variants.trace).values()} == {0, FRAMES.tokens}
    notes = [note for note in program.variants.reasons if note.startswith("blocks.0.attn2: patterns that keep every")]
    assert len(notes) == bool(of_text), "a decision that comes to nothing is told"
