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
from torch import Tensor, fx

from ditopt.calls import NetworkCalls
from ditopt.components import SELF, Module, modules
from ditopt.console import Stage
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import block_for
from ditopt.measures import PROMPT, Label, Measure, Table
from ditopt.passes._infra import tensor_value
from ditopt.profiler.head_edits import BlockMask, middling, under_blocks, without_head
from ditopt.profiler.interpret import Collector, CountedCalls, Edit, Moment, Seen, State, Watched, of_branches
from ditopt.profiler.memory import trim
from ditopt.profiler.places import Attention, attentions
from ditopt.profiler.tried import candidates_of
from ditopt.runtime.program import Compute
from ditopt.search.heads import LEFT_OUT, PATTERN
from ditopt.trace import Trace

NOISE = 0.1
"""Planted noise relative to the output's root mean square, channel by channel."""
MOST_SITES = 24
MOST_HEADS = 96
STEPS = (0.1, 0.4, 0.8)
"""Where in the schedule single calls are planted, as shares of its length."""
NOISE_ERROR = "noise"
ERRORS = (NOISE_ERROR, LEFT_OUT, PATTERN)
"""Kinds of errors: noise at the first and last of these steps, heads left out between, patterns at all of them."""
FLOOR = 4
"""What moves the output by no more than so many units of its last place is rounding, and tells nothing."""
LEAST = 1e-6
"""An error smaller than this, relative to the module's output, is no error: an idle head has no growth."""


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


def plantable(trace: Trace, calls: NetworkCalls) -> tuple[Module, ...]:
    """What errors can be planted in: modules, and the projections behind self-attention that is in none.

    Left out is what has a batch that guidance branches cannot share.
    """
    found = modules(trace)
    inside = {entry.site.name for entry in attention_of(trace, found).values()}
    alone = [
        Module(entry.site.name, SELF, entry.projection or entry.node)
        for entry in attentions(trace)
        if not entry.cross and entry.site.name not in inside
    ]
    branches = calls.branches if calls.batched else 1
    return tuple(each for each in (*found, *alone) if tensor_value(each.node).shape[0] % branches == 0)


