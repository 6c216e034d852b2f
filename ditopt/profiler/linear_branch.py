"""Candidates whose rest is linear attention (SLA, arXiv 2509.24006), with projections fitted to earlier prompts.

Each prompt adds up, of sampled rows, what linear attention to the skipped blocks has to do with what the pattern loses:
second moments, from which a projection of least squares follows. One prompt's is tried on the next, so that every error
is one of a prompt that had no say in it; a plan's projections are of all prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.head_tensors import period_of
from ditopt.kernels.block_sparse_attention.linear import NOTHING, block_sums, features
from ditopt.measures import Measure, Table
from ditopt.profiled_tensors import CROSS, GRAM, LINEAR_AXES, fitted_projections, summed
from ditopt.profiler.rows import Operands, Part, Place

FITTED: tuple[Mapping[str, object], ...] = (
    {"pattern": "skip"},
    {"pattern": "draft", "keep": 0.25},
    {"pattern": "draft", "keep": 0.125},
)
"""What is tried with a linear rest."""
MOST_BYTES = 256 << 20
"""Of the moments of all sites of a network under one prompt; with more, none is tried."""
AXES = ("prompt", "period", "head")
CHANNELS = ("channel", "channel_of")


def fits(places: Sequence[Place], periods: int) -> bool:
    """Whether the moments of all these sites are small enough to be kept."""
    each = (place.entry.site.heads * place.entry.site.head_dim**2 for place in places)
    return 2 * 4 * len(FITTED) * periods * sum(each) <= MOST_BYTES


class LinearReader:
    """The linear rests of a site in one order of its tokens; ``among`` are the candidates without a rest.

    ``before`` are the tables of earlier prompts, ``starts`` those of the periods.
    """

    def __init__(self, place: Place, among: Sequence[str], starts: Sequence[int], before: Sequence[Table]) -> None:
        self.place, self.starts = place, tuple(starts)
        order = {} if place.order is None else {"order": place.order.to_data()}
        tried = [each for each in FITTED if place.order is None or each["pattern"] != "skip"]  # which is as in raster
        wanted = [pattern_text({**each, **order}) for each in tried]
        self.which = tuple(among.index(name) for name in wanted if name in among)
        self.names = tuple(pattern_text({**json.loads(among[at]), "rest": "linear"}) for at in self.which)
        sums = [summed(before, measure[place.order is not None]) for measure in (GRAM, CROSS)]
        self._before = None if sums[0] is None or sums[1] is None else fitted_projections(sums[0], sums[1])
        self._sums: tuple[Tensor, Tensor] | None = None
        self._call: tuple[Operands, int] | None = None
        self._latest: tuple[int, Tensor] | None = None

    @property
    def tried(self) -> bool:
        """Whether there are candidates, and earlier prompts to fit them to."""
        return self._before is not None and bool(self.names)

    @property
    def further(self) -> float:
        """The work that it takes beside listed blocks, as a share of dense attention's."""
        depth, tokens, block = self.place.entry.site.head_dim, self.place.entry.site.queries, self.place.key_block
        return depth / tokens + depth / (2 * block**2)

    def start(self, operands: Operands, index: int) -> None:
        """The heads of a sample's call are asked for from now on."""
        self._call, self._latest = (operands, index), None

    def finish(self) -> None:
        """Let go of the call."""
        self._call = self._latest = None

    def take(self, part: Part, kept: Tensor, weights: Tensor) -> Tensor | None:
        """Add up moments of some rows; ``[C, E, E]`` of the errors with projections fitted before, if there are any.

        ``kept`` ``[q, ..., Kb]`` is what the candidates without a rest keep, ``weights`` ``[q, r]``.
        """
        if not self.names:
            return None
        chosen = kept[:, [*self.which]].float()
        missing, regressors = self._lost(part, chosen), self._linear(part, chosen)
        scale = weights.sqrt()[:, None, :, None]
        lost, linear = ((each * scale).transpose(0, 1).flatten(1, 2) for each in (missing, regressors))
        if self._sums is None:
            shape = (len(self.starts), self.place.entry.site.heads, len(self.names), lost.shape[-1], lost.shape[-1])
            self._sums = torch.zeros(shape), torch.zeros(shape)
        period = period_of(self.starts, part.step)
        for sums, other in zip(self._sums, (linear, lost), strict=True):
            sums[period, part.head] += torch.bmm(linear.transpose(1, 2), other).cpu()
        if self._before is None:
            return None
        projection = torch.from_numpy(self._before[period, part.head]).to(lost)
        rows = lost - torch.bmm(linear, projection)
        return torch.bmm(rows.transpose(1, 2), rows)

    def measures(self) -> dict[str, Measure]:
        """The moments of this prompt, for the prompts behind it and for the plan."""
        if self._sums is None:
            return {}
        ordered = self.place.order is not None
        names, axes = (GRAM[ordered], CROSS[ordered]), (*AXES, LINEAR_AXES[ordered], *CHANNELS)
        return {name: Measure(axes, sums.numpy()[None]) for name, sums in zip(names, self._sums, strict=True)}

    def _lost(self, part: Part, chosen: Tensor) -> Tensor:
        """``[q, C, r, E]``: what the patterns' outputs lack of dense attention's."""
        assert part.sums is not None
        key_blocks, _, width = part.sums.shape
        by_block = part.sums.view(key_blocks, len(chosen), -1).transpose(0, 1)
        picked = torch.cat([chosen.new_ones(len(chosen), 1, key_blocks), chosen], 1)
        outputs = torch.bmm(picked, by_block).unflatten(2, (-1, width))
        means: Tensor = outputs[..., :-1] / outputs[..., -1:].clamp(min=NOTHING)
        return means[:, :1] - means[:, 1:]

    def _linear(self, part: Part, chosen: Tensor) -> Tensor:
        """``[q, C, r, E]``: linear attention to what they skip."""
        assert self._call is not None, "no call was started"
        operands, index = self._call
        if self._latest is None or self._latest[0] != part.head:
            group = operands.group(part.head)
            key, value = operands.key[index, group], operands.value[index, group]
            self._latest = part.head, block_sums(key, value, self.place.key_block)
        sums = self._latest[1]
        of_blocks = ((1 - chosen) @ sums.flatten(1)).unflatten(2, sums.shape[1:])
        rows = self.place.sample.rows.view(-1).to(operands.query.device)[part.where]
        queries = features(operands.query[index, part.head, rows]).view(len(chosen), 1, -1, sums.shape[1])
        found: Tensor = queries @ of_blocks
        return found[..., :-1] / found[..., -1:].clamp(min=NOTHING)
