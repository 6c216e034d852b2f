"""What block-sparse attention takes, from what dense attention does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ditopt.errors import InputError

FINDING = ("means", "mass", "error")
INT8 = "int8"
ORDERED = "ordered"
SHARED = (*FINDING, "pooled", "taylor", "kept", INT8, ORDERED)
"""What heads may need that a site computes once a step: blocks found by each of three selectors, means of what is
skipped, the first-order term beside them, results put together with rests that are kept from an earlier step, for int8
scores what is done to keys of all heads, and tokens put into another order and results out of it."""
CLUSTERS = "clusters"
"""What every head whose tokens are in an order of clusters takes by itself: finding them."""
TIMED = (*SHARED, CLUSTERS)
"""What is timed by itself, each for all heads of a site."""
OTHERS = "others"
"""What a site needs once in so many steps whose heads keep rests: a second call of the kernel, for other blocks."""
Need = tuple[str, int]
"""One of ``SHARED``, and once in how many steps."""


def shared_seconds(prices: Mapping[str, float], needs: Iterable[Need], steps: int | None = None) -> float:
    """What a site's needs take together: each in the steps in which some head needs it; unknown ones nothing.

    ``prices`` are of so many ``steps`` in a row, in the first of which all is found; None: of any number of them.

    >>> shared_seconds({"mass": 3.0, "means": 1.0}, [("mass", 3), ("mass", 6), ("means", 1)])
    2.0
    >>> shared_seconds({"mass": 4.0}, [("mass", 3)], steps=4)
    2.0
    """
    often: dict[str, set[int]] = {}
    for name, every in needs:
        often.setdefault(name, set()).add(every)
    taken = 0.0
    for name, periods in often.items():
        count = math.lcm(*periods) if steps is None else steps
        found = sum(any(step % every == 0 for every in periods) for step in range(count))
        taken += prices.get(name, 0.0) * found / count
    return taken


def spread(shares: Sequence[float]) -> float:
    """How unlike the heads' budgets are: their standard deviation over their mean; 0 where all are alike.

    >>> spread([0.5, 0.5]), spread([1.0, 0.0])
    (0.0, 1.0)
    """
    mean = math.fsum(shares) / max(len(shares), 1)
    return math.sqrt(math.fsum((each - mean) ** 2 for each in shares) / len(shares)) / mean if mean > 0 else 0.0


@dataclass(frozen=True)
class Int8Cost:
    """What heads with int8 scores take in the place of others.

    Attributes:
        overhead: seconds for all heads of a site, whatever their lists are: quantising queries and keys.
        efficiency: pairs of queries and keys a second, of those of dense attention.
    """

    overhead: float
    efficiency: float


@dataclass(frozen=True)
class SparseCost:
    """Seconds of an attention site in one step, dense and block-sparse.

    Attributes:
        dense: what dense attention takes.
        overhead: what block-sparse attention takes whatever its lists are: packing queries, writing results.
        efficiency: pairs of queries and keys a second beyond that, of those of dense attention.
        shared: what each of ``TIMED`` takes by itself for all heads; what was not timed is left out.
        int8: of heads with int8 scores; None: there are none, or they take as long.
        per_spread: by what share of it blocks take longer for each unit of the ``spread`` of the heads' densities.

    Raises:
        InputError: dense attention takes no time, something else a negative one, or an efficiency is not above 0.
    """

    dense: float
    overhead: float
    efficiency: float
    shared: Mapping[str, float] = field(default_factory=dict)
    int8: Int8Cost | None = None
    per_spread: float = 0.0

    def __post_init__(self) -> None:
        eight = Int8Cost(0.0, 1.0) if self.int8 is None else self.int8
        others = (self.overhead, eight.overhead, self.per_spread, *self.shared.values())
        if not (min(self.dense, self.efficiency, eight.efficiency) > 0 and all(each >= 0 for each in others)):
            raise InputError(f"{self}: dense and efficiency have to be above 0, what else takes time not below")

    @classmethod
    def measured(
        cls,
        dense: float,
        times: Mapping[float, float],
        shared: Mapping[str, float] | None = None,
        int8: Mapping[float, float] | None = None,
        uneven: tuple[Sequence[float], float] | None = None,
    ) -> SparseCost:
        """The line of least squares through ``times``: seconds by density (0 to 1) of this site on this machine.

        And the one through ``int8``, of heads that all have int8 scores, if it rises less. ``uneven``: densities of
        heads that are not alike, and the seconds that they took.

        Raises:
            InputError: fewer than two densities were timed, or seconds do not rise with them.
        """
        if len(times) < 2:
            raise InputError(
                f"block-sparse attention was timed at {len(times)} densities; it takes two to tell its cost"
            )
        slope, overhead = _line(times)
        if slope <= 1e-6 * max(times.values()):
            raise InputError(
                f"block-sparse attention takes no longer at higher densities: {dict(times)}; time it again"
            )
        found = cls(dense, max(0.0, overhead), dense / slope, dict(shared or {}))
        if uneven is not None and spread(uneven[0]) > 0:
            densities, seconds = uneven
            even = found.seconds(math.fsum(densities) / len(densities))
            longer = (seconds - even) / (even - found.overhead) / spread(densities)
            found = replace(found, per_spread=max(0.0, longer))
        if not int8:
            return found
        of_int8, at_none = _line(int8)
        if not 1e-6 * slope < of_int8 < slope:
            return found
        further = at_none - overhead - found.shared.get(INT8, 0.0)
        return replace(found, int8=Int8Cost(max(0.0, further), dense / of_int8))

    @property
    def prices(self) -> dict[str, float]:
        """Seconds of all that heads may need: what was timed of ``SHARED``, and for ``OTHERS`` the ``overhead``."""
        return {**self.shared, OTHERS: self.overhead}

    def seconds(self, density: float) -> float:
        """What it takes block-sparse; ``density`` is the mean share of blocks that heads attend to, 0 to 1."""
        return self.overhead + self.dense * density / self.efficiency

    def uneven_seconds(self, densities: Sequence[float]) -> float:
        """What heads of such densities take beyond as many alike that have the same mean.

        >>> SparseCost(1.0, 0.1, 0.5, per_spread=0.25).uneven_seconds([1.0, 0.0])
        0.25
        """
        mean = math.fsum(densities) / max(len(densities), 1)
        return self.per_spread * spread(densities) * self.dense * mean / self.efficiency

    def with_clusters(self, density: float) -> float:
        """The density at which a head takes as long as one with clusters does at this one.

        >>> SparseCost(1.0, 0.1, 0.5, {CLUSTERS: 0.2}).with_clusters(0.5)
        0.6
        """
        return density + self.efficiency * self.shared.get(CLUSTERS, 0.0) / self.dense

    def as_plain(self, density: float) -> float:
        """The density at which a head without int8 scores takes as long as one with them does at this one.

        >>> SparseCost(1.0, 0.1, 0.5, int8=Int8Cost(0.2, 1.0)).as_plain(0.5)
        0.35
        """
        if self.int8 is None:
            return density
        return self.efficiency * (density / self.int8.efficiency + self.int8.overhead / self.dense)


def _line(times: Mapping[float, float]) -> tuple[float, float]:
    """Slope and value at 0 of the line of least squares through seconds by density."""
    slope, at_none = np.polyfit(list(times), list(times.values()), 1)
    return float(slope), float(at_none)
