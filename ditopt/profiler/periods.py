"""The periods of attention over raster distance: how many tokens a row has, and how many a frame."""

from __future__ import annotations

import math

import numpy as np

from ditopt.measures import Numbers, Table

FEWEST = 12
"""Distances, or multiples of a row, that periods can be told from."""
AROUND = 16
"""The noise of attention over distance is taken from so many distances to either side, at least."""
CLEAR = 8.0
"""A peak of attention over distance stands out if it rises above the valleys beside it by so many deviations."""
DOUBT = 3.0
"""A frame's peak that stands out by so many deviations, but not clearly, may be one or none."""
SAME = 1e-4
"""Levels that differ by less than this are the same."""


def periods(by_distance: Table, tokens: int | None = None) -> tuple[int, int] | None:
    """(columns, columns * rows) of a video or image whose attention has the mass ``by_distance``; None: none stand out.

    A token looks at what is near in space and time, so mass has a peak where the raster distance is one row, and
    another where it is one frame. The number of columns is the least divisor of ``tokens`` (default: what the distances
    span), of at least 3, at which the logarithm of the mass stands out; rows are found alike among the multiples of one
    row. Where none of these stands out there is one frame, if the distances span all tokens and nothing is in doubt.
    Bins of more than one token show no periods.

    Needs the measure ``by_distance`` [..., distance_bin] and the distances in ``labels["distance_bin"]``.
    """
    distances = np.asarray([float(label) for label in by_distance.labels["distance_bin"]])
    measure = by_distance["by_distance"]
    mass = measure.mean(*(axis for axis in measure.axes if axis != "distance_bin")).values
    span = int(distances.max()) if distances.size else 0
    if span < FEWEST or not np.array_equal(np.unique(distances), np.arange(distances.min(), distances.max() + 1)):
        return None
    sums, counts = np.zeros(span + 1), np.zeros(span + 1)
    kept = ~np.isnan(mass)
    places = np.abs(distances).astype(int)
    kept &= places <= span
    np.add.at(sums, places[kept], mass[kept])
    np.add.at(counts, places[kept], 1)
    levels = np.log(np.maximum(sums / np.maximum(counts, 1), 1e-12))
    count = tokens or span + 1
    levels = levels[: span * 7 // 8]
    columns = _period(levels, 1, count, 3, CLEAR)
    if columns is None or len(levels) // columns < FEWEST:
        return None
    rows = _period(levels, columns, count // columns, 2, CLEAR)
    if rows is None and (count > span + 1 or _period(levels, columns, count // columns, 2, DOUBT) is not None):
        return None  # a frame may be further than the distances go, or there
    return columns, count if rows is None else columns * rows


def _period(levels: Numbers, unit: int, count: int, least: int, clear: float) -> int | None:
    """The least divisor of ``count`` at which ``levels``, from 0 on in steps of ``unit``, have a peak that stands out.

    That is: nothing within a third of it is higher, and it is ``clear`` standard deviations of the noise above the
    lowest within a half of it, on either side. The noise is what third differences of the levels around it leave, which
    is next to nothing of smooth curves and 20 = 1 + 9 + 9 + 1 times the variance of noise.
    """
    some = levels[::unit]
    for period in range(least, min(count // 2, len(some) - 2) + 1):
        if count % period:
            continue
        third, half = max(1, period // 3), max(1, period // 2)
        top = some[period - third : period + third + 1].max()
        valley = max(some[period - half : period].min(), some[period + 1 : period + half + 1].min())
        at, reach = period * unit, max(period, unit, AROUND)
        left = np.diff(levels[max(0, at - reach) : at + reach + 1], 3)
        noise = 1.4826 * float(np.median(np.abs(left))) / math.sqrt(20)
        if some[period] == top and top - valley > max(clear * noise, SAME):
            return period
    return None
