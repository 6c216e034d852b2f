"""Bisection by real rollouts: the fastest plan that meets a target, over lambda or over the number of kept steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ditopt.search.joint import least_kept, solve, solve_kept
from ditopt.search.problem import SearchProblem
from ditopt.search.rollouts import Improve, Measure, Measurement, Progress, Rollouts, Trial
from ditopt.search.solution import Solution

GRID = 4096
"""Lambdas tried are points of a logarithmic grid, so that a bisection takes 12 solves and fewer rollouts."""

Meets = Callable[[Measurement], bool]


@dataclass(frozen=True)
class Found:
    """``best`` is the fastest measured plan that met the target, None if none did; ``trials`` all that was measured."""

    best: Trial | None
    trials: tuple[Trial, ...]


def bisect_lambda(
    problem: SearchProblem,
    measure: Measure,
    meets: Meets,
    budget: int = 10,
    max_variants: int = 8,
    progress: Progress | None = None,
    start: float | None = None,
    improve: Improve | None = None,
) -> Found:
    """The fastest plan that ``meets`` accepts, by bisecting the price of error.

    Args:
        problem: what was measured.
        measure: real rollouts under some rules; called at most ``budget`` times, never twice for the same rules.
        meets: whether a measurement is good enough. The dense plan counts as good enough and is not measured.
        budget: of calls.
        max_variants: as ``solve``.
        progress: called after each rollout.
        start: a lambda to try first, with neighbours at doubling distances until the verdict changes.
        improve: see ``Rollouts``.
    """
    low, high = lambda_range(problem)
    ratio = high / low
    first = None if start is None else round((GRID - 1) * np.log(start / low) / np.log(ratio))

    def at(index: int) -> Solution:
        return solve(problem, low * ratio ** (index / (GRID - 1)), max_variants)

    return _bisect(at, 0, GRID, Rollouts(measure, budget, progress, improve), meets, first, GRID // 32)


def bisect_kept(
    problem: SearchProblem,
    measure: Measure,
    meets: Meets,
    budget: int = 10,
    max_variants: int = 8,
    progress: Progress | None = None,
    start: int | None = None,
    improve: Improve | None = None,
) -> Found:
    """As ``bisect_lambda``, over plans of ``solve_kept``: the fewest network evaluations that meet the target."""
    return _bisect(
        lambda count: solve_kept(problem, count, max_variants),
        least_kept(problem), problem.steps, Rollouts(measure, budget, progress, improve), meets, start, 1,
    )  # fmt: skip


def _bisect(
    at: Callable[[int], Solution], low: int, high: int, rollouts: Rollouts, meets: Meets, start: int | None, stride: int
) -> Found:
    """The least index in ``low .. high - 1`` whose plan meets (``high``: dense); quality grows with the index."""
    guess: int | None = start
    heading: bool | None = None
    while low < high:
        middle = (low + high) // 2
        if guess is not None:
            middle = min(max(guess, low), high - 1)
        solution = at(middle)
        verdict = True
        if solution.rules:
            trial = rollouts.trial(solution)
            if trial is None:
                break
            verdict = meets(trial.measurement)
        low, high = (low, middle) if verdict else (middle + 1, high)
        if guess is not None:
            turned = heading not in (None, verdict)
            heading, guess = verdict, None if turned else guess - stride if verdict else guess + stride
            stride *= 2
    good = [trial for trial in rollouts.trials if meets(trial.measurement)]
    return Found(min(good, key=lambda trial: trial.measurement.seconds, default=None), rollouts.trials)


def lambda_range(problem: SearchProblem) -> tuple[float, float]:
    """A lambda so low that one step is computed, and one so high that all are (or 14 decades above the low one)."""
    if problem.seconds_predicted is None:
        return _lambda_range_of_ranges(problem)
    price = problem.price(problem.weights)
    single = problem.table.least[:, 0].reshape(problem.steps, -1)[:, 0]
    total = float(np.sum((price * np.where(np.isfinite(single), single, 0.0))[1:]))
    least = problem.table.least.reshape(problem.steps, -1)[1:].min(axis=1, initial=np.inf)
    smallest = price[1:] * np.where(np.isfinite(least), least, 0.0)
    saved = max(problem.seconds_full - problem.seconds_predicted, 1e-9)
    tiny = np.finfo(float).tiny
    low = 0.5 * saved / max(total, tiny**0.5)
    high = 2 * saved / max(float(smallest[smallest > 0].min(initial=np.inf)), tiny**0.5)
    return low, float(min(max(high, 2 * low), 1e14 * low))


def _lambda_range_of_ranges(problem: SearchProblem) -> tuple[float, float]:
    """As ``lambda_range`` for a problem without whole steps: from all ranges predicted to none."""
    saved, errors = [1e-9], [float(np.finfo(float).tiny) ** 0.5]
    for name, site in problem.ranges.items():
        price = problem.price(site.weight * problem.weights)
        for family in problem.range_tables[name].errors:
            priced = family * price.reshape((-1,) + (1,) * (family.ndim - 1))
            errors += [float(error) for error in priced[np.isfinite(priced) & (priced > 0)]]
        saved.append(max(site.seconds_saved, 1e-9))
    low = 0.5 * min(saved[1:] or saved) / (max(errors) * problem.steps)
    return low, float(min(max(2 * max(saved) / min(errors[1:] or errors), 2 * low), 1e14 * low))
