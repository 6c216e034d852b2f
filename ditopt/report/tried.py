"""What the search tried, drawn: the front of speed and quality, and what was predicted against what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from ditopt.plan import Plan, format_steps
from ditopt.report import charts
from ditopt.report.explained import Explained, Explanation, Rival, TableRow, Trial
from ditopt.report.figures import OPTIMISED, bench_rows

EXACT = 80.0
"""Decibels from which on samples differ by rounding alone."""


def trials_chart(plan: Plan, found: Explained, bench: Mapping[str, Any] | None) -> Markup | None:
    """Every plan tried and every rival: quality over seconds, or over evaluations where seconds are not known."""
    timed = bool(found.trials) and all(trial.seconds for trial in found.trials)
    points = _near([_of_trial(trial, timed) for trial in found.trials])
    front = pareto([(point.x, point.y) for point in points])
    rivals: list[tuple[str, Any, Any, Any]] = [
        (row.name, row.seconds, row.evaluations, row.psnr) for row in found.table if _rival(row)
    ]
    if bench:
        rivals = [(name, s, n, db) for name, n, s, _, db, _ in bench_rows(bench)[3:]]
    for name, seconds, evaluations, psnr in rivals:
        at = seconds if timed else evaluations
        if at and psnr is not None:
            label = f"{name}: {evaluations} evaluations, {psnr:.2f} dB, {seconds or math.nan:.3g} s"
            points.append(charts.Point(at, psnr, label, "rival", name))
    for name, seconds, evaluations, psnr in _chosen(found, bench):
        at = seconds if timed else evaluations
        if at and psnr is not None:
            label = f"the plan: {evaluations} evaluations, {psnr:.2f} dB on prompts that the search did not see"
            points.append(charts.Point(at, psnr, label, "chosen", name))
    if not points:
        return None
    target = plan.target.get("min_psnr")
    line = float(target) if isinstance(target, int | float) else None
    x_name = "seconds of a generation" if timed else "network evaluations"
    upright = [(s, "dense")] if timed and (s := _dense_seconds(found, bench)) else []
    front = front if len(front) > 1 else []
    return charts.scatter(points, x_name, "PSNR to dense (dB)", line, upright=upright, front=front, size=(820, 380))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both less ``x`` and more ``y``, from left to right.

    >>> pareto([(3, 9), (1, 2), (2, 1), (2, 5)])
    [(1, 2), (2, 5), (3, 9)]
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if math.isfinite(x) and math.isfinite(y) and (not found or y > found[-1][1]):
            found.append((x, y))
    return found


@dataclass(frozen=True)
class Agreement:
    """Predicted against measured values of the same plans, drawn; ``rank`` is Spearman's correlation, if any."""

    title: str
    chart: Markup
    count: int
    rank: float | None


def agreements(plan: Plan, found: Explained) -> list[Agreement]:
    """Predicted against measured error, and seconds, of the plans tried and of the plan itself."""
    predicted, measured = plan.predicted, plan.measured
    error = [(t.predicted_error, t.rel_l2, _told(t)) for t in found.trials]
    error.append((predicted.get("relative_error"), measured.get("rel_l2"), "the plan, on held-out prompts"))
    seconds = [(t.seconds, t.measured_seconds, _told(t)) for t in found.trials]
    seconds.append((predicted.get("seconds"), measured.get("plan_s"), "the plan, whole generations"))
    table = {row.name: row.seconds for row in found.table}
    for network in list(found.profile.values())[:1] if len(found.profile) == 1 else ():
        step = network.seconds.get("full")
        dense = step * len(network.timesteps) if step else None
        seconds.append((dense, table.get("dense, compiled"), "dense, compiled"))
    return [
        agreement("Relative error of the sample", error, "predicted", "measured", True),
        agreement("Seconds of a generation", seconds, "predicted", "measured", False),
    ]


