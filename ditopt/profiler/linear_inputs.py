"""Collects what decides how coarsely a linear layer may be computed: ranges of its inputs, noise of each precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ditopt.calls import NetworkCalls
from ditopt.errors import InputError
from ditopt.measures import PROMPT, Label, Measure, Numbers, Table
from ditopt.passes.flops import PRODUCTS
from ditopt.profiler.drawn import drawn, drawn_tokens
from ditopt.profiler.formats import FORMATS, decibels
from ditopt.profiler.interpret import Collector, Moment, Seen, of_branches
from ditopt.profiler.places import linears
from ditopt.profiler.rows import anchor_steps
from ditopt.sites import LinearSite
from ditopt.trace import Trace

QUANTILES = (0.5, 0.9, 0.99, 1.0)
CHANNEL_BYTES = 16 << 20
"""Of the ranges of single channels of a prompt, over all layers: with more, they are kept of fewer steps."""
OUTPUTS = 1024
"""The noise of a wider layer is measured in so many of its outputs, drawn evenly: what is rounded stays affordable."""
LARGEST = float(np.finfo(np.float16).max)
RATIO = 1e6
"""The most that an outlier ratio can be, where the median channel is all but silent."""


@dataclass(frozen=True)
class Ranges:
    """Largest absolute values of inputs: per channel ``[in]``, and quantiles over tokens of the largest per token."""

    channels: Numbers
    tokens: Numbers


@dataclass
class _Layer:
    """A product, where its input comes from, and its measures: without prompts, NaN until seen."""

    site: LinearSite
    left: int
    right: int
    source: tuple[str, int]
    channel_max: Numbers
    token_max: Numbers
    outlier: Numbers
    snr: Numbers
    weight_max: Numbers | None = None


class LinearInputs(Collector):
    """Ranges of the inputs of linear layers in every step, and the noise that each precision would add, at anchors.

    Those of single channels are of evenly spread steps (the label ``channel_step``), of as many as ``CHANNEL_BYTES``
    allow: of all in most models.

    The signal to noise ratio is that of the product without bias, against the product in float32, of at most ``rows``
    evenly drawn tokens.

    Raises:
        InputError: ``rows`` is below 1.
    """

    name = "linear"

    def __init__(self, trace: Trace, calls: NetworkCalls, *, rows: int = 128) -> None:
        super().__init__()
        if rows < 1:
            raise InputError(f"rows={rows}: a product needs at least 1 row to be measured on")
        self._rows = rows
        steps, branches = len(calls.timesteps), calls.branches
        self.anchors = anchor_steps(steps)
        self._layers: dict[str, _Layer] = {}
        found = linears(trace)
        per_step = 2 * branches * sum(site.in_features for site, _ in found)
        self.channel_steps = anchor_steps(steps, max(2, CHANNEL_BYTES // max(per_step, 1)))
        for site, node in found:
            left, right = PRODUCTS[node.target]  # type: ignore[index]  # the sites' nodes are calls of products
            source = node.args[left]
            assert isinstance(source, fx.Node)
            self._layers[node.name] = _Layer(
                site,
                left,
                right,
                _source(source),
                _unknown(len(self.channel_steps), branches, site.in_features, dtype=np.float16),
                _unknown(steps, branches, len(QUANTILES)),
                _unknown(steps, branches),
                _unknown(len(self.anchors), branches, len(FORMATS)),
            )
        self.wanted = frozenset(self._layers)
        self._known: dict[tuple[str, int], tuple[Moment, list[Ranges]]] = {}

    def see(self, seen: Seen) -> None:
        """Take the ranges of a product's input, and at an anchor try every precision."""
        layer, moment = self._layers[seen.node.name], seen.moment
        inputs, weight = seen.arguments[layer.left], seen.arguments[layer.right]
        if moment.refusal(inputs):
            self.skip(f"{layer.site.name}: inputs of shape {list(inputs.shape)} do not divide into guidance branches")
            return
        weight = (weight[0] if weight.ndim == 3 else weight).T
        if layer.weight_max is None:
            layer.weight_max = weight.abs().amax(0).float().cpu().numpy()
        parts = of_branches(moment, inputs)
        for (branch, _), found in zip(parts, self._ranges(layer, moment, [part for _, part in parts]), strict=True):
            layer.token_max[moment.step, branch] = found.tokens
            layer.outlier[moment.step, branch] = outlier_ratio(found.channels)
            if moment.step in self.channel_steps:
                position = self.channel_steps.index(moment.step)
                layer.channel_max[position, branch] = np.minimum(found.channels, LARGEST)
        if moment.step in self.anchors:
            some = weight[drawn(len(weight), OUTPUTS).to(weight.device)].float()
            for branch, part in parts:
                layer.snr[self.anchors.index(moment.step), branch] = ratios(drawn_tokens(part, self._rows), some)

    def tables(self) -> dict[str, Table]:
        """By site, the measures of the layers that were seen."""
        labels: dict[str, tuple[Label, ...]] = {
            "anchor": self.anchors,
            "channel_step": self.channel_steps,
            "quantile": QUANTILES,
            "format": tuple(FORMATS),
        }
        found = {}
        for layer in self._layers.values():
            if layer.weight_max is None:
                continue
            axes = {
                "channel_max": ("channel_step", "branch", "channel"),
                "token_max": ("step", "branch", "quantile"),
                "outlier": ("step", "branch"),
                "snr": ("anchor", "branch", "format"),
            }
            measures = {
                name: Measure((PROMPT, *along), getattr(layer, name)[None], partial=True)
                for name, along in axes.items()
            }
            measures["weight_max"] = Measure(("channel",), layer.weight_max)
            site = layer.site
            facts = {"in_features": site.in_features, "out_features": site.out_features, "rows": site.rows}
            found[site.name] = Table(measures, labels, facts)
        return found

    def _ranges(self, layer: _Layer, moment: Moment, parts: list[Tensor]) -> list[Ranges]:
        """Of each branch's inputs; layers side by side that read the same value share them."""
        known = self._known.get(layer.source)
        if known is None or known[0] != moment:
            known = self._known[layer.source] = moment, [ranges(part) for part in parts]
        return known[1]


def ranges(inputs: Tensor) -> Ranges:
    """The ranges of inputs ``[..., in]``."""
    sizes = inputs.detach().abs()
    channels = sizes.amax(tuple(range(sizes.ndim - 1))).float().cpu().numpy()
    tokens = sizes.amax(-1).flatten().float().cpu().numpy()
    return Ranges(channels, np.quantile(tokens, QUANTILES).astype(np.float32))


def outlier_ratio(channels: Numbers) -> float:
    """The largest of channels' largest values over their median; 1 if all are zero."""
    largest, median = float(channels.max()), float(np.median(channels))
    return min(largest / median, RATIO) if median > 0 else (RATIO if largest > 0 else 1.0)


def ratios(inputs: Tensor, weight: Tensor) -> list[float]:
    """The signal to noise ratio in dB of ``inputs [N, in] @ weight [out, in].T`` in each candidate precision."""
    reference = inputs @ weight.T
    return [decibels(product(inputs, weight), reference) for product in FORMATS.values()]


def _source(value: fx.Node) -> tuple[str, int]:
    """What a value is a view of, entry by entry in the same order, and its number of channels."""
    at = value
    while at.target in (torch.ops.aten.view.default, torch.ops.aten.clone.default):
        at = at.all_input_nodes[0]
    return at.name, int(value.meta["val"].shape[-1])


def _unknown(*shape: int, dtype: type[np.floating[Any]] = np.float32) -> Numbers:
    return np.full(shape, np.nan, dtype)
