"""Candidates whose rest is kept from an earlier step: what each of the steps before would have left to this one.

Some of the sampled rows are remembered from call to call, the same ones in all steps: what the blocks that a pattern
skips gave them. From that and what the pattern's own blocks give now follows a head's output at each age of its rest.
An error is the root mean square over the ages from 0, which is dense, to one less than the refresh: which step of a run
it is falls in no phase. In the first steps of a generation these are as many ages as there are.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.kernels.block_sparse_attention.kept import shares
from ditopt.kernels.patterns.choice import REST
from ditopt.kernels.patterns.kept import FORMS, Form, Kept
from ditopt.measures import Numbers
from ditopt.profiler.rows import Part
from ditopt.profiler.sample import Sample, second_moments

EVERY = (2, 4)
"""N: rests are kept anew in every N-th step."""
OLDEST = max(EVERY) - 1
IN_RASTER = ("skip", "spatial", "temporal", "band")
IN_ORDER = ("window",)
"""Patterns that are tried with a kept rest, one of each, in raster order and in the order that is tried beside it."""
VALUES = 1 << 17
"""So many values of all heads are remembered of a pattern and a step, twice; where rows have more, of fewer rows."""
NOTHING = 1e-30
"""Of a row with less mass in some blocks, these are taken to give 0."""


@dataclass(frozen=True)
class KeptCandidates:
    """Names, and of each the place of its pattern in ``bases``, which are places among the patterns without a rest."""

    names: tuple[str, ...]
    bases: tuple[int, ...]
    each: tuple[tuple[int, Form, int], ...]


def kept_of(names: Sequence[str], in_order: bool) -> KeptCandidates:
    """Of static candidates called ``names`` those that are tried with a kept rest; ``in_order``: not in raster order.

    Of several of a kind it is the one in the middle, of spatial, temporal and window patterns the first. Where a head
    is skipped, all forms are one.
    """
    settings = [json.loads(name) for name in names]
    bases = []
    for kind in IN_ORDER if in_order else IN_RASTER:
        found = [at for at, each in enumerate(settings) if each["pattern"] == kind]
        bases += found[len(found) // 2 :][:1] if kind == "band" else found[:1]
    each = [
        (place, form, every)
        for place, base in enumerate(bases)
        for form in (("residual",) if settings[base]["pattern"] == "skip" else FORMS)
        for every in EVERY
    ]
    made = [{**settings[bases[place]], REST: Kept(form, every).to_data()} for place, form, every in each]
    return KeptCandidates(tuple(map(pattern_text, made)), tuple(bases), tuple(each))


@dataclass(frozen=True)
class _State:
    """What a call leaves to later ones, of P patterns: ``[H, P, r, E]``, twice, and ``[H, P, r]``, three times."""

    of_others: Tensor
    residual: Tensor
    share: Tensor
    others_share: Tensor
    others_lse: Tensor

    @classmethod
    def of(cls, own: Tensor, others: Tensor, lse: Tensor) -> _State:
        """Of sums over a pattern's blocks and over all others, ``[H, P, r, E + 1]``, whose last parts add up to 1."""
        share, rest = own[..., -1], others[..., -1]
        residual = own[..., :-1] + others[..., :-1] - per_mass(own)
        return cls(others[..., :-1].clone(), residual, share.clone(), rest.clone(), lse[:, None] + rest.log())

    def output(self, form: Form, own: Tensor, lse: Tensor) -> Tensor:
        """``[H, P, r, E]``: of a later call with such sums over the patterns' blocks."""
        if form == "residual":
            return per_mass(own) + self.residual
        if form == "ratio":
            return self.share[..., None] * per_mass(own) + self.of_others
        now, kept = shares(lse[:, None] + own[..., -1].log(), self.others_lse)
        return now[..., None] * per_mass(own) + kept[..., None] * (
            self.of_others / self.others_share.clamp(min=NOTHING)[..., None]
        )


