"""The joint search: whole steps outermost, block ranges inside computed steps, all under one price of error.

The outer programme chooses which steps to compute; in those each range has its own programme, with
errors priced by how far they reach: into the step's own output and, through every prediction that reads
it, into later ones. What the ranges save is fed back as cheaper steps until nothing changes. Ranges in
use never overlap: the best disjoint set is found exactly (weighted interval scheduling).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ditopt.errors import InputError
from ditopt.profile import Array
from ditopt.search.explain import explain
from ditopt.search.problem import SearchProblem
from ditopt.search.quadratic import Quadratic, descend
from ditopt.search.schedule import Schedule, cheapest, cheapest_of_each_size, prediction_costs
from ditopt.search.solution import Draft, RangeDraft, Solution, count_variants, step_choices, to_rules
from ditopt.search.space import Candidate
from ditopt.search.table import ErrorTable, least_errors, with_histories
from ditopt.search.variants import reduce_variants
from ditopt.sites import STEP

ROUNDS = 5


def solve(problem: SearchProblem, lam: float, max_variants: int = 8) -> Solution:
    """The plan of least ``seconds + lam * error`` with at most ``max_variants`` distinct graphs.

    Args:
        problem: what was measured.
        lam: seconds per unit of additive error (mean squared relative error, or relative error).
        max_variants: of distinct straight-line graphs, at least 1.

    Raises:
        InputError: ``lam`` is negative or not finite, or ``max_variants`` is below 1.
    """
    if not (np.isfinite(lam) and lam >= 0):
        raise InputError(f"lam is {lam}; it must be finite and not negative")
    if max_variants < 1:
        raise InputError(f"max_variants is {max_variants}; it must be at least 1")
    best = with_ranges(problem, dense(problem), lam)
    if problem.seconds_predicted is not None:
        best = _with_steps(problem, best, lam, problem.seconds_predicted)
    return finish(problem, reduce_variants(problem, best, max_variants, lam, with_ranges, account), lam, max_variants)


def _with_steps(problem: SearchProblem, best: Draft, lam: float, seconds_predicted: float) -> Draft:
    """The best draft with predicted steps, or ``best`` (without any) where none is better."""
    if problem.schedules is not None:
        drafts = [best, *(Draft(kept, families) for kept, families, _ in problem.allowed)]
        return min(drafts, key=lambda draft: _objective(problem, draft, lam))
    costs = prediction_costs(
        problem.table.least, np.full(problem.steps, seconds_predicted), lam * problem.price(problem.weights)
    )
    least = _objective(problem, best, lam)
    seen: set[tuple[int, ...]] = set()
    for saved in [np.zeros(problem.steps), _savings(problem, best, lam)]:
        for _ in range(ROUNDS):
            kept = cheapest(costs, problem.seconds_full - saved).kept
            if kept in seen:
                break
            seen.add(kept)
            draft = with_ranges(problem, draft_for(problem, kept), lam)
            objective = _objective(problem, draft, lam)
            if objective < least:
                best, least = draft, objective
            saved = _savings(problem, draft, lam)
    return best


def least_kept(problem: SearchProblem) -> int:
    """The fewest steps that a plan of whole steps can compute, as its predictors read computed ones."""
    if problem.schedules is not None:
        return min((len(kept) for kept, _, _ in problem.allowed), default=problem.steps)
    schedules = _cheapest_up_to(problem, problem.steps)
    return next((count for count, found in enumerate(schedules, 1) if np.isfinite(found.objective)), problem.steps)


def solve_kept(problem: SearchProblem, count: int, max_variants: int = 8) -> Solution:
    """The plan with exactly ``count`` network evaluations: dynamic programme, then search on the quadratic error.

    Under a recipe's schedules the one of least error that computes at most so many.

    Raises:
        InputError: ``count`` is not in 1 .. T, or too small for steps that ran different branches, or whole steps
            cannot be predicted.
    """
    if problem.seconds_predicted is None and count < problem.steps:
        raise InputError(f"{count} kept steps are asked for, but graph breaks forbid predicting whole steps")
    if not 1 <= count <= problem.steps:
        raise InputError(f"{count} kept steps are asked for; choose 1 to {problem.steps}")
    if problem.schedules is not None:
        return _allowed_kept(problem, count, max_variants)
    schedule = _cheapest_up_to(problem, count)[count - 1]
    if not np.isfinite(schedule.objective):
        raise InputError(f"no schedule computes only {count} of {problem.steps} steps; keep more or allow 'reuse'")
    kept, families, _ = descend(Quadratic(problem, problem.table), schedule.kept)
    return from_kept(problem, kept, name_families(problem, families), None, max_variants)


def _allowed_kept(problem: SearchProblem, count: int, max_variants: int) -> Solution:
    few = [each for each in problem.allowed if len(each[0]) <= count]
    if count == problem.steps:
        few.append((tuple(range(count)), {}, 0.0))
    if not few:
        raise InputError(f"no schedule of the recipe computes only {count} of {problem.steps} steps; keep more")
    kept, families, _ = min(few, key=lambda each: (each[2], len(each[0])))
    return from_kept(problem, kept, families, None, max_variants)


def _cheapest_up_to(problem: SearchProblem, count: int) -> list[Schedule]:
    """By the additive price, the best schedule of each number of computed steps from 1 to ``count``."""
    free = np.zeros(problem.steps)
    return cheapest_of_each_size(
        prediction_costs(problem.table.least, free, problem.price(problem.weights)), free, count
    )


def from_kept(
    problem: SearchProblem,
    kept: Sequence[int],
    families: Mapping[int, Candidate] | None = None,
    lam: float | None = None,
    max_variants: int = 8,
) -> Solution:
    """The plan that computes the steps ``kept``; families default to each step's best, ranges are solved at ``lam``."""
    draft = draft_for(problem, kept) if families is None else Draft(tuple(kept), families)
    if lam is not None:
        draft = with_ranges(problem, draft, lam)
    draft = reduce_variants(problem, draft, max_variants, lam, with_ranges, account)
    return finish(problem, draft, lam, max_variants)


