"""The choice among candidates of one site's heads in some steps, exact also where heads share what they need.

A head is chosen by itself; but what blocks are found by, and means of what is skipped, a site computes once a step if
any of its heads needs it. So for every set of such needs the best heads within it are found, and the best set is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import numpy as np

from ditopt.cost_models.sparse import CLUSTERS, INT8, ORDERED, OTHERS, Need, shared_seconds, spread
from ditopt.decisions import Decision, Sparse
from ditopt.kept import Use
from ditopt.measures import Label, Numbers
from ditopt.search.heads import HeadPattern

KEPT, REFRESH = "kept", "refresh"
MASS = "mass"
"""Of what a head may need: that all pairs are scored, to choose blocks by their true mass."""
Needs = frozenset[Need]


def needs_of(decision: Decision) -> Needs:
    """What a head needs that its site computes once a step, or once in so many."""
    settings = decision.settings if isinstance(decision, Sparse) else {}
    found = set()
    if settings.get("pattern") == "draft":
        found.add((str(settings.get("by", "means")), int(settings.get("refresh", 1))))
    rest = settings.get("rest")
    if isinstance(rest, Mapping) and KEPT in rest:
        found |= {(KEPT, 1), (OTHERS, int(rest[REFRESH]))}
    elif rest is not None:
        name = str(next(iter(rest)) if isinstance(rest, Mapping) else rest)
        found |= {(name, 1), *([("pooled", 1)] if name == "taylor" else [])}
    if is_int8(decision):
        found.add((INT8, 1))
    if "order" in settings:
        found.add((ORDERED, 1))
    return frozenset(found)


def is_int8(decision: Decision) -> bool:
    """Whether a head has int8 scores."""
    return isinstance(decision, Sparse) and decision.settings.get("qk") == INT8


def is_clustered(decision: Decision) -> bool:
    """Whether a head's tokens are in an order that every call finds."""
    return isinstance(decision, Sparse) and decision.settings.get("order") == CLUSTERS


def found_every(decision: Decision) -> int | None:
    """N, where a head finds its blocks in every N-th step of a run, or is dense there and keeps its rest; else None."""
    found = decision.settings.get(REFRESH) if isinstance(decision, Sparse) else None
    return kept_every(decision) if found is None else int(found)


def needs_now(decision: Decision, use: Use) -> Needs:
    """What a head needs in one step: where it reads what an earlier one found, nothing to find that."""
    every = found_every(decision)
    needs = needs_of(decision)
    return needs if every is None else frozenset((name, 1) for name, n in needs if n != every or use is Use.FOUND)


def kept_every(decision: Decision) -> int | None:
    """N, where a head is dense in every N-th step of a run, to keep its rest; None: it keeps none."""
    rest = decision.settings.get("rest") if isinstance(decision, Sparse) else None
    return int(rest[REFRESH]) if isinstance(rest, Mapping) and KEPT in rest else None


def between(every: int, density: float) -> float:
    """What a head attends to in steps that read its rest, if the mean with the dense one of ``every`` is ``density``.

    >>> between(4, 0.4375)
    0.25
    """
    return max(0.0, (every * density - 1) / (every - 1))


def mean_density(decision: Decision, density: float, steps: int) -> float:
    """Of a run of so many steps, where ``density`` is that of many: the first one keeps a rest, as it may be.

    >>> mean_density(Sparse(pattern={"pattern": "band", "rest": {"kept": "merge", "refresh": 4}}), 0.4375, 2)
    0.625
    """
    every = kept_every(decision)
    if every is None:
        return density
    dense = math.ceil(steps / every)
    return (dense + (steps - dense) * between(every, density)) / steps


@dataclass(frozen=True)
class HeadCandidate:
    """A head under a pattern in some steps.

    ``saved`` are seconds of a generation against the head being dense in the same kernel, without what it ``needs``;
    ``error`` is the square of the final sample's relative error.
    """

    choice: HeadPattern
    saved: float
    error: float
    needs: Needs = frozenset()

    def gain(self, price: float) -> float:
        """Seconds saved, less the error at a price (seconds per squared relative error)."""
        return self.saved - price * self.error


