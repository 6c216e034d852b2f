"""What tests of loop recipes share: features that move over steps, and a network in which a system has the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import Predictor
from ditopt.search import predictor_coefficients
from tests.tiny import TinyDiT

Blocks = Callable[[Tensor], Tensor]
"""What the blocks add to the stream."""
System = Callable[[int, Tensor, Blocks], Tensor]
"""A published system: what is added to the stream in a step; it may run the blocks, or not."""


def walk(steps: int, size: int = 12, prompts: int = 2, seed: int = 0) -> np.ndarray:
    """``[P, T, size]``: features that turn and shrink from step to step."""
    rng = np.random.default_rng(seed)
    start, pull = rng.normal(size=(prompts, 1, size)), rng.normal(size=(prompts, 1, size))
    at = np.linspace(0, 1, steps)[None, :, None]
    return np.asarray(start * (1 - 0.3 * at) + pull * at**2 + 0.02 * rng.normal(size=(prompts, steps, size)))


def gram_of(features: np.ndarray) -> np.ndarray:
    """``[P, T, T]`` of features ``[P, T, size]``."""
    return np.asarray(features @ features.transpose(0, 2, 1))


def carried_out(decision: Predictor, kept: Sequence[int], features: np.ndarray) -> np.ndarray:
    """``[T, size]``: features ``[T, size]`` where computed, else what the decision makes of the computed ones."""
    found, times = features.copy(), np.linspace(1, 0.1, len(features)) ** 2
    for step in range(len(features)):
        if step not in kept:
            sources = [each for each in reversed(kept) if each < step][: decision.history]
            found[step] = np.dot(predictor_coefficients(decision, times.tolist(), step, sources), features[sources])
    return found


class WithSystem(torch.nn.Module):
    """A tiny network, eager, in which a system decides step by step what its blocks add."""

    def __init__(self, model: TinyDiT, system: System) -> None:
        super().__init__()
        self.model, self.system, self.step = model, system, 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        model = self.model
        angles = timestep[:, None] / 1000 * torch.arange(1, 9)
        features = model.time(torch.cat([angles.sin(), angles.cos()], -1)) + encoder_hidden_states

        def blocks(stream: Tensor) -> Tensor:
            after = stream
            for block in model.blocks:
                after = block(after, features)
            return after - stream

        x = model.embed(hidden_states)
        added = self.system(self.step, x, blocks)
        self.step += 1
        velocity: Tensor = model.head(x + added) + hidden_states
        return velocity
