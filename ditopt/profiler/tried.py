"""The candidates of a site whose blocks are of tokens in one order: their names, what they keep, and their errors.

A block pattern's output is a sum over the blocks of keys that it keeps. So the probabilities of a row, and these times
the values, are summed by block of keys once; every candidate is a small product with these. Where the blocks that it
does not keep count by means, sums of what means give are multiplied with the complement.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import candidates
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.measures import Measure, Numbers, Table
from ditopt.passes.attention import first_order_refusal
from ditopt.profiled_tensors import summed
from ditopt.profiler.cluster_errors import ClusterReader
from ditopt.profiler.draft_blocks import KEPT_BYTES, DraftReader, drafts_of
from ditopt.profiler.int8_errors import Int8Candidates, int8_of
from ditopt.profiler.kept_errors import KeptReader, kept_of
from ditopt.profiler.linear_branch import LinearReader
from ditopt.profiler.listed_blocks import ListedReader, lists_of, sums_of
from ditopt.profiler.moments import Compensated, compensated_of, error_moments
from ditopt.profiler.rows import Operands, Part, Place


@dataclass(frozen=True)
class Candidates:
    """Patterns for a site: their names, the blocks ``kept`` ``[Qb, C, Kb]`` (boolean), and the share of all blocks."""

    names: tuple[str, ...]
    kept: Tensor
    density: Numbers


@lru_cache(maxsize=8)
def candidates_of(geometry: Geometry, block: int, order: TokenOrder | None = None) -> Candidates:
    """The candidates of a geometry, in blocks of so many queries and keys in an order (None: raster)."""
    tried = candidates(geometry, block, order)
    there = None if order is None else order.of_video(geometry, block)
    maps = np.stack([pattern.block_map(geometry, block, order=there) for pattern in tried], axis=1)
    names = tuple(pattern_text(SparseChoice(pattern, order=order).to_data()) for pattern in tried)
    return Candidates(names, torch.from_numpy(maps), maps.mean(axis=(0, 2)).astype(np.float32))


class Tried:
    """The candidates of a site whose blocks are of tokens in one order, and what they have of the calls seen.

    ``starts`` are those of the periods in which lists are chosen, none if they are not; ``before`` the tables of
    earlier prompts that choose them, and that ``linear`` rests are fitted to. Where there are none, errors of these
    candidates are NaN. ``steps`` and ``branches`` are those of a generation.
    """

    def __init__(
        self,
        place: Place,
        geometry: Geometry,
        rows: tuple[int, int],
        starts: Sequence[int] = (),
        before: Sequence[Table] = (),
        *,
        linear: bool = False,
        steps: int = 1,
        branches: int = 1,
    ) -> None:
        block, order = place.sample.block, place.order
        self.place = place
        self.candidates = candidates_of(geometry, block, order)
        drafts = drafts_of(geometry, block, order, steps)
        self.held = drafts.bytes_kept(place.entry.site.heads, branches)
        """Bytes of blocks that would be kept between steps; with more than ``KEPT_BYTES`` none are."""
        if self.held > KEPT_BYTES:
            drafts = drafts_of(geometry, block, order)
        self.drafts = DraftReader(drafts)
        self.clusters = ClusterReader(geometry, place.key_block) if order is None else None
        self.listed = self.linear = None
        if starts:
            sums = summed(before, sums_of(place))
            self.listed = ListedReader(place, lists_of(geometry, block, order), tuple(starts), sums)
        if starts and linear and place.pool:
            among = (*self.candidates.names, *self.drafts.drafts.names)
            self.linear = LinearReader(place, among, starts, before)
        listed = self.listed.lists.names if self.listed is not None else ()
        fitted = self.linear.names if self.linear is not None else ()
        every, self._with_rests, self._with_int8 = self._names(listed, fitted)
        self.tries_lists = self.listed is not None and self.listed.tried
        self.tries_linear = self.linear is not None and self.linear.tried
        measured, self.compensated, self.int8 = self._names(
            listed if self.tries_lists else (), fitted if self.tries_linear else ()
        )
        # What means the same in every order has its numbers in raster order.
        self.told = tuple(
            at
            for at, name in enumerate(every)
            if order is None or not SparseChoice.from_data(json.loads(name)).in_any_order
        )
        self.every = len(every)
        self._measured = [every.index(name) for name in measured]
        self.weights = place.sample.weights(*rows, place.sequence)
        self.kept_rests = KeptReader(
            kept_of(self.candidates.names, order is not None),
            self.candidates.kept,
            place.sample,
            self.weights,
            place.entry.site.heads,
        )
        self.names = (*(every[at] for at in self.told), *self.kept_rests.names)
        self._errors: dict[int, Tensor] = {}

    def _names(
        self, listed: tuple[str, ...], fitted: tuple[str, ...]
    ) -> tuple[tuple[str, ...], Compensated | None, Int8Candidates | None]:
        """All candidates with these listed ones and linear rests, those of them with means, those with int8 scores."""
        own = (*self.candidates.names, *self.drafts.drafts.names, *listed)
        every, found, eight, place = own, None, None, self.place
        linear = first_order_refusal(place.entry.node) is None
        if place.pool:
            found = compensated_of(own, place.key_block, place.pool, linear)
            every += found.names
        every += (*(self.clusters.names if self.clusters is not None else ()), *fitted)
        if place.int8:
            eight = int8_of(own, place.order is None, place.key_block, place.pool, linear)
            every += eight.names
        return every, found, eight

    @property
    def density(self) -> Numbers:
        """``[C]``: what candidates cost of dense attention: shares of blocks, of drafts the mean over what was seen."""
        found = np.concatenate([self.candidates.density, self.drafts.density])
        if self.listed is not None:
            found = np.concatenate([found, self.listed.density])
        own = found
        if self._with_rests is not None:
            found = np.concatenate([found, self._with_rests.density(own)])
        if self.clusters is not None:
            found = np.concatenate([found, self.clusters.density])
        if self.linear is not None:
            found = np.concatenate([found, np.minimum(found[[*self.linear.which]] + self.linear.further, 1)])
        if self._with_int8 is not None:
            found = np.concatenate([found, self._with_int8.density(own)])
        return np.concatenate([found[[*self.told]], self.kept_rests.density])

    def kept(self, part: Part) -> Tensor:
        """``[q, C, Kb]``: what the candidates without a rest keep of some rows of a head."""
        found = self.drafts.kept(part.head, part.step, part.branch)[part.blocks]
        each = [self.candidates.kept[part.blocks].to(found.device), found]
        if self.listed is not None and self.tries_lists:
            each.append(self.listed.kept(part).to(found.device))
        return torch.cat(each, 1)

    def start(self, operands: Operands, index: int) -> None:
        """Remember what heads would find their blocks by."""
        for reader in (self.drafts, self.clusters, self.linear):
            if reader is not None:
                reader.start(operands, index)

    def finish(self, branch: int) -> None:
        """Let go of a branch's operands."""
        self.kept_rests.finish(branch)
        for reader in (self.drafts, self.clusters, self.linear):
            if reader is not None:
                reader.finish()

    def take(self, part: Part) -> None:
        """Add up the errors of some rows."""
        assert part.sums is not None
        if part.branch not in self._errors:
            width = part.sums.shape[-1] - 1
            shape = (self.place.entry.site.heads, len(self._measured), width, width)
            self._errors[part.branch] = torch.zeros(shape, device=part.sums.device)
        self._errors[part.branch][part.head] += self._moments(part, part.sums)
        self.kept_rests.take(part)
        if self.listed is not None:
            self.listed.take(part)

    def _moments(self, part: Part, sums: Tensor) -> Tensor:
        """``[C, E, E]``: second moments of the errors of all candidates in some rows of a head."""
        weights = self.weights[part.blocks].to(sums.device)
        pooled = linear = None
        if self.compensated is not None and part.pooled is not None and part.linear is not None:
            pooled, linear = (part.pooled, self.compensated.which), (part.linear, self.compensated.linear)
        kept = self.kept(part)
        found = [error_moments(sums, kept, weights, pooled, linear)]
        if self.clusters is not None and self.clusters.names:
            of_clusters, of_rows = self.clusters.sums(part, self.place.sample)
            found.append(error_moments(of_clusters, of_rows, weights.view(-1, 1)))
        fitted = self.linear.take(part, kept, weights) if self.linear is not None else None
        found += [] if fitted is None else [fitted]
        if self.int8 is not None:
            found.append(self.int8.moments(part, kept, weights))
        return torch.cat(found)

    def measures(self) -> dict[str, Measure]:
        """What later prompts choose lists by, and fit linear rests to."""
        readers = (self.listed, self.linear)
        return {name: each for reader in readers if reader is not None for name, each in reader.measures().items()}

    def errors(self, branch: int) -> Tensor:
        """``[H, C, E, E]``: second moments of the errors in a branch's call, which are then forgotten; NaN: unknown.

        Those of candidates with a kept rest, the last ones, are told by ``kept_rests``.
        """
        found = self._errors.pop(branch)
        whole = found.new_full((len(found), self.every, *found.shape[2:]), torch.nan)
        whole[:, self._measured] = found
        return whole[:, [*self.told]]
