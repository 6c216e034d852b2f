"""Collects the features of modules, blocks, block ranges and the step: Gram matrices, and per-channel corrections.

A large tensor is represented by coordinates drawn once, the same for all tensors of its size. Drawing is linear: a
range's feature, a difference of streams, costs nothing beside the streams at the edges between blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from ditopt.calls import NetworkCalls
from ditopt.components import modules
from ditopt.errors import InputError
from ditopt.measures import PROMPT, Measure, Numbers, Table
from ditopt.passes._infra import tensor_value
from ditopt.passes.features import feature
from ditopt.profiler.drawn import Centred, centred, coordinates, drawn_tokens, fitted, relative_error
from ditopt.profiler.interpret import Collector, Seen
from ditopt.profiler.places import BLOCK, RANGE, STEP_KIND, attentions
from ditopt.profiler.ranges import candidate_spans
from ditopt.profiler.rows import anchor_steps
from ditopt.sites import STEP, range_name
from ditopt.trace import Trace

ERRORS = ("affine", "affine_shared", "plain")
COEFFICIENT_BYTES = 256 << 20
"""Of the first prompt's corrections, which others are tried with: with more, ``affine_shared`` is of fewer steps."""


@dataclass(frozen=True)
class Feature:
    """A site's feature: end minus start (None: the end as it is) of each part, side by side; parts name nodes."""

    site: str
    kind: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of all nodes that it is made of."""
        return tuple(name for part in self.parts for name in part if name is not None)


@dataclass
class _Measured:
    """What is known of a feature: ``errors [3, step, branch, lag]`` and what it was in the last steps of a branch."""

    channels: int
    sizes: tuple[int, ...]
    errors: Numbers
    coefficients: Tensor
    earlier: dict[tuple[int, int], list[Centred]] = field(default_factory=dict)


class FeatureTables(Collector):
    """Gram matrices over (branch, step), and the errors of reading features ``lag`` steps later, as is or corrected.

    The correction is CacheQuant's (arXiv 2503.01323): ``Y = a X + b`` per channel with ``a = Cov(X, Y) / Var(X)``.
    Channels are the last dimension; of images and videos that the step returns, the second. ``shared`` are the
    ``coefficients`` of the first prompt's collector; None: this is the first prompt. They are of evenly spread steps,
    of as many as ``COEFFICIENT_BYTES`` allow: of all in most models.

    Raises:
        InputError: lags are not distinct numbers from 1 on; while collecting, ``shared`` does not fit this generation.
    """

    name = "features"

    def __init__(
        self,
        trace: Trace,
        calls: NetworkCalls,
        *,
        lags: Sequence[int] = (1, 2, 3),
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not lags or min(lags) < 1 or len(set(lags)) != len(lags):
            raise InputError(f"lags {list(lags)} have to be distinct numbers of steps, from 1 on")
        self.lags, self.shared = tuple(lags), shared
        self._steps, self._branches = len(calls.timesteps), calls.branches
        self._features = features_of(trace)
        self._measured: dict[str, _Measured] = {}
        self._rows: dict[tuple[str, int, int], Tensor] = {}
        self._tokens: dict[tuple[str, int], Tensor] = {}  # of the present call
        self._sizes: dict[str, int] = {}
        self.wanted = frozenset(name for each in self._features for name in each.nodes)
        order = [node for node in trace.gm.graph.nodes if node.name in self.wanted]
        position = {node.name: at for at, node in enumerate(order)}
        returned = {name for each in self._features if each.kind == STEP_KIND for name in each.nodes}
        self._images = {n.name for n in order if n.name in returned and tensor_value(n).ndim > 3}
        self.fitted_steps = self._fitted(order)
        self._ending: dict[str, list[Feature]] = {}
        for each in self._features:
            self._ending.setdefault(max(each.nodes, key=position.__getitem__), []).append(each)
        self._last = order[-1].name if order else ""
        for site in _without_feature(trace):
            self.skip(f"{site}: no module of its block hands on this attention as its one output, so it has no feature")

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """By site, ``[step, branch, lag, 2, channel]`` float32: a, then b; NaN where no earlier output was.

        Steps are the ``fitted_steps``.
        """
        if self.shared is not None:
            return dict(self.shared)
        return {site: measured.coefficients for site, measured in self._measured.items()}

    def see(self, seen: Seen) -> None:
        """Draw from a module's output or a stream, and weigh the features that are complete with it."""
        name, moment, parts = seen.node.name, seen.moment, self.parts(seen)
        if not parts:
            return
        for branch, part in parts:
            self._rows[name, branch, moment.step] = coordinates(part)
            tokens = part.movedim(1, -1) if name in self._images else part
            self._tokens[name, branch] = drawn_tokens(tokens)
            self._sizes[name] = tokens.shape[:-1].numel()
        for each in self._ending.get(name, ()):
            for branch in moment.branches:
                if all((node, branch) in self._tokens for node in each.nodes):
                    self._weigh(each, moment.step, branch)
        if name == self._last:
            self._tokens.clear()

    def tables(self) -> dict[str, Table]:
        """By site, ``gram``, and per lag the relative errors ``affine``, ``affine_shared`` and ``plain``."""
        found = {}
        for each in self._features:
            measured = self._measured.get(each.site)
            if measured is None:
                continue
            measures = {"gram": Measure((PROMPT, "row", "column"), self._gram(each)[None])}
            for name, errors in zip(ERRORS, measured.errors, strict=True):
                measures[name] = Measure((PROMPT, "step", "branch", "lag"), errors[None], partial=True)
            facts = {"kind": each.kind, "channels": measured.channels, "tokens": sum(measured.sizes)}
            found[each.site] = Table(measures, {"lag": self.lags}, facts)
        return found

    def _weigh(self, each: Feature, step: int, branch: int) -> None:
        """Compare a feature with what it was in the steps before."""
        values = {node: self._tokens[node, branch] for node in each.nodes}
        now = [centred(part) for part in _differences(each, values)]
        measured = self._measured.get(each.site)
        if measured is None:
            measured = self._measured[each.site] = self._started(each, now)
        for position, lag in enumerate(self.lags):
            before = measured.earlier.get((branch, step - lag))
            if before is None:
                continue
            own = [fitted(*pair) for pair in zip(before, now, strict=True)]
            own_error = relative_error(before, now, own, measured.sizes)
            shared_error = math.nan  # of the first prompt, their own errors would flatter them
            at = (self.fitted_steps.index(step), branch, position) if step in self.fitted_steps else None
            if at is not None and self.shared is None:
                measured.coefficients[at] = torch.cat(own, dim=1)
            elif at is not None:
                fits = measured.coefficients[at].to(own[0].device)
                shared = fits.split([part.values.shape[1] for part in now], dim=1)
                shared_error = relative_error(before, now, shared, measured.sizes)
            unchanged = [torch.stack([torch.ones_like(fit[0]), torch.zeros_like(fit[1])]) for fit in own]
            plain_error = relative_error(before, now, unchanged, measured.sizes)
            errors = np.array([own_error, shared_error, plain_error])
            measured.errors[:, step, branch, position] = np.where(np.isinf(errors), np.nan, errors)  # of a zero feature
        measured.earlier[branch, step] = now
        for key in [key for key in measured.earlier if key[0] == branch and key[1] <= step - max(self.lags)]:
            del measured.earlier[key]

    def _started(self, each: Feature, now: Sequence[Centred]) -> _Measured:
        channels = sum(part.values.shape[1] for part in now)
        sizes = tuple(self._sizes[end] for end, _ in each.parts)
        errors = np.full((len(ERRORS), self._steps, self._branches, len(self.lags)), np.nan, np.float32)
        shape = (len(self.fitted_steps), self._branches, len(self.lags))
        if self.shared is None:
            return _Measured(channels, sizes, errors, torch.full((*shape, 2, channels), math.nan))
        known = self.shared.get(each.site)
        if known is None or known.shape != (*shape, 2, channels):
            has = "none" if known is None else f"shape {list(known.shape)}"
            raise InputError(f"shared coefficients of {each.site} need shape {[*shape, 2, channels]}; there is {has}")
        return _Measured(channels, sizes, errors, known)

    def _fitted(self, nodes: Sequence[fx.Node]) -> tuple[int, ...]:
        """The steps of which corrections are kept; before the first there is nothing to correct."""
        channels = {node.name: tensor_value(node).shape[1 if node.name in self._images else -1] for node in nodes}
        total = sum(channels[end] for each in self._features for end, _ in each.parts)
        per_step = 4 * 2 * len(self.lags) * self._branches * total
        later = anchor_steps(max(self._steps - 1, 1), max(2, COEFFICIENT_BYTES // max(per_step, 1)))
        return tuple(step + 1 for step in later)

    def _gram(self, each: Feature) -> Numbers:
        """Inner products in float64 over rows ``branch * steps + step``; of what did not run they are zero."""
        rows = {}
        for branch in range(self._branches):
            for step in range(self._steps):
                if all((node, branch, step) in self._rows for node in each.nodes):
                    values = {node: self._rows[node, branch, step] for node in each.nodes}
                    rows[branch * self._steps + step] = torch.cat(_differences(each, values)).double()
        matrix = torch.zeros(self._branches * self._steps, next(iter(rows.values())).numel(), dtype=torch.float64)
        for position, row in rows.items():
            matrix[position] = row
        return np.asarray((matrix @ matrix.T).numpy())


def features_of(trace: Trace) -> list[Feature]:
    """The features of a graph: of modules, in order, of blocks, of the ranges worth a candidate, and of the step."""
    found = [Feature(module.site, module.kind, ((module.node.name, None),)) for module in modules(trace)]
    blocks = trace.blocks if trace.boundaries else ()
    ranges = [range_name(blocks[first], blocks[last]) for first, last in candidate_spans(len(blocks))]
    for site, kind in {**dict.fromkeys(blocks, BLOCK), **dict.fromkeys(ranges, RANGE), STEP: STEP_KIND}.items():
        made = feature(trace.gm, trace.graph_index(None), site)
        ends = zip(made.ends, made.starts, strict=True)
        parts = tuple((end.name, start.name if start else None) for end, start in ends if _is_tensor(end.meta))
        if parts:
            found.append(Feature(site, kind, parts))
    return found


def _differences(each: Feature, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values[end] if start is None else values[end] - values[start] for end, start in each.parts]


def _without_feature(trace: Trace) -> list[str]:
    """Attention sites that are in no module which has a feature."""
    covered = tuple(f"{module.site}." for module in modules(trace))
    names = [entry.site.name for entry in attentions(trace)]
    return [name for name in names if not f"{name.split('#')[0]}.".startswith(covered)]


def _is_tensor(meta: Mapping[str, object]) -> bool:
    return isinstance(meta.get("val"), Tensor)
