"""Sparse heads beside a schedule: which at a bound of error or of seconds, decided for phases of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np

from ditopt.cost_models.sparse import FINDING, SparseCost
from ditopt.decisions import Decision, Dense, Sparse
from ditopt.kept import Use, uses
from ditopt.profile import NetworkProfile
from ditopt.recipes import Recipe
from ditopt.search.problem import SearchProblem
from ditopt.search.site_choice import KEPT, MASS, SiteCandidates, found_every, kept_every, needs_of
from ditopt.search.solution import Solution, SparsePart, signatures
from ditopt.search.sparse import (
    head_candidates,
    price_of,
    price_that_saves,
    profiled_candidates,
    sparse_part,
    totals,
)

LISTS, CLUSTERS = "lists", "clusters"
PHASES = 3
"""Computed steps are divided into so many ranges, one after the other, at most: heads are decided for each."""
MORE_STEPS = 3
"""Schedules of up to so many further computed steps are tried with heads."""
NEEDED_TABLES = frozenset({"patterns", "sensitivity", "latency"})
"""Of a profile, what tells the errors of heads and their seconds."""
Allowed = Callable[[Solution], bool]
"""Whether a plan may be: whether it needs no more graphs than are allowed."""


def divisions(steps: Sequence[int], periods: Collection[int] = ()) -> list[tuple[tuple[int, ...], ...]]:
    """Steps in one to ``PHASES`` ranges, one after the other: as long as each other, and in multiples of a period.

    In those of a period begins whatever is found once in so many steps, so that heads which do find it together.

    >>> divisions(range(10), (4,))[1:3]
    [((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), ((0, 1, 2, 3), (4, 5, 6, 7, 8, 9))]
    """
    count = len(steps)
    found: dict[tuple[int, ...], None] = {}
    for ranges in range(1, min(PHASES, count) + 1):
        even = [int(part[0]) for part in np.array_split(np.arange(count), ranges)]
        for every in (1, *sorted(periods)):
            found[
                tuple(sorted({each for each in (every * round(start / every) for start in even) if each < count}))
            ] = None
    return [tuple(tuple(steps[start:end]) for start, end in pairwise((*starts, count))) for starts in found]


class HeadsBeside:
    """The choices of heads beside one schedule; ``costs`` are of the sites that may be sparse, ``recipe`` says how.

    What is kept needs graphs of its own for the steps that find it: there are choices without anything kept, too.

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
        first = 0 if recipe is None else recipe.first_step(problem.steps)
        steps = [step for step in base.kept if step >= first]
        offered = (each for each in profiled_candidates(network) if recipe is None or recipe.allows(each))
        periods = {*filter(None, (found_every(Sparse(pattern=each)) for each in offered))}
        self.divisions = [
            head_candidates(network, problem, base.draft, costs, each, recipe, kept=kept)
            for kept in ((True, False) if periods else (False,))
            for each in divisions(steps, periods if kept else ())
        ]

    @property
    def most_saved(self) -> float:
        """Seconds of a generation that the heads can save, whatever their error."""
        return max((totals(each, 0.0)[0] for each in self.divisions), default=0.0)

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

    A site in some step may be sparse or not, look for blocks or not, by true mass or not, and by clusters or not; where
    heads keep lists or rests, it may find some, and read some.
    """
    decided: dict[str, dict[int, dict[int, Decision]]] = {}
    for rule in solution.sparse.rules:
        for head in rule.heads or (0,):
            of_head = decided.setdefault(rule.sites, {}).setdefault(head, {})
            of_head.update(dict.fromkeys(rule.steps, rule.do))
    does: list[set[tuple[str, ...]]] = [set() for _ in range(problem.steps)]
    for site, of_heads in decided.items():
        in_turn = [[of_steps.get(step, Dense()) for step in solution.kept] for of_steps in of_heads.values()]
        for step, told in zip(solution.kept, _graphs(in_turn), strict=True):
            does[step] |= {(site, *each) for each in told}
    return len({*zip(signatures(problem, solution.draft), map(frozenset, does), strict=True)})


def _graphs(of_heads: Sequence[Sequence[Decision]]) -> Iterator[set[tuple[str, ...]]]:
    """Of a site whose heads do this in steps in a row: in every step what tells its graph from others."""
    of_uses = [uses(each, found_every) for each in of_heads]
    anew = [each for each in chain(*of_heads) if _finds_by(each) and found_every(each) is None]
    everywhere = {*map(_finds_by, anew)} - {MASS}
    kept = {_kept_kind(do) for do, use in zip(chain(*of_heads), chain(*of_uses), strict=True) if use is Use.READ}
    for heads, used in zip(zip(*of_heads, strict=True), zip(*of_uses, strict=True), strict=True):
        if not any(isinstance(do, Sparse) for do in heads):
            yield set()
            continue
        does = [*zip(heads, used, strict=True)]
        told = {(_kept_kind(do), use.name) for do, use in does if use is not Use.NONE and _kept_kind(do) in kept}
        finding = {_finds_by(do) for do, use in does if use is not Use.READ} - {None}
        if finding or (anew and (LISTS, Use.READ.name) not in told):
            told |= {("by", str(each)) for each in finding | everywhere or {FINDING[0]}}
        yield told | {()} | {(CLUSTERS,) for do in heads if _is_clustered(do)}


def _finds_by(decision: Decision) -> str | None:
    """By what a head finds its blocks in a call; None: it does not."""
    return next((name for name, _ in needs_of(decision) if name in FINDING), None)


def _is_clustered(decision: Decision) -> bool:
    """Whether calls find the order of a head's tokens."""
    return isinstance(decision, Sparse) and decision.settings.get("order") == CLUSTERS


def _kept_kind(decision: Decision) -> str:
    """What a head keeps, if it keeps anything."""
    return LISTS if kept_every(decision) is None else KEPT


def further_schedules(
    solution: Solution, steps: int, more: int, start: Callable[[int], Solution]
) -> Iterator[Solution]:
    """``solution``, then those that compute 1, 2, up to ``more`` further steps: ``start(count)``."""
    yield solution
    for count in range(len(solution.kept) + 1, min(len(solution.kept) + more, steps) + 1):
        yield start(count)
