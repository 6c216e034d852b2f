"""Which steps a published system computes: rules that make its schedules from measured features. Numbers only.

A rule says of a whole family of schedules, from slow and near to fast and far, that a search may choose among. What it
looks at is the Gram matrix ``[P, T, T]`` of a feature over the steps, for each of P prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Schedule = tuple[int, ...]
"""The computed steps, ascending, step 0 among them."""

THRESHOLDS = np.geomspace(0.002, 4.0, 120)
"""Of accumulated magnitude error: what may be chosen; most give schedules that others give, too."""


class StepRule(Protocol):
    """A published rule of which steps are computed."""

    @property
    def text(self) -> str:
        """The rule in words."""

    def schedules(self, gram: Numbers) -> Iterator[Schedule]:
        """The schedules that the rule can give; the same one may come more than once."""


@dataclass(frozen=True)
class Every:
    """The first steps are computed, and every N-th behind them, for every N from 2 on (TaylorSeer, FORA)."""

    first: int

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"the first {self.first} steps and every N-th behind them"

    def schedules(self, gram: Numbers) -> Iterator[Schedule]:
        """One for each N."""
        steps = gram.shape[-1]
        first = min(self.first, steps)
        for interval in range(2, steps - first + 2):
            yield (*range(first), *range(first - 1 + interval, steps, interval))


@dataclass(frozen=True)
class Magnitude:
    """Steps are skipped while the error of the feature's magnitude, added up over them, is small (MagCache).

    Behind the first steps, each step multiplies the ratio of magnitudes since the computed one, and adds by how much
    that is off from 1. It is skipped while the sum is at most a threshold and at most ``most`` steps are skipped in a
    row; else it is computed, and ratio and sum begin anew.
    """

    retained: float
    most: tuple[int, ...]

    @property
    def text(self) -> str:
        """The rule in words."""
        most = ", ".join(map(str, self.most))
        return (
            f"the first {self.retained:.0%} of steps, then skipped while the magnitude's errors add up to no more than "
            f"a threshold, at most {most} in a row"
        )

    def schedules(self, gram: Numbers) -> Iterator[Schedule]:
        """One for each threshold and number of steps in a row."""
        ratios, first = magnitude_ratios(gram), max(int(self.retained * gram.shape[-1]), 1)
        for most in self.most:
            for threshold in THRESHOLDS:
                yield accumulated(ratios, first, float(threshold), most)


@dataclass(frozen=True)
class Segments:
    """The schedule is cut into segments of which the first step is computed, by a dynamic programme (CacheQuant).

    It minimises the sum of distances of every feature to that of its segment's first step. Of K segments each has from
    half to twice as many steps as they have on the average.
    """

    @property
    def text(self) -> str:
        """The rule in words."""
        return "the first of each of K segments, by the least sum of distances to it"

    def schedules(self, gram: Numbers) -> Iterator[Schedule]:
        """One for each K that segments of such lengths can make up."""
        costs, steps = distances(gram), gram.shape[-1]
        for count in range(1, steps):
            longest = int(2 * steps / count)
            found = cut_into(costs, count, max(-(-steps // (2 * count)), 1), longest)
            if found is not None:
                yield found


def magnitude_ratios(gram: Numbers) -> list[float]:
    """``[T]``: the mean over prompts of a feature's norm over that of the step before; 1 in step 0."""
    norms = np.sqrt(np.maximum(np.einsum("ptt->pt", gram), 0.0))
    ratios = (norms[:, 1:] / np.maximum(norms[:, :-1], 1e-30)).mean(axis=0)
    return [1.0, *map(float, ratios)]


def accumulated(ratios: Sequence[float], first: int, threshold: float, most: int) -> Schedule:
    """The steps that are computed where the others are skipped by their accumulated magnitude error."""
    computed = list(range(first))
    ratio, error, skipped = 1.0, 0.0, 0
    for step in range(first, len(ratios)):
        ratio *= ratios[step]
        error += abs(1 - ratio)
        skipped += 1
        if error > threshold or skipped > most:
            computed.append(step)
            ratio, error, skipped = 1.0, 0.0, 0
    return tuple(computed)


def distances(gram: Numbers) -> Numbers:
    """``[T, T]``: the mean over prompts of the distance of two steps' features."""
    squares = np.einsum("ptt->pt", gram)
    return np.asarray(np.sqrt(np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * gram, 0.0)).mean(axis=0))


def cut_into(costs: Numbers, count: int, shortest: int, longest: int) -> Schedule | None:
    """The first steps of ``count`` segments of least cost, of ``shortest`` to ``longest`` steps; None: there are none.

    A segment costs the sum of ``costs[first, step]`` over its steps.
    """
    steps = len(costs)
    least = np.full((count + 1, steps + 1), np.inf)
    begun = np.zeros((count + 1, steps + 1), dtype=int)
    least[0, 0] = 0.0
    for used in range(1, count + 1):
        for first in range(steps):
            if not np.isfinite(least[used - 1, first]):
                continue
            for end in range(first + shortest, min(first + longest, steps) + 1):
                cost = least[used - 1, first] + float(costs[first, first:end].sum())
                if cost < least[used, end]:
                    least[used, end], begun[used, end] = cost, first
    if not np.isfinite(least[count, steps]):
        return None
    found, end = [], steps
    for used in range(count, 0, -1):
        end = int(begun[used, end])
        found.append(end)
    return tuple(reversed(found))
