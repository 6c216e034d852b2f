"""The limit on distinct graphs: merge or drop what is worth least until a plan fits.

Done at fixed computed steps: forbid one predictor shape of one site, or one range, at a time, whichever
costs the least objective for each variant it removes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np

from ditopt.search.problem import SearchProblem
from ditopt.search.solution import Draft, count_variants
from ditopt.search.space import Candidate
from ditopt.search.table import with_histories
from ditopt.sites import STEP

Allowed = dict[str, frozenset[str]]


class Ranger(Protocol):
    """``joint.with_ranges``: fills in the ranges of a draft."""

    def __call__(
        self, problem: SearchProblem, draft: Draft, lam: float, allowed: Mapping[str, Collection[str]] | None = None
    ) -> Draft:
        """The draft with its best ranges among those allowed."""


def reduce_variants(
    problem: SearchProblem,
    draft: Draft,
    limit: int,
    lam: float | None,
    with_ranges: Ranger,
    account: Callable[[SearchProblem, Draft], tuple[float, float]],
) -> Draft:
    """``draft`` itself if it needs at most ``limit`` graphs, else the best simplification that does.

    Dense, which needs one graph, where nothing else fits.
    """
    allowed: Allowed = {STEP: frozenset(candidate.name for candidate in problem.candidates)}
    allowed |= {name: frozenset(candidate.name for candidate in problem.range_candidates) for name in draft.ranges}
    variants = count_variants(problem, draft)
    value = _objective(account(problem, draft), lam)
    while variants > limit:
        options: list[tuple[float, float, int, Draft, Allowed]] = []
        for site, names in _simpler(problem, draft, allowed).items():
            for kept_names in names:
                trial_allowed = {**allowed, site: kept_names}
                trial = _again(problem, draft, trial_allowed, lam, with_ranges, site == STEP)
                if trial is None:
                    continue
                count = count_variants(problem, trial)
                worse = _objective(account(problem, trial), lam) - value
                rate = worse / (variants - count) if count < variants else np.inf
                options.append((rate, worse, len(options), trial, trial_allowed))
        if not options:
            return Draft(tuple(range(problem.steps)), {})
        _, worse, _, draft, allowed = min(options, key=lambda option: option[:3])
        value += worse
        variants = count_variants(problem, draft)
    return draft


def _objective(cost: tuple[float, float], lam: float | None) -> float:
    seconds, error = cost
    return error if lam is None else seconds + lam * error


def _simpler(problem: SearchProblem, draft: Draft, allowed: Allowed) -> dict[str, list[frozenset[str]]]:
    """Per site, what would be left after forbidding a shape it uses; for ranges also nothing at all."""
    found = {STEP: _without_each_shape(problem.candidates, allowed[STEP], draft.families)}
    for name, part in draft.ranges.items():
        found[name] = [*_without_each_shape(problem.range_candidates, allowed[name], part.families), frozenset()]
    return found


def _without_each_shape(
    candidates: tuple[Candidate, ...], names: frozenset[str], families: Mapping[int, Candidate]
) -> list[frozenset[str]]:
    shapes = sorted({candidate.shape for candidate in families.values()})
    return [names - {candidate.name for candidate in candidates if candidate.shape == shape} for shape in shapes]


def _again(
    problem: SearchProblem, draft: Draft, allowed: Allowed, lam: float | None, with_ranges: Ranger, outer: bool
) -> Draft | None:
    """The plan with the same computed steps under ``allowed``; None where a step has no predictor left."""
    families = draft.families
    if outer:
        table = problem.table.only(allowed[STEP])
        chosen = {}
        for step, history in with_histories(draft.kept, problem.steps).items():
            if draft.families[step].name in allowed[STEP]:
                chosen[step] = draft.families[step]
                continue
            error, index = table.best(step, history) if table.candidates else (np.inf, 0)
            if not np.isfinite(error):
                return None
            chosen[step] = table.candidates[index]
        families = chosen
    plain = Draft(draft.kept, families)
    if lam is None:
        return plain
    return with_ranges(problem, plain, lam, {name: names for name, names in allowed.items() if name != STEP})
