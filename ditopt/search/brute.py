"""Exhaustive search for tiny cases: the oracle of the dynamic programmes. Slow on purpose, plain on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from ditopt.profile import Array
from ditopt.search.joint import account, draft_for
from ditopt.search.problem import SearchProblem
from ditopt.search.solution import Draft, RangeDraft
from ditopt.search.space import Candidate
from ditopt.search.table import with_histories

LIMIT = 8


def subsets(steps: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All subsets of ``steps`` that contain the first."""
    for size in range(len(steps)):
        for rest in combinations(steps[1:], size):
            yield (steps[0], *rest)


def prediction_error(
    problem: SearchProblem, grams: Array, candidate: Candidate, step: int, history: Sequence[int]
) -> float:
    """The error of one prediction, straight from ``a^T G a``; infinite where the history is too short."""
    if len(history) < candidate.history:
        return float("inf")
    sources, total = history[: candidate.history], problem.steps
    factors = candidate.coefficients(
        np.asarray(problem.times), grams.sum(axis=0), np.array([step]), np.array([sources]), problem.ridge
    )[0]
    a = np.zeros(grams.shape[1])
    a[step] = 1.0
    for row, factor in zip([*sources, total + step], factors, strict=False):
        a[row] -= factor
    squares = np.array([max(float(a @ gram @ a), 0.0) for gram in grams])
    return float(squares.mean() if problem.additive == "squares" else np.sqrt(squares).mean())


def brute_schedule(problem: SearchProblem, lam: float = 1.0, count: int | None = None) -> tuple[float, tuple[int, ...]]:
    """The least objective over all sets of computed steps, and the set; with ``count``, error alone at that size."""
    if problem.steps > LIMIT:
        raise ValueError(f"brute force over {problem.steps} steps would take too long; the limit is {LIMIT}")
    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for kept in subsets(range(problem.steps)):
        if count is not None and len(kept) != count:
            continue
        objective = 0.0 if count is not None else len(kept) * problem.seconds_full
        for step, history in with_histories(kept, problem.steps).items():
            error = min(prediction_error(problem, problem.gram, c, step, history) for c in problem.candidates)
            growth = abs(float(problem.weights[step]))
            counted = growth * growth if problem.additive == "squares" else growth
            objective += (
                counted * error if count is not None else (problem.seconds_predicted or 0.0) + lam * counted * error
            )
        best = min(best, (objective, kept))
    return best


def brute_joint(problem: SearchProblem, lam: float) -> tuple[float, Draft]:
    """The least objective over all computed steps, disjoint ranges and schedules of these (T at most 5)."""
    best: tuple[float, Draft] = (float("inf"), Draft((), {}))
    for kept in subsets(range(problem.steps)):
        outer = draft_for(problem, kept)
        for ranges in _range_plans(problem, kept, list(problem.ranges)):
            draft = Draft(outer.kept, outer.families, ranges)
            seconds, error = account(problem, draft)
            if seconds + lam * error < best[0]:
                best = seconds + lam * error, draft
    return best


def _range_plans(problem: SearchProblem, kept: tuple[int, ...], names: list[str]) -> Iterator[dict[str, RangeDraft]]:
    """Every way to schedule some disjoint ranges among ``kept``."""
    if not names:
        yield {}
        return
    for rest in _range_plans(problem, kept, names[1:]):
        yield rest
        site, table = problem.ranges[names[0]], problem.range_tables[names[0]]
        if any(site.first <= problem.ranges[other].last and problem.ranges[other].first <= site.last for other in rest):
            continue
        for computed in subsets(kept):
            histories = with_histories(computed, kept)
            families = {t: table.candidates[table.best(t, past)[1]] for t, past in histories.items()}
            if histories:
                yield {names[0]: RangeDraft(computed, families), **rest}
