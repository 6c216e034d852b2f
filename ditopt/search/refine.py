"""Measured improvement of a schedule: move single kept steps and change predictor families by real rollouts.

The quadratic prediction only ranks the proposals; the rollout decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from ditopt.search.joint import draft_for, from_kept, name_families
from ditopt.search.problem import SearchProblem
from ditopt.search.quadratic import Quadratic
from ditopt.search.rollouts import Improve, Measure, Progress, Rollouts
from ditopt.search.solution import Solution
from ditopt.search.table import with_histories

FAMILIES_FIRST = 3
"""Schedules with one predictor family throughout that are tried before single moves."""


def refine(
    problem: SearchProblem,
    solution: Solution,
    measure: Measure,
    budget: int,
    progress: Progress | None = None,
    improve: Improve | None = None,
) -> Solution:
    """The best measured plan with as many kept steps as ``solution``; deterministic where ``measure`` is.

    ``measure`` is called at most ``budget`` times, first on ``solution`` itself. Block ranges are solved anew for
    every proposal, at the solution's lambda. Where ``improve`` (see ``Rollouts``) chooses the predictors, only moved
    steps are proposed.
    """
    rollouts = Rollouts(measure, budget, progress, improve)
    first = rollouts.trial(solution)
    if first is None:
        return solution
    best = first
    improved = True
    while improved and rollouts.left > 0:
        improved = False
        for proposal in proposals(problem, best.solution, families=improve is None):
            if rollouts.knows(proposal) or proposal.variants > solution.max_variants:
                continue
            trial = rollouts.trial(proposal)
            if trial is None:
                break
            if trial.measurement.error < best.measurement.error:
                best, improved = trial, True
                break
    return best.solution


def proposals(problem: SearchProblem, solution: Solution, families: bool = True) -> Iterator[Solution]:
    """Neighbours of a plan, most promising first: moved steps, and with ``families`` other families of predictors.

    There are none where a recipe says what schedules there are.
    """
    if problem.schedules is not None:
        return
    quadratic = Quadratic(problem, problem.table)
    lam, limit, kept = solution.lam, solution.max_variants, solution.kept
    ranked = quadratic.moves(kept)
    if families:
        for uniform in islice(_uniform(problem, quadratic, solution), FAMILIES_FIRST):
            yield from_kept(problem, kept, name_families(problem, uniform), lam, limit)
        ranked += _swaps(problem, quadratic, solution)
    for _, moved, chosen in sorted(ranked, key=lambda proposal: proposal[0]):
        yield from_kept(problem, moved, name_families(problem, chosen), lam, limit)


def with_further_step(problem: SearchProblem, solution: Solution) -> Solution:
    """``solution`` with one more computed step, the one that lowers the predicted error most."""
    quadratic = Quadratic(problem, problem.table)
    found = []
    for step in set(range(problem.steps)) - set(solution.kept):
        kept = tuple(sorted((*solution.kept, step)))
        families, error = quadratic.settle(kept)
        found.append((error, kept, families))
    _, kept, families = min(found, key=lambda entry: entry[:2])
    return from_kept(problem, kept, name_families(problem, families), solution.lam, solution.max_variants)


def _uniform(problem: SearchProblem, quadratic: Quadratic, solution: Solution) -> Iterator[dict[int, int]]:
    """One candidate in all predicted steps that have the history for it, ordered by predicted error."""
    found = []
    for candidate in problem.candidates:
        simpler = {o.name for o in problem.candidates if o.history < candidate.history and o.order is not None}
        mixed = draft_for(problem, solution.kept, {candidate.name, *simpler}).families
        index = problem.candidates.index(candidate)
        families = {}
        for step, past in with_histories(solution.kept, problem.steps).items():
            possible = np.isfinite(problem.table.error(index, step, past))
            families[step] = index if possible else problem.candidates.index(mixed[step])
            if not np.isfinite(problem.table.error(families[step], step, past)):
                break
        else:
            found.append((quadratic.error(solution.kept, families), index, families))
    yield from (families for _, _, families in sorted(found, key=lambda entry: entry[:2]))


def _swaps(
    problem: SearchProblem, quadratic: Quadratic, solution: Solution
) -> Iterator[tuple[float, tuple[int, ...], dict[int, int]]]:
    """The same kept steps with another candidate in one predicted step."""
    now = {step: problem.candidates.index(candidate) for step, candidate in solution.draft.families.items()}
    for step, past in with_histories(solution.kept, problem.steps).items():
        for index in range(len(problem.candidates)):
            if index != now[step] and np.isfinite(problem.table.error(index, step, past)):
                families = {**now, step: index}
                yield quadratic.error(solution.kept, families), solution.kept, families
