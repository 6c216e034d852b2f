"""What every sparse pattern, skipping a head and reusing its output would cost in quality, after the output projection.

A block pattern's output is a sum over the blocks of keys that it keeps. So the probabilities of a row, and these times
the values, are summed by block of keys once; every candidate is a small product with these. Where the blocks that it
does not keep count by means, sums of what means give are multiplied with the complement. An error ``X`` ``[R, E]``
of a head has the squared norm ``tr(X^T X G)`` behind the projection, where ``G = W W^T`` and W is the head's part of
its weight: the second moments ``X^T X`` are all that is kept until the projection, and its weight, are seen.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import candidates
from ditopt.kernels.patterns.choice import REST, Pooled, SparseChoice
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.measures import Label, Measure, Numbers, Table
from ditopt.passes.attention import first_order_refusal, rest_refusal
from ditopt.profiler.cluster_errors import ClusterReader
from ditopt.profiler.draft_blocks import DraftReader, drafts_of
from ditopt.profiler.interpret import Seen
from ditopt.profiler.rows import Operands, Part, Place, Reads, RowReader, SharedRows, first_samples
from ditopt.search.heads import SKIP
from ditopt.trace import Trace

LAGS = 3
"""A head's output is reused for so many steps at most."""
REMEMBERED = 1 << 19
"""So many values of a site's output are kept per step; of more, a share of the sampled rows."""
WITH_REST = ("skip", "spatial", "temporal", "window", "band", "draft")
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
        json.dumps({**settings[at], REST: rest}, sort_keys=True)
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


def moments(outputs: Tensor, weights: Tensor) -> Tensor:
    """``[H, E, E]``: weighted second moments of ``[H, R, E]`` over rows; ``weights`` ``[R]``."""
    scaled = outputs * weights.sqrt()[:, None]
    return torch.bmm(scaled.transpose(1, 2), scaled)


@dataclass(frozen=True)
class Projection:
    """The weight ``[H, E, O]`` that mixes heads; None where none was found, so that norms are those before it."""

    weight: Tensor | None

    def norms(self, squares: Tensor) -> Tensor:
        """``[H, ...]``: norms of what second moments ``[H, ..., E, E]`` become."""
        if self.weight is None:
            found = squares.diagonal(dim1=-2, dim2=-1).sum(-1)
        else:
            gram = torch.bmm(self.weight, self.weight.transpose(1, 2))
            found = torch.einsum("h...ij,hij->h...", squares, gram)
        return found.clamp(min=0).sqrt()

    def rows(self, outputs: Tensor) -> tuple[Tensor, int]:
        """Squared norms ``[R]`` of the projected rows of ``[H, R, E]``, and over how many channels."""
        heads, count, width = outputs.shape
        if self.weight is None:
            return outputs.square().sum((0, 2)), heads * width
        together = outputs.transpose(0, 1).reshape(count, -1) @ self.weight.reshape(heads * width, -1)
        return together.square().sum(1), int(self.weight.shape[-1])


@dataclass
class _Call:
    """What is kept of one branch's call until the projection is seen; ``errors`` is ``[H, C, E, E]``."""

    step: int
    branch: int
    outputs: Tensor
    errors: Tensor
    apart: dict[int, Tensor]
    from_other: Tensor | None


