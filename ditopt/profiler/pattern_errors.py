"""What every sparse pattern, skipping a head and reusing its output would cost in quality, after the output projection.

Outputs under patterns follow from sums by block of keys (``tried``). An error ``X`` ``[R, E]`` of a head has the
squared norm ``tr(X^T X G)`` behind the projection, where ``G = W W^T`` and W is the head's part of its weight: the
second moments ``X^T X`` are all that is kept until the projection, and its weight, are seen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.measures import Label, Measure, Numbers, Table
from ditopt.passes.attention import int8_scores_refusal, rest_refusal
from ditopt.profiled_tensors import LINEAR_AXES
from ditopt.profiler.draft_blocks import KEPT_BYTES
from ditopt.profiler.interpret import Seen
from ditopt.profiler.kept_errors import KeptErrors
from ditopt.profiler.linear_branch import fits
from ditopt.profiler.listed_blocks import periods_that_fit
from ditopt.profiler.rows import Operands, Part, Place, Reads, RowReader, SharedRows, first_samples
from ditopt.profiler.sample import second_moments
from ditopt.profiler.tried import Tried
from ditopt.search.heads import SKIP
from ditopt.trace import Trace

LAGS = 3
"""A head's output is reused for so many steps at most."""
REMEMBERED = 1 << 19
"""So many values of a site's output are kept per step; of more, a share of the sampled rows."""


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
    """What is kept of one branch's call until the projection is seen.

    ``errors`` are ``[H, C, E, E]`` of all sampled rows, or those of the rows that are remembered; as names go.
    """

    step: int
    branch: int
    outputs: Tensor
    errors: list[Tensor | KeptErrors]
    apart: dict[int, Tensor]
    from_other: Tensor | None


class _Site:
    """Where a site's numbers go, and what is remembered of its outputs."""

    def __init__(
        self,
        place: Place,
        ordered: Place | None,
        calls: NetworkCalls,
        starts: Sequence[int] = (),
        before: Sequence[Table] = (),
        linear: bool = False,
    ) -> None:
        self.place, self.starts = place, tuple(starts)
        first, last = (max(place.video[0], place.entry.rows[0]), min(place.video[1], place.entry.rows[1]))
        self.known = first < last
        if not self.known:
            first, last = place.entry.rows
        self.rows = last - first
        self.weights = place.sample.weights(first, last)
        steps, branches, heads = len(calls.timesteps), calls.branches, place.entry.site.heads
        self.tried: dict[TokenOrder | None, Tried] = {}
        if place.geometry is not None:
            places = (place,) if ordered is None else (place, ordered)
            rows = first, last
            self.tried = {
                each.order: Tried(
                    each, place.geometry, rows, starts, before, linear=linear, steps=steps, branches=branches
                )
                for each in places
            }
        self.names = tuple(name for each in self.tried.values() for name in each.names) or (SKIP,)
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
            **{name: measure for each in self.tried.values() for name, measure in each.measures().items()},
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
    Listed patterns are chosen by the earlier prompts' sums of attention (``before``, the tables of each site), so under
    the first prompt they have no error; what this prompt adds to the sums is among the measures (``listed_blocks``).
    Candidates with a ``rest`` have the blocks that they skip by means of their keys and values; their ``density`` has
    one pair of a query and a group for each group of the sequence more. Those with ``qk: int8`` (``int8_errors``) have
    the density of the same pattern without. Those with a ``refresh`` have in a step what
    they found in the last one that is a multiple of it, as a run that starts in the first step has. Those whose rest is
    kept from an earlier step (``kept_errors``) have as ``density`` the mean over a dense step and those up to the next.
    ``linear``: rests of linear attention are fitted to earlier prompts, too.
    Of a batch the first sample of each guidance branch is looked at. ``rows`` is what other collectors of the
    generation read, too.
    """

    name = "patterns"

    def __init__(
        self,
        trace: Trace,
        calls: NetworkCalls,
        geometry: Geometry | None,
        rows: SharedRows | None = None,
        before: Mapping[str, Sequence[Table]] | None = None,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.rows = SharedRows(trace, geometry) if rows is None else rows
        self.rows.readers.append(self)
        places = [*self.rows.places.values(), *self.rows.ordered.values()]
        fitting = [place for place in places if place.geometry is not None]
        starts = periods_that_fit(fitting, len(calls.timesteps))
        if fitting and not starts:
            self.skip("sums of attention by blocks would be too large: lists chosen from them are not tried")
        fitted, linear = linear, linear and fits(fitting, len(starts))
        if fitted and not linear:
            self.skip("moments of linear attention would be too large: no linear rest is fitted")
        earlier = before or {}
        self._sites = {
            place.name: _Site(place, self.rows.ordered.get(node), calls, starts, earlier.get(place.name, ()), linear)
            for node, place in self.rows.places.items()
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
            held = max((each.held for each in site.tried.values()), default=0)
            if held > KEPT_BYTES:
                self.skip(f"{name}: {held >> 20} MiB of blocks to keep between steps; no draft with a refresh is tried")
            if site.tried and not site.place.int8:
                self.skip(f"{name}: {int8_scores_refusal(entry.node)}; no pattern is tried with int8 scores")
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
        self._sites[place.name].tried[place.order].finish(branch)

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
        apart = {step - at: second_moments(now - then, weights) for at, then in past if 0 < step - at <= LAGS}
        other = site.past.get(1 - branch)
        beside = other[-1] if other else None
        from_other = second_moments(now - beside[1], weights) if beside is not None and beside[0] == step else None
        past.append((step, now))
        found: list[Tensor | KeptErrors] = []
        for each in site.tried.values():
            rests = each.kept_rests.errors(branch)
            found += [each.errors(branch), *([] if rests is None else [rests])]
        if not found:
            found = [second_moments(outputs, site.weights.view(-1).to(result.device))[:, None]]
        site.waiting.append(_Call(step, branch, outputs, found, apart, from_other))

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
            site.share[at] = _numbers(projection.norms(second_moments(call.outputs, weights)) / total)
            site.error[at] = np.concatenate([_relative(projection, each, total) for each in call.errors], 1)
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
            labels |= {"period": site.starts} if site.tried and site.starts else {}
            readers = [each.linear for each in site.tried.values()]
            labels |= {LINEAR_AXES[each.place.order is not None]: each.names for each in readers if each and each.names}
            facts = {
                "tokens": place.entry.site.queries,
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


def _relative(projection: Projection, errors: Tensor | KeptErrors, total: Tensor) -> Numbers:
    """``[H, C]``: errors behind a projection, against the norm of what is right: ``total``, or that of their rows."""
    if isinstance(errors, KeptErrors):
        norms, _ = projection.rows(errors.outputs)
        return _numbers(projection.norms(errors.errors) / (errors.weights @ norms).sqrt())
    return _numbers(projection.norms(errors) / total)


def _numbers(values: Tensor) -> Numbers:
    return np.asarray(values.cpu().numpy())
