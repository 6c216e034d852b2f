"""Error tables: what every candidate would cost in every step after every history of computed steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from ditopt.profile import Array
from ditopt.search.predictors import regressors, squared_errors
from ditopt.search.space import Candidate


@dataclass(frozen=True)
class ErrorTable:
    """Errors of predictions from Gram matrices, aggregated over prompts.

    ``errors[i]`` is ``[T] * (1 + history)`` for ``candidates[i]``, indexed by step, then sources newest
    first; infinite where the sources are not earlier steps in order, or ran other branches.
    """

    candidates: tuple[Candidate, ...]
    errors: tuple[Array, ...]
    times: Array
    total: Array
    ridge: float

    @classmethod
    def build(
        cls,
        times: Sequence[float],
        grams: Array,
        candidates: tuple[Candidate, ...],
        additive: str = "squares",
        ridge: float = 0.0,
        groups: Sequence[int] = (),
    ) -> ErrorTable:
        """All errors for per-prompt Gram matrices ``[P, N, N]``.

        An entry is the mean over prompts of the squared error (``additive="squares"``) or of its root.
        """
        steps = len(times)
        at, total = np.asarray(times, dtype=float), grams.sum(axis=0)
        branch = np.asarray(groups) if len(groups) else np.zeros(steps)
        tables = []
        for candidate in candidates:
            table = np.full((steps,) * (candidate.history + 1), np.inf)
            chosen = np.array(list(combinations(range(steps), candidate.history + 1)), dtype=np.intp)
            if len(chosen):
                chosen = chosen[:, ::-1]
                chosen = chosen[(branch[chosen] == branch[chosen[:, :1]]).all(axis=1)]
            if len(chosen):
                target, sources = chosen[:, 0], chosen[:, 1:]
                factors = candidate.coefficients(at, total, target, sources, ridge)
                read = regressors(target, sources, steps, candidate.latents)
                squares = squared_errors(grams, target, read, factors)
                mean = squares.mean(axis=0) if additive == "squares" else np.sqrt(squares).mean(axis=0)
                table[tuple(chosen.T)] = mean
            tables.append(table)
        return cls(candidates, tuple(tables), at, total, ridge)

    @property
    def depth(self) -> int:
        """The longest history of any candidate."""
        return max(candidate.history for candidate in self.candidates)

    def only(self, names: Collection[str]) -> ErrorTable:
        """The table of the candidates in ``names``; shares the numbers."""
        kept = [i for i, candidate in enumerate(self.candidates) if candidate.name in names]
        pairs = tuple(self.candidates[i] for i in kept), tuple(self.errors[i] for i in kept)
        return ErrorTable(*pairs, self.times, self.total, self.ridge)

    def restrict(self, steps: Sequence[int]) -> tuple[Array, ...]:
        """``errors`` with ``steps`` as the only steps there are, renumbered from 0."""
        return tuple(errors[np.ix_(*[np.asarray(steps, dtype=np.intp)] * errors.ndim)] for errors in self.errors)

    def error(self, candidate: int, step: int, history: Sequence[int]) -> float:
        """The error of predicting ``step`` after ``history`` (newest first); infinite where that is too short."""
        depth = self.candidates[candidate].history
        return float(self.errors[candidate][(step, *history[:depth])]) if len(history) >= depth else np.inf

    def best(self, step: int, history: Sequence[int]) -> tuple[float, int]:
        """The least error of any candidate and its index; the simplest of equals."""
        return min((self.error(i, step, history), i) for i in range(len(self.candidates)))

    def coefficients(self, candidate: int, step: int, history: Sequence[int]) -> tuple[float, ...]:
        """The factors of one prediction."""
        family = self.candidates[candidate]
        sources = np.array([history[: family.history]], dtype=np.intp)
        factors = family.coefficients(self.times, self.total, np.array([step]), sources, self.ridge)
        return tuple(float(factor) for factor in factors[0])

    @cached_property
    def least(self) -> Array:
        """``least_errors`` of all candidates."""
        return least_errors(self.errors)


def least_errors(errors: Sequence[Array]) -> Array:
    """The least error over candidates: ``[T, T] + [T + 1] * (depth - 1)``, by step and the computed steps before it.

    Index 0 of the second and further source axes means "there is none"; source s has index s + 1.
    """
    steps = errors[0].shape[0]
    depth = max(table.ndim for table in errors) - 1
    least = np.full((steps, steps) + (steps + 1,) * (depth - 1), np.inf)
    for table in errors:
        padded = np.pad(table, [(0, 0), (0, 0)] + [(1, 0)] * (table.ndim - 2), constant_values=np.inf)
        np.minimum(least, padded.reshape(padded.shape + (1,) * (least.ndim - padded.ndim)), out=least)
    return least


def with_histories(kept: Sequence[int], among: int | Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each step of ``among`` (a number: all) not in ``kept``: up to three kept steps before it, newest first."""
    found: dict[int, tuple[int, ...]] = {}
    history: tuple[int, ...] = ()
    computed = set(kept)
    for step in range(among) if isinstance(among, int) else among:
        if step in computed:
            history = (step, *history[:2])
        else:
            found[step] = history
    return found
