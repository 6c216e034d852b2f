"""Candidates whose blocks are chosen once, from the attention of earlier prompts, and are the same in every call.

Each prompt adds up the attention of its rows by blocks of queries and keys, head by head, in up to three periods of the
schedule. What one prompt chooses is tried on the next, so that every error is one of a prompt that had no say in it;
under the first prompt there is none. A plan's lists are chosen by all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.head_tensors import period_of
from ditopt.kernels.block_sparse_attention.lists import blocks
from ditopt.kernels.patterns._infra import Booleans
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import Listed, own_blocks
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.measures import Measure, Numbers
from ditopt.profiled_tensors import SUMS
from ditopt.profiler.maps import pooled_rows
from ditopt.profiler.rows import Part, Place

TRIED = (Listed(keep=0.5), Listed(keep=0.25), Listed(keep=0.125), Listed(mass=0.9), Listed(columns=0.125))
PERIODS = 3
"""Of the schedule: each has lists of its own."""
MOST_BYTES = 256 << 20
"""Of the sums of all sites of a network under one prompt; with more, periods are fewer, and at last none is tried."""
AXES = ("prompt", "period", "head", "query_block", "key_block")


@dataclass(frozen=True)
class Lists:
    """Listed patterns for a site: their names, and in blocks of ``block`` tokens what all keep, ``[Qb, Kb]``."""

    names: tuple[str, ...]
    patterns: tuple[Listed, ...]
    always: Booleans


@lru_cache(maxsize=8)
def lists_of(geometry: Geometry, block: int, order: TokenOrder | None = None) -> Lists:
    """Those of ``TRIED`` that leave something out, and of those with room for as many blocks only the first.

    Blocks are of tokens in an order, None: raster.
    """
    count, always = blocks(geometry.tokens, block), own_blocks(geometry, block, order)
    found: dict[tuple[int, bool, bool], Listed] = {}
    for each in TRIED:
        if not (each.everything(count) or always.all()):
            found.setdefault((each.room(count), each.mass is None, each.columns is None), each)
    names = tuple(pattern_text(SparseChoice(each, order=order).to_data()) for each in found.values())
    return Lists(names, tuple(found.values()), always)


def period_starts(steps: int, periods: int) -> tuple[int, ...]:
    """The first steps of so many periods of a schedule, or of as many as it has steps.

    >>> period_starts(8, 3)
    (0, 3, 6)
    """
    return tuple(int(part[0]) for part in np.array_split(np.arange(steps), min(periods, steps)))


def periods_that_fit(places: Sequence[Place], steps: int) -> tuple[int, ...]:
    """The starts of as many periods as the sums of all these sites may have; none where they are too large."""
    sizes = (place.entry.site.heads * place.sample.blocks**2 * 2 for place in places)  # float16
    each = sum(sizes)
    count = next((count for count in range(PERIODS, 0, -1) if count * each <= MOST_BYTES), 0)
    return period_starts(steps, count) if count else ()


def sums_of(place: Place) -> str:
    """The measure with the sums of a place."""
    return SUMS[place.order is not None]


@dataclass
class ListedReader:
    """What listed patterns keep at a site; ``before`` are the sums of earlier prompts, ``starts`` those of periods."""

    place: Place
    lists: Lists
    starts: tuple[int, ...]
    before: Numbers | None = None
    _latest: tuple[int, int, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        heads, count = self.place.entry.site.heads, self.place.sample.blocks
        self.sums = np.zeros((len(self.starts), heads, count, count), dtype=np.float32)
        self._calls = np.zeros(len(self.starts))

    @property
    def tried(self) -> bool:
        """Whether there are candidates, and earlier prompts to choose them by."""
        return self.before is not None and bool(self.lists.names)

    def take(self, part: Part) -> None:
        """Add up the attention of some rows."""
        if self.lists.names:
            sample, period = self.place.sample, period_of(self.starts, part.step)
            real = sample.real[part.blocks].to(part.mass.device)
            pooled = pooled_rows(part.mass.view(len(real), sample.each, -1), real)
            self.sums[period, part.head, part.blocks] += pooled.cpu().numpy()
            self._calls[period] += part.head == 0 and not part.blocks.start

    def kept(self, part: Part) -> Tensor:
        """``[q, L, Kb]`` boolean: what each pattern keeps of some rows of a head."""
        assert self.before is not None, "there is nothing to choose by"
        period = period_of(self.starts, part.step)
        if self._latest is None or self._latest[:2] != (period, part.head):
            found = chosen(self.lists, self.before[period, part.head])
            self._latest = period, part.head, torch.from_numpy(found).transpose(0, 1)
        return self._latest[2][part.blocks]

    @property
    def density(self) -> Numbers:
        """``[L]``: the share of blocks of what all prompts so far choose, mean over heads and periods."""
        known = self.sums if self.before is None else self.sums + self.before
        if not known.any() or not self.lists.names:
            count = self.place.sample.blocks
            return np.asarray([each.room(count) / count for each in self.lists.patterns], dtype=np.float32)
        shares = [chosen(self.lists, of_head).mean((1, 2)) for of_period in known for of_head in of_period]
        return np.asarray(np.mean(shares, axis=0), dtype=np.float32)

    def measures(self) -> dict[str, Measure]:
        """The sums of this prompt over its calls, for the prompts behind it and for the plan."""
        if not self.lists.names:
            return {}
        means = self.sums / np.maximum(self._calls, 1)[:, None, None, None]
        return {sums_of(self.place): Measure(AXES, means.astype(np.float16)[None])}


def chosen(lists: Lists, attention: npt.NDArray[np.floating]) -> Booleans:
    """``[L, Qb, Kb]``: what each pattern keeps by the sums ``[Qb, Kb]`` of a head."""
    return np.stack([each.choose(attention, lists.always) for each in lists.patterns])
