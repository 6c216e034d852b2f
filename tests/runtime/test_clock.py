"""StepClock and read_timestep on plain values, and on the timesteps that real diffusers schedulers hand out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditopt.errors import PlanError, PlanMismatchError
from ditopt.runtime.clock import ScheduleCache, StepClock, Tick, read_timestep

# diffusers hands numpy arrays of tensors around in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

SCHEDULERS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "HeunDiscreteScheduler": {},
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "LCMScheduler": {},
}


def make_scheduler(name: str, steps: int) -> Any:
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    scheduler.set_timesteps(steps)
    return scheduler


def generate(scheduler: Any, clock: StepClock, start: int = 0, stop: int | None = None) -> list[Tick]:
    """A sampling loop as pipelines write it, from evaluation ``start`` to before ``stop``; the tick of each call."""
    latents, ticks = torch.ones(1, 4, 4, 4), []
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for timestep in scheduler.timesteps[start:stop]:
        ticks.append(clock.tick(read_timestep(timestep.expand(2))))
        latents = scheduler.step(0.1 * latents, timestep, latents, return_dict=False)[0]
    return ticks


def steps_of(ticks: Sequence[Tick]) -> list[int | None]:
    return [tick.step for tick in ticks]


def fresh_of(ticks: Sequence[Tick]) -> list[int]:
    return [index for index, tick in enumerate(ticks) if tick.fresh]


@pytest.mark.parametrize("name", SCHEDULERS)
class TestRealSchedulers:
    def test_numbers_every_evaluation(self, name: str) -> None:
        recorded = make_scheduler(name, 8).timesteps.tolist()
        clock = StepClock(recorded)
        for _ in range(2):
            ticks = generate(make_scheduler(name, 8), clock)
            assert steps_of(ticks) == list(range(len(recorded)))
            assert fresh_of(ticks) == [0]
        assert len(recorded) == (15 if "Heun" in name else 8)

    def test_image_to_image_starts_in_the_middle(self, name: str) -> None:
        scheduler = make_scheduler(name, 8)
        start = 3 * scheduler.order
        recorded = scheduler.timesteps.tolist()
        clock = StepClock(recorded)
        for _ in range(2):
            ticks = generate(make_scheduler(name, 8), clock, start)
            assert steps_of(ticks) == list(range(start, len(recorded)))
            assert fresh_of(ticks) == [0]

    def test_aborted_then_restarted(self, name: str) -> None:
        recorded = make_scheduler(name, 8).timesteps.tolist()
        clock = StepClock(recorded)
        for stop in (1, 4, len(recorded)):
            ticks = generate(make_scheduler(name, 8), clock, stop=stop)
            assert steps_of(ticks) == list(range(stop))
            assert fresh_of(ticks) == [0]

    def test_other_step_count_is_reported(self, name: str) -> None:
        recorded = make_scheduler(name, 8).timesteps.tolist()
        other = make_scheduler(name, 11)
        ticks = generate(other, StepClock(recorded))
        for tick, value in zip(ticks, other.timesteps.tolist(), strict=True):
            known = [index for index, planned in enumerate(recorded) if math.isclose(planned, value, abs_tol=1e-3)]
            rounded = [i for i, t in enumerate(recorded) if abs(t - value) < 2**-10 * max(t, value)]
            if tick.step is None:
                assert not known
                assert f"{value:.9g}" in tick.reason and "nearest is" in tick.reason
            else:
                assert tick.step in (known or rounded)
        assert sum(tick.step is None for tick in ticks) >= 6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1.0, 1000.0])
    def test_rounded_and_normalised(self, name: str, dtype: torch.dtype, scale: float) -> None:
        scheduler = make_scheduler(name, 20)
        recorded = (scheduler.timesteps / scale).tolist()
        clock = StepClock(recorded)
        ticks = [clock.tick(read_timestep((t.expand(2) / scale).to(dtype))) for t in scheduler.timesteps]
        assert steps_of(ticks) == list(range(len(recorded)))
        assert fresh_of(ticks) == [0]


def test_thousand_steps_that_collide_in_bfloat16() -> None:
    values = [1000.0 - index for index in range(1000)]
    assert len(set(torch.tensor(values).bfloat16().tolist())) < 700
    clock = StepClock(values)
    for _ in range(2):
        ticks = [clock.tick(value) for value in torch.tensor(values).bfloat16().tolist()]
        assert steps_of(ticks) == list(range(1000))
        assert fresh_of(ticks) == [0]


def test_plan_recorded_in_bfloat16_and_collided() -> None:
    values = torch.arange(1000.0, 900.0, -1.0).bfloat16().tolist()
    clock = StepClock(values)
    for _ in range(2):
        ticks = [clock.tick(value) for value in values]
        assert steps_of(ticks) == list(range(100)) and fresh_of(ticks) == [0]


def test_full_precision_neighbours_are_not_mixed_up() -> None:
    clock = StepClock([980.3, 960.0, 940.0])
    assert clock.tick(980.1).step is None
    assert clock.tick(980.3).step == 0
    assert StepClock([999, 998, 997, 996]).tick(996).step == 3


class TestRestartAmbiguity:
    """A value that is both the expected one and the first: goes on, unless the schedule is used up."""

    def test_one_step(self) -> None:
        clock = StepClock([500.0])
        assert [clock.tick(500.0) for _ in range(3)] == [Tick(0, True, "first step of a generation")] * 3

    def test_first_value_repeated(self) -> None:
        clock = StepClock([9.0, 9.0, 5.0])
        ticks = [clock.tick(value) for value in (9, 9, 5, 9, 9, 5)]
        assert steps_of(ticks) == [0, 1, 2, 0, 1, 2]
        assert fresh_of(ticks) == [0, 3]

    def test_aborted_after_the_first_of_two_repeats_heals(self) -> None:
        clock = StepClock([9.0, 9.0, 5.0])
        ticks = [clock.tick(value) for value in (9, 9, 9, 5)]
        assert steps_of(ticks) == [0, 1, 0, 2]
        assert fresh_of(ticks) == [0, 2]
        assert ticks[3].skipped == 1

    def test_constant_schedule(self) -> None:
        clock = StepClock([7.0, 7.0, 7.0])
        ticks = [clock.tick(7.0) for _ in range(7)]
        assert steps_of(ticks) == [0, 1, 2, 0, 1, 2, 0]
        assert fresh_of(ticks) == [0, 3, 6]

    def test_repeat_of_a_middle_step_never_continues(self) -> None:
        clock = StepClock([9.0, 7.0, 5.0])
        ticks = [clock.tick(value) for value in (9, 7, 7, 5)]
        assert steps_of(ticks) == [0, 1, 1, 2]
        assert fresh_of(ticks) == [0, 2]
        assert "stopped ahead of step 2" in ticks[2].reason


def test_jump_forward_is_not_fresh_and_says_so() -> None:
    clock = StepClock([9, 8, 7, 6, 5])
    clock.tick(9)
    assert clock.tick(6) == Tick(3, False, "jumped from step 1 to step 3", 2)
    assert clock.expected == 4
    assert clock.tick(5) == Tick(4, False, "next step")
    assert clock.expected is None


def test_schedule_that_goes_back_and_forth() -> None:
    values = [9, 7, 8, 6, 7, 5]
    clock = StepClock(values)
    for _ in range(2):
        ticks = [clock.tick(value) for value in values]
        assert steps_of(ticks) == list(range(6)) and fresh_of(ticks) == [0]


def test_rising_schedule() -> None:
    clock = StepClock([0.0, 0.25, 0.5, 0.75])
    assert [clock.tick(v).step for v in (0.0, 0.25, 0.3, 0.5)] == [0, 1, None, 2]
    assert clock.tick(0.1).step is None
    assert clock.tick(0.75).fresh


def test_unknown_value_names_it_and_the_nearest() -> None:
    clock = StepClock([1000.0, 750.0, 500.0])
    tick = clock.tick(740.5)
    assert (tick.step, tick.fresh) == (None, False)
    assert "740.5" in tick.reason and "750 (step 1)" in tick.reason and "step count" in tick.reason
    assert clock.tick(float("nan")).step is None
    assert clock.tick(float("inf")).step is None


def test_unknown_value_in_between_changes_nothing() -> None:
    clock = StepClock([9, 8, 7])
    ticks = [clock.tick(value) for value in (9, 8.5, 8, 7.5, 7)]
    assert steps_of(ticks) == [0, None, 1, None, 2] and fresh_of(ticks) == [0]


def test_generation_of_another_schedule_never_continues_an_aborted_one() -> None:
    clock = StepClock([9, 8, 7, 6])
    clock.tick(9)
    clock.tick(8)
    assert clock.tick(9.5).step is None
    assert clock.tick(7) == Tick(2, True, "first step of a generation, which starts at step 2 of 4")


def test_reset() -> None:
    clock = StepClock([9, 8, 7])
    clock.tick(9)
    clock.reset()
    assert clock.tick(8).fresh


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bad_schedules(values: list[float]) -> None:
    with pytest.raises(PlanError, match="timestep"):
        StepClock(values)


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40, unique=True),
    st.lists(st.integers(1, 40), max_size=5),
)
def test_any_falling_schedule_with_any_aborts(values: list[int], stops: list[int]) -> None:
    values.sort(reverse=True)
    clock = StepClock(values)
    for stop in stops:
        ticks = [clock.tick(value) for value in values[:stop]]
        assert steps_of(ticks) == list(range(len(ticks))) and fresh_of(ticks) == [0]


class TestReadTimestep:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
    @pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (1, 1)])
    def test_shapes_and_dtypes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        assert read_timestep(torch.full(shape, 500, dtype=dtype)) == 500.0
        assert read_timestep(torch.tensor(500, dtype=dtype).expand(shape)) == 500.0

    def test_numbers(self) -> None:
        assert read_timestep(7) == 7.0
        assert read_timestep(0.25) == 0.25

    def test_requires_grad(self) -> None:
        assert read_timestep(torch.full((2,), 0.5, requires_grad=True)) == 0.5

    def test_wan_expanded_timesteps(self) -> None:
        per_token = (torch.ones(12) * torch.tensor(900.0)).unsqueeze(0).expand(2, -1)
        assert read_timestep(per_token) == 900.0

    def test_different_values(self) -> None:
        with pytest.raises(PlanMismatchError, match=r"shape \[2\] holds different values in one call \(250 to 500\)"):
            read_timestep(torch.tensor([500.0, 250.0]))
        with pytest.raises(PlanMismatchError, match=r"\[2, 3\]"):
            read_timestep(torch.tensor([0.0, 900.0, 900.0]).unsqueeze(0).expand(2, -1))

    def test_empty(self) -> None:
        with pytest.raises(PlanMismatchError, match="no elements"):
            read_timestep(torch.empty(0))


class TestScheduleCache:
    def test_views_are_read_once_per_schedule(self) -> None:
        cache = ScheduleCache()
        for name in ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"):
            timesteps = make_scheduler(name, 6).timesteps
            for index, timestep in enumerate(timesteps):
                for view in (timestep, timestep.expand(3), timesteps[index], timestep[None], timestep.expand(2, 5)):
                    assert cache.value(view) == float(timesteps[index])
            assert [cache.value(t) for t in timesteps[2:]] == timesteps[2:].tolist()
        assert cache.reads == 2

    def test_computed_timesteps_are_not_known(self) -> None:
        timesteps = torch.linspace(1000, 10, 8)
        cache = ScheduleCache()
        for tensor in (timesteps[1] / 1000, timesteps[1].bfloat16(), torch.full((2,), 5.0), timesteps, timesteps[:2]):
            assert cache.value(tensor) is None
        assert cache.value(torch.zeros(100_000)[3]) is None
        with torch.inference_mode():
            assert cache.value(torch.arange(4.0)[1]) is None
        assert cache.reads == 0

    def test_written_schedule_is_read_again(self) -> None:
        timesteps = torch.linspace(1000, 10, 8)
        cache = ScheduleCache()
        assert cache.value(timesteps[7]) == 10.0
        timesteps[7] = 20.0
        assert cache.value(timesteps[7]) == 20.0
        assert cache.reads == 2

    def test_address_of_a_dead_schedule_is_not_mistaken(self) -> None:
        cache = ScheduleCache(limit=3)
        for start in range(20):  # of a size for which the allocator gives the last address out again
            timesteps = torch.arange(start, start + 6000, dtype=torch.float32)
            assert cache.value(timesteps[7]) == start + 7
            del timesteps
        assert cache.reads == 20