def refitted(
    problem: SearchProblem,
    solution: Solution,
    families: Mapping[int, Candidate],
    factors: Mapping[int, Sequence[float]],
) -> Solution:
    """``solution`` with other candidates for its predicted steps, and ``factors`` in place of the profile's.

    Its sparse heads stay.
    """
    found = finish(problem, replace(solution.draft, families=families), solution.lam, solution.max_variants)
    made = tuple(
        choice if choice.candidate is None else replace(choice, coefficients=tuple(factors[choice.step]))
        for choice in found.choices[STEP]
    )
    choices = {**found.choices, STEP: made}
    return replace(found, choices=choices, rules=to_rules(problem, choices)).with_sparse(solution.sparse)


def dense(problem: SearchProblem) -> Draft:
    """The plan that computes everything."""
    return Draft(tuple(range(problem.steps)), {})


def name_families(problem: SearchProblem, families: Mapping[int, int]) -> dict[int, Candidate]:
    """Candidates in place of their indices in the problem's table."""
    return {step: problem.candidates[family] for step, family in families.items()}


def draft_for(problem: SearchProblem, kept: Sequence[int], names: Collection[str] | None = None) -> Draft:
    """The plan that computes ``kept`` and predicts each other step by its best candidate (of those in ``names``)."""
    table = problem.table if names is None else problem.table.only(names)
    histories = with_histories(kept, problem.steps)
    return Draft(tuple(kept), {step: table.candidates[table.best(step, past)[1]] for step, past in histories.items()})


def carried(problem: SearchProblem, draft: Draft) -> Array:
    """``[T]``: how an output error of a computed step reaches the final sample, predictions that read it included."""
    index = {candidate: i for i, candidate in enumerate(problem.candidates)}
    rows = Quadratic(problem, problem.table).combination(draft.kept, {t: index[c] for t, c in draft.families.items()})
    return np.asarray(problem.weights - rows[: problem.steps])


def with_ranges(
    problem: SearchProblem, draft: Draft, lam: float, allowed: Mapping[str, Collection[str]] | None = None
) -> Draft:
    """``draft`` with the best disjoint ranges at ``lam``; ``allowed`` restricts ranges and their candidates by name."""
    if not problem.ranges or len(draft.kept) < 2:
        return Draft(draft.kept, draft.families)
    growth, gains, parts = carried(problem, draft), {}, {}
    for name, site in problem.ranges.items():
        table = problem.range_tables[name]
        if allowed is not None:
            table = table.only(allowed.get(name, ()))
        if table.candidates and site.seconds_saved > 0:
            part, gain = _solve_range(table, draft.kept, site.seconds_saved, lam * problem.price(site.weight * growth))
            if gain > 0:
                gains[name], parts[name] = gain, part
    used = best_disjoint(problem, gains)
    return Draft(draft.kept, draft.families, {name: parts[name] for name in used})


