"""The predicted error of predictions that are given with their factors, whoever chose them: in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditopt.profile import Array
from ditopt.search.problem import SearchProblem
from ditopt.search.quadratic import COHERENCE, mixed


@dataclass(frozen=True)
class Planned:
    """One step's prediction: ``factors`` of the outputs of ``sources``, then of the latents where there is one more."""

    sources: tuple[int, ...]
    factors: tuple[float, ...]


def planned_error(problem: SearchProblem, predictions: Mapping[int, Planned], coherence: float = COHERENCE) -> float:
    """Root mean square over prompts of the final sample's relative error, as ``quadratic`` has it."""
    gram = problem.gram.mean(axis=0)
    total, alone = np.zeros(len(gram)), 0.0
    for step, planned in predictions.items():
        row = _row(problem, step, planned.sources, planned.factors)
        total += row
        alone += float(row @ gram @ row)
    together = float(total @ gram @ total)
    return float(max(mixed(together, alone, coherence), 0.0) ** 0.5)


def _row(problem: SearchProblem, step: int, sources: Sequence[int], factors: Sequence[float]) -> Array:
    row = np.zeros(problem.gram.shape[-1])
    row[step] = 1.0
    for source, factor in zip(sources, factors, strict=False):
        row[source] -= factor
    if len(factors) > len(sources):
        row[problem.steps + step] -= factors[-1]
    return np.asarray(row * problem.weights[step])
