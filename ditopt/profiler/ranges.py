"""How much an error in a block range's residual moves the network's output, step by step.

An observer of one dense rollout: in some steps it also runs the blocks behind (and before) each range on
the residual of the step before, as reusing it would, and compares outputs. One rollout weighs all ranges
in all steps; nothing is compiled for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, fx

from ditopt.calls import NetworkCalls
from ditopt.passes._infra import Prediction, StepPlan
from ditopt.passes.combine import factors_name, slot_name
from ditopt.passes.features import feature
from ditopt.profiler.sensitivity import interpolate
from ditopt.runtime.program import Observation, Program

SAMPLED = 8
"""Steps in which ranges are weighed; weights between them are interpolated in the logarithm."""

Span = tuple[int, int]


def candidate_spans(count: int) -> tuple[Span, ...]:
    """The ranges worth a candidate among ``count`` blocks, as (first, last): all, all but an end or both, parts."""
    if count < 4:
        return ()
    last, half, quarter = count - 1, count // 2, count // 4
    spans = [(0, last), (1, last), (0, last - 1), (1, last - 1), (quarter, last - quarter), (0, half - 1), (half, last)]
    return tuple(dict.fromkeys(spans))


def residual_ends(program: Program, site: str) -> list[tuple[int, int | None]]:
    """Positions of a range's (end, start) streams among observed boundaries; no start where a stream begins inside."""
    trace = program.variants.trace
    names = [name for boundary in trace.boundaries for name in boundary.streams]
    offsets = [0, *accumulate(len(boundary.streams) for boundary in trace.boundaries)]
    first, last = trace.ranges()[site]
    found = feature(trace.gm, program.variants.index, site)
    return [
        (
            names.index(end.name, offsets[last + 1]),
            None if start is None else names.index(start.name, offsets[first]),
        )
        for end, start in zip(found.ends, found.starts, strict=True)
    ]


def residuals(edges: Sequence[Tensor], ends: Sequence[tuple[int, int | None]]) -> list[Tensor]:
    """What a range adds to each of its streams; a stream that begins inside it counts whole."""
    return [edges[end] if start is None else edges[end] - edges[start] for end, start in ends]


class RangeProbe:
    """Weighs ranges of one network over one generation; use as the observer of its program.

    Args:
        program: of the network, without a plan.
        calls: its call pattern.
        branch_weights: how the branches' outputs are combined, in the order of the profile's rows.
        sites: the ranges, by site name.
    """

    def __init__(
        self, program: Program, calls: NetworkCalls, branch_weights: Sequence[float], sites: Sequence[str]
    ) -> None:
        self._calls, self._branch_weights = calls, branch_weights
        variants = program.variants
        self._ends = {site: residual_ends(program, site) for site in sites}
        self._graphs = {site: variants.graph(StepPlan((Prediction(site, 1),))) for site in sites}
        total = len(calls.timesteps)
        self._steps = {round(step) for step in np.linspace(1, total - 1, min(SAMPLED, total - 1))}
        self._before: dict[tuple[str, int], list[Tensor]] = {}
        self._apart: dict[tuple[str, int], list[list[Tensor]]] = {}
        self._count = 0

    def __call__(self, seen: Observation) -> None:
        """Take in one call."""
        step, branch = self._calls.calls[self._count]
        self._count += 1
        edges = seen.boundaries
        for site, ends in self._ends.items():
            residual = residuals(edges, ends)
            before = self._before.get((site, branch))
            if before is not None and step in self._steps:
                self._weigh(site, step, branch, seen, residual, before)
            self._before[site, branch] = residual

    def _weigh(
        self, site: str, step: int, branch: int, seen: Observation, residual: list[Tensor], before: list[Tensor]
    ) -> None:
        graph = self._graphs[site]
        added: dict[str, Tensor] = {slot_name(site, 0, i): part.contiguous() for i, part in enumerate(before)}
        added[factors_name(site)] = torch.ones(1, device=before[0].device)
        inputs = [seen.arguments[i] if isinstance(i, int) else added[i] for i in graph.meta["ditopt_inputs"]]
        outputs = fx.Interpreter(graph).run(*inputs)[: len(seen.outputs)]
        moved = [o - d for o, d in zip(outputs, seen.outputs, strict=True) if isinstance(o, Tensor)]
        self._add(site, step, branch, moved, [b - r for b, r in zip(before, residual, strict=True)])

    def _add(self, site: str, step: int, branch: int, moved: list[Tensor], error: list[Tensor]) -> None:
        """Add one call's share of the guided sums of output and residual errors."""
        shares = self._branch_weights
        mixed = []
        for part in (moved, error):
            if self._calls.batched:
                halves = [tuple(t.chunk(2)) for t in part]
                mixed.append([shares[0] * one + shares[1] * two for one, two in halves])
            else:
                mixed.append([shares[branch] * t for t in part])
        if (site, step) in self._apart:
            old = self._apart[site, step]
            mixed = [[a + b for a, b in zip(*parts, strict=True)] for parts in zip(old, mixed, strict=True)]
        self._apart[site, step] = mixed

    def weights(self) -> Mapping[str, tuple[float, ...]]:
        """Per range and step ``||output error|| / ||residual error||`` of the guided sums."""
        found: dict[str, dict[int, float]] = {site: {} for site in self._ends}
        for (site, step), (moved, error) in self._apart.items():
            found[site][step] = max(_norm(moved), 1e-12) / max(_norm(error), 1e-12)
        total = len(self._calls.timesteps)
        return {
            site: interpolate(total, sorted(seen), [[seen[step] for step in sorted(seen)]])
            for site, seen in found.items()
            if seen
        }


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())
