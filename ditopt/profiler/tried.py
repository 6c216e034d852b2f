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
from ditopt.kernels.patterns.choice import REST, Pooled, SparseChoice
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.measures import Measure, Numbers, Table
from ditopt.passes.attention import first_order_refusal
from ditopt.profiled_tensors import summed
from ditopt.profiler.cluster_errors import ClusterReader
from ditopt.profiler.draft_blocks import KEPT_BYTES, DraftReader, drafts_of
from ditopt.profiler.kept_errors import KeptReader, kept_of
from ditopt.profiler.linear_branch import LinearReader
from ditopt.profiler.listed_blocks import ListedReader, lists_of, sums_of
from ditopt.profiler.rows import Operands, Part, Place

WITH_REST = ("skip", "spatial", "temporal", "window", "band", "draft", "listed")
"""Patterns that are tried with a rest as well."""
TO_FIRST_ORDER = ({"pattern": "skip"}, {"pattern": "draft", "by": "error"})
"""Those of them that are tried with a rest to first order, too: they have these settings."""
NOTHING = 1e-30
"""A row of which a pattern keeps less mass is taken to have lost all of it: its output is 0."""


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


@dataclass(frozen=True)
class Compensated:
    """Candidates whose rest counts by means of ``pool`` tokens: names, and ``which`` of those without one they are.

    The last ``linear`` of them count it to first order.
    """

    pool: int
    names: tuple[str, ...]
    which: tuple[int, ...]
    linear: int = 0


@lru_cache(maxsize=8)
def compensated_of(names: tuple[str, ...], block: int, pool: int, first_order: bool = True) -> Compensated:
    """Of candidates called ``names``, in blocks of so many keys, those of ``WITH_REST`` with a rest.

    Behind them those of ``TO_FIRST_ORDER`` with one to first order, if there is a kernel for it.
    """
    settings = [json.loads(name) for name in names]
    which = [at for at, each in enumerate(settings) if each["pattern"] in WITH_REST]
    further = [
        at for at in which if first_order and any(each.items() <= settings[at].items() for each in TO_FIRST_ORDER)
    ]
    rests = (Pooled(None if pool == block else pool, first_order=order).to_data() for order in (False, True))
    found = [
        pattern_text({**settings[at], REST: rest})
        for rest, places in zip(rests, (which, further), strict=True)
        for at in places
    ]
    return Compensated(pool, tuple(found), (*which, *further), len(further))


def error_moments(
    sums: Tensor,
    kept: Tensor,
    weights: Tensor,
    pooled: tuple[Tensor, Sequence[int]] | None = None,
    linear: tuple[Tensor, int] | None = None,
) -> Tensor:
    """``[C, E, E]``: weighted second moments of the errors that patterns make in a head's output.

    ``sums`` ``[Kb, q * r, E + 1]`` are of q blocks of r rows (``Part.sums``), ``kept`` ``[q, C, Kb]``, ``weights``
    ``[q, r]``. What a pattern keeps of a row is scaled to sum to one. ``pooled``, sums as those of
    ``Part.pooled``, is what some of the patterns have of the blocks that they do not keep: further errors behind ``C``.
    ``linear``, ``[q * r, E]`` as in ``Part``, is what the last so many of these have, times the mass of that.
    """
    key_blocks, _, width = sums.shape
    blocks = len(kept)
    dense = torch.ones((blocks, 1, key_blocks), device=sums.device)
    picked = torch.cat([dense, kept.to(sums.device, torch.float32)], 1)
    found = [torch.bmm(picked, _by_query_block(sums, blocks))]
    if pooled is not None:
        of_groups, which = pooled
        at = torch.tensor(which, device=sums.device) + 1
        rests = torch.bmm(1 - picked[:, at], _by_query_block(of_groups, blocks))
        if linear is not None:
            behind = rests[:, len(which) - linear[1] :].view(blocks, linear[1], -1, width)
            behind[..., :-1] += behind[..., -1:] * linear[0].view(blocks, 1, -1, width - 1)
        found.append(rests.add_(found[0][:, at]))
    shape = (sum(each.shape[1] for each in found), blocks, sums.shape[1] // blocks, width - 1)
    outputs, begin = torch.empty(shape, device=sums.device), 0
    for each in found:
        end = begin + each.shape[1]
        parts = each.view(blocks, end - begin, -1, width).transpose(0, 1)
        scale = weights.sqrt()[..., None] / parts[..., -1:].clamp(min=NOTHING)
        torch.mul(parts[..., :-1], scale, out=outputs[begin:end])
        begin = end
    rows = outputs[1:].sub_(outputs[:1]).view(len(outputs) - 1, -1, width - 1)
    return torch.bmm(rows.transpose(1, 2), rows)


def _by_query_block(sums: Tensor, blocks: int) -> Tensor:
    """``[Kb, q * r, E + 1]`` -> ``[q, Kb, r * (E + 1)]``."""
    return sums.view(len(sums), blocks, -1).transpose(0, 1)


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
        every, self._with_rests = self._names(listed, fitted)
        self.tries_lists = self.listed is not None and self.listed.tried
        self.tries_linear = self.linear is not None and self.linear.tried
        measured, self.compensated = self._names(
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

    def _names(self, listed: tuple[str, ...], fitted: tuple[str, ...]) -> tuple[tuple[str, ...], Compensated | None]:
        """All candidates with these listed ones and linear rests, and those of them with means."""
        every = (*self.candidates.names, *self.drafts.drafts.names, *listed)
        found, place = None, self.place
        if place.pool:
            linear = first_order_refusal(place.entry.node) is None
            found = compensated_of(every, place.key_block, place.pool, linear)
            every += found.names
        return (*every, *(self.clusters.names if self.clusters is not None else ()), *fitted), found

    @property
    def density(self) -> Numbers:
        """``[C]``: what candidates cost of dense attention: shares of blocks, of drafts the mean over what was seen.

        A rest costs a pair of a query and a group for each group of the sequence.
        """
        found = np.concatenate([self.candidates.density, self.drafts.density])
        if self.listed is not None:
            found = np.concatenate([found, self.listed.density])
        if self._with_rests is not None:
            of_rests = found[[*self._with_rests.which]] + 1 / self._with_rests.pool
            found = np.concatenate([found, np.minimum(of_rests, 1)])
        if self.clusters is not None:
            found = np.concatenate([found, self.clusters.density])
        if self.linear is not None:
            found = np.concatenate([found, np.minimum(found[[*self.linear.which]] + self.linear.further, 1)])
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
        return torch.cat([*found, *([] if fitted is None else [fitted])])

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