def agreement(title: str, pairs: Sequence[tuple[Any, Any, str]], x_name: str, y_name: str, log: bool) -> Agreement:
    """A chart of ``(predicted, measured, what)``; pairs that lack one are left out."""
    known = [(float(a), float(b), told) for a, b, told in pairs if _usable(a) and _usable(b)]
    points = []
    for a, b, told in known:
        style = "chosen" if told.startswith("the plan") else "met"
        points.append(charts.Point(a, b, f"{told}: predicted {a:.4g}, measured {b:.4g}", style))
    chart = charts.scatter(points, x_name, y_name, diagonal=True, log=log and bool(points), size=(420, 340))
    return Agreement(title, chart, len(known), rank_correlation([a for a, _, _ in known], [b for _, b, _ in known]))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None of fewer than four pairs or of equal values.

    >>> rank_correlation([1, 2, 3, 4], [10, 20, 30, 40])
    1.0
    """
    if len(first) < 4 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    a, b = (_ranks(np.asarray(values, dtype=float)) for values in (first, second))
    return round(float(np.corrcoef(a, b)[0, 1]), 6)


def _ranks(values: Any) -> Any:
    less = (values[:, None] > values).sum(1)
    return less + ((values[:, None] == values).sum(1) - 1) / 2


def _usable(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _told(trial: Trial) -> str:
    return f"{trial.stage or 'trial'}, {trial.evaluations} evaluations"


def _of_trial(trial: Trial, timed: bool) -> charts.Point:
    label = f"{trial.stage or 'trial'}: {trial.evaluations} evaluations, {trial.psnr:.2f} dB"
    label += f", {trial.seconds:.3g} s" if trial.seconds else ""
    label += f"\ncomputed steps {format_steps(trial.kept)}" if trial.kept else ""
    at = trial.seconds if timed and trial.seconds else float(trial.evaluations)
    return charts.Point(at, trial.psnr, label, "met" if trial.met else "missed")


def _near(points: list[charts.Point]) -> list[charts.Point]:
    """Points with those that are dense but for rounding drawn just above the others, not far off."""
    others = [point.y for point in points if point.y < EXACT]
    top = max(others, default=EXACT) + 5
    told = "exact but for rounding"
    return [point if point.y < EXACT else replace(point, y=top, tag=told) for point in points]


def _rival(row: TableRow) -> bool:
    """Whether a line is neither the plan nor the dense run itself, which have no place among the rivals."""
    return row.psnr is not None and row.name != "ditopt"


def _chosen(found: Explained, bench: Mapping[str, Any] | None) -> list[tuple[str, Any, Any, Any]]:
    if bench:
        rows = [row for row in bench_rows(bench) if row[0] == OPTIMISED]
        return [("this plan", s, n, db) for _, n, s, _, db, _ in rows]
    return [("this plan", row.seconds, row.evaluations, row.psnr) for row in found.table if row.name == "ditopt"]


def _dense_seconds(found: Explained, bench: Mapping[str, Any] | None) -> float | None:
    if bench and bench.get("dense_inductor_s"):
        return float(bench["dense_inductor_s"])
    return next((row.seconds for row in found.table if row.name == "dense, compiled"), None)


@dataclass(frozen=True)
class Decided:
    """What was chosen at a site in some steps (none: in all), over which nearest rival, and why."""

    steps: str
    site: str
    chosen: str
    rival: str
    reason: str

    @property
    def title(self) -> str:
        """Steps and site.

        >>> Decided("3, 5-7", "step", "reuse", "", "").title
        'steps 3, 5-7, step'
        """
        if not self.steps:
            return self.site
        return f"step{'' if self.steps.isdecimal() else 's'} {self.steps}, {self.site}"


def nearest(one: Explanation) -> Rival | None:
    """The rival with the least objective, of those that have none the first; None where there is no rival."""
    return min(one.rivals, key=_rank, default=None)


def _rank(rival: Rival) -> float:
    value = rival.objective
    return value if value is not None and math.isfinite(value) else math.inf


def nearest_rivals(made: Sequence[Explanation]) -> list[Decided]:
    """Every decision with its nearest rival; those that say the same word by word are one, over their steps."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for one in made:
        near = nearest(one)
        key = one.site, one.chosen, near.name if near else "–", near.reason if near else "there was no other"
        steps = found.setdefault(key, [])
        steps += [one.step] if one.step is not None else []
    return [Decided(format_steps(steps), *key) for key, steps in found.items()]


def grouped(made: Sequence[Explanation]) -> list[tuple[str, Explanation]]:
    """Decisions with the steps they are for; those of one site that say the same word by word are one."""
    found: dict[str, tuple[list[int], Explanation]] = {}
    for one in made:
        key = one.model_copy(update={"step": None, "objective": None}).model_dump_json()
        steps, _ = found.setdefault(key, ([], one))
        steps += [one.step] if one.step is not None else []
    return [(format_steps(steps), one) for steps, one in found.values()]
