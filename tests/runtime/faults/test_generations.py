"""Faults in the order of calls: generations that interleave, end early, begin late, or run in threads.

Each equals, bit for bit, the same generation where nothing was before and nothing is beside it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ditopt
from ditopt.errors import PlanMismatchError
from ditopt.runtime.variants import Variant
from tests.runtime.faults.bench import RULES, Bench, bench_of, embeds, noise, wan
from tests.runtime.test_sparse import TIMES

pytest.importorskip("diffusers")

Pairs = list[tuple[Tensor, Tensor]]
Case = Callable[[Bench, bool], Pairs]
VISIBLE = "timesteps are views of a schedule"
HIDDEN = "timesteps are made for each call"


@pytest.fixture(scope="module")
def captured() -> Iterator[Bench]:
    with bench_of(wan(), *RULES) as found:
        yield found


@pytest.fixture
def bench(captured: Bench) -> Bench:
    captured.fresh()
    return captured


def interleaved(bench: Bench, hidden: bool, prompts: Sequence[Tensor], order: Sequence[int], shared: bool) -> Pairs:
    """Generations with ``prompts``, a step of one at a time in the ``order`` given; they may have one schedule."""
    expected = [bench.alone(prompt, seed, hidden=hidden) for seed, prompt in enumerate(prompts)]
    schedule = torch.tensor(TIMES) if shared else None
    loops = [bench.loop(prompt, seed, hidden=hidden, schedule=schedule) for seed, prompt in enumerate(prompts)]
    for which in order:
        loops[which].step()
    assert bench.cold == 0
    return [(loop.latents, each) for loop, each in zip(loops, expected, strict=True)]


IN_TURN = [0, 1] * 6
IN_PAIRS = [0, 0, 1, 1] * 3
LATE = [0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1]


def of_one_prompt(order: Sequence[int], shared: bool) -> Case:
    def case(bench: Bench, hidden: bool) -> Pairs:
        prompt = embeds()
        return interleaved(bench, hidden, [prompt, prompt], order, shared)

    return case


def of_two_prompts(bench: Bench, hidden: bool) -> Pairs:
    return interleaved(bench, hidden, [embeds(1), embeds(2)], LATE, shared=True)


def of_three(bench: Bench, hidden: bool) -> Pairs:
    prompt = embeds()
    return interleaved(bench, hidden, [prompt, embeds(2), prompt], [0, 1, 2] * 6, shared=True)


def given_up(at: int, start: int, same_prompt: bool, error: type[BaseException] | None = None) -> Case:
    """A generation ends before step ``at``; the next begins at ``start``."""

    def case(bench: Bench, hidden: bool) -> Pairs:
        prompt = embeds()
        second = prompt if same_prompt else embeds(2)
        expected = bench.alone(second, 5, start=start, hidden=hidden)
        if error is None:
            bench.loop(prompt, hidden=hidden).run(at)
        else:
            loop = broken_in(bench, at, error).loop(prompt, hidden=hidden)
            with pytest.raises(error):
                loop.run()
        if hidden and same_prompt and start == at:  # no call tells
            with ditopt.Generation():
                return [(bench.loop(second, 5, start=start, hidden=hidden).run(), expected)]
        return [(bench.loop(second, 5, start=start, hidden=hidden).run(), expected)]

    return case


def broken_in(bench: Bench, at: int, error: type[BaseException]) -> Bench:
    """The network's call number ``at`` is interrupted when half of it is done."""
    run, calls = bench.program._run, iter(range(at + 1))

    def broken(variant: Variant, *given: Any) -> Any:
        if next(calls) < at:
            return run(variant, *given)
        del bench.program._run  # the method comes back
        raise error

    bench.program._run = broken  # type: ignore[method-assign,assignment]
    return bench


def made_again(bench: Bench, hidden: bool) -> Pairs:
    """The interrupted call is made again: from there on it is as a generation that begins there."""
    prompt = embeds()
    first = bench.alone(prompt, steps=2, hidden=hidden)
    expected = bench.alone(prompt, first, start=2, hidden=hidden)
    loop = broken_in(bench, 2, RuntimeError).loop(prompt, hidden=hidden)
    with pytest.raises(RuntimeError):
        loop.run()
    return [(loop.run(), expected)]


