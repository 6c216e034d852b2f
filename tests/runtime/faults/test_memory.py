"""What slots take is known before a plan runs, goes at the last reader, and does not grow with generations."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditopt.decisions import Fit, Forecast, Reuse
from ditopt.errors import StateError
from ditopt.plan import Rule
from ditopt.runtime.clock import StepClock
from ditopt.runtime.slots import StreamState
from ditopt.runtime.state_bytes import planned_bytes, slot_bytes
from ditopt.sites import STEP
from tests.runtime.faults.bench import RULES, SHAPE, Bench, bench_of, embeds, noise, wan
from tests.runtime.test_sparse import TIMES

pytest.importorskip("diffusers")

FIT = Fit(history=2, coefficients={4: (1.5, -0.5), 5: (1.6, -0.6)}, sources={4: (3, 2), 5: (3, 2)})
PLANS: dict[str, tuple[Rule, ...]] = {
    "all kinds": RULES,
    "reuse": (Rule(sites=STEP, steps=(2, 3, 5), do=Reuse()),),
    "order 2": (Rule(sites=STEP, steps=(3, 5), do=Forecast(order=2)),),
    "fit": (Rule(sites=STEP, steps=(4, 5), do=FIT),),
    "ranges": (
        Rule(sites="blocks.0", steps=(2, 4), do=Forecast()),
        Rule(sites="blocks.1", steps=(3, 5), do=Reuse()),
    ),
    "nothing": (),
}


@pytest.fixture(scope="module")
def captured() -> Iterator[Bench]:
    with bench_of(wan(), *RULES) as found:
        yield found


@pytest.fixture(params=PLANS)
def bench(captured: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    plan, rules = captured.plan, PLANS[request.param]
    captured.plan = plan.model_copy(update={"rules": rules})
    captured.fresh()
    yield captured
    captured.plan = plan


def held(bench: Bench) -> int:
    return sum(state.held_bytes for state in bench.program._states)


@pytest.mark.parametrize("branches", [1, 2])
def test_the_peak_is_predicted_and_what_nobody_reads_is_freed(branches: int, bench: Bench) -> None:
    loop = bench.loop(embeds(), schedule=torch.tensor(TIMES), other=embeds(2) if branches == 2 else None)
    bound = bench.program.bound
    sizes = {} if bound is None else slot_bytes(bench.program.variants, bound)
    for step in range(len(TIMES)):
        loop.step()
        live = [] if bound is None else [sizes[name] for name, of in bound.steps[step].live if of <= step]
        assert held(bench) == branches * sum(live), "exactly what later steps read is held"
    assert held(bench) == 0
    predicted = 0 if bound is None else planned_bytes(bench.program.variants, bound, branches)
    measured = bench.program.statistics.peak_slot_bytes
    assert 0.9 * measured <= predicted <= 1.1 * measured


def test_reading_what_is_not_there_is_an_error() -> None:
    state = StreamState(StepClock(TIMES))
    with pytest.raises(StateError, match=r"slot step of step 2 is read, but is not there: .* held are none"):
        state.read(STEP, 2)
    for step in range(3):
        state.store(STEP, step, TIMES[step] / 1000, [torch.ones(2)])
    assert state.read(STEP, 1).step == 1
    state.retain_newest(1, [STEP])
    with pytest.raises(StateError, match=r"slot step of step 1 is read, but is not there: .* held are 2"):
        state.read(STEP, 1)


def test_a_slot_that_goes_too_early_is_an_error_and_not_computed_in_silence(captured: Bench) -> None:
    captured.fresh()
    loop = captured.loop(embeds(), schedule=torch.tensor(TIMES))
    loop.run(3)
    (state,) = captured.program._states
    state.retain_newest(1, [STEP])
    with pytest.raises(StateError, match="step 3 of the plan reads a slot that is not held, though all steps before"):
        loop.step()


def test_a_thousand_generations_leave_nothing(captured: Bench) -> None:
    """Of one prompt that lives on; some given up, some begun later, each with its own schedule, as pipelines do."""
    captured.fresh("retarget")
    prompt, sizes, counts = embeds(), [], []
    program = captured.program
    run = program._run

    def quick(variant: object, arguments: list[object], added: dict[str, Tensor]) -> object:
        """What steps hand on, without the network."""
        features = {name: (torch.zeros(64), torch.zeros(64))[:count] for name, count in variant.recorded}  # type: ignore[attr-defined]
        return [torch.zeros(SHAPE)], features

    program._run = quick  # type: ignore[method-assign,assignment]
    try:
        tracemalloc.start()
        latents = noise()
        for number in range(1000):
            times = [time - 1e-3 * number for time in TIMES]
            loop = captured.loop(prompt, latents, start=number % 3, times=times)
            loop.run(1 + number % 3)
            del loop
            if number in (199, 999):
                gc.collect()
                here = tracemalloc.take_snapshot().filter_traces(
                    [tracemalloc.Filter(True, str(Path(__file__).parents[3] / "ditopt" / "*"))]
                )
                sizes.append(sum(trace.size for trace in here.traces))
                counts.append((len(list(program._states)), held(captured), len(program._streams.live())))
    finally:
        tracemalloc.stop()
        program._run = run  # type: ignore[method-assign]
        captured.fresh()
    assert counts[0] == counts[1] == (0, 0, 0)
    assert sizes[1] < sizes[0] + 16 * 1024
