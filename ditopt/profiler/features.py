"""Collects features of a generation and reduces them to Gram matrices over branches and steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.measure import DensePath
from ditopt.passes._infra import latents_part
from ditopt.profile import Array
from ditopt.runtime.program import Observation

MAX_COORDINATES = 1 << 16
"""Features with more entries are represented by this many, drawn once with a fixed seed and scaled.

Drawing coordinates is linear, so the error of every linear predictor is estimated without bias; with
65,536 of them its norm is exact to about a per cent.
"""


class FeatureCollector:
    """An observer of one network over one generation."""

    def __init__(self, calls: NetworkCalls, latents: int | None, streams: tuple[int, ...]) -> None:
        """``latents`` is the position of the latents among the inputs; ``streams`` how many tensors each edge has."""
        self.calls, self.latents, self.streams = calls, latents, streams
        self.rows: dict[tuple[str, int, int], Tensor] = {}
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self._sizes: dict[str, int] = {}
        self._count = 0

    def __call__(self, seen: Observation) -> None:
        """Take in one call; the order of calls says which step and branch it is."""
        step, branch = self.calls.calls[self._count]
        self._count += 1
        self._take("step", step, branch, [out for out in seen.outputs if isinstance(out, Tensor)])
        if self.latents is not None:
            self._take("latents", step, branch, [matching_latents(seen.arguments[self.latents], seen.outputs)])
        at = 0
        shapes = []
        for edge, count in enumerate(self.streams):
            tensors = list(seen.boundaries[at : at + count])
            at += count
            shapes.append(tuple(tuple(t.shape) for t in tensors))
            self._take(f"edge{edge}", step, branch, tensors)
        self.shapes = shapes

    @property
    def complete(self) -> bool:
        """Whether every call of the recorded pattern was seen."""
        return self._count == len(self.calls.calls)

    def _take(self, kind: str, step: int, branch: int, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        self._sizes[kind] = sum(t.numel() for t in tensors)
        for offset, row in enumerate(reduced_branches(tensors, self.calls.batched)):
            self.rows[kind, branch + offset, step] = row

    def path(self, shares: Array) -> DensePath:
        """The generation's path; ``shares`` ``[branches, T]`` is how the branches' outputs are combined."""
        outputs = []
        for step in range(len(self.calls.timesteps)):
            rows = [float(shares[b, step]) * self._row("step", b, step) for b in range(self.calls.branches)]
            outputs.append(torch.stack(rows).sum(0))
        found = torch.stack(outputs)
        if not self.has_latents:
            return DensePath(found, found.new_zeros(len(outputs), 0))
        return DensePath(found, torch.stack([self._row("latents", 0, step) for step in range(len(outputs))]))

    def step_gram(self) -> Array:
        """Inner products ``[N, N]`` of outputs over (branch, step), then of the latents over steps."""
        rows = [self._row("step", b, t) for b in range(self.calls.branches) for t in range(len(self.calls.timesteps))]
        if self.has_latents:
            rows += [self._row("latents", 0, t) for t in range(len(self.calls.timesteps))]
        return _gram(rows)

    @property
    def has_latents(self) -> bool:
        """Whether the latents can serve as a regressor: they have the size of the output."""
        return "latents" in self._sizes and self._sizes["latents"] == self._sizes["step"]

    def branch_weights(self) -> tuple[float, ...] | None:
        """How the loop combines its branches, by least squares on ``x[t+1] = a x[t] + sum_b w_b F_b[t]``; sum 1.

        The median over steps; None where the latents do not tell (no such input, another size, one branch).
        """
        calls, found = self.calls, []
        if calls.branches < 2 or not self.has_latents:
            return None
        present = np.asarray(self.present().all(axis=0))
        for step in range(len(calls.timesteps) - 1):
            if not present[step]:
                continue
            rows = [self._row("latents", 0, step), *(self._row("step", b, step) for b in range(calls.branches))]
            read = torch.stack(rows).double().numpy()
            after = self._row("latents", 0, step + 1).double().numpy()
            weights = np.linalg.lstsq(read @ read.T, read @ after, rcond=1e-12)[0]
            missed = float(np.linalg.norm(after - weights @ read))
            moved = float(np.linalg.norm(after - weights[0] * read[0]))
            if missed < 0.3 * moved and abs(weights[1:].sum()) > 0:
                found.append(weights[1:] / weights[1:].sum())
        return tuple(float(w) for w in np.median(found, axis=0)) if found else None

    def edge_gram(self) -> Array:
        """Inner products ``[E, N, E, N]`` of the streams at all edges over (branch, step).

        Between edges that are not `comparable` (a joint block that ends in fewer streams) they mean nothing.
        """
        edges = len(self.streams)
        rows = [
            self._row(f"edge{e}", b, t)
            for e in range(edges)
            for b in range(self.calls.branches)
            for t in range(len(self.calls.timesteps))
        ]
        count = self.calls.branches * len(self.calls.timesteps)
        longest = max(row.numel() for row in rows)
        rows = [torch.nn.functional.pad(row, (0, longest - row.numel())) for row in rows]
        return _gram(rows).reshape(edges, count, edges, count)

    def present(self) -> np.ndarray:
        """``[branches, steps]``: which branch ran in which step."""
        steps = range(len(self.calls.timesteps))
        return np.array([[("step", b, t) in self.rows for t in steps] for b in range(self.calls.branches)])

    def comparable(self, first: int, last: int) -> bool:
        """Whether the streams before block ``first`` and after block ``last`` are of the same shapes."""
        return bool(self.shapes) and self.shapes[first] == self.shapes[last + 1]

    def _any(self, kind: str) -> Tensor | None:
        return next((row for (name, _, _), row in self.rows.items() if name == kind), None)

    def _row(self, kind: str, branch: int, step: int) -> Tensor:
        found = self.rows.get((kind, branch, step))
        if found is None and kind == "latents":
            found = next((self.rows[key] for key in self.rows if key[0] == kind and key[2] == step), None)
        if found is None:
            like = self._any(kind)
            assert like is not None
            return torch.zeros_like(like)
        return found


def reduce_features(tensors: list[Tensor]) -> Tensor:
    """A feature's entries in one float32 vector on the CPU; of more than ``MAX_COORDINATES`` a drawn part, scaled."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    size = flat.numel()
    if size <= MAX_COORDINATES:
        return flat.cpu().clone()
    return (flat[_drawn(size, MAX_COORDINATES).to(flat.device)] * math.sqrt(size / MAX_COORDINATES)).cpu()


