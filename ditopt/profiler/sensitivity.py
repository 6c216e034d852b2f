"""How much an output error of a step moves the final sample: measured by planted errors in real rollouts.

Up to the planted step a rollout is the dense one, so the recorded outputs are played back there and nothing
is computed: a plant at step t of T costs T - t evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ditopt.calls import NetworkCalls
from ditopt.profile import Array
from ditopt.runtime.program import Compute, Observation, Program, copied

PLANTS = (0.03, 0.12, 0.3, 0.55, 0.85)
"""Where in the schedule errors are planted, as shares of its length; factors between are interpolated."""

PLANTED_PROMPTS = 2
"""Prompts in which errors are planted; their factors are averaged in the logarithm."""


def plant_steps(steps: int) -> tuple[int, ...]:
    """The steps in which errors are planted."""
    return tuple(sorted({min(max(1, round(share * steps)), steps - 1) for share in PLANTS}))


@dataclass
class Tape:
    """The outputs of all network calls of one dense generation, in the order of the calls."""

    calls: Mapping[str, NetworkCalls]
    recorded: list[tuple[str, int, int, tuple[Any, ...]]] = field(default_factory=list)
    _seen: dict[str, int] = field(default_factory=dict)

    def record(self, network: str, seen: Observation) -> None:
        """Take in one call, as an observer does."""
        self.recorded.append((network, *self._next(network), copied(seen.outputs)))

    def plant(self, programs: Mapping[str, Program], network: str, step: int) -> None:
        """Until ``eject``: play back what comes before ``step`` of ``network``, and there give the step before's."""
        self._seen.clear()
        self._at = 0
        for name, program in programs.items():
            program.interceptor = partial(self._play, name, (network, step))

    def eject(self, programs: Mapping[str, Program]) -> None:
        """Let the networks compute again."""
        self._seen.clear()
        for program in programs.values():
            program.interceptor = None

    def _next(self, network: str) -> tuple[int, int]:
        number = self._seen.get(network, 0)
        self._seen[network] = number + 1
        return self.calls[network].calls[number]

    def _play(
        self,
        network: str,
        planted: tuple[str, int],
        arguments: list[Any],
        compute: Compute,
    ) -> Sequence[Any]:
        here = self._at
        self._at += 1
        step, branch = self._next(network)
        if (network, step) == planted:
            earlier = [out for name, t, b, out in self.recorded if (name, b) == (network, branch) and t < step]
            return copied(earlier[-1]) if earlier else compute(arguments)
        began = next(i for i, (name, t, _, _) in enumerate(self.recorded) if (name, t) == planted)
        return copied(self.recorded[here][-1]) if here < began else compute(arguments)


def growth_factor(gram: Array, step: int, width: float, moved: float) -> float:
    """``||change of the final sample|| / (step width * ||output error||)`` for a step that reused the one before.

    ``gram`` is the effective Gram matrix ``[N, N]`` of the outputs in the planted prompt.
    """
    square = gram[step, step] - 2 * gram[step, step - 1] + gram[step - 1, step - 1]
    return max(moved, 1e-12) / max(width * float(np.sqrt(max(square, 1e-30))), 1e-12)


def interpolate(steps: int, planted: Sequence[int], factors: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Factors of all steps from ``factors`` ``[prompts][planted]``: mean over prompts, linear, in the logarithm."""
    means = np.log(np.asarray(factors)).mean(axis=0)
    return tuple(np.exp(np.interp(np.arange(steps), planted, means)).tolist())