def one_after_another(bench: Bench, hidden: bool) -> Pairs:
    prompt = embeds()
    expected = [bench.alone(prompt, seed, hidden=hidden) for seed in range(3)]
    return [(bench.loop(prompt, seed, hidden=hidden).run(), expected[seed]) for seed in range(3)]


def paused(bench: Bench, hidden: bool) -> Pairs:
    """A generation that goes on later, behind others, is the same one."""
    prompt = embeds()
    expected = bench.alone(prompt, hidden=hidden)
    loop = bench.loop(prompt, hidden=hidden)
    loop.run(2)
    bench.loop(embeds(2), 3, hidden=hidden).run()
    bench.loop(prompt, 4, hidden=hidden).run(1)
    return [(loop.run(), expected)]


def with_a_hole(bench: Bench, hidden: bool) -> Pairs:
    """Steps 0, 1, 4 and 5: what was before the hole is not read behind it."""
    times = (*TIMES[:2], *TIMES[4:])
    expected = bench.alone(embeds(), hidden=hidden, start=2, latents=noise(7), times=times)
    loop = bench.loop(embeds(), noise(3), hidden=hidden, times=times)
    loop.run(2)
    loop.latents = noise(7)
    return [(loop.run(), expected)]


def from_one_schedule(start: int) -> Case:
    """A loop sets its timesteps once for two generations, of which the second begins further on."""

    def case(bench: Bench, hidden: bool) -> Pairs:
        prompt, schedule = embeds(), torch.tensor(TIMES)
        expected = bench.alone(prompt, 5, start=start, hidden=hidden)
        bench.loop(prompt, hidden=hidden, schedule=schedule).run(2)
        return [(bench.loop(prompt, 5, start=start, hidden=hidden, schedule=schedule).run(), expected)]

    return case


def truncated(bench: Bench, hidden: bool) -> Pairs:
    prompt = embeds()
    short = bench.alone(prompt, 2, steps=4, hidden=hidden)
    expected = bench.alone(prompt, 3, hidden=hidden)
    found = bench.loop(prompt, 2, hidden=hidden).run(4)
    return [(found, short), (bench.loop(prompt, 3, hidden=hidden).run(), expected)]


CASES: dict[str, Case] = {
    "two of one prompt and schedule in turn": of_one_prompt(IN_TURN, shared=True),
    "two of one prompt and schedule in pairs of steps": of_one_prompt(IN_PAIRS, shared=True),
    "two of one prompt, one of them late": of_one_prompt(LATE, shared=True),
    "two of one prompt with schedules of their own": of_one_prompt(IN_TURN, shared=False),
    "two prompts, one of them late": of_two_prompts,
    "three, two of them of one prompt": of_three,
    "one after another": one_after_another,
    "paused behind others": paused,
    "given up, begun at the start, same prompt": given_up(3, 0, same_prompt=True),
    "given up, begun at the start, other prompt": given_up(3, 0, same_prompt=False),
    "given up, begun exactly at the next step, same prompt": given_up(2, 2, same_prompt=True),
    "given up, begun exactly at the next step, other prompt": given_up(2, 2, same_prompt=False),
    "given up, begun further on, same prompt": given_up(2, 4, same_prompt=True),
    "given up, begun before, same prompt": given_up(4, 2, same_prompt=True),
    "Ctrl-C within a call, begun at the start": given_up(2, 0, same_prompt=True, error=KeyboardInterrupt),
    "an exception within a call, begun at that step": given_up(2, 2, same_prompt=True, error=RuntimeError),
    "an exception within a call, begun further on": given_up(2, 3, same_prompt=True, error=RuntimeError),
    "an exception within a call that is made again": made_again,
    "a schedule with a hole": with_a_hole,
    "one schedule for two, the second begins further on": from_one_schedule(4),
    "one schedule for two, the second begins at the start": from_one_schedule(0),
    "cut short, then a whole one": truncated,
}


@pytest.mark.parametrize("hidden", [False, True], ids=[VISIBLE, HIDDEN])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_a_fresh_process(name: str, hidden: bool, bench: Bench) -> None:
    for found, expected in CASES[name](bench, hidden):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("hidden", [False, True], ids=[VISIBLE, HIDDEN])
