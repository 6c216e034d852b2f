"""Generations that are altered or observed while they are profiled, against the same loop by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.profiler.moves import Moves, second_order
from ditopt.profiler.observe import inputs_of, observed
from ditopt.runtime.program import Program
from tests.tiny import TinyDiT, compiled_tiny, make_model, prompt_features

SIGMAS = torch.linspace(1, 0, 8) ** 1.3
STEPS = len(SIGMAS) - 1
BEGINS = 2  # the first step with guidance
GUIDANCE = 3.0
CALLS = NetworkCalls(
    tuple(float(sigma) * 1000 for sigma in SIGMAS[:-1]),
    tuple((t, b) for t in range(STEPS) for b in range(2) if b == 0 or t >= BEGINS),
    2,
    False,
)


@torch.no_grad()
def generate(model: TinyDiT, *, second: bool = False) -> Tensor:
    """Euler with guidance from step `BEGINS` on; ``second``: by Adams and Bashforth where branches go on."""
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    texts = [prompt_features("a"), prompt_features("")]
    before: list[Tensor] = []
    for step, (now, then) in enumerate(pairwise(SIGMAS)):
        parts = [model(x, now[None] * 1000, text) for text in (texts if step >= BEGINS else texts[:1])]
        moved = parts
        if second and len(parts) == len(before):
            factor = (then - now) / (now - SIGMAS[step - 1]) / 2
            moved = [part + factor * (part - last) for part, last in zip(parts, before, strict=True)]
        before = parts
        guided = GUIDANCE * moved[0] + (1 - GUIDANCE) * moved[1] if len(moved) == 2 else moved[0]
        x = x + (then - now) * guided
    return x


@pytest.fixture
def compiled() -> Iterator[tuple[TinyDiT, Program]]:
    with compiled_tiny(make_model(), generate) as found:
        yield found


def evaluator_of(rollout: Any) -> Any:
    adapter = SimpleNamespace(checked_rollout=rollout, rollout=rollout)
    return SimpleNamespace(adapter=adapter, bind=lambda rules: None)


def euler_moves() -> Moves:
    return Moves(np.ones(STEPS), np.diff(SIGMAS.numpy()).astype(float), 0.0)


def test_altered_outputs_make_eulers_loop_a_second_order_one(compiled: tuple[TinyDiT, Program]) -> None:
    model, program = compiled
    expected = generate(make_model(), second=True)
    evaluator = evaluator_of(lambda prompt, seed: generate(model))
    shares = np.array(
        [[1.0] * BEGINS + [GUIDANCE] * (STEPS - BEGINS), [0.0] * BEGINS + [1 - GUIDANCE] * (STEPS - BEGINS)]
    )
    found = second_order(evaluator, program, CALLS, shares, euler_moves(), ("a", 3))
    torch.testing.assert_close(found.sample, expected, rtol=1e-4, atol=1e-5)
    ends = found.path.latents[-1] + float(SIGMAS[-1] - SIGMAS[-2]) * found.path.outputs[-1]
    torch.testing.assert_close(ends, expected.flatten(), rtol=1e-4, atol=1e-4)
    assert program.interceptor is None
    torch.testing.assert_close(generate(model), generate(make_model()), rtol=1e-4, atol=1e-5)


def test_nothing_stays_behind_when_a_generation_fails(compiled: tuple[TinyDiT, Program]) -> None:
    model, program = compiled

    def fails(prompt: str, seed: int) -> Tensor:
        generate(model)
        raise RuntimeError("in the loop")

    shares = np.ones((2, STEPS))
    with pytest.raises(RuntimeError, match="in the loop"):
        second_order(evaluator_of(fails), program, CALLS, shares, euler_moves(), ("a", 3))
    with pytest.raises(RuntimeError, match="in the loop"):
        observed(evaluator_of(fails), ("a", 3), [(program, lambda seen: None)])
    assert program.interceptor is None and program.observer is None


def test_inputs_are_those_of_the_first_call(compiled: tuple[TinyDiT, Program]) -> None:
    model, program = compiled
    calls: list[int] = []

    def rollout(prompt: str, seed: int) -> Tensor:
        calls.append(1)
        return generate(model)

    (inputs,) = inputs_of(evaluator_of(rollout), ("a", 3), [program])
    noise = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    assert any(isinstance(value, Tensor) and torch.equal(value, noise) for value in inputs)
    assert calls == [1] and program.observer is None