def _solve_range(table: ErrorTable, kept: Sequence[int], saved: float, price: Array) -> tuple[RangeDraft, float]:
    """The range's schedule among ``kept``, and the objective it saves."""
    among = np.asarray(kept, dtype=np.intp)
    costs = prediction_costs(least_errors(table.restrict(kept)), np.full(len(among), -saved), price[among])
    schedule = cheapest(costs, np.zeros(len(among)))
    computed = tuple(int(among[i]) for i in schedule.kept)
    families = {t: table.candidates[table.best(t, past)[1]] for t, past in with_histories(computed, kept).items()}
    return RangeDraft(computed, families), -schedule.objective


def best_disjoint(problem: SearchProblem, gains: Mapping[str, float]) -> list[str]:
    """The ranges of largest total gain of which no two overlap, in execution order."""
    order = sorted(gains, key=lambda name: (problem.ranges[name].last, name))
    ends = [problem.ranges[name].last for name in order]
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for i, name in enumerate(order):
        before = best[min(bisect_left(ends, problem.ranges[name].first), i)]
        best.append(max(best[-1], (before[0] + gains[name], [*before[1], name]), key=lambda pair: pair[0]))
    return best[-1][1]


@dataclass(frozen=True)
class _RangeCost:
    """Seconds saved and additive error of a range's schedule, per computed step of the outer one."""

    saved: Array
    error: Array


def _range_costs(problem: SearchProblem, draft: Draft) -> _RangeCost:
    saved, error = np.zeros(problem.steps), np.zeros(problem.steps)
    if draft.ranges:
        growth = carried(problem, draft)
        for name, part in draft.ranges.items():
            site, table = problem.ranges[name], problem.range_tables[name]
            price = problem.price(site.weight * growth)
            for step, past in with_histories(part.computed, draft.kept).items():
                saved[step] += site.seconds_saved
                error[step] += price[step] * table.error(table.candidates.index(part.families[step]), step, past)
    return _RangeCost(saved, error)


def account(problem: SearchProblem, draft: Draft) -> tuple[float, float]:
    """Seconds of a generation's network evaluations, and the additive error."""
    inner, price = _range_costs(problem, draft), problem.price(problem.weights)
    histories = with_histories(draft.kept, problem.steps)
    error = float(inner.error.sum())
    for step, past in histories.items():
        error += float(price[step]) * problem.table.error(problem.candidates.index(draft.families[step]), step, past)
    seconds = len(draft.kept) * problem.seconds_full + len(histories) * (problem.seconds_predicted or 0.0)
    return seconds - float(inner.saved.sum()), error


def _objective(problem: SearchProblem, draft: Draft, lam: float) -> float:
    seconds, error = account(problem, draft)
    return seconds + lam * error


def _savings(problem: SearchProblem, draft: Draft, lam: float) -> Array:
    """``[T]``: what the ranges take off each step's objective; steps not computed are taken to save the average."""
    inner = _range_costs(problem, draft)
    saved = inner.saved - lam * inner.error
    others = np.setdiff1d(np.arange(problem.steps), draft.kept)
    saved[others] = saved[list(draft.kept)].mean()
    return np.asarray(saved)


def finish(problem: SearchProblem, draft: Draft, lam: float | None, max_variants: int) -> Solution:
    """The solution that a draft stands for, with figures, rules and explanations."""
    seconds, additive = account(problem, draft)
    ranges = _range_costs(problem, draft)
    inner = float(ranges.error.sum())
    families = {step: problem.candidates.index(candidate) for step, candidate in draft.families.items()}
    outer = Quadratic(problem, problem.table).error(draft.kept, families)
    error = (outer**2 + inner) ** 0.5 if problem.additive == "squares" else outer + inner
    growth = {STEP: problem.weights}
    if draft.ranges:
        reach = carried(problem, draft)
        growth |= {name: problem.ranges[name].weight * reach for name in draft.ranges}
    choices = step_choices(problem, draft, {site: values.tolist() for site, values in growth.items()})
    relief = ranges.saved - (lam or 0.0) * ranges.error
    objective = additive if lam is None else seconds + lam * additive
    return Solution(
        rules=to_rules(problem, choices),
        kept=draft.kept,
        predicted_error=error,
        predicted_seconds=seconds,
        explanations=explain(problem, draft, choices, growth, relief, objective, lam, max_variants),
        variants=count_variants(problem, draft),
        objective=objective,
        additive_error=additive,
        lam=lam,
        max_variants=max_variants,
        choices=choices,
        draft=draft,
    )
