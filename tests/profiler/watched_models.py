"""Generations of tiny diffusers models under collectors, their values in full, and what an object keeps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.components import modules
from ditopt.measures import Numbers, Table
from ditopt.passes._infra import outputs
from ditopt.profiler.interpret import Collector, Seen, WatchedCalls, of_branches
from ditopt.trace import Trace
from tests.trace.models import CASES, Captured, capture, interpreted

STEPS = 5
ONE = NetworkCalls(tuple(map(float, range(STEPS))), tuple((t, 0) for t in range(STEPS)), 1, False)
SEPARATE = NetworkCalls(ONE.timesteps, tuple((t, b) for t in range(STEPS) for b in (0, 1)), 2, False)
INTERVAL = NetworkCalls(ONE.timesteps, tuple((t, b) for t, b in SEPARATE.calls if b == 0 or t in (1, 2, 4)), 2, False)
BATCHED = NetworkCalls(ONE.timesteps, ONE.calls, 2, True)


@functools.cache
def captured(name: str) -> Captured:
    model, inputs = CASES[name].make()
    with interpreted():
        return capture(model, inputs)


def trace_of(name: str) -> Trace:
    return captured(name).program.variants.trace


def generate(name: str, calls: NetworkCalls, *collectors: Collector, seed: int = 0) -> None:
    """A generation whose latents drift from step to step, another way in each branch."""
    found = captured(name)
    position = found.program.variants.latents
    assert position is not None
    drawing = torch.Generator().manual_seed(seed)
    begin, end, apart = (torch.randn(found.arguments[position].shape, generator=drawing) for _ in range(3))
    watched = WatchedCalls(trace_of(name), calls, collectors)
    for step, branch in calls.calls:
        arguments = list(found.arguments)
        arguments[position] = begin + (end - begin) * step / len(calls.timesteps) + apart * branch / 3
        watched(arguments, None)  # type: ignore[arg-type]  # nothing is left to the compiled program
    assert watched.complete


class Keeper(Collector):
    """Keeps every value in full, by node, step and branch."""

    name = "keeper"

    def __init__(self, wanted: frozenset[str]) -> None:
        super().__init__()
        self.wanted = wanted
        self.values: dict[tuple[str, int, int], Tensor] = {}
        self.inputs: dict[tuple[str, int], tuple[Any, ...]] = {}

    def see(self, seen: Seen) -> None:
        self.inputs[seen.node.name, seen.moment.step] = tuple(
            arg.clone() if isinstance(arg, Tensor) else arg for arg in seen.arguments
        )
        for branch, part in of_branches(seen.moment, seen.result):
            self.values[seen.node.name, seen.moment.step, branch] = part.clone()

    def tables(self) -> dict[str, Table]:
        return {}


@dataclass
class Full:
    """What features are in full, from the graph's modules, boundaries and outputs alone."""

    trace: Trace
    keeper: Keeper

    def __post_init__(self) -> None:
        self.made = {module.site: module.node.name for module in modules(self.trace)}
        self.returned = [node.name for node in outputs(self.trace.gm) if node is not None]
        self.ranges = self.trace.ranges()

    def parts(self, site: str, step: int, branch: int) -> list[Tensor] | None:
        """The tensors of a feature, or None where the branch did not run."""

        def value(name: str) -> Tensor:
            return self.keeper.values[name, step, branch].double()

        if not any((name, step, branch) in self.keeper.values for name in self.returned):
            return None
        if site in self.made:
            return [value(self.made[site])]
        if site == "step":
            return [value(name) for name in self.returned]
        first, last = self.ranges[site]
        before = [value(name) for name in self.trace.boundaries[first].streams]
        found = []
        for end in map(value, self.trace.boundaries[last + 1].streams):
            same = next((i for i, start in enumerate(before) if start.shape == end.shape), None)
            found.append(end if same is None else end - before.pop(same))
        return found

    def tokens(self, site: str, step: int, branch: int) -> list[Numbers] | None:
        """Its tokens ``[n, C]``; of an image that the step returns channels are in the second dimension."""
        parts = self.parts(site, step, branch)
        if parts is None:
            return None
        parts = [part.movedim(1, -1) if site == "step" and part.ndim > 3 else part for part in parts]
        return [part.reshape(-1, part.shape[-1]).numpy() for part in parts]


def kept_by(thing: object) -> Iterator[Tensor]:
    """Every tensor that an object holds, at any depth."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, np.ndarray):
        yield torch.from_numpy(thing)
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from kept_by(value)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from kept_by(value)
    elif type(thing).__module__.startswith("ditopt.") and hasattr(thing, "__dict__") and not isinstance(thing, Trace):
        yield from kept_by(vars(thing))
