"""The exact dynamic programme over the steps of one site: which to compute, which to predict.

Predictions read computed steps only, so the cost of a prediction depends on the last few computed
steps (as many as the deepest predictor reads) and on nothing else: these are the state. From state
(a, b, c), newest first, the programme chooses the next computed step n and pays for predicting
a+1 .. n-1. Exact for errors that add; ``brute.py`` is its oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditopt.profile import Array
from ditopt.search.predictors import Index

Key = tuple[int | slice, ...]


@dataclass(frozen=True)
class Schedule:
    """The computed steps, ascending, and the objective they reach."""

    kept: tuple[int, ...]
    objective: float


def prediction_costs(least: Array, seconds: Array, price: Array) -> Array:
    """``seconds[t] + price[t] * least[t, ...]``, infinite where the error is, also at a price of zero."""
    shape = (-1,) + (1,) * (least.ndim - 1)
    weighted = np.where(np.isinf(least), np.inf, price.reshape(shape) * np.where(np.isinf(least), 0.0, least))
    return np.asarray(seconds.reshape(shape) + weighted)


def cheapest(costs: Array, kept_costs: Array) -> Schedule:
    """The schedule of least total cost; step 0 is always computed.

    Args:
        costs: of predicting a step, ``[T, T] + [T + 1] * (depth - 1)`` as ``table.least_errors`` is indexed.
        kept_costs: of computing a step, ``[T]``.
    """
    steps, depth = len(kept_costs), costs.ndim - 1
    value = np.full((steps,) + (steps + 1,) * (depth - 1), np.inf)
    following = np.full(value.shape, steps, dtype=np.intp)
    for last in reversed(range(steps)):
        live: Key = (last, *_older(last, depth))
        total = _segments(costs, last)
        if last + 1 < steps:
            total[:-1] += _continue(value, kept_costs, last, depth)
        following[live] = total.argmin(axis=0) + last + 1
        value[live] = total.min(axis=0)
    start = (0,) * depth
    return Schedule(_walk([following] * steps, depth, steps), float(kept_costs[0] + value[start]))


def cheapest_of_each_size(costs: Array, kept_costs: Array, largest: int | None = None) -> list[Schedule]:
    """For every K = 1 .. ``largest`` (default T) the cheapest schedule with exactly K computed steps."""
    steps, depth = len(kept_costs), costs.ndim - 1
    segments = [_segments(costs, last) for last in range(steps)]
    shape = (steps,) + (steps + 1,) * (depth - 1)
    value, following, found = np.full(shape, np.inf), [np.full(shape, steps, dtype=np.intp)], []
    states: list[Key] = [(last, *_older(last, depth)) for last in range(steps)]
    for last in range(steps):
        value[states[last]] = segments[last][-1]
    for _ in range(largest or steps):
        found.append(Schedule(_walk(following[::-1], depth, steps), float(kept_costs[0] + value[(0,) * depth])))
        longer, then = np.full(shape, np.inf), np.full(shape, steps, dtype=np.intp)
        for last in range(steps - 1):
            total = segments[last][:-1] + _continue(value, kept_costs, last, depth)
            then[states[last]] = total.argmin(axis=0) + last + 1
            longer[states[last]] = total.min(axis=0)
        value = longer
        following.append(then)
    return found


def _older(last: int, depth: int) -> tuple[slice, ...]:
    """The states in which all older computed steps come before ``last`` (index 0: none)."""
    return (slice(0, last + 1),) * (depth - 1)


def _segments(costs: Array, last: int) -> Array:
    """``[T - last, ...]``: predicting all steps between ``last`` and the next computed one, last + 1 .. T."""
    live: Key = (slice(last + 1, None), last, *_older(last, costs.ndim - 1))
    run = costs[live]
    return np.concatenate([np.zeros((1, *run.shape[1:])), np.cumsum(run, axis=0)])


def _continue(value: Array, kept_costs: Array, last: int, depth: int) -> Array:
    """What computing n = last + 1 .. T - 1 next costs from there on; the oldest step leaves the state."""
    costs = kept_costs[last + 1 :]
    if depth == 1:
        return np.asarray(costs + value[last + 1 :])
    live: Key = (slice(last + 1, None), last + 1, *_older(last, depth - 1))
    return np.asarray((costs.reshape((-1,) + (1,) * (depth - 2)) + value[live])[..., None])


def _walk(following: Sequence[Index], depth: int, steps: int) -> tuple[int, ...]:
    """The computed steps from step 0 on; ``following[i]`` is the table of the i-th move."""
    kept, state = [0], (0,) * depth
    for table in following:
        step = int(table[state])
        if step >= steps:
            break
        state = (step, state[0] + 1, *state[1:-1])[:depth]
        kept.append(step)
    return tuple(kept)
