"""Sparse heads beside a schedule: which at a bound of error or of seconds, decided for phases of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ditopt.cost_models.sparse import FINDING, SparseCost
from ditopt.decisions import Decision, Dense, Sparse
from ditopt.kept import Use, uses
from ditopt.profile import NetworkProfile
from ditopt.recipes import Recipe
from ditopt.search.problem import SearchProblem
from ditopt.search.site_choice import KEPT, MASS, SiteCandidates, found_every, kept_every, needs_now
from ditopt.search.solution import Solution, SparsePart, signatures
from ditopt.search.sparse import (
    head_candidates,
    price_of,
    price_that_saves,
    profiled_candidates,
    sparse_part,
    totals,
)

PHASES = 3
"""Computed steps are divided into so many ranges, one after the other, at most: heads are decided for each."""
MORE_STEPS = 3
"""Schedules of up to so many further computed steps are tried with heads."""
NEEDED_TABLES = frozenset({"patterns", "sensitivity", "latency"})
"""Of a profile, what tells the errors of heads and their seconds."""
Allowed = Callable[[Solution], bool]
"""Whether a plan may be: whether it needs no more graphs than are allowed."""


class HeadsBeside:
    """The choices of heads beside one schedule; ``costs`` are of the sites that may be sparse, ``recipe`` says how.

    Rests that are kept need graphs of their own for the steps that keep them: there are choices without any, too.

    Raises:
        InputError: no error that was planted at any attention site moved anything.
    """

    def __init__(
        self,
        network: NetworkProfile,
        problem: SearchProblem,
        base: Solution,
        costs: Mapping[str, SparseCost],
        allowed: Allowed,
        recipe: Recipe | None = None,
    ) -> None:
        self.base, self.network, self.allowed = base, problem.network, allowed
        steps = base.kept
        divisions = (np.array_split(steps, count) for count in range(1, min(PHASES, len(steps)) + 1))
        ranges = ([tuple(map(int, part)) for part in division] for division in divisions)
        kept = any(kept_every(Sparse(pattern=each)) for each in profiled_candidates(network))
        self.divisions = [
            head_candidates(network, problem, base.draft, costs, each, recipe, kept=with_kept)
            for each in ranges
            for with_kept in ((True, False) if kept else (False,))
        ]

    @property
    def most_saved(self) -> float:
        """Seconds of a generation that the heads can save, whatever their error."""
        return max(totals(each, 0.0)[0] for each in self.divisions)

    def within_error(self, squared: float) -> SparsePart | None:
        """What saves most with a squared relative error of so much at most; None: nothing does."""
        found = (self._part(each, price_of(each, lambda saved, error: error <= squared)) for each in self.divisions)
        return self._first(sorted(found, key=lambda part: -part.saved))

    def saving(self, seconds: float) -> SparsePart | None:
        """What errs least and saves so many seconds of a generation; None: nothing saves so much."""
        if seconds > self.most_saved:
            return None
        found = (self._part(each, price_that_saves(each, seconds)) for each in self.divisions)
        return self._first(sorted((part for part in found if part.saved >= seconds), key=lambda part: part.error))

    def _part(self, candidates: Sequence[SiteCandidates], price: float) -> SparsePart:
        return sparse_part(candidates, price, self.network, self.base.objective)

    def _first(self, parts: Sequence[SparsePart]) -> SparsePart | None:
        useful = (part for part in parts if part.saved > 0)
        return next((part for part in useful if self.allowed(self.base.with_sparse(part))), None)


def count_graphs(problem: SearchProblem, solution: Solution) -> int:
    """Number of distinct graphs that a plan needs with its sparse heads.

    A site in some step may be sparse or not, and choose blocks by their true mass or not; where heads keep lists, it
    may find some, by either selector, and read some, and so it may where heads keep rests.
    """
    decided: dict[tuple[str, int], dict[int, Decision]] = {}
    for rule in solution.sparse.rules:
        for head in rule.heads or (0,):
            decided.setdefault((rule.sites, head), {}).update(dict.fromkeys(rule.steps, rule.do))
    does: list[set[tuple[str, ...]]] = [set() for _ in range(problem.steps)]
    for (site, _), of_steps in decided.items():
        in_turn = [of_steps.get(step, Dense()) for step in solution.kept]
        for step, do, use in zip(solution.kept, in_turn, uses(in_turn, found_every), strict=True):
            if isinstance(do, Sparse):
                by = {*FINDING} & dict(needs_now(do, use)).keys()
                kind = "lists" if kept_every(do) is None else KEPT
                told = {MASS} & by if use is Use.NONE else {f"{kind} {use.name}", *by}
                does[step] |= {(site,), *((site, each) for each in told)}
    return len({*zip(signatures(problem, solution.draft), map(frozenset, does), strict=True)})


def further_schedules(
    solution: Solution, steps: int, more: int, start: Callable[[int], Solution]
) -> Iterator[Solution]:
    """``solution``, then those that compute 1, 2, up to ``more`` further steps: ``start(count)``."""
    yield solution
    for count in range(len(solution.kept) + 1, min(len(solution.kept) + more, steps) + 1):
        yield start(count)