class _Tried:
    """The candidates of a site whose blocks are of tokens in one order, and what they have of the calls seen."""

    def __init__(self, place: Place, geometry: Geometry, rows: tuple[int, int]) -> None:
        block, order = place.sample.block, place.order
        self.place = place
        self.candidates = candidates_of(geometry, block, order)
        self.drafts = DraftReader(drafts_of(geometry, block, order))
        every = (*self.candidates.names, *self.drafts.drafts.names)
        self.compensated: Compensated | None = None
        if place.pool:
            self.compensated = compensated_of(
                every, place.key_block, place.pool, first_order_refusal(place.entry.node) is None
            )
            every += self.compensated.names
        self.clusters = ClusterReader(geometry, place.key_block) if order is None else None
        every += self.clusters.names if self.clusters is not None else ()
        # What means the same in every order has its numbers in raster order.
        self.told = tuple(
            at
            for at, name in enumerate(every)
            if order is None or not SparseChoice.from_data(json.loads(name)).in_any_order
        )
        self.every = len(every)
        self.names = tuple(every[at] for at in self.told)
        self.weights = place.sample.weights(*rows, place.sequence)
        self._errors: dict[int, Tensor] = {}

    @property
    def density(self) -> Numbers:
        """``[C]``: what candidates cost of dense attention: shares of blocks, of drafts the mean over what was seen.

        A rest costs a pair of a query and a group for each group of the sequence.
        """
        found = np.concatenate([self.candidates.density, self.drafts.density])
        if self.compensated is not None:
            of_rests = found[[*self.compensated.which]] + 1 / self.compensated.pool
            found = np.concatenate([found, np.minimum(of_rests, 1)])
        if self.clusters is not None:
            found = np.concatenate([found, self.clusters.density])
        return found[[*self.told]]

    def kept(self, part: Part) -> Tensor:
        """``[q, C, Kb]``: what the candidates without a rest keep of some rows of a head."""
        found = self.drafts.kept(part.head)[part.blocks]
        return torch.cat([self.candidates.kept[part.blocks].to(found.device), found], 1)

    def start(self, operands: Operands, index: int) -> None:
        """Remember what heads would find their blocks by."""
        for reader in (self.drafts, self.clusters):
            if reader is not None:
                reader.start(operands, index)

    def finish(self) -> None:
        """Let go of the operands."""
        for reader in (self.drafts, self.clusters):
            if reader is not None:
                reader.finish()

    def take(self, part: Part) -> None:
        """Add up the errors of some rows."""
        assert part.sums is not None
        if part.branch not in self._errors:
            width = part.sums.shape[-1] - 1
            shape = (self.place.entry.site.heads, self.every, width, width)
            self._errors[part.branch] = torch.zeros(shape, device=part.sums.device)
        self._errors[part.branch][part.head] += self._moments(part, part.sums)

    def _moments(self, part: Part, sums: Tensor) -> Tensor:
        """``[C, E, E]``: second moments of the errors of all candidates in some rows of a head."""
        weights = self.weights[part.blocks].to(sums.device)
        pooled = linear = None
        if self.compensated is not None and part.pooled is not None and part.linear is not None:
            pooled, linear = (part.pooled, self.compensated.which), (part.linear, self.compensated.linear)
        found = error_moments(sums, self.kept(part), weights, pooled, linear)
        if self.clusters is None or not self.clusters.names:
            return found
        of_clusters, kept = self.clusters.sums(part, self.place.sample)
        return torch.cat([found, error_moments(of_clusters, kept, weights.view(-1, 1))])

    def errors(self, branch: int) -> Tensor:
        """``[H, C, E, E]``: second moments of the errors in a branch's call, which are then forgotten."""
        return self._errors.pop(branch)[:, [*self.told]]


