"""How the caller's sampler moves, and the path that a second-order solver would take on the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.measure import DensePath, Evaluator, SecondOrder
from ditopt.profile import Array
from ditopt.profiler.features import FeatureCollector
from ditopt.runtime.program import Compute, Observation, Program, copied

FIRST_ORDER = 0.03
"""A sampler whose moves are missed by less than this, relative, beyond rounding, goes by the current output alone."""
ROUNDING_SLACK = 1.1
"""Of the expected squared error of rounding, what is taken for it."""
STRAIGHT = 0.01
"""Moves whose ``a`` is 1 to this add outputs up: Euler's method on a flow."""


@dataclass(frozen=True)
class Moves:
    """``x[t+1] = a[t] x[t] + b[t] F[t]``, all ``[T]``.

    ``missed`` is the most that is left of a move, relative and beyond what rounding explains; ``earlier`` how much of
    a move at most goes along the output before, which rounding does not. No call shows the outcome of the last step;
    it is taken to be like the one before, scaled by the step widths.
    """

    a: Array
    b: Array
    missed: float
    earlier: float = 0.0

    @property
    def back(self) -> Array:
        """``[T]``: the change of a step's output, per unit of it that the latents are off, that brings them back."""
        lost = np.abs(self.b) <= 1e-9 * np.abs(self.a)
        return np.asarray(np.where(lost, 0.0, self.a / np.where(lost, 1.0, self.b)))

    @property
    def is_euler(self) -> bool:
        """Whether they are Euler's on a flow, ``dx/dsigma = F``, which a formula of second order can take further."""
        return max(self.missed, self.earlier) < FIRST_ORDER and bool((np.abs(self.a - 1) < STRAIGHT).all())


def sampler_moves(paths: Sequence[DensePath], widths: Sequence[float] | Array, rounding: float = 0.0) -> Moves | None:
    """By least squares over dense paths; None where the latents do not go with the outputs.

    ``rounding`` is the error, relative and root mean square, of the latents that enter the network: loops keep them in
    float32 and hand on 16 bits.
    """
    total = len(widths)
    if total < 2 or any(path.latents.shape != path.outputs.shape for path in paths):
        return None
    found, missed, earlier = np.zeros((2, total)), 0.0, 0.0
    for step in range(total - 1):
        inner, cross = np.zeros((2, 2)), np.zeros(2)
        for path in paths:
            read = torch.stack([path.latents[step], path.outputs[step]]).double()
            inner += (read @ read.T).numpy()
            cross += (read @ path.latents[step + 1].double()).numpy()
        a, b = found[:, step] = np.linalg.lstsq(inner, cross, rcond=None)[0]
        for path in paths:
            before, after = path.latents[step], path.latents[step + 1]
            left = after - a * before - b * path.outputs[step]
            moved = float((after - before).norm().clamp(min=1e-12))
            rounded = rounding**2 * float(after.square().sum() + a**2 * before.square().sum())
            missed = max(missed, math.sqrt(max(0.0, float(left.square().sum()) - ROUNDING_SLACK * rounded)) / moved)
            if step:
                earlier = max(earlier, _along(left, path.outputs[step - 1], (before, path.outputs[step])) / moved)
    found[:, -1] = found[0, -2], found[1, -2] * widths[-1] / widths[-2]
    return Moves(found[0], found[1], missed, earlier)


def _along(vector: Tensor, direction: Tensor, others: Sequence[Tensor]) -> float:
    """Length of ``vector`` along what of ``direction`` is orthogonal to ``others``."""
    basis = torch.linalg.qr(torch.stack([*others, direction], 1).double())[0]
    return abs(float(basis[:, -1] @ vector.double()))


def second_order(
    evaluator: Evaluator, program: Program, calls: NetworkCalls, shares: Array, moves: Moves, pair: tuple[str, int]
) -> SecondOrder:
    """One generation whose outputs are altered so that a first-order sampler makes second-order moves.

    That is Adams and Bashforth's two-step formula: ``F[t] + h[t] / (2 h[t-1]) (F[t] - F[t-1])`` in place of ``F[t]``,
    branch by branch, where two steps have the same branches; ``moves`` are Euler's. Costs one dense generation.

    Raises:
        NonFiniteError: the altered generation has NaN or infinite values.
    """
    collector = FeatureCollector(calls, program.variants.latents, ())
    before: dict[int, tuple[Any, ...]] = {}  # of each branch, the last outputs
    branches = [{b for t, b in calls.calls if t == step} for step in range(len(calls.timesteps))]
    count = 0

    def intercept(arguments: list[Any], compute: Compute) -> Sequence[Any]:
        nonlocal count
        step, branch = calls.calls[count]
        count += 1
        outputs = tuple(compute(arguments))
        last, before[branch] = before.get(branch), copied(outputs)
        if last is not None and branches[step] == branches[step - 1]:
            factor = float(moves.b[step] / moves.b[step - 1]) / 2
            outputs = tuple(
                (now.float() + factor * (now.float() - then.float())).to(now.dtype) if isinstance(now, Tensor) else now
                for now, then in zip(outputs, last, strict=True)
            )
        collector(Observation(arguments, outputs, ()))
        return copied(outputs)

    evaluator.bind(())
    program.interceptor = intercept
    try:
        sample = evaluator.adapter.checked_rollout(*pair)
    finally:
        program.interceptor = None
    return SecondOrder(collector.path(shares), sample)


def pulled(dense: DensePath, finer: DensePath, share: float) -> DensePath:
    """The path ``share`` of the way from one to the other, which a first-order sampler can take as it takes both."""
    outputs, latents = torch.lerp(dense.outputs, finer.outputs, share), torch.lerp(dense.latents, finer.latents, share)
    return DensePath(outputs, latents)
