"""What a pattern is, and how it becomes a map of blocks for any geometry, block size and token order.

Tokens are held as runs: tokens of one block that follow each other along one axis, so that a run is a box. A pattern
tells which boxes reach which; so maps are exact, and a sequence of 118,000 tokens takes millions of comparisons and not
ten billion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from ditopt.errors import InputError
from ditopt.geometry import Geometry

Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
AXES = FRAMES, ROWS, COLUMNS = 0, 1, 2
SLAB = 1 << 22
"""So many pairs of runs are compared at once."""


def whole(tokens: npt.ArrayLike) -> Integers:
    """Tokens of sizes that shares of a geometry give: a third of 9 is 3, whatever rounding made of it."""
    return np.floor(np.asarray(tokens) + 1e-9).astype(np.int64)


@dataclass(frozen=True)
class Boxes:
    """Runs of video tokens: ``first`` and ``last`` ``[3, N]`` are coordinates (frame, row, column), ends included."""

    first: Integers
    last: Integers

    def gap(self, other: Boxes, axis: int, unit: int = 1) -> Integers:
        """``[N, M]``: how far apart boxes are along an axis, in tiles of ``unit`` tokens; 0 where they share one."""
        start, end = (part[axis] // unit for part in (self.first, self.last))
        begin, stop = (part[axis] // unit for part in (other.first, other.last))
        return np.asarray(np.maximum(np.maximum(begin - end[:, None], start[:, None] - stop), 0))

    def near(self, other: Boxes, sizes: Sequence[int], reach: Integers) -> Booleans:
        """``[N, M]``: whether boxes that run along columns are at most ``reach`` places apart in raster order.

        ``sizes`` are those of the axes that count: of all three, or of rows and columns for places in frames.
        """
        (begin, end), (first, last) = self._spans(sizes), other._spans(sizes)
        return np.asarray((first <= end[:, None] + reach) & (last >= begin[:, None] - reach))

    def _spans(self, sizes: Sequence[int]) -> tuple[Integers, Integers]:
        """First and last place of each box."""
        axes = list(AXES[-len(sizes) :])
        first, last = (np.ravel_multi_index(tuple(part[axes]), tuple(sizes)) for part in (self.first, self.last))
        return np.asarray(first), np.asarray(last)

    def some(self, where: slice) -> Boxes:
        """Some of the boxes."""
        return Boxes(self.first[:, where], self.last[:, where])


class Pattern(BaseModel, ABC):
    """Which video tokens attend to which; parameters are in tokens of the geometry's axes.

    Text, where a sequence has some, attends to everything and is attended to by everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def separable(self) -> bool:
        """Whether it speaks of each axis by itself, so that boxes may run along any; others run along columns only."""
        return True

    @abstractmethod
    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """``[N, M]``: whether some token of a box of queries attends to some token of a box of keys."""

    def block_map(
        self, geometry: Geometry, query_block: int, key_block: int | None = None, order: Integers | None = None
    ) -> Booleans:
        """``[Qb, Kb]``: the blocks in which some query attends to some key.

        ``order`` is a permutation of the video tokens (``orders``): what stands where in the sequence; None is raster
        order. Blocks are of the whole sequence, text included, so the last one may be short.

        Raises:
            InputError: a block has no token, or the order is no permutation.
        """
        key_block = query_block if key_block is None else key_block
        if min(query_block, key_block) < 1:
            raise InputError(f"blocks of {query_block} queries and {key_block} keys: both have to be at least 1")
        if order is not None and not np.array_equal(np.sort(order), np.arange(geometry.video)):
            raise InputError(f"the order is no permutation of the {geometry.video} tokens of {geometry}")
        queries, query_blocks, query_text = _in_blocks(geometry, query_block, order, self.separable)
        keys, key_blocks, key_text = _in_blocks(geometry, key_block, order, self.separable)
        found = np.zeros((len(query_text), len(key_text)), dtype=bool)
        step = max(1, SLAB // max(len(key_blocks), 1))
        starts = np.flatnonzero(np.diff(key_blocks, prepend=-1))
        for begin in range(0, len(query_blocks), step):
            part = slice(begin, begin + step)
            reached = np.logical_or.reduceat(self.reaches(queries.some(part), keys, geometry), starts, axis=1)
            at, rows = np.unique(query_blocks[part], return_index=True)
            found[np.ix_(at, key_blocks[starts])] |= np.logical_or.reduceat(reached, rows, axis=0)
        found[query_text] = True
        found[:, key_text] = True
        return found


def _in_blocks(
    geometry: Geometry, block: int, order: Integers | None, separable: bool
) -> tuple[Boxes, Integers, Booleans]:
    """The runs of a sequence, the block of each, and which blocks hold text."""
    before = geometry.text if geometry.text_first else 0
    places = before + np.arange(geometry.video)
    raster = np.arange(geometry.video)
    # A block is the same in any order of its tokens: that which has fewer runs will do.
    tried = [raster] if order is None else [order, order[np.lexsort((order, places // block))]]
    sequence, breaks = min(
        ((each, _breaks(each, geometry, places // block, separable)) for each in tried),
        key=lambda found: found[1].sum(),
    )
    coordinates = np.stack(np.unravel_index(sequence, geometry.sizes))
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    ends = np.concatenate([starts[1:] - 1, [geometry.video - 1]])
    total = -(-geometry.tokens // block)
    text = np.zeros(total, dtype=bool)
    if geometry.text:
        first = 0 if geometry.text_first else geometry.video
        text[first // block : -(-(first + geometry.text) // block)] = True
    return Boxes(coordinates[:, starts], coordinates[:, ends]), places[starts] // block, text


def _breaks(sequence: Integers, geometry: Geometry, block_of: Integers, separable: bool) -> Booleans:
    """``[N - 1]``: between which tokens of a sequence a run ends."""
    moves = np.diff(np.stack(np.unravel_index(sequence, geometry.sizes)), axis=1)
    unit = np.abs(moves).sum(0) == 1
    along = np.where(unit & (moves.sum(0) == 1), np.argmax(moves != 0, axis=0), -1)
    if not separable:
        along = np.where(along == COLUMNS, along, -1)
    breaks = (along < 0) | (np.diff(block_of) != 0)
    turned = ~breaks[1:] & ~breaks[:-1] & (along[1:] != along[:-1])
    breaks[1:] |= turned  # a box runs along one axis; the token after a turn begins another
    return np.asarray(breaks)
