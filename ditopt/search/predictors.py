"""Linear predictors of a feature from earlier ones: their coefficients and, from a Gram matrix, their errors.

Everything here is vectorised over M predictions at once. A prediction of step ``t`` reads ``sources``
(step indices, newest first) and perhaps the latents of ``t``; its squared error per prompt is
``a^T G a`` with ``a = e_t - sum_i c_i e_i``, so that no feature is ever needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ditopt.decisions import Fit, Forecast, Predictor
from ditopt.profile import Array

Index = npt.NDArray[np.intp]

SAME_TIME = 1e-7
"""Times closer than this share of the largest one count as equal (Heun evaluates a sigma twice)."""

_FLOOR = 1e-12
"""Relative ridge that keeps the normal equations of linearly dependent features solvable."""


def lagrange(nodes: Array, at: Array) -> Array:
    """Weights ``[M, h]`` of the polynomial through ``nodes`` ``[M, h]`` (newest first), evaluated at ``at`` ``[M]``.

    Of nodes with equal times the newest counts and the others weigh zero, so the order falls to what
    the distinct times permit and nothing is divided by zero.
    """
    gaps = nodes[:, :, None] - nodes[:, None, :]
    same = np.abs(gaps) <= SAME_TIME * max(float(np.abs(nodes).max(initial=0.0)), np.finfo(float).tiny)
    distinct = ~np.any(np.tril(same, -1), axis=2)
    factors = (at[:, None, None] - nodes[:, None, :]) / np.where(same, 1.0, gaps)
    neutral = ~distinct[:, None, :] | np.eye(nodes.shape[1], dtype=bool)
    return np.asarray(np.where(distinct, np.where(neutral, 1.0, factors).prod(axis=2), 0.0))


def taylor(nodes: Array, at: Array) -> Array:
    """Weights ``[M, h]`` of Taylor's series about the newest of ``nodes`` ``[M, h]``, evaluated at ``at`` ``[M]``.

    TaylorSeer's (arXiv 2503.06923): the derivative ``D[0] = F``, ``D[j + 1] = (D[j] - D[j] before) / d``, with d the
    distance of the two newest computed steps at that time, and ``F(t + k) = sum_j D[j] k^j / j!``. A derivative over
    no distance is taken to be zero.
    """
    count, depth = nodes.shape
    gaps = nodes[:, :-1] - nodes[:, 1:]
    same = np.abs(gaps) <= SAME_TIME * max(float(np.abs(nodes).max(initial=0.0)), np.finfo(float).tiny)
    rates = np.where(same, 0.0, 1.0 / np.where(same, 1.0, gaps))
    derivatives = np.broadcast_to(np.eye(depth), (count, depth, depth))  # of each node when it was the newest: weights
    total, power = derivatives[:, 0].copy(), np.ones(count)
    for order in range(1, depth):
        derivatives = (derivatives[:, :-1] - derivatives[:, 1:]) * rates[:, : depth - order, None]
        power = power * (at - nodes[:, 0]) / order
        total += power[:, None] * derivatives[:, 0]
    return np.asarray(total)


def step_positions(planned: Sequence[float], at: Sequence[float]) -> tuple[float, ...]:
    """Where the times ``at`` lie among the steps of a schedule, whose times are ``planned``, as numbers of steps.

    On straight lines between planned steps, and beyond the first and the last; of equal times the first counts.
    """
    known: dict[float, int] = {}
    for step, time in enumerate(planned):
        known.setdefault(time, step)
    times, steps = map(np.array, zip(*sorted(known.items()), strict=True))
    if len(times) == 1:
        return tuple(float(steps[0]) for _ in at)
    left = np.clip(np.searchsorted(times, at) - 1, 0, len(times) - 2)
    rates = (steps[left + 1] - steps[left]) / (times[left + 1] - times[left])
    return tuple(float(found) for found in steps[left] + (np.asarray(at) - times[left]) * rates)


def predictor_coefficients(
    decision: Predictor, times: Sequence[float], step: int, sources: Sequence[int]
) -> tuple[float, ...]:
    """The factors with which ``decision`` combines the features of ``sources`` in ``step``.

    Args:
        decision: reuse, forecast or fit.
        times: coordinate of every step (sigma); distances need not be uniform, values may repeat.
        step: the step to predict.
        sources: computed steps, newest first; those beyond the decision's history are not read.

    Returns:
        A factor for each source that is read (fewer than ``history`` where fewer are given: the order
        falls); for a fit the stored ones, that of the latents last.

    Raises:
        ValueError: there is no source, or a fit was made for other sources.
    """
    read = tuple(sources[: decision.history])
    if not read:
        raise ValueError(f"step {step} cannot be predicted: no earlier step was computed")
    if isinstance(decision, Fit):
        if decision.sources.get(step) != read:
            raise ValueError(f"step {step}: the fit was made for sources {decision.sources.get(step)}, found {read}")
        return decision.coefficients[step]
    in_steps = isinstance(decision, Forecast) and decision.distances == "steps"
    series = isinstance(decision, Forecast) and decision.formula == "taylor"
    places = range(len(times)) if in_steps else times
    nodes = np.array([[places[source] for source in read]], dtype=float)
    weights = (taylor if series else lagrange)(nodes, np.array([places[step]], dtype=float))[0]
    return tuple(float(weight) for weight in weights)


def second_order_factors(share: float, times: Sequence[float], step: int, source: int) -> tuple[float, float] | None:
    """Factors of the output of ``step`` and of that of ``source``, the computed step before, for ``share`` of AB2.

    ``F + share * h / (2 d) * (F - F_source)`` with ``h = times[step + 1] - times[step]`` and ``d = times[step] -
    times[source]``: Adams and Bashforth's two-step formula at true distances. None in the last step, which shows no
    ``h``, and where the times are the same.
    """
    if step + 1 >= len(times):
        return None
    width, distance = times[step + 1] - times[step], times[step] - times[source]
    if min(abs(width), abs(distance)) <= SAME_TIME * max(map(abs, times)):
        return None
    change = share * width / (2 * distance)
    return 1 + change, -change


def regressors(steps: Index, sources: Index, total: int, latents: bool) -> Index:
    """Gram rows ``[M, k]`` that the predictions read: ``sources`` ``[M, h]``, then the latents of ``steps`` ``[M]``."""
    return np.column_stack([sources, total + steps]) if latents else sources


def fit_coefficients(gram: Array, steps: Index, read: Index, prior: Array, ridge: float = 0.0) -> Array:
    """Least-squares coefficients ``[M, k]`` of the rows ``read`` ``[M, k]`` for the rows ``steps`` ``[M]``.

    Args:
        gram: ``[N, N]``, the sum over prompts.
        steps: rows to predict.
        read: rows to combine.
        prior: coefficients ``[M, k]`` towards which ``ridge`` pulls.
        ridge: strength, relative to the mean squared norm of the rows read.

    With ``c = prior + d`` it minimises ``|f_t - X c|^2 + ridge * s * |d|^2`` (Tikhonov about a prior):
    an ill-determined fit falls back to extrapolation, not to zero.
    """
    inner = gram[read[:, :, None], read[:, None, :]]
    target = gram[read, steps[:, None]] - np.einsum("mij,mj->mi", inner, prior)
    scale = np.einsum("mii->m", inner) / read.shape[1] + np.finfo(float).tiny
    inner = inner + ((ridge + _FLOOR) * scale)[:, None, None] * np.eye(read.shape[1])
    return np.asarray(prior + np.linalg.solve(inner, target[:, :, None])[:, :, 0])


def squared_errors(grams: Array, steps: Index, read: Index, coefficients: Array) -> Array:
    """``[P, M]``: the squared norm of ``f_t - sum_i c_i f_i`` for each prompt's Gram matrix ``[P, N, N]``."""
    errors = np.empty((len(grams), len(steps)))
    for prompt, gram in enumerate(grams):
        cross = np.einsum("mi,mi->m", coefficients, gram[read, steps[:, None]])
        inner = gram[read[:, :, None], read[:, None, :]]
        norm = np.einsum("mi,mij,mj->m", coefficients, inner, coefficients, optimize=False)
        errors[prompt] = gram[steps, steps] - 2 * cross + norm
    return np.maximum(errors, 0.0)
