"""Small charts as inline SVG: no library, no script; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from ditopt.report.svg import BOTTOM, LEFT, RIGHT, TOP, Axis, Canvas, draw_axes, plain

SIZE = (640, 300)
PANEL = (340, 230)
"""Width and height of a chart, and of one of several that stand side by side."""
MAX_CELLS = 64
ROW, TAG = 26, 11
"""Height of a bar with its gap, and of a word beside a mark."""


@dataclass(frozen=True)
class Point:
    """A mark of a scatter chart; ``style`` is the CSS class that colours and shapes it, ``tag`` a word beside it."""

    x: float
    y: float
    label: str
    style: str
    tag: str = ""


@dataclass(frozen=True)
class Line:
    """Values over 0, 1, 2, ..., or over ``at``; what is not finite is a gap. Faint lines have no marks."""

    values: Sequence[float]
    label: str
    style: str = "curve"
    faint: bool = False
    at: Sequence[int] | None = None

    @property
    def places(self) -> Sequence[int]:
        """Where the values stand."""
        return range(len(self.values)) if self.at is None else self.at


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of parts ``(name, value, style)``; ``note`` stands behind it."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    note: str = ""


def scatter(
    points: Sequence[Point],
    x_name: str,
    y_name: str,
    line: float | None = None,
    *,
    upright: Sequence[tuple[float, str]] = (),
    front: Sequence[tuple[float, float]] = (),
    diagonal: bool = False,
    log: bool = False,
    size: tuple[int, int] = SIZE,
) -> Markup:
    """Points over two axes.

    ``line`` is a horizontal mark (the target), ``upright`` are vertical ones with their names, ``front`` is joined by
    steps; with ``diagonal`` both axes are the same and where they agree is drawn; ``log``: both are logarithmic.
    """
    xs = [p.x for p in points if math.isfinite(p.x)] + [x for x, _ in upright]
    ys = [p.y for p in points if math.isfinite(p.y)] + ([line] if line is not None else [])
    if diagonal:
        xs = ys = xs + ys
    across = Axis.over(xs, x_name, LEFT, size[0] - RIGHT, log)
    up = Axis.over(ys, y_name, size[1] - BOTTOM, TOP, log)
    canvas = Canvas()
    draw_axes(canvas, across, up, size)
    if diagonal:
        low, high = across.marks[0], across.marks[-1]
        canvas.add("line", x1=across.at(low), y1=up.at(low), x2=across.at(high), y2=up.at(high), class_="target")
    if line is not None:
        y = up.at(line)
        canvas.add("line", x1=LEFT, x2=size[0] - RIGHT, y1=y, y2=y, class_="target")
        canvas.add("text", f"target {line:g}", x=size[0] - RIGHT, y=y - 4, text_anchor="end", class_="tick")
    for x, name in upright:
        at = across.at(x)
        canvas.add("line", x1=at, x2=at, y1=TOP, y2=size[1] - BOTTOM, class_="target")
        canvas.add("text", name, x=at - 4, y=TOP + 10, text_anchor="end", class_="tick")
    if front:
        path = " ".join(f"{plain(across.at(x))},{plain(up.at(y))}" for x, y in _stairs(front))
        canvas.add("polyline", points=path, class_="front")
    shown = [point for point in points if across.holds(point.x) and up.holds(point.y)]
    for point in shown:
        radius = 7 if point.style == "chosen" else 5
        canvas.add("circle", title=point.label, cx=across.at(point.x), cy=up.at(point.y), r=radius, class_=point.style)
    _tags(canvas, [(across.at(point.x), up.at(point.y), point.tag) for point in shown if point.tag], size[0])
    return canvas.done(*size, f"{y_name} over {x_name}")


def _tags(canvas: Canvas, tags: Sequence[tuple[float, float, str]], width: float) -> None:
    """Words beside marks, moved down where they would lie on one another."""
    placed: list[tuple[float, float]] = []
    for x, y, tag in sorted(tags, key=lambda each: each[1]):
        below = [other + TAG for at, other in placed if abs(at - x) < 150]
        y = max([y, *below])
        placed.append((x, y))
        end = x > width - 120
        beside, anchor = (x - 10, "end") if end else (x + 10, "start")
        canvas.add("text", tag, x=beside, y=y + 4, text_anchor=anchor, class_="tick")


def _stairs(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the steps through points in ascending order: what is on or below them is reached."""
    found = [front[0]]
    for (_, before), (x, y) in pairwise(front):
        found += [(x, before), (x, y)]
    return found


