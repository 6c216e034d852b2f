"""Measures: arrays whose axes have names, and tables of them. Data only; numpy, no torch.

A collector of the profiler gives one ``Table`` per site and prompt. Tables of several prompts, runs or machines are put
together along the axis ``prompt``; what has no such axis (a weight's ranges, say) is averaged by the number of prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ditopt.errors import InputError

PROMPT = "prompt"
Numbers = npt.NDArray[np.floating[Any]]
Label = str | int | float


@dataclass(frozen=True)
class Measure:
    """``values`` with one name per axis: statistics are taken along names, never along positions.

    NaN stands for what was not measured (a guidance branch that a step leaves out, a lag before the first step), and
    is allowed only where ``partial`` says so.

    >>> Measure(("prompt", "head"), np.array([[1.0, 3.0], [3.0, 5.0]])).mean("prompt").values.tolist()
    [2.0, 4.0]
    """

    axes: tuple[str, ...]
    values: Numbers
    partial: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim or len(set(self.axes)) != len(self.axes):
            raise InputError(f"axes {', '.join(self.axes)} do not name the axes of shape {list(self.values.shape)}")

    def size(self, axis: str) -> int:
        """The length of an axis."""
        return int(self.values.shape[self.axes.index(axis)])

    def mean(self, *axes: str) -> Measure:
        """The mean along ``axes``, of what was measured."""
        return self._reduced(nanmean, axes)

    def geometric_mean(self, *axes: str) -> Measure:
        """The geometric mean along ``axes``, of what was measured: for factors, which are 0 or more."""

        def of(values: Numbers, axis: tuple[int, ...]) -> Numbers:
            found: Numbers = np.exp(nanmean(np.log(np.maximum(values, np.finfo(float).tiny)), axis))
            return found

        return self._reduced(of, axes)

    def upper(self, quantile: float, *axes: str) -> Measure:
        """The ``quantile`` (0.9, say) along ``axes``, of what was measured."""

        def of(values: Numbers, axis: tuple[int, ...]) -> Numbers:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
                found: Numbers = np.nanquantile(values, quantile, axis=axis)
            return found

        return self._reduced(of, axes)

    def at(self, **positions: int) -> Measure:
        """What stands at a position of some axes, which go.

        >>> Measure(("step", "head"), np.array([[1.0, 2.0], [3.0, 4.0]])).at(step=1).values.tolist()
        [3.0, 4.0]
        """
        index = tuple(positions.get(axis, slice(None)) for axis in self.axes)
        return Measure(tuple(axis for axis in self.axes if axis not in positions), self.values[index], self.partial)

    def ordered(self, *axes: str) -> Numbers:
        """The values with the axes in this order; all have to be named."""
        if sorted(axes) != sorted(self.axes):
            raise InputError(f"a measure along {', '.join(self.axes)} has not the axes {', '.join(axes)}")
        return self.values.transpose([self.axes.index(axis) for axis in axes])

    def _reduced(self, function: Any, axes: Sequence[str]) -> Measure:
        missing = [axis for axis in axes if axis not in self.axes]
        if missing:
            raise InputError(f"a measure along {', '.join(self.axes)} has no axis {', '.join(missing)}")
        values = function(self.values, axis=tuple(self.axes.index(axis) for axis in axes))
        return Measure(tuple(axis for axis in self.axes if axis not in axes), np.asarray(values), self.partial)


def nanmean(values: Numbers, axis: tuple[int, ...]) -> Numbers:
    """The mean along axes of what is known, summed in float64; NaN of nothing."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=axis, dtype=np.float64)
    count = known.sum(axis=axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def growth_over_prompts(growth: Measure) -> Measure:
    """Growth factors without their axis of prompts: the geometric mean of those in which errors were planted."""
    return growth.geometric_mean(PROMPT) if PROMPT in growth.axes else growth


@dataclass(frozen=True)
class Table:
    """What one collector measured at one site.

    ``labels`` say what stands along an axis whose positions have names of their own (candidates, formats, lags, the
    steps that are anchors); ``facts`` what is true of the site as a whole (JSON).
    """

    measures: Mapping[str, Measure]
    labels: Mapping[str, tuple[Label, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Measure:
        return self.measures[name]

    def position(self, axis: str, label: Label) -> int:
        """Where ``label`` stands along ``axis``.

        Raises:
            KeyError: it does not.
        """
        try:
            return self.labels[axis].index(label)
        except ValueError:
            raise KeyError(f"{label!r} is none of {axis}: {', '.join(map(str, self.labels[axis]))}") from None

    @property
    def prompts(self) -> int:
        """Over how many prompts it was measured."""
        return next((measure.size(PROMPT) for measure in self.measures.values() if PROMPT in measure.axes), 0)


def joined(tables: Sequence[Table], weights: Sequence[float] | None = None) -> Table:
    """One table of several of a site, their prompts in order.

    ``weights`` (default: the numbers of prompts) are for measures that have no axis of prompts.

    Raises:
        InputError: they differ in what was measured, along what, or in a fact; the message says where.
    """
    first = tables[0]
    shares = np.asarray(weights if weights is not None else [table.prompts or 1 for table in tables], dtype=float)
    for other in tables[1:]:
        if other.measures.keys() != first.measures.keys():
            apart = sorted(other.measures.keys() ^ first.measures.keys())
            raise InputError(f"one has the measures {', '.join(apart)}, the other has not")
        for what, mine, theirs in (("axis", first.labels, other.labels), ("fact", first.facts, other.facts)):
            wrong = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
            if wrong:
                key = wrong[0]
                raise InputError(f"{what} {key!r} is {mine.get(key)!r} in one and {theirs.get(key)!r} in the other")
    return Table({name: _joined(name, tables, shares) for name in first.measures}, first.labels, first.facts)


def _joined(name: str, tables: Sequence[Table], shares: Numbers) -> Measure:
    parts = [table[name] for table in tables]
    first = parts[0]
    kinds = {
        (part.axes, *(n for a, n in zip(part.axes, part.values.shape, strict=True) if a != PROMPT)) for part in parts
    }
    if len(kinds) > 1:
        raise InputError(f"measure {name!r} has other axes or sizes in one than in the other")
    partial = any(part.partial for part in parts)
    if PROMPT in first.axes:
        return Measure(first.axes, np.concatenate([p.values for p in parts], axis=first.axes.index(PROMPT)), partial)
    values = np.stack([part.values for part in parts]).astype(float)
    weights = np.where(np.isnan(values), 0, shares.reshape(-1, *[1] * first.values.ndim))
    total = weights.sum(axis=0)
    mean = np.where(total > 0, (np.nan_to_num(values) * weights).sum(axis=0) / np.where(total > 0, total, 1), np.nan)
    return Measure(first.axes, np.asarray(mean, dtype=first.values.dtype), partial)