class _Site:
    """Where a site's numbers go, and what is remembered of its outputs."""

    def __init__(self, place: Place, ordered: Place | None, calls: NetworkCalls) -> None:
        self.place = place
        first, last = (max(place.video[0], place.entry.rows[0]), min(place.video[1], place.entry.rows[1]))
        self.known = first < last
        if not self.known:
            first, last = place.entry.rows
        self.rows = last - first
        self.weights = place.sample.weights(first, last)
        self.tried: dict[TokenOrder | None, _Tried] = {}
        if place.geometry is not None:
            places = (place,) if ordered is None else (place, ordered)
            self.tried = {each.order: _Tried(each, place.geometry, (first, last)) for each in places}
        self.names = tuple(name for each in self.tried.values() for name in each.names) or (SKIP,)
        steps, branches, heads = len(calls.timesteps), calls.branches, place.entry.site.heads
        self.error = np.full((1, steps, branches, heads, len(self.names)), np.nan, dtype=np.float32)
        self.reuse = np.full((1, steps, branches, heads, LAGS), np.nan, dtype=np.float32)
        self.branches = np.full((1, steps, heads), np.nan, dtype=np.float32)
        self.output = np.full((1, steps, branches), np.nan, dtype=np.float32)
        self.share = np.full((1, steps, branches, heads), np.nan, dtype=np.float32)
        self.past: dict[int, deque[tuple[int, Tensor]]] = {}
        self.waiting: list[_Call] = []
        self.elements = 0
        self.norm_of_second: Tensor = torch.tensor(math.nan)

    @property
    def density(self) -> Numbers:
        """``[C]``: what candidates cost of dense attention."""
        if not self.tried:
            return np.zeros(1, dtype=np.float32)
        return np.concatenate([each.density for each in self.tried.values()])

    def remembered(self, width: int) -> Tensor:
        """The rows, of those that count, whose outputs are kept from step to step; a row has ``width`` values."""
        rows = self.weights.view(-1).nonzero().view(-1)
        return rows[:: max(1, -(-len(rows) * width // REMEMBERED))]

    def measures(self) -> dict[str, Measure]:
        """All of them."""
        along = ("prompt", "step", "branch")
        return {
            "error": Measure((*along, "head", "candidate"), self.error, True),
            "reuse": Measure((*along, "head", "lag"), self.reuse, True),
            "branches": Measure(("prompt", "step", "head"), self.branches, True),
            "output": Measure(along, self.output, True),
            "share": Measure((*along, "head"), self.share, True),
            "density": Measure(("candidate",), self.density),
        }


class PatternCollector(RowReader):
    """Relative errors of candidate patterns, of reuse and of skipping, per head; the table ``patterns``.

    They are measured on sampled rows of the video's queries (of all queries where there is no text), after the output
    projection and without its bias. Patterns keep whole blocks, of tokens in raster order or in the ``order`` that a
    candidate's name has (``orders.compact_order``), and text as ``Pattern`` says: ``skip`` in joint attention keeps the
    blocks that hold text, and ``share`` is the error of leaving a head out altogether.
    Candidates with a ``rest`` have the blocks that they skip by means of their keys and values; their ``density`` has
    one pair of a query and a group for each group of the sequence more. Of a batch the first sample of each guidance
    branch is looked at. ``rows`` is what other collectors of the generation read, too.
    """

    name = "patterns"

    def __init__(
        self, trace: Trace, calls: NetworkCalls, geometry: Geometry | None, rows: SharedRows | None = None
    ) -> None:
        super().__init__()
        self.rows = SharedRows(trace, geometry) if rows is None else rows
        self.rows.readers.append(self)
        self._sites = {
            place.name: _Site(place, self.rows.ordered.get(node), calls) for node, place in self.rows.places.items()
        }
        self._behind: dict[str, _Site] = {}
        for name, site in self._sites.items():
            entry = site.place.entry
            if entry.projection is not None:
                self._behind[entry.projection.name] = site
            else:
                self.skip(f"{name}: no product with a weight was found behind it; errors are those before it")
            if not site.known:
                self.skip(
                    f"{name}: the product behind it takes no video tokens of {geometry}; all it takes are measured"
                )
            if not site.tried and not entry.cross:
                sizes = f"{entry.site.queries} queries and {entry.site.keys} keys"
                self.skip(f"{name}: {sizes} do not fit the {geometry}; no pattern is tried")
            if site.tried and not site.place.pool:
                self.skip(f"{name}: {rest_refusal(entry.node)}; no pattern is tried with means of what it skips")
        self.wanted = frozenset({*self.rows.places, *self._behind})

    def reads(self, place: Place) -> Reads:
        """Sums by block of keys, where patterns are tried."""
        return Reads.SUMS if place.order in self._sites[place.name].tried else Reads.NOTHING

    def start(self, place: Place, operands: Operands, branch: int, index: int) -> None:
        """Remember what heads would find their blocks by."""
        self._sites[place.name].tried[place.order].start(operands, index)

    def take(self, place: Place, part: Part) -> None:
        """Add up the errors of some rows."""
        self._sites[place.name].tried[place.order].take(part)

    def finish(self, place: Place, step: int, branch: int) -> None:
        """Let go of the operands; outputs come with the node itself."""
        self._sites[place.name].tried[place.order].finish()

    def see(self, seen: Seen) -> None:
        """Keep what is needed of an attention's output; measure it where the projection behind it is seen."""
        behind = self._behind.get(seen.node.name)
        if behind is not None:
            assert behind.place.entry.weight is not None
            self._measure(behind, seen.arguments[behind.place.entry.weight])
        elif self.rows.read(seen):
            site = self._sites[self.rows.places[seen.node.name].name]
            for branch, index in first_samples(seen.moment, seen.result).items():
                self._keep(site, seen.moment.step, branch, seen.result[index])
            if site.place.entry.projection is None:
                self._measure(site, None)

    def _keep(self, site: _Site, step: int, branch: int, result: Tensor) -> None:
        """``result`` is ``[H, S, E]``."""
        rows = site.place.sample.rows.view(-1).to(result.device)
        outputs = result[:, rows].float()
        kept = site.remembered(result.shape[0] * result.shape[-1])
        weights = site.weights.view(-1)[kept].to(result.device)
        now = outputs[:, kept.to(result.device)]
        past = site.past.setdefault(branch, deque(maxlen=LAGS))
        apart = {step - at: moments(now - then, weights) for at, then in past if 0 < step - at <= LAGS}
        other = site.past.get(1 - branch)
        beside = other[-1] if other else None
        from_other = moments(now - beside[1], weights) if beside is not None and beside[0] == step else None
        past.append((step, now))
        found = [each.errors(branch) for each in site.tried.values()]
        if not found:
            found = [moments(outputs, site.weights.view(-1).to(result.device))[:, None]]
        errors = torch.cat(found, 1)
        site.waiting.append(_Call(step, branch, outputs, errors, apart, from_other))

    def _measure(self, site: _Site, weight: Tensor | None) -> None:
        for call in site.waiting:
            heads, _, width = call.outputs.shape
            if weight is not None:
                weight = weight[0] if weight.ndim == 3 else weight
                column = site.place.entry.column
                part = weight[column : column + heads * width].float().view(heads, width, -1)
            projection = Projection(part if weight is not None else None)
            norms, channels = projection.rows(call.outputs)
            weights = site.weights.view(-1).to(norms.device)
            total = (weights @ norms).sqrt()
            kept = site.remembered(heads * width).to(norms.device)
            total_kept = (weights[kept] @ norms[kept]).sqrt()
            at = (0, call.step, call.branch)
            site.output[at] = float(total) / channels**0.5
            site.elements = site.rows * channels
            site.share[at] = _numbers(projection.norms(moments(call.outputs, weights)) / total)
            site.error[at] = _numbers(projection.norms(call.errors) / total)
            for lag, squares in call.apart.items():
                site.reuse[(*at, slice(None), lag - 1)] = _numbers(projection.norms(squares) / total_kept)
            if call.branch == 1:
                site.norm_of_second = total_kept
            if call.from_other is not None:
                site.branches[0, call.step] = _numbers(projection.norms(call.from_other) / site.norm_of_second)
        site.waiting.clear()

    def tables(self) -> dict[str, Table]:
        """One table per attention site."""
        found = {}
        for name, site in self._sites.items():
            place = site.place
            labels: dict[str, tuple[Label, ...]] = {"candidate": site.names, "lag": tuple(range(1, LAGS + 1))}
            facts = {
                "kind": place.kind,
                "tried": bool(site.tried),
                "block_queries": place.sample.block,
                "block_keys": place.key_block,
                "rows": int((site.weights > 0).sum()),
                "elements": site.elements,
                "projected": place.entry.projection is not None,
            }
            found[name] = Table(site.measures(), labels, facts)
        return found


def _numbers(values: Tensor) -> Numbers:
    return np.asarray(values.cpu().numpy())