def lines(
    series: Sequence[Line],
    x_name: str,
    y_name: str,
    *,
    size: tuple[int, int] = SIZE,
    log: bool = False,
    also: Sequence[float] = (),
) -> Markup:
    """Lines over 0, 1, 2, ...; ``also`` are values that the upright axis has to hold, ``log`` makes it logarithmic."""
    known = [value for line in series for value in line.values if math.isfinite(value)] + list(also)
    last = max((place for line in series for place in line.places), default=0)
    across = Axis.over([0.0, float(max(last, 1))], x_name, LEFT, size[0] - RIGHT)
    up = Axis.over(known, y_name, size[1] - BOTTOM, TOP, log)
    canvas = Canvas()
    draw_axes(canvas, across, up, size)
    for line in series:
        for run in _runs(line, up):
            path = " ".join(f"{plain(across.at(i))},{plain(up.at(v))}" for i, v in run)
            canvas.add("polyline", title=line.label, points=path, class_=line.style)
            for i, v in () if line.faint else run:
                title = f"{line.label}{', ' if line.label else ''}{x_name} {i}: {v:.4g}"
                canvas.add("circle", title=title, cx=across.at(i), cy=up.at(v), r=3, class_=f"{line.style} dot")
    return canvas.done(*size, f"{y_name} over {x_name}")


def _runs(line: Line, up: Axis) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for i, value in zip(line.places, line.values, strict=True):
        if up.holds(value):
            runs[-1].append((i, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def curve(values: Sequence[float], x_name: str, y_name: str) -> Markup:
    """A line with a mark per value over 0, 1, 2, ..., from 0 up."""
    return lines([Line(values, "")], x_name, y_name, also=(0.0,))


def bars(rows: Sequence[Bar], x_name: str, width: int = 760) -> Markup:
    """Horizontal bars of parts in a row, one below the other, from 0."""
    left = 16 + 7.0 * max(len(row.label) for row in rows)
    longest = max(sum(value for _, value, _ in row.parts) for row in rows)
    across = Axis.over([0.0, longest], x_name, left, width - 110)
    bottom = 8 + len(rows) * ROW
    canvas = Canvas()
    with canvas.group("axes"):
        for value in across.marks:
            x = across.at(value)
            canvas.add("line", x1=x, x2=x, y1=4, y2=bottom, class_="grid")
            canvas.add("text", f"{value:g}", x=x, y=bottom + 14, text_anchor="middle", class_="tick")
        canvas.add("text", x_name, x=(left + width - 110) / 2, y=bottom + 32, text_anchor="middle", class_="label")
    for i, row in enumerate(rows):
        y, start = 8 + i * ROW, 0.0
        canvas.add("text", row.label, x=left - 8, y=y + 14, text_anchor="end", class_="label")
        for name, value, style in row.parts:
            x = across.at(start)
            title = f"{row.label}, {name}: {value:.4g}"
            width_here = max(across.at(start + value) - x, 0.5)
            canvas.add("rect", title=title, x=x, y=y, width=width_here, height=18, class_=style)
            start += value
        canvas.add("text", row.note, x=across.at(start) + 8, y=y + 14, class_="tick")
    return canvas.done(width, bottom + 40, x_name)


def heat_map(matrix: Sequence[Sequence[float]], name: str) -> Markup:
    """A square matrix, strong colour for large values; large matrices are thinned out to 64 rows."""
    stride = max(1, math.ceil(len(matrix) / MAX_CELLS))
    steps = range(0, len(matrix), stride)
    values = [matrix[a][b] for a in steps for b in steps if math.isfinite(matrix[a][b])]
    low, high = min(values, default=0.0), max(values, default=1.0)
    edge = max(5.0, min(18.0, 420 / max(len(steps), 1)))
    canvas = Canvas()
    for i, a in enumerate(steps):
        if i % max(1, len(steps) // 10) == 0:
            canvas.add("text", str(a), x=26, y=24 + i * edge + edge, text_anchor="end", class_="tick")
            canvas.add("text", str(a), x=30 + i * edge + edge / 2, y=16, text_anchor="middle", class_="tick")
        for j, b in enumerate(steps):
            value = matrix[a][b]
            strength = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
            x, y, side = 30 + j * edge, 20 + i * edge, edge - 0.5
            title, opacity = f"steps {a} and {b}: {value:.4f}", round(strength, 3)
            canvas.add("rect", title=title, class_="heat", fill_opacity=opacity, x=x, y=y, width=side, height=side)
    size = len(steps) * edge
    canvas.add("text", f"{low:.3f} (pale) to {high:.3f} (strong)", x=30, y=36 + size, class_="tick")
    return canvas.done(40 + size, 44 + size, name)
