"""The error of a whole schedule in closed form, with the correlations between steps, and a local search on it.

A linear sampler ends off by ``sum_t w_t (F_t - sum_i c_ti F_i)``, which is one combination of features:
``c^T F``. Its squared norm is ``c^T G c`` per prompt, so signs and cancellation between steps are seen,
which a sum over steps cannot do. That the network answers the changed latents is seen only through the
measured sensitivity, so full trust in cancellation would overfit: ``COHERENCE`` mixes both views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ditopt.profile import Array
from ditopt.search.problem import SearchProblem
from ditopt.search.table import ErrorTable, with_histories

COHERENCE = 0.8
"""Share of the coherent sum ``|sum_t e_t|^2``; the rest is ``sum_t |e_t|^2``."""


def mixed(together: Any, alone: Any, coherence: float = COHERENCE) -> Any:
    """The square of a sum of errors, from that of all ``together`` and the sum of their squares (numbers or arrays)."""
    return coherence * together + (1 - coherence) * alone


Families = Mapping[int, int]
"""Predicted step -> index of its candidate in the table."""


@dataclass(frozen=True)
class Quadratic:
    """Whole-schedule errors of one problem; ``table`` says which candidates there are."""

    problem: SearchProblem
    table: ErrorTable
    coherence: float = COHERENCE

    @cached_property
    def gram(self) -> Array:
        """``[N, N]``: the mean over prompts, in units of the squared sample norm once rows are weighted."""
        return np.asarray(self.problem.gram.mean(axis=0))

    @cached_property
    def _rows(self) -> dict[tuple[int, int, tuple[int, ...]], tuple[Array, float]]:
        return {}

    def row(self, step: int, family: int, history: Sequence[int]) -> tuple[Array, float]:
        """The weighted error of one prediction as a combination ``[N]`` of Gram rows, and its squared norm."""
        candidate = self.table.candidates[family]
        key = (step, family, tuple(history[: candidate.history]))
        if key not in self._rows:
            row = np.zeros(len(self.gram))
            factors = self.table.coefficients(family, step, history)
            row[list(key[2])] = [-factor for factor in factors[: candidate.history]]
            if candidate.latents:
                row[self.problem.steps + step] = -factors[-1]
            row[step] += 1.0
            row *= self.problem.weights[step]
            self._rows[key] = row, float(row @ self.gram @ row)
        return self._rows[key]

    def combination(self, kept: Sequence[int], families: Families) -> Array:
        """``[N]``: the final error as a combination of Gram rows."""
        total = np.zeros(len(self.gram))
        for step, history in with_histories(kept, self.problem.steps).items():
            total += self.row(step, families[step], history)[0]
        return total

    def error(self, kept: Sequence[int], families: Families) -> float:
        """Root mean square over prompts of the final error, relative to the sample norm."""
        total, alone = np.zeros(len(self.gram)), 0.0
        for step, history in with_histories(kept, self.problem.steps).items():
            row, square = self.row(step, families[step], history)
            total += row
            alone += square
        return self._mix(float(total @ self.gram @ total), alone)

    def _mix(self, together: float, alone: float) -> float:
        return float(max(mixed(together, alone, self.coherence), 0.0) ** 0.5)

    def settle(self, kept: Sequence[int], sweeps: int = 2) -> tuple[dict[int, int], float]:
        """The families for ``kept``: each step's own best first, then changed one by one while the whole gains."""
        histories = with_histories(kept, self.problem.steps)
        families = {step: self.table.best(step, history)[1] for step, history in histories.items()}
        options = {
            step: {
                family: self.row(step, family, history)
                for family in range(len(self.table.candidates))
                if np.isfinite(self.table.error(family, step, history))
            }
            for step, history in histories.items()
        }
        if not all(options.values()):
            return families, np.inf
        for _ in range(sweeps):
            before = dict(families)
            total = self.combination(kept, families)
            for step, rows in options.items():
                rest = total - rows[families[step]][0]
                pull = 2 * (self.gram @ rest)
                scores = {family: self.coherence * float(row @ pull) + square for family, (row, square) in rows.items()}
                families[step] = min(scores, key=lambda family: (scores[family], family))
                total = rest + rows[families[step]][0]
            if families == before:
                break
        return families, self.error(kept, families)

    def moves(self, kept: Sequence[int]) -> list[tuple[float, tuple[int, ...], dict[int, int]]]:
        """Every schedule that differs from ``kept`` by one moved step, as (error, kept, families), best first."""
        found = []
        spare = [step for step in range(self.problem.steps) if step not in kept]
        for gone in kept[1:]:
            for new in spare:
                moved = tuple(sorted({*kept, new} - {gone}))
                families, error = self.settle(moved)
                if np.isfinite(error):
                    found.append((error, moved, families))
        return sorted(found, key=lambda move: move[:2])


def descend(
    quadratic: Quadratic, kept: Sequence[int], rounds: int = 8
) -> tuple[tuple[int, ...], dict[int, int], float]:
    """Move single kept steps while the whole-schedule error falls: (kept, families, error)."""
    best = tuple(kept)
    families, error = quadratic.settle(best)
    for _ in range(rounds):
        moves = quadratic.moves(best)
        if not moves or moves[0][0] >= error * (1 - 1e-6):
            break
        error, best, families = moves[0]
    return best, families, error