def per_mass(sums: Tensor) -> Tensor:
    """``[..., E + 1]`` -> ``[..., E]``: sums over blocks as attention to them alone gives."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=NOTHING)


@dataclass(frozen=True)
class KeptErrors:
    """Of one call: second moments of errors ``[H, C, E, E]``, dense ``outputs`` ``[H, r, E]``, ``weights`` ``[r]``."""

    errors: Tensor
    outputs: Tensor
    weights: Tensor


class KeptReader:
    """The candidates of a site with a kept rest, call by call; ``kept`` ``[Qb, C, Kb]`` are all static patterns."""

    def __init__(self, candidates: KeptCandidates, kept: Tensor, sample: Sample, weights: Tensor, heads: int) -> None:
        self.candidates, self.heads, self.each = candidates, heads, sample.each
        self.kept = kept[:, [*candidates.bases]]
        self.weights = weights.reshape(-1)
        self.names = candidates.names
        self._rows: Tensor | None = None
        self._calls: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._past: dict[int, deque[_State]] = {}
        self._errors: dict[int, KeptErrors] = {}

    @property
    def density(self) -> Numbers:
        """``[C]``: what candidates cost of dense attention: once in so many steps all of it, else their blocks."""
        shares = self.kept.float().mean((0, 2)).numpy()
        found = [(1 + (every - 1) * shares[place]) / every for place, _, every in self.candidates.each]
        return np.array(found, dtype=np.float32)

    def rows_of(self, width: int) -> Tensor:
        """Of the rows that count those that are remembered, ascending; a head has ``width`` values in each."""
        if self._rows is None:
            rows = self.weights.nonzero().view(-1)
            self._rows = rows[:: max(1, -(-len(rows) * self.heads * width // VALUES))].contiguous()
        return self._rows

    def take(self, part: Part) -> None:
        """Take in some rows of a head."""
        if not self.names:
            return
        assert part.sums is not None
        width, device = part.sums.shape[-1], part.sums.device
        rows = self.rows_of(width - 1)
        if part.branch not in self._calls:
            shape = (self.heads, self.kept.shape[1], len(rows), width)
            both = torch.zeros((2, *shape), device=device)
            self._calls[part.branch] = (*both, torch.zeros((self.heads, len(rows)), device=device))
        own, others, lse = self._calls[part.branch]
        first, last = torch.searchsorted(rows, torch.tensor([part.where.start, part.where.stop])).tolist()
        if first == last:
            return
        here, mine = rows[first:last], slice(first, last)
        local = (here - part.where.start).to(device)
        picked = self.kept[here // self.each].to(device, torch.float32)
        sums = part.sums[:, local].transpose(0, 1)
        own[part.head, :, mine] = torch.bmm(picked, sums).transpose(0, 1)
        others[part.head, :, mine] = torch.bmm(1 - picked, sums).transpose(0, 1)
        lse[part.head, mine] = part.lse[local]

    def finish(self, branch: int) -> None:
        """All rows of a branch's call were taken."""
        if branch not in self._calls:
            return
        own, others, lse = self._calls.pop(branch)
        dense = own[:, :1, :, :-1] + others[:, :1, :, :-1]
        weights = self.weights[self.rows_of(own.shape[-1] - 1)].to(own.device)
        past = self._past.setdefault(branch, deque(maxlen=OLDEST))
        of_ages = {
            form: [self._moments(each.output(form, own, lse) - dense, weights) for each in past] for form in FORMS
        }
        found = [self._mean(of_ages[form][: every - 1], place, own) for place, form, every in self.candidates.each]
        self._errors[branch] = KeptErrors(torch.stack(found, 1), dense[:, 0], weights)
        past.appendleft(_State.of(own, others, lse))

    def errors(self, branch: int) -> KeptErrors | None:
        """Those of a branch's call, which are then forgotten; None where nothing is tried."""
        return self._errors.pop(branch, None)

    @staticmethod
    def _moments(errors: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = second_moments(errors.flatten(0, 1), weights).unflatten(0, errors.shape[:2])
        return found

    def _mean(self, of_ages: Sequence[Tensor], place: int, own: Tensor) -> Tensor:
        """``[H, E, E]``: over the ages from 0, at which there is no error, of the pattern at a place."""
        width = own.shape[-1] - 1
        found = torch.zeros((self.heads, width, width), device=own.device)
        for each in of_ages:
            found += each[:, place]
        return found / (len(of_ages) + 1)
