"""The rows of attention maps that are looked at: which queries, their exact probabilities, and who reads them.

A map of all queries and keys is never made. Of every block of queries some rows are taken, and of these the exact
probabilities, head by head and a few blocks at a time. Collectors that look at the same site read the same rows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.int8 import Int8Keys, quantised_keys, scores_of
from ditopt.kernels.block_sparse_attention.pooled import moments
from ditopt.kernels.ops import SETTINGS, mask_mismatch
from ditopt.kernels.patterns.candidates import block_for
from ditopt.kernels.patterns.choice import LEAST_POOL
from ditopt.kernels.patterns.orders import TokenOrder, compact_order
from ditopt.passes.attention import int8_scores_refusal, rest_refusal, special
from ditopt.profiler.interpret import Collector, Moment, Seen, of_branches
from ditopt.profiler.places import Attention, attentions
from ditopt.profiler.sample import Sample, sample_rows
from ditopt.trace import SDPA_ARGUMENTS, Trace

SLAB = 1 << 20
"""So many probabilities are held at once, where a row has no more."""
HIDDEN = -1e30
"""The score of a key that a mask hides: as good as minus infinity, but times its probability it is 0."""
FINER = 4
"""Groups whose means are tried have this part of the tokens of a block of keys."""


def anchor_steps(steps: int, count: int = 6) -> tuple[int, ...]:
    """At most ``count`` steps of ``steps``, spread evenly, the first and the last among them.

    >>> anchor_steps(30)
    (0, 6, 12, 17, 23, 29)
    """
    return tuple(int(step) for step in np.unique(np.linspace(0, steps - 1, min(count, steps)).round().astype(int)))


@dataclass(frozen=True)
class Operands:
    """What one attention call computes with: ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]``, and settings."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float
    grouped: bool

    @classmethod
    def of(cls, arguments: Sequence[Any], settings: Mapping[str, Any]) -> Operands:
        """Those of a node of ``ditopt::attention``."""
        given: dict[str, Any] = SETTINGS | dict(zip(SDPA_ARGUMENTS, arguments, strict=False)) | dict(settings)
        query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
        scale = given["scale"] if given["scale"] is not None else query.shape[-1] ** -0.5
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        return cls(query, key, value, mask, given["dropout_p"], given["is_causal"], scale, given["enable_gqa"])

    def in_order(self, order: Tensor) -> Operands:
        """The same with tokens in an order ``[S]``: which one stands where; of self-attention without a mask."""
        assert self.mask is None and not self.causal, "a mask is of tokens in raster order"
        there = order.to(self.query.device)
        query, key, value = (part.index_select(2, there) for part in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def group(self, head: int) -> int:
        """The head of keys and values that belongs to a head of queries."""
        return head * int(self.key.shape[1]) // int(self.query.shape[1])

    def mask_rows(self, index: int, head: int, rows: Tensor) -> Tensor:
        """``[r or 1, L or 1]``: what a mask says of some rows."""
        assert self.mask is not None
        sizes = self.mask.shape
        of_head = self.mask[index if sizes[0] > 1 else 0, head if sizes[1] > 1 else 0]
        return of_head[rows] if sizes[2] > 1 else of_head

    def scores(self, index: int, head: int, rows: Tensor, keys: Tensor) -> Tensor:
        """``[r, Lp]`` float32: scaled and masked scores; ``keys`` ``[Lp, D]`` are the head's, filled up behind."""
        return self.masked((self.query[index, head, rows].float() * self.scale) @ keys.T, index, head, rows)

    def int8_scores(self, index: int, head: int, rows: Tensor, keys: Int8Keys, key_block: int, length: int) -> Tensor:
        """``[r, length]`` float32: as ``scores``, of the head's keys as int8, in blocks of so many tokens."""
        queries = self.query[index, head, rows].float()
        found = scores_of(queries[None, None], keys, key_block)[0, 0].mul_(self.scale)
        return self.masked(F.pad(found, (0, length - found.shape[1])), index, head, rows)

    def masked(self, found: Tensor, index: int, head: int, rows: Tensor) -> Tensor:
        """Scaled scores ``[r, Lp]`` of some rows, and ``HIDDEN`` where keys are hidden or none; they are changed."""
        length = int(self.key.shape[-2])
        if self.mask is not None:
            mask = self.mask_rows(index, head, rows)
            if mask.dtype == torch.bool:
                found[:, :length].masked_fill_(~mask, HIDDEN)
            else:
                found[:, :length].add_(mask.float()).clamp_(min=HIDDEN)
        if self.causal:
            found.masked_fill_(torch.arange(found.shape[1], device=rows.device) > rows[:, None], HIDDEN)
        found[:, length:] = HIDDEN
        return found


def refusal(operands: Operands, result: Tensor, samples: Sequence[int], rows: Tensor) -> str | None:
    """Why the rows of an attention call cannot be looked at; None if they can."""
    query, key = operands.query, operands.key
    if query.ndim != 4 or key.ndim != 4:
        return f"queries of shape {list(query.shape)} are not [B, H, S, D]"
    if key.shape[1] != query.shape[1] and (not operands.grouped or query.shape[1] % key.shape[1]):
        return f"{query.shape[1]} heads of queries and {key.shape[1]} of keys"
    if operands.dropout > 0:
        return f"attention with dropout ({operands.dropout:g})"
    reason = _mask_refusal(operands, samples, rows) if operands.mask is not None else None
    if reason is None and not all(bool(result[index, :, rows].isfinite().all()) for index in samples):
        return "its output has values that are not finite"
    return reason


def _mask_refusal(operands: Operands, samples: Sequence[int], rows: Tensor) -> str | None:
    mask = operands.mask
    assert mask is not None
    wrong = mask_mismatch(operands.query, operands.key, mask)
    if wrong is not None:
        return wrong
    for index in samples if mask.shape[0] > 1 else (0,):
        for head in range(mask.shape[1]):
            part = operands.mask_rows(index, head, rows)
            if mask.dtype != torch.bool and bool((part.isnan() | (part == math.inf)).any()):
                return "a bias with NaN or infinity"
            seen = part if mask.dtype == torch.bool else part > HIDDEN
            if not bool(seen.any(-1).all()):
                return "rows that are wholly masked"
    return None


@dataclass(frozen=True)
class Place:
    """An attention site as it is looked at.

    ``geometry`` is that of its tokens, None where queries or keys are others; ``video`` the first and past the last
    query that is no text. Blocks of keys have ``key_block`` tokens; where they can count by means, too, these are of
    ``pool`` tokens, else that is 0. Rows, blocks and means are of tokens in an ``order``; None: raster. ``int8``: there
    is a kernel with int8 scores for it.
    """

    entry: Attention
    geometry: Geometry | None
    sample: Sample
    key_block: int
    video: tuple[int, int]
    pool: int = 0
    order: TokenOrder | None = None
    int8: bool = False

    @property
    def sequence(self) -> Tensor | None:
        """``[S]``: which token stands where in its order; None: each at its own place."""
        if self.order is None or self.geometry is None:
            return None
        return torch.from_numpy(self.order.of_sequence(self.geometry, self.key_block))

    @property
    def name(self) -> str:
        """The site's name."""
        return self.entry.site.name

    @property
    def kind(self) -> str:
        """``self``, ``cross`` or ``joint`` (text and video in one sequence)."""
        if self.entry.cross:
            return "cross"
        text = self.geometry.text if self.geometry is not None else 0
        apart = self.entry.rows != (0, self.entry.site.queries)
        return "joint" if text or apart else "self"

    @property
    def line(self) -> tuple[int, int] | None:
        """The first and past the last token of the sequence that is both queries and keys; None where there is none."""
        site = self.entry.site
        return self.video if not self.entry.cross and site.queries == site.keys else None


def place_of(entry: Attention, geometry: Geometry | None) -> Place:
    """How a site is looked at, if self-attention's tokens have this geometry; None: they stand in a line."""
    site = entry.site
    fits = None
    if not entry.cross and site.queries == site.keys:
        fits = (geometry or Geometry(1, 1, site.queries)).of_tokens(site.queries)
    before = fits.text if fits is not None and fits.text_first else 0
    video = (before, before + fits.video) if fits is not None else (0, site.queries)
    block = block_for(site.queries)
    keys = block if site.queries == site.keys else max(1, -(-site.keys // 128))
    pool = pool_size(block) if fits is not None and rest_refusal(entry.node) is None else 0
    int8 = fits is not None and int8_scores_refusal(entry.node) is None
    return Place(entry, fits, sample_rows(site.queries, block), keys, video, pool, int8=int8)


def ordered(place: Place) -> Place | None:
    """The place with its tokens in the order that is tried beside raster order; None where none is.

    That is where there is a mask, which is read in raster order only, and where tokens stand in a line or alone in a
    block.
    """
    if place.geometry is None or special(place.entry.node) is not None:
        return None
    order = compact_order(place.geometry, place.key_block)
    return None if order is None else replace(place, order=order)


def pool_size(block: int) -> int:
    """Tokens of the groups that are tried in blocks of so many keys: a quarter of the block where that will do.

    >>> pool_size(64), pool_size(4)
    (16, 4)
    """
    return block // FINER if block // FINER >= LEAST_POOL else block


@dataclass(frozen=True)
class Part:
    """Some rows of one head. ``blocks`` are their blocks of queries, ``where`` their places among a sample's rows.

    ``probabilities`` are ``[r, Lp]``, 0 past the last key; ``lse`` and ``entropy`` (nats) ``[r]``; ``mass`` by block of
    keys ``[r, Kb]``; ``sums`` of probabilities times values, and times 1 behind them, ``[Kb, r, E + 1]``, if some
    reader asked for them; and ``pooled`` the same, had the mean of each group of the place's ``pool`` tokens its
    probability times its tokens. ``linear`` ``[r, E]`` is what a rest to first order adds, were all mass in it.
    ``int8`` is as ``sums``, of int8 scores, over the exact ones' sum: so its mass is 1 but for rounding.
    """

    step: int
    branch: int
    head: int
    blocks: slice
    where: slice
    probabilities: Tensor
    lse: Tensor
    entropy: Tensor
    mass: Tensor
    sums: Tensor | None
    pooled: Tensor | None = None
    linear: Tensor | None = None
    int8: Tensor | None = None


class Reads(Enum):
    """What a reader needs of a site: nothing, probabilities, or sums with values too."""

    NOTHING, PROBABILITIES, SUMS = range(3)


class RowReader(Collector):
    """A collector that reads the rows of attention sites. It shows every node of one to ``rows.read``."""

    @abstractmethod
    def reads(self, place: Place) -> Reads:
        """What it needs of a site, in raster order and (another place) in the order that is tried beside it."""

    def start(self, place: Place, operands: Operands, branch: int, index: int) -> None:
        """The rows of a branch's call follow: of sample ``index`` of its operands."""

    @abstractmethod
    def take(self, place: Place, part: Part) -> None:
        """Take in some rows."""

    @abstractmethod
    def finish(self, place: Place, step: int, branch: int) -> None:
        """All rows of a branch's call were taken."""


class SharedRows:
    """The rows of a network's attention sites, computed once for all ``readers``.

    ``places`` are by node name, and so are those in another order of tokens, where some reader asks for them.
    """

    def __init__(self, trace: Trace, geometry: Geometry | None) -> None:
        self.geometry = geometry
        self.places = {entry.node.name: place_of(entry, geometry) for entry in attentions(trace)}
        self.ordered = {name: found for name, place in self.places.items() if (found := ordered(place)) is not None}
        self.readers: list[RowReader] = []
        self._last: tuple[Moment, fx.Node, bool] | None = None

    def read(self, seen: Seen) -> bool:
        """Let all readers take one call's rows, the first time it is shown; returns whether it could be read."""
        if self._last is not None and self._last[0] is seen.moment and self._last[1] is seen.node:
            return self._last[2]
        place = self.places[seen.node.name]
        operands = Operands.of(seen.arguments, seen.settings)
        reason = seen.moment.refusal(seen.result)
        samples = first_samples(seen.moment, seen.result) if reason is None else {}
        if reason is None:
            rows = place.sample.rows.to(operands.query.device).view(-1)
            reason = refusal(operands, seen.result, list(samples.values()), rows)
        self._last = (seen.moment, seen.node, reason is None)
        if reason is not None:
            for reader in self.readers:
                reader.skip(f"{place.name}: {reason}")
            return False
        for each in (place, self.ordered.get(seen.node.name)):
            if each is not None:
                self._read(each, operands, seen.moment.step, samples)
        return True

    def _read(self, place: Place, operands: Operands, step: int, samples: Mapping[int, int]) -> None:
        needs = {reader: reader.reads(place) for reader in self.readers}
        reading = [reader for reader, need in needs.items() if need is not Reads.NOTHING]
        if not reading:
            return
        sequence = place.sequence
        operands = operands if sequence is None else operands.in_order(sequence)
        for branch, index in samples.items():
            for reader in reading:
                reader.start(place, operands, branch, index)
            for part in parts(place, operands, step, branch, index, Reads.SUMS in needs.values()):
                for reader in reading:
                    reader.take(place, part)
            for reader in reading:
                reader.finish(place, step, branch)


def first_samples(moment: Moment, value: Tensor) -> dict[int, int]:
    """Where in a batch the first sample of each guidance branch stands; others are not looked at."""
    return {branch: int(part[0]) for branch, part in of_branches(moment, torch.arange(value.shape[0]))}


def parts(place: Place, operands: Operands, step: int, branch: int, index: int, values: bool) -> Iterator[Part]:
    """The sampled rows of one sample, head by head, some blocks of queries at a time."""
    sample, length = place.sample, int(operands.key.shape[-2])
    blocks = -(-length // place.key_block)
    fill = blocks * place.key_block - length
    rows = sample.rows.to(operands.query.device).view(-1)
    at_once = max(1, SLAB // (sample.each * (length + fill)))
    for head in range(operands.query.shape[1]):
        group = operands.group(head)
        keys = F.pad(operands.key[index, group].float(), (0, 0, 0, fill))
        ones = F.pad(operands.value[index, group].float(), (0, 1), value=1.0) if values else None
        by_block = F.pad(ones, (0, 0, 0, fill)).view(blocks, place.key_block, -1) if ones is not None else None
        means = of_head = eight = None
        if by_block is not None and place.int8:
            eight = quantised_keys(operands.key[index, group][None, None], place.key_block)
        if by_block is not None and place.pool:
            means = _means(keys, by_block, length, place.pool)
            of_head = moments(keys[:length], operands.value[index, group].float(), place.pool)
        for first in range(0, sample.blocks, at_once):
            last = min(first + at_once, sample.blocks)
            where = slice(first * sample.each, last * sample.each)
            scores = operands.scores(index, head, rows[where], keys)
            found = scores.softmax(1)
            lse = scores.amax(1) - found.amax(1).log_()
            entropy = lse - scores.mul_(found).sum(1)
            split = found.view(-1, blocks, place.key_block)
            sums = torch.bmm(split.transpose(0, 1), by_block) if by_block is not None else None
            mass = sums[..., -1].T if sums is not None else split.sum(-1)
            pooled = linear = int8 = None
            if eight is not None and by_block is not None:
                rounded = operands.int8_scores(index, head, rows[where], eight, place.key_block, length + fill)
                shares = rounded.sub_(lse[:, None]).exp_().view(-1, blocks, place.key_block)
                int8 = torch.bmm(shares.transpose(0, 1), by_block)
            if means is not None and of_head is not None:
                queries = operands.query[index, head, rows[where]].float() * operands.scale
                pooled, linear = _pooled_sums(queries, lse, *means), queries @ of_head
            at = step, branch, head, slice(first, last), where
            yield Part(*at, found, lse, entropy, mass, sums, pooled, linear, int8)


def _means(keys: Tensor, by_block: Tensor, length: int, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of groups of ``pool`` keys ``[G, D]``, the logarithm of their tokens ``[G]``, means of values by block.

    The latter are ``[Kb, G / Kb, E + 1]``; ``keys`` ``[Lp, D]`` and ``by_block`` ``[Kb, block, E + 1]`` are 0 past
    ``length``.
    """
    groups = len(keys) // pool
    tokens = (length - pool * torch.arange(groups, device=keys.device)).clamp(0, pool).float()
    shares = tokens.clamp(min=1).reciprocal()[:, None]
    of_keys = keys.view(groups, pool, -1).sum(1) * shares
    of_values = by_block.view(groups, pool, -1).sum(1) * shares
    return of_keys, tokens.log(), of_values.view(len(by_block), -1, by_block.shape[-1])


def _pooled_sums(queries: Tensor, lse: Tensor, keys: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """``[Kb, r, E + 1]``: sums by block of keys over groups, of scaled queries ``[r, D]``.

    No group has more mass than its keys together, as the exponential function is convex: so none is above 1.
    """
    scores = (queries @ keys.T).add_(counts).sub_(lse[:, None]).clamp_(max=0).exp_()
    by_block = scores.view(len(queries), len(values), -1).transpose(0, 1)
    if values.shape[1] == 1:  # of which products of matrices are slow
        return by_block.contiguous() * values
    return torch.bmm(by_block, values)
