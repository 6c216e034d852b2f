"""Errors planted at modules, in single calls and in rollouts, against the same thing done by hooks on the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.measures import Table, joined
from ditopt.profile import FeatureGram, NetworkProfile
from ditopt.profiler.call_plants import NOISE, CallPlants, chosen_modules, noisy
from ditopt.profiler.interpret import WatchedCalls
from ditopt.profiler.rollout_plants import Plant, RolloutPlant, plants
from ditopt.profiler.site_sensitivity import Planted, compared, rollouts_table
from ditopt.runtime.program import Program
from ditopt.search.heads import correction, output_growth
from tests.tiny import Silent, TinyDiT, compiled_tiny, make_model, prompt_features

STEPS = 10
SIGMAS = torch.linspace(1, 0, STEPS + 1)
CALLS = NetworkCalls(tuple(float(s) * 1000 for s in SIGMAS[:-1]), tuple((t, 0) for t in range(STEPS)), 1, False)


@torch.no_grad()
def generate(model: TinyDiT) -> tuple[Tensor, list[Tensor]]:
    """A generation and the network's outputs."""
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    outputs = []
    for now, then in pairwise(SIGMAS):
        outputs.append(model(x, now[None] * 1000, prompt_features("a")).clone())
        x = x + (then - now) * outputs[-1]
    return x, outputs


@pytest.fixture(scope="module")
def compiled() -> Iterator[tuple[TinyDiT, Program]]:
    with compiled_tiny(make_model(), generate) as found:
        yield found


def test_the_modules_of_a_stack_are_found_and_errors_of_the_drawn_size_are_planted(
    compiled: tuple[TinyDiT, Program],
) -> None:
    found = chosen_modules(compiled[1].variants.trace, CALLS)
    assert [module.site for module in found if module.kind == "mlp"] == [f"blocks.{i}.mlp" for i in range(4)]
    assert {f"blocks.{i}" for i in range(4)} <= {module.site for module in found}, "attention in the block itself"
    value = torch.randn(1, 500, 8) * torch.arange(1.0, 9.0)
    noise = noisy(3)((), value) - value
    assert torch.equal(noisy(3)((), value), noisy(3)((), value))
    assert noise.square().mean((0, 1)).sqrt() == pytest.approx((NOISE * torch.arange(1.0, 9.0)).numpy(), rel=0.15)


def test_an_error_in_a_call_is_measured_as_a_hook_on_the_module_has_it(compiled: tuple[TinyDiT, Program]) -> None:
    model, program = compiled
    planting = CallPlants(program.variants.trace, CALLS, Silent())
    program.interceptor = planting
    inputs: list[tuple[Any, ...]] = []
    try:
        generate(model)
    finally:
        program.interceptor = None
    step = planting.steps[-1]
    plain = make_model()
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for number, (now, then) in enumerate(pairwise(SIGMAS)):
            inputs.append((x, now[None] * 1000, prompt_features("a")))
            if number == step:
                break
            x = x + (then - now) * plain(*inputs[-1])
    for position, module in enumerate(planting.modules):
        if module.kind == "self":
            continue  # it is in no module that a hook could be on
        planted: list[Tensor] = []

        def plant(_: Any, __: Any, out: Tensor, seed: int = 1000 * step + position, into: Any = planted) -> Tensor:
            into.append(noisy(seed)((), out) - out)
            planted_output: Tensor = out + into[-1]
            return planted_output

        with torch.no_grad():
            dense = plain(*inputs[-1])
            handle = plain.get_submodule(module.site).register_forward_hook(plant)
            moved = plain(*inputs[-1]) - dense
            handle.remove()
        expected = float(moved.norm() / planted[0].norm())
        (measured,) = planting.found[module.site, 0, "noise", step]
        assert measured == pytest.approx(expected, rel=1e-3), module.site