@pytest.mark.parametrize("start", [2, 4])
def test_retargeted_it_begins_anew_further_on(start: int, hidden: bool, bench: Bench) -> None:
    bench.fresh("retarget")
    for found, expected in given_up(2, start, same_prompt=True)(bench, hidden):
        assert torch.equal(found, expected)


OTHER = (1000.0, 860.0, 720.0, 580.0, 430.0, 290.0, 140.0)
"""More steps than planned, at other times but for the first."""


@pytest.mark.parametrize("start", [0, 3, 5])
def test_another_schedule_retargeted(start: int, bench: Bench) -> None:
    bench.fresh("retarget")
    prompt = embeds()
    expected = bench.alone(prompt, 5, start=start, times=OTHER)
    bench.loop(prompt, times=OTHER).run(3)
    assert torch.equal(bench.loop(prompt, 5, start=start, times=OTHER).run(), expected)
    assert bench.program.statistics.predicted_calls, "it is predicted there, too"


def test_another_schedule_retargeted_and_interleaved(bench: Bench) -> None:
    bench.fresh("retarget")
    prompt, schedule = embeds(), torch.tensor(OTHER)
    expected = [bench.alone(prompt, seed, times=OTHER) for seed in range(2)]
    loops = [bench.loop(prompt, seed, schedule=schedule) for seed in range(2)]
    for _ in OTHER:
        for loop in loops:
            loop.step()
    assert all(torch.equal(loop.latents, each) for loop, each in zip(loops, expected, strict=True))


@pytest.mark.parametrize("on_mismatch", ["error", "dense"])
def test_another_schedule_is_refused_or_dense(on_mismatch: str, bench: Bench) -> None:
    bench.fresh(on_mismatch)
    prompt = embeds()
    expected = bench.alone(prompt, 1)
    loop = bench.loop(prompt, times=OTHER)
    if on_mismatch == "error":
        with pytest.raises(PlanMismatchError, match=r"timestep 860 is not among the 6 planned ones"):
            loop.run()
    else:
        loop.run()
        assert bench.program.statistics.unplanned_calls == len(OTHER) - 1
    assert torch.equal(bench.loop(prompt, 1).run(), expected)


@pytest.mark.parametrize("same_prompt", [False, True])
def test_threads(same_prompt: bool, bench: Bench) -> None:
    prompts = [embeds(1), embeds(1 if same_prompt else 2)]
    if same_prompt:
        prompts[1] = prompts[0]
    schedule = torch.tensor(TIMES)
    expected = [bench.alone(prompt, seed) for seed, prompt in enumerate(prompts)]
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(2, timeout=120)

    def work(seed: int) -> None:
        loop = bench.loop(prompts[seed], seed, schedule=schedule)
        for _ in TIMES:
            gate.wait()
            loop.step()
        found[seed] = loop.latents

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], each) for seed, each in enumerate(expected))


def test_a_thread_that_has_the_number_of_one_that_ended(bench: Bench) -> None:
    """It begins exactly where the other stopped, with its prompt and schedule; numbers of threads are used again."""
    prompt, schedule = embeds(), torch.tensor(TIMES)
    expected = bench.alone(prompt, 5, start=2)
    found: list[Tensor] = []
    for loop, steps in ((bench.loop(prompt, schedule=schedule), 2), (bench.loop(prompt, 5, start=2), 4)):
        loop.schedule = schedule
        thread = threading.Thread(target=lambda loop=loop, steps=steps: found.append(loop.run(steps)))
        thread.start()
        thread.join()
        gc.collect()
        assert not bench.program._streams.live(), "a thread's state goes with it"
    assert torch.equal(found[1], expected)


def test_a_generation_that_changes_its_thread(bench: Bench) -> None:
    """Its second part is as one that begins there."""
    prompt, schedule = embeds(), torch.tensor(TIMES)
    first = bench.alone(prompt, steps=3)
    expected = bench.alone(prompt, first, start=3)
    loop = bench.loop(prompt, schedule=schedule)
    for steps in (3, 3):
        thread = threading.Thread(target=loop.run, args=(steps,))
        thread.start()
        thread.join()
    assert torch.equal(loop.latents, expected)