def reduced_branches(tensors: list[Tensor], batched: bool) -> list[Tensor]:
    """`reduce_features` of every guidance branch of a call: of both halves of the batch where it holds two."""
    parts = [[t.chunk(2)[half] for t in tensors] for half in range(2)] if batched else [tensors]
    return [reduce_features(part) for part in parts]


def matching_latents(latents: Tensor, outputs: Sequence[Any]) -> Tensor:
    """The leading channels of ``latents`` that have the shape of the first output; all of them where none have."""
    output = next(out for out in outputs if isinstance(out, Tensor))
    part = latents_part(latents, output)
    return latents if part is None or latents.ndim < 3 else latents.narrow(1, 0, part)


@functools.lru_cache(maxsize=16)
def _drawn(size: int, count: int) -> Tensor:
    """``count`` of ``size`` coordinates, the same ones every time."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count].sort().values


def range_gram(edges: Array, first: int, last: int) -> Array:
    """Inner products ``[N, N]`` of the residual that blocks ``first`` to ``last`` add, from ``edge_gram``."""
    a, b = first, last + 1
    return np.asarray(edges[b, :, b, :] - edges[b, :, a, :] - edges[a, :, b, :] + edges[a, :, a, :])


def _gram(rows: list[Tensor]) -> Array:
    """Summed in float64, in chunks: errors of good forecasts are small differences of large numbers."""
    matrix = torch.stack(rows)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in matrix.split(8192, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return np.asarray(total.numpy())