def test_a_rollout_with_a_plant_is_that_of_a_model_whose_module_repeats_its_output(
    compiled: tuple[TinyDiT, Program],
) -> None:
    model, program = compiled
    dense, outputs = generate(model)
    module = next(m for m in chosen_modules(program.variants.trace, CALLS) if m.site == "blocks.2.mlp")
    plant = Plant(module, 4, "reuse")
    planting = RolloutPlant(program.variants.trace, CALLS, [(out,) for out in outputs], plant)
    program.interceptor = planting
    try:
        sample, _ = generate(model)
    finally:
        program.interceptor = None
    plain, seen = make_model(), list[Tensor]()

    def repeat(_: Any, __: Any, out: Tensor) -> Tensor:
        seen.append(out)
        return seen[3] if len(seen) == 5 else out

    plain.blocks[2].mlp.register_forward_hook(repeat)  # type: ignore[union-attr]  # it is a module
    expected, _ = generate(plain)
    assert (sample - expected).norm() < 1e-4 * (expected - dense).norm() + 1e-5
    assert planting.errors[0] == pytest.approx(float((seen[4] - seen[3]).norm()), rel=1e-3)


def test_nine_plants_are_in_every_depth_and_phase(compiled: tuple[TinyDiT, Program]) -> None:
    found = plants(chosen_modules(compiled[1].variants.trace, CALLS), STEPS)
    assert len(found) == 9
    assert len({plant.step for plant in found}) == 3
    for kind in {plant.module.kind for plant in found}:
        assert {plant.error for plant in found if plant.module.kind == kind} == {"noise", "reuse"}, kind
    assert len({plant.module.site.split(".")[1] for plant in found}) == 3


def test_predictions_of_plants_and_their_spread() -> None:
    gram = FeatureGram("step", 4, ("all",), np.ones((1, 4, 4)), np.ones((1, 4), dtype=bool))
    network = NetworkProfile(
        (4.0, 3.0, 2.0, 1.0), (1.0, 0.75, 0.5, 0.25), (0.25,) * 4, (2.0,) * 4, (1.0,), {"step": gram}
    )
    from ditopt.components import Module
    from ditopt.measures import Measure

    growth = Measure(("anchor", "error"), np.array([[1.0, 1.0], [4.0, 4.0]]))
    table = Table({"to_output": growth}, {"anchor": (0, 2), "error": ("noise", "head")})
    assert output_growth(table, 1, "noise") == pytest.approx(2.0)
    rows = [
        (Plant(Module("m", "mlp", None), step, "noise"), moved, [3.0])  # type: ignore[arg-type]  # no graph is needed
        for step, moved in ((0, 3.0), (2, 24.0))
    ]
    found = rollouts_table(network, {"m": table}, rows)
    assert found["predicted"].values[0].tolist() == pytest.approx([1.5, 6.0])
    scale, spread = correction(found)
    assert scale == pytest.approx(np.sqrt(2 * 4)) and spread == pytest.approx(np.log(2) / np.sqrt(2))
    assert correction(found, "noise") == (scale, spread)
    of_another = compared([Planted(str(name), "noise", 2.0, 1.0) for name in found.labels["plant"]])
    assert correction(joined([found, of_another]))[0] == pytest.approx((2 * 4 * 2 * 2) ** 0.25), "every prompt counts"
    kinds = compared(
        [Planted("a", "noise", 2.0, 1.0), Planted("b", "reuse", 9.0, 3.0), Planted("c", "noise", 1.0, 1.0)]
    )
    assert correction(kinds, "reuse")[0] == pytest.approx(3.0) and np.isnan(correction(kinds, "reuse")[1])
    assert correction(kinds, "noise") == pytest.approx((2**0.5, np.log(2) / 2**0.5))


def test_more_calls_than_recorded_are_an_error(compiled: tuple[TinyDiT, Program]) -> None:
    from ditopt.errors import RolloutError

    model, program = compiled
    program.interceptor = WatchedCalls(
        program.variants.trace, NetworkCalls(CALLS.timesteps[:2], ((0, 0), (1, 0)), 1, False)
    )
    try:
        with pytest.raises(RolloutError, match="more often"):
            generate(model)
    finally:
        program.interceptor = None
