"""What the profiler measures in rollouts, against the same thing done by hand on the module itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.profiler.ranges import SAMPLED, RangeProbe, candidate_spans
from ditopt.profiler.sensitivity import Tape, growth_factor, interpolate, plant_steps
from ditopt.runtime.program import Program
from tests.tiny import TinyDiT, compiled_tiny, make_model, prompt_features

STEPS = 6
SIGMAS = torch.linspace(1, 0, STEPS + 1)
CALLS = NetworkCalls(
    tuple(float(sigma) * 1000 for sigma in SIGMAS[:-1]), tuple((t, b) for t in range(STEPS) for b in range(2)), 2, False
)
GUIDANCE = 3.0


@torch.no_grad()
def generate(model: TinyDiT, replaced: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """A guided generation and its guided outputs; in step ``replaced`` both branches give what they gave before."""
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    cond, uncond = prompt_features("a"), prompt_features("")
    before: list[Tensor] = []
    guided = []
    for step, (now, then) in enumerate(pairwise(SIGMAS)):
        parts = before if step == replaced else [model(x, now[None] * 1000, text) for text in (cond, uncond)]
        before = parts
        guided.append(GUIDANCE * parts[0] + (1 - GUIDANCE) * parts[1])
        x = x + (then - now) * guided[-1]
    return x, guided


@pytest.fixture
def compiled() -> Iterator[tuple[TinyDiT, Program]]:
    with compiled_tiny(make_model(), generate) as found:
        yield found


def test_planted_rollouts_equal_a_loop_that_repeats_an_output(compiled: tuple[TinyDiT, Program]) -> None:
    model, program = compiled
    tape = Tape({"transformer": CALLS})
    program.observer = lambda seen: tape.record("transformer", seen)
    dense, _ = generate(model)
    program.observer = None
    for step in plant_steps(STEPS):
        ran = 0

        def count(*seen: object) -> None:
            nonlocal ran
            ran += 1

        tape.plant({"transformer": program}, "transformer", step)
        program.observer = count
        planted, _ = generate(model)
        program.observer = None
        tape.eject({"transformer": program})
        torch.testing.assert_close(planted, generate(model, replaced=step)[0], rtol=1e-5, atol=1e-6)
        assert float((planted - dense).norm()) > 1e-4
        assert ran == 2 * (STEPS - step - 1), "what comes before the plant is played back, not computed"
    torch.testing.assert_close(generate(model)[0], dense)


def test_a_plant_in_one_network_plays_back_the_other() -> None:
    first, second = (NetworkCalls((1.0, 0.5), ((0, 0), (1, 0)), 1, False) for _ in range(2))
    tape = Tape({"high": first, "low": second})
    tape.recorded = [("high", 0, 0, (10,)), ("high", 1, 0, (11,)), ("low", 0, 0, (20,)), ("low", 1, 0, (21,))]

    class Player:
        interceptor: Any = None

        def __call__(self) -> Any:
            return self.interceptor([], lambda arguments: "computed")

    players = {"high": Player(), "low": Player()}
    tape.plant(players, "low", 1)  # type: ignore[arg-type]  # only the attribute is used
    order = ("high", "high", "low", "low")
    assert [players[name]() for name in order] == [(10,), (11,), (20,), (20,)]
    tape.plant(players, "high", 1)  # type: ignore[arg-type]
    assert [players[name]() for name in order] == [(10,), (10,), "computed", "computed"]


def test_growth_factor_divides_by_what_was_planted() -> None:
    model = make_model()
    _, guided = generate(model)
    rows = torch.stack([g.flatten() for g in guided]).double()
    error = float((guided[2] - guided[1]).norm())
    found = growth_factor((rows @ rows.T).numpy(), 2, 0.25, 3.0)
    assert found == pytest.approx(3.0 / (0.25 * error), rel=1e-5)


def test_factors_are_interpolated_in_the_logarithm() -> None:
    found = interpolate(5, (0, 4), [[1.0, 16.0], [4.0, 64.0]])
    assert found == pytest.approx((2.0, 4.0, 8.0, 16.0, 32.0))


@torch.no_grad()
def test_range_weights_equal_reuse_by_hand(compiled: tuple[TinyDiT, Program]) -> None:
    model, program = compiled
    ranges = program.variants.trace.ranges()
    sites = {site: span for site, span in ranges.items() if span in candidate_spans(4)}
    assert {(0, 3), (1, 2), (0, 1), (2, 3)} <= set(sites.values())
    probe = RangeProbe(program, CALLS, (GUIDANCE, 1 - GUIDANCE), tuple(sites))
    program.observer = probe
    generate(model)
    program.observer = None
    weights = probe.weights()
    assert STEPS <= SAMPLED, "every step is weighed, none interpolated"
    for site, (first, last) in sites.items():
        for step, expected in enumerate(by_hand(first, last), start=1):
            assert weights[site][step] == pytest.approx(expected, rel=1e-3), (site, step)


def by_hand(first: int, last: int) -> list[float]:
    """Per step from 1 on, ``||guided output error|| / ||guided residual error||`` of reusing a range's residual."""
    model = make_model()
    edges: list[Tensor] = []
    swap: list[Tensor] = []

    def enter(block: object, args: tuple[Tensor, ...]) -> None:
        edges.append(args[0])

    def leave(block: object, args: object, out: Tensor) -> Tensor:
        edges.append(out)
        return edges[-2] + swap[0] if swap else out

    model.blocks[first].register_forward_pre_hook(enter)
    model.blocks[last].register_forward_hook(leave)
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    texts = (prompt_features("a"), prompt_features(""))
    shares = (GUIDANCE, 1 - GUIDANCE)
    before: list[Tensor] = []
    found = []
    for now, then in pairwise(SIGMAS):
        outs, residuals, moved = [], [], []
        for branch, text in enumerate(texts):
            edges.clear()
            outs.append(model(x, now[None] * 1000, text))
            residuals.append(edges[1] - edges[0])
            if before:
                swap.append(before[branch])
                moved.append(model(x, now[None] * 1000, text) - outs[-1])
                swap.clear()
        if before:
            apart = sum(share * m for share, m in zip(shares, moved, strict=True))
            error = sum(share * (b - r) for share, b, r in zip(shares, before, residuals, strict=True))
            found.append(float(apart.norm() / error.norm()))  # type: ignore[union-attr]
        before = residuals
        x = x + (then - now) * (shares[0] * outs[0] + shares[1] * outs[1])
    return found