@dataclass(frozen=True, eq=False)
class SiteCandidates:
    """The heads of one site in some steps; ``heads`` are the candidates of each, beside dense.

    ``lost`` are the seconds of a generation that the block-sparse kernel takes longer than dense attention where every
    head attends to everything; below 0 where it is the faster one. ``prices`` are those of what heads need, by name,
    in so many ``steps`` in a row (None: of any number). ``alike``: all heads have to do the same. Of a generation a
    dense head takes ``of_head`` seconds of the kernel; all blocks take longer by ``per_spread`` for each unit of the
    ``spread`` of heads' seconds, which is no head's own: it is counted once the choice is made.
    """

    heads: tuple[tuple[HeadCandidate, ...], ...]
    lost: float
    alike: bool = False
    prices: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    of_head: float = 0.0
    per_spread: float = 0.0

    def chosen(self, price: float) -> tuple[HeadCandidate, ...]:
        """The candidates of most gain together, one a head at most; none where dense attention is better."""
        found = self._chosen_alike(price) if self.alike else self._chosen(price)
        worth = sum(each.gain(price) for each in found) - self.paid(found)
        return found if worth > 0 or not self.per_spread else ()

    def _chosen(self, price: float) -> tuple[HeadCandidate, ...]:
        """Without what it takes that budgets of heads are not alike."""
        table = self._table
        if not table.heads:
            return ()
        gains = np.where(table.within, table.saved - price * table.error, -np.inf)
        best = gains.max(-1)
        together = np.where(best > 0, best, 0.0).sum(-1)
        together = np.where((best > 0).any(-1), together, best.max(-1))  # one it takes to run in the kernel
        worth = together - table.paid - self.lost
        at = int(worth.argmax())
        if not worth[at] > 0:
            return ()
        taken = best[at] > 0 if (best[at] > 0).any() else best[at] == best[at].max()
        which = gains[at].argmax(-1)
        found = tuple(head[which[place]] for place, head in enumerate(table.heads) if taken[place])
        return found if (best[at] > 0).any() else found[:1]

    def paid(self, candidates: Iterable[HeadCandidate]) -> float:
        """Seconds of a generation that some heads cost the site beside their own lists.

        The kernel's, what they need, and what it takes that their budgets are not alike.
        """
        chosen = tuple(candidates)
        return self.lost + self.seconds(union(chosen)) + self._uneven(chosen)

    def _uneven(self, chosen: Sequence[HeadCandidate]) -> float:
        if not self.per_spread:
            return 0.0
        taken = [self.of_head - each.saved for each in chosen]
        taken += [self.of_head] * (len(self.heads) - len(taken))
        return self.per_spread * spread(taken) * sum(taken)

    def seconds(self, needs: Needs) -> float:
        """Seconds of a generation that the site takes for what its heads need."""
        return shared_seconds(self.prices, needs, self.steps)

    def _chosen_alike(self, price: float) -> tuple[HeadCandidate, ...]:
        """Of what every head may do, that of most gain together."""
        of_label: dict[Label, list[HeadCandidate]] = {}
        for each in (each for of_head in self.heads for each in of_head):
            of_label.setdefault(each.choice.candidate, []).append(each)
        together = [made for made in of_label.values() if len(made) == len(self.heads)]

        def gain(made: list[HeadCandidate]) -> float:
            return sum(each.gain(price) for each in made) - self.seconds(union(made))

        best = max(together, key=gain, default=[])
        return tuple(best) if gain(best) > max(self.lost, 0.0) else ()

    @cached_property
    def _table(self) -> _Table:
        heads = tuple(filter(None, self.heads))
        shape = (len(heads), max(map(len, heads), default=0))
        saved, error = np.full(shape, -np.inf), np.zeros(shape)
        sets = _unions(each.needs for of_head in heads for each in of_head)
        within = np.zeros((len(sets), *shape), dtype=bool)
        for row, of_head in enumerate(heads):
            for column, each in enumerate(of_head):
                saved[row, column], error[row, column] = each.saved, each.error
                within[:, row, column] = [each.needs <= needs for needs in sets]
        paid = np.array([self.seconds(needs) for needs in sets])
        return _Table(heads, saved, error, within, paid)


@dataclass(frozen=True, eq=False)
class _Table:
    """Candidates ``[H, C]`` as numbers; which are within each of S sets of needs ``[S, H, C]``, and what those cost."""

    heads: tuple[tuple[HeadCandidate, ...], ...]
    saved: Numbers
    error: Numbers
    within: Numbers
    paid: Numbers


def union(candidates: Iterable[HeadCandidate]) -> Needs:
    """All that some heads need."""
    none: Needs = frozenset()
    return reduce(lambda one, other: one | other.needs, candidates, none)


def _unions(needs: Iterable[Needs]) -> list[Needs]:
    """Every union of some of these, the empty one too: what heads may need together."""
    found: dict[Needs, None] = {frozenset(): None}
    for each in dict.fromkeys(needs):
        found |= dict.fromkeys([each | other for other in found])
    return list(found)


def not_worse(candidates: Iterable[HeadCandidate]) -> tuple[HeadCandidate, ...]:
    """Those that save something and that none beats in both and needs no more, by error.

    Where all need the same, they save the more, the larger their error.
    """
    found: list[HeadCandidate] = []
    for each in sorted(candidates, key=lambda each: (each.error, -each.saved, len(each.needs))):
        if each.saved > max((other.saved for other in found if other.needs <= each.needs), default=0.0):
            found.append(each)
    return tuple(found)
