"""How much an error at a module's output moves the network's output: errors planted in single calls of a generation.

The errors are noise of a tenth of the output and, in self-attention, a head left out and a head under a sparse pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.console import Stage
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import block_for
from ditopt.measures import Label, Measure, Table
from ditopt.profiler.head_edits import middling_mask, under_masks, without_head
from ditopt.profiler.interpret import Collector, Edit, Seen, Watched, moment_of, of_branches
from ditopt.profiler.places import SELF, Attention, Module, attentions, modules
from ditopt.runtime.program import Compute
from ditopt.trace import Trace

NOISE = 0.1
"""Planted noise relative to the output's root mean square, channel by channel."""
MOST_SITES = 24
STEPS = (0.1, 0.35, 0.65, 0.9)
"""Where in the schedule single calls are planted, as shares of its length."""
ERRORS = ("noise", "head", "pattern")


class Keeper(Collector):
    """Holds the latest value of each of some nodes."""

    name = "keeper"

    def __init__(self, *nodes: str) -> None:
        super().__init__()
        self.wanted = frozenset(nodes)
        self.kept: dict[str, Tensor] = {}

    def see(self, seen: Seen) -> None:
        """Hold the node's result."""
        self.kept[seen.node.name] = seen.result

    def tables(self) -> dict[str, Table]:
        """None: it measures nothing."""
        return {}


def anchor_steps_of(steps: int) -> tuple[int, ...]:
    """The steps in which single calls are planted."""
    return tuple(sorted({min(round(share * steps), steps - 1) for share in STEPS}))


def chosen_modules(trace: Trace) -> tuple[Module, ...]:
    """The modules in which errors are planted: all, or of many some of each kind, spread evenly in depth."""
    found = modules(trace)
    kinds: dict[str, list[Module]] = {}
    for module in found:
        kinds.setdefault(module.kind, []).append(module)
    most = max(1, MOST_SITES // max(len(kinds), 1))
    kept = {
        of_kind[int(at)].site
        for of_kind in kinds.values()
        for at in np.unique(np.linspace(0, len(of_kind) - 1, min(most, len(of_kind))).round())
    }
    return tuple(module for module in found if module.site in kept)


def noisy(seed: int) -> Edit:
    """Adds noise of ``NOISE`` times the root mean square of every channel (the last dimension)."""

    def edit(arguments: tuple[Any, ...], value: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device)
        rms = value.float().square().mean(tuple(range(value.ndim - 1)), keepdim=True).sqrt()
        return (value.float() + NOISE * rms * drawn).to(value.dtype)

    return edit


@dataclass
class CallPlants:
    """An interceptor: answers a generation's calls by interpreting, and plants errors in those of some steps.

    ``found`` holds, per site, error and step, ``||change of the output|| / ||error||`` of each planted branch.
    """

    trace: Trace
    calls: NetworkCalls
    stage: Stage
    geometry: Geometry | None = None
    found: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.modules = chosen_modules(self.trace)
        self._attention = attention_of(self.trace, self.modules)
        self.steps = anchor_steps_of(len(self.calls.timesteps))

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call."""
        moment = moment_of(self.calls, self.count)
        self.count += 1
        if moment.step not in self.steps or 0 not in moment.branches:
            return compute(arguments)
        last = self.modules[-1]
        keeper = Keeper(last.node.name)
        outputs: Sequence[Any] = Watched(self.trace, [keeper]).run(*arguments)
        base = keeper.kept[last.node.name]
        for position in reversed(range(len(self.modules))):
            module, before = self.modules[position], self.modules[position - 1]
            for error, edits in self._edits(position, moment.step).items():
                keeper = Keeper(module.node.name, before.node.name)
                changed = Watched(self.trace, [keeper], edits).run(*arguments)
                self._note(moment, module, error, keeper.kept[module.node.name] - base, changed[0] - outputs[0])
            base = keeper.kept[before.node.name]  # upstream of the plant, so it is what it was
            self.stage.advance()
        return outputs

    def _edits(self, position: int, step: int) -> dict[str, dict[str, Edit]]:
        module = self.modules[position]
        found = {"noise": {module.node.name: noisy(1000 * step + position)}}
        attention = self._attention.get(module.site)
        if attention is not None:
            head = (self.steps.index(step) + position) % attention.site.heads
            found["head"] = {attention.node.name: without_head(head)}
            mask = mask_for(attention, self.geometry)
            if mask is not None:
                found["pattern"] = {attention.node.name: under_masks({head: mask})}
        return found

    def _note(self, moment: Any, module: Module, error: str, planted: Tensor, moved: Tensor) -> None:
        parts = zip(of_branches(moment, planted), of_branches(moment, moved), strict=True)
        for (_, one), (_, two) in parts:
            ratio = float(two.double().norm()) / max(float(one.double().norm()), 1e-30)
            self.found.setdefault((module.site, error, moment.step), []).append(ratio)

    def tables(self) -> dict[str, Table]:
        """``to_output`` ``[anchor, error]`` by site: the mean over branches in the logarithm."""
        found = {}
        for module in self.modules:
            values = np.full((len(self.steps), len(ERRORS)), np.nan, dtype=np.float32)
            for (row, step), (column, error) in product(enumerate(self.steps), enumerate(ERRORS)):
                ratios = self.found.get((module.site, error, step))
                if ratios:
                    values[row, column] = np.exp(np.mean(np.log(np.maximum(ratios, 1e-30))))
            measure = Measure(("anchor", "error"), values, partial=True)
            labels: dict[str, tuple[Label, ...]] = {"anchor": self.steps, "error": ERRORS}
            found[module.site] = Table({"to_output": measure}, labels, {"kind": module.kind})
        return found


def mask_for(attention: Attention, geometry: Geometry | None) -> Tensor | None:
    """The mask of the pattern that is planted at a site; None where its tokens do not lie as ``geometry`` says."""
    tokens = attention.site.queries
    if geometry is None or geometry.tokens != tokens or attention.site.keys != tokens:
        return None
    return middling_mask(geometry, block_for(tokens))


def attention_of(trace: Trace, found: Sequence[Module]) -> dict[str, Attention]:
    """The attention site inside each self-attention module, by the module's name."""
    return {
        module.site: entry
        for module in found
        for entry in attentions(trace)
        if module.kind == SELF and (entry.site.name == module.site or entry.site.name.startswith(f"{module.site}."))
    }
