"""Blocks of keys that were chosen once, from calibration prompts, and stand in a file beside the plan."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, model_validator

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Booleans, Integers, Pattern
from ditopt.kernels.patterns.draft import OWN, Share
from ditopt.kernels.patterns.orders import TokenOrder, inverse

Numbers = npt.NDArray[np.floating]
Shares = npt.NDArray[np.float64]


class Listed(BaseModel):
    """Of every block of queries the blocks of keys that had most attention when prompts were profiled; ``OWN`` always.

    ``keep`` is their share of all blocks of keys, rounded up (block top-k), those of ``OWN`` among them. ``mass``: as
    few as held that share of the attention (block top-p), and no more than the share ``most`` of all blocks.
    ``columns``: the same blocks of keys for all queries, that share of all: those with most attention of all queries
    together (vertical stripes, sinks).
    """

    model_config = Pattern.model_config

    kind: Literal["listed"] = "listed"
    keep: Share | None = None
    mass: Share | None = None
    columns: Share | None = None
    most: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _one_of_three(self) -> Listed:
        if [self.keep, self.mass, self.columns].count(None) != 2:
            raise ValueError("exactly one of keep, mass and columns is needed, e.g. {pattern: listed, keep: 0.25}")
        if self.mass is None and "most" in self.model_fields_set:
            raise ValueError("most is a limit for mass; keep and columns are shares of blocks themselves")
        return self

    def room(self, key_blocks: int) -> int:
        """How many of so many blocks of keys are chosen for a block of queries at most."""
        share = next(each for each in (self.keep, self.columns, self.most) if each is not None)
        return max(1, math.ceil(share * key_blocks - 1e-9))

    def everything(self, key_blocks: int) -> bool:
        """Whether it keeps all of so many blocks, whatever their attention."""
        return self.mass is None and self.room(key_blocks) >= key_blocks

    def choose(self, attention: Numbers, always: Booleans) -> Booleans:
        """``[..., Qb, Kb]``: the blocks chosen by sums of attention of that shape, and ``always`` ``[Qb, Kb]``.

        Of equal ones the first is taken before the others.
        """
        known = np.asarray(attention, dtype=np.float64)
        if self.columns is not None:
            known = np.broadcast_to(known.sum(-2, keepdims=True), known.shape)
            first = known
        else:
            first = np.where(always, np.inf, known)
        order = np.argsort(-first, axis=-1, kind="stable")
        taken = np.broadcast_to(np.arange(known.shape[-1]) < self.room(known.shape[-1]), known.shape)
        if self.mass is not None:
            shares = np.take_along_axis(known / np.maximum(known.sum(-1, keepdims=True), 1e-30), order, -1)
            taken = taken & (shares.cumsum(-1) - shares < self.mass)
        found = np.zeros(known.shape, dtype=bool)
        np.put_along_axis(found, order, taken, -1)
        return found | always


def own_blocks(geometry: Geometry, block: int, order: TokenOrder | None = None) -> Booleans:
    """``[Qb, Kb]``: what is kept whatever the attention: the blocks of the query's own tokens, and text."""
    there = None if order is None else order.of_video(geometry, block)
    return OWN.block_map(geometry, block, order=there)


def rescaled(
    kept: Booleans, geometry: Geometry, block: int, to: Geometry, to_block: int, order: TokenOrder | None = None
) -> Booleans:
    """``[Qb, Kb]`` of a geometry ``to``, of blocks ``kept`` in another one: where they lie in space.

    A block keeps as many as the blocks of before that lie there, in proportion: those of most overlap with what these
    kept. Both are of tokens in an ``order`` (None: raster).
    """
    shares = _overlap(geometry, block, to, to_block, order)
    scores = shares @ kept @ shares.T
    lengths = np.ceil(shares @ kept.sum(-1) * (len(shares) / len(kept)) - 1e-9)
    ranked = np.argsort(-scores, axis=-1, kind="stable")
    taken = (np.arange(len(shares)) < lengths[:, None]) & (np.take_along_axis(scores, ranked, -1) > 0)
    found = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(found, ranked, taken, -1)
    return found | own_blocks(to, to_block, order)


def _overlap(geometry: Geometry, block: int, to: Geometry, to_block: int, order: TokenOrder | None) -> Shares:
    """``[blocks of to, blocks of geometry]``: the share of a block's video tokens that lie in each block of before."""
    places = np.stack(np.unravel_index(np.arange(to.video), to.sizes))
    sizes = np.reshape(geometry.sizes, (3, 1)), np.reshape(to.sizes, (3, 1))
    there = np.ravel_multi_index(tuple((2 * places + 1) * sizes[0] // (2 * sizes[1])), geometry.sizes)
    found = np.zeros((-(-to.tokens // to_block), -(-geometry.tokens // block)))
    now, before = _block_of(to, to_block, order), _block_of(geometry, block, order)
    np.add.at(found, (now, before[there]), 1)
    return np.asarray(found / np.maximum(found.sum(1, keepdims=True), 1))


def _block_of(geometry: Geometry, block: int, order: TokenOrder | None) -> Integers:
    """The block of every video token, which are in raster order."""
    places = np.arange(geometry.video) if order is None else inverse(order.of_video(geometry, block))
    return np.asarray((places + (geometry.text if geometry.text_first else 0)) // block)