def chosen_modules(trace: Trace, calls: NetworkCalls, attention_only: bool = False) -> tuple[Module, ...]:
    """Where errors are planted: everywhere, or of many some of each kind, spread evenly in depth.

    ``attention_only``: in self-attention alone.
    """
    found = tuple(each for each in plantable(trace, calls) if each.kind == SELF or not attention_only)
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
class CallPlants(CountedCalls):
    """An interceptor: answers a generation's calls by interpreting, and plants errors in those of some steps.

    ``found`` holds, per site, head (0 where none), error and step, ``||change of the output|| / ||error||`` of each
    planted branch. Tables have ``prompts`` rows, of which all but the first, in which errors are planted, are unknown.
    """

    stage: Stage
    geometry: Geometry | None = None
    prompts: int = 1
    attention_only: bool = False
    found: dict[tuple[str, int, str, int], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = chosen_modules(self.trace, self.calls, self.attention_only)
        self._attention = attention_of(self.trace, self.modules)
        total = sum(entry.site.heads for entry in self._attention.values())
        self._every = max(1, -(-total // MOST_HEADS))
        self._masks = {site: mask_for(entry, self.geometry) for site, entry in self._attention.items()}
        self.steps = anchor_steps_of(len(self.calls.timesteps))

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call."""
        _, moment = self.next_call()
        if moment.step not in self.steps or 0 not in moment.branches:
            return compute(arguments)
        planted = {
            node: (module, edits) for module in self.modules for node, edits in self._edits(module, moment.step).items()
        }
        if not planted:
            self.stage.advance(units=len(self.modules))
            return compute(arguments)
        run = Watched(self.trace)
        outputs: Sequence[Any] = run.run(*arguments)
        state = run.start(*arguments)
        for node in run.graph.nodes:
            if node not in planted:
                continue
            module, edits = planted[node]
            state = run.until(state, node)
            given, value = run.value(state)
            base, _ = _through(run, state, value, module)
            for head, error, edit in edits:
                there, behind = _through(run, state, edit(given, value), module)
                key = (module.site, head, error, moment.step)
                self._note(moment, key, base, there, outputs[0], run.finish(behind)[0])
            trim()
            self.stage.advance(units=len(self.modules) / len(planted))
        return outputs

    def _edits(self, module: Module, step: int) -> dict[fx.Node, list[tuple[int, str, Edit]]]:
        """By the node that is edited: heads (0: none), kinds of errors and their edits."""
        position, place = self.modules.index(module), self.steps.index(step)
        between = 0 < place < len(self.steps) - 1
        found: dict[fx.Node, list[tuple[int, str, Edit]]] = {}
        attention, mask = self._attention.get(module.site), self._masks.get(module.site)
        for head in range(position % self._every, attention.site.heads if attention else 0, self._every):
            assert attention is not None
            if between or mask is None:
                found.setdefault(attention.node, []).append((head, LEFT_OUT, without_head(head)))
            if mask is not None:
                found.setdefault(attention.node, []).append((head, PATTERN, under_blocks({head: mask})))
        if not between:
            found.setdefault(module.node, []).append((0, NOISE_ERROR, noisy(1000 * step + position)))
        return found

    def _note(
        self,
        moment: Moment,
        key: tuple[str, int, str, int],
        base: Tensor,
        planted: Tensor,
        output: Tensor,
        changed: Tensor,
    ) -> None:
        """Keep how much an error (``planted`` less ``base``, at the module) changes the network's ``output``."""
        parts = [of_branches(moment, value) for value in (base, planted - base, output, changed)]
        rounding = FLOOR * torch.finfo(output.dtype).eps
        for (_, whole), (_, error), (_, dense), (_, result) in zip(*parts, strict=True):
            size, moved = float(error.double().norm()), float((result.double() - dense.double()).norm())
            told = moved == 0 or moved > rounding * float(dense.double().norm())
            if size > LEAST * float(whole.double().norm()) and told:
                self.found.setdefault(key, []).append(moved / size)

    def tables(self) -> dict[str, Table]:
        """By site ``to_output`` ``[prompt, anchor, error]``; of attention also ``head_to_output``, by ``head`` as well.

        Means over branches and heads are geometric; NaN: not planted, or what moved was no more than rounding.
        """
        found = {}
        for module in self.modules:
            attention = self._attention.get(module.site)
            heads = attention.site.heads if attention is not None else 1
            levels = np.full((self.prompts, len(self.steps), heads, len(ERRORS)), np.nan)
            for (row, step), head, (column, error) in product(enumerate(self.steps), range(heads), enumerate(ERRORS)):
                ratios = self.found.get((module.site, head, error, step))
                if ratios:
                    levels[0, row, head, column] = np.exp(np.mean(np.log(np.maximum(ratios, 1e-30))))
            each = Measure((PROMPT, "anchor", "head", "error"), levels, partial=True)
            measures = {"to_output": each.geometric_mean("head")}
            if attention is not None:
                measures["head_to_output"] = each
            labels: dict[str, tuple[Label, ...]] = {"anchor": self.steps, "error": ERRORS}
            found[module.site] = Table(measures, labels, {"kind": module.kind})
        return found


def _through(run: Watched, state: State, value: Any, module: Module) -> tuple[Tensor, State]:
    """With a value for the node that is next: the module's output, and the state behind it."""
    if state.at is module.node:
        return value, run.put(state, value)
    before = run.until(run.put(state, value), module.node)
    _, output = run.value(before)
    return output, run.put(before, output)


def mask_for(attention: Attention, geometry: Geometry | None) -> BlockMask | None:
    """The pattern that is planted at a site; None where its tokens do not lie as ``geometry`` says."""
    tokens = attention.site.queries
    if geometry is None or geometry.tokens != tokens or attention.site.keys != tokens:
        return None
    found = middling(candidates_of(geometry, block_for(tokens)))
    return None if found is None else BlockMask(found[1], block_for(tokens), block_for(tokens))


def attention_of(trace: Trace, found: Sequence[Module]) -> dict[str, Attention]:
    """The attention site inside each self-attention module, by the module's name."""
    return {
        module.site: entry
        for module in found
        for entry in attentions(trace)
        if module.kind == SELF and (entry.site.name == module.site or entry.site.name.startswith(f"{module.site}."))
    }
