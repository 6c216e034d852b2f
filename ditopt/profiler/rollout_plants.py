"""Errors planted in real rollouts: at modules of every kind, depth and phase of the schedule, and in many heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ditopt.components import Module
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.profile import NetworkProfile
from ditopt.profiler.call_plants import Keeper, noisy
from ditopt.profiler.head_edits import BlockMask, middling, under_blocks
from ditopt.profiler.interpret import CountedCalls, Watched, of_branches
from ditopt.profiler.memory import trim
from ditopt.profiler.places import attentions
from ditopt.profiler.tried import candidates_of
from ditopt.runtime.program import Compute, copied
from ditopt.search.heads import HeadPattern, is_measured
from ditopt.trace import Trace

THIRDS = (1 / 6, 1 / 2, 5 / 6)
STARTS = (1 / 6, 1 / 3, 1 / 2)
"""From where in the schedule on a third of all heads is under a pattern, in a rollout each."""


@dataclass(frozen=True)
class Plant:
    """An error planted in a rollout: where, in which step, and of what kind."""

    module: Module
    step: int
    error: str

    def __str__(self) -> str:
        return f"{self.module.site}, step {self.step}, {self.error}"


def plants(found: Sequence[Module], steps: int) -> tuple[Plant, ...]:
    """Nine plants: each third of the depth in each third of the schedule, kinds and errors in turn (a Latin square)."""
    kinds = list(dict.fromkeys(module.kind for module in found))
    chosen = []
    for depth, phase in product(range(3), range(3)):
        of_kind = [module for module in found if module.kind == kinds[(depth + phase) % len(kinds)]]
        module = of_kind[min(int(THIRDS[depth] * len(of_kind)), len(of_kind) - 1)]
        step = min(max(round(THIRDS[phase] * steps), 1), steps - 1)
        error = "reuse" if (depth + 2 * phase) % 3 == 1 else "noise"  # each kind of module has both
        chosen.append(Plant(module, step, error))
    return tuple(dict.fromkeys(chosen))


@dataclass
class RolloutPlant(CountedCalls):
    """An interceptor: plays a dense generation back up to a plant, answers that step with the error, then computes.

    A branch that the step before left out has noise in place of a reused output.
    """

    outputs: Sequence[Sequence[Any]]
    plant: Plant
    errors: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before: dict[int, Tensor] = {}

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call."""
        (number, moment), node = self.next_call(), self.plant.module.node.name
        if moment.step > self.plant.step:
            return compute(arguments)
        if moment.step < self.plant.step:
            if moment.step == self.plant.step - 1 and self.plant.error == "reuse":
                keeper = Keeper(node)
                Watched(self.trace, [keeper]).run(*arguments)
                self._before |= {branch: part.clone() for branch, part in of_branches(moment, keeper.kept[node])}
            return copied(self.outputs[number])
        whole = [self._before[branch] for branch in moment.branches if branch in self._before]

        def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
            planted = torch.cat(whole) if len(whole) == len(moment.branches) else noisy(number)(given, value)
            for (branch, mine), (_, theirs) in zip(
                of_branches(moment, value), of_branches(moment, planted), strict=True
            ):
                self.errors[branch] = float((theirs.double() - mine.double()).norm())
            return planted

        result: Sequence[Any] = Watched(self.trace, (), {node: edit}).run(*arguments)
        return result


@dataclass
class HeadsPlant(CountedCalls):
    """An interceptor: plays a dense generation back up to a step, and interprets from there on with heads under masks.

    ``masks`` are by the name of the attention's node and head.
    """

    outputs: Sequence[Sequence[Any]]
    start: int
    masks: Mapping[str, Mapping[int, BlockMask]]

    def __post_init__(self) -> None:
        self._edits = {node: under_blocks(heads) for node, heads in self.masks.items()}

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call."""
        number, moment = self.next_call()
        if moment.step < self.start:
            return copied(self.outputs[number])
        result: Sequence[Any] = Watched(self.trace, (), self._edits).run(*arguments)
        trim()
        return result


def third_of_heads(trace: Trace, network: NetworkProfile, which: int, start: int) -> tuple[HeadPattern, ...]:
    """Every third head of self-attention, from ``which`` on, under the candidate of middling density from a step on.

    Those of which the profile does not tell what that costs are left out.
    """
    steps = tuple(range(start, len(network.timesteps)))
    heads = []
    for entry in attentions(trace):
        table = network.tables["patterns"].get(entry.site.name)
        if table is None or network.geometry is None or entry.cross:
            continue
        found = middling(candidates_of(network.geometry, int(table.facts["block_queries"])))
        if found is None or found[0] not in table.labels["candidate"]:
            continue
        choices = (HeadPattern(entry.site.name, head, found[0], steps) for head in range(entry.site.heads))
        heads += [choice for choice in choices if is_measured(network, choice)]
    return tuple(heads[which::3])


def masks_of(
    heads: Sequence[HeadPattern], network: NetworkProfile, nodes: Mapping[str, str]
) -> dict[str, dict[int, BlockMask]]:
    """Masks by attention node (``nodes``: of each site) and head; blocks are those that were profiled."""
    found: dict[str, dict[int, BlockMask]] = {}
    assert network.geometry is not None
    for choice in heads:
        facts = network.tables["patterns"][choice.site].facts
        queries, keys = int(facts["block_queries"]), int(facts["block_keys"])
        pattern = pattern_from_data(json.loads(str(choice.candidate)))
        mask = BlockMask(pattern.block_map(network.geometry, queries, keys), queries, keys)
        found.setdefault(nodes[choice.site], {})[choice.head] = mask
    return found
