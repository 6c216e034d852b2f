"""Small charts as inline SVG: no library, no script; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from markupsafe import Markup, escape

from ditopt.report.picture import Picture

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40
CELL, GAP = 16, 2
MAX_CELLS = 64


@dataclass(frozen=True)
class Point:
    """A mark of a scatter chart; ``style`` is the CSS class that colours and shapes it."""

    x: float
    y: float
    label: str
    style: str


class _Canvas:
    """Collects SVG elements; texts are escaped."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, tag: str, text: str = "", title: str = "", **attributes: object) -> None:
        names = " ".join(f'{key.strip("_").replace("_", "-")}="{escape(_plain(v))}"' for key, v in attributes.items())
        inner = f"{f'<title>{escape(title)}</title>' if title else ''}{escape(text)}"
        self.parts.append(f"<{tag} {names}>{inner}</{tag}>")

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        self.parts.append(f'<g class="{escape(name)}">')
        yield
        self.parts.append("</g>")

    def done(self, width: float, height: float, label: str) -> Markup:
        head = f'<svg viewBox="0 0 {_plain(width)} {_plain(height)}" role="img" aria-label="{escape(label)}"'
        return Markup(f'{head} style="max-width:{_plain(width)}px">{"".join(self.parts)}</svg>')


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover ``low`` to ``high``.

    >>> ticks(0, 9.5)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = max(high - low, 1e-9 * max(abs(low), abs(high)))
    span = span if span > 1e-300 else 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = min((f * power for f in (1, 2, 2.5, 5, 10)), key=lambda s: abs(span / s - wanted))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, max(last, first + 1) + 1)]


def schedule(picture: Picture) -> Markup:
    """Sites (down) by steps (across), a coloured cell each."""
    canvas = _Canvas()
    left = 12 + 7.2 * max(len(row.site) for row in picture.rows)
    for step in range(0, picture.steps, 1 if picture.steps <= 40 else 5):
        x = left + step * (CELL + GAP) + CELL / 2
        canvas.add("text", str(step), x=x, y=12, text_anchor="middle", class_="tick")
    for i, row in enumerate(picture.rows):
        y = 18 + i * (CELL + GAP)
        canvas.add("text", row.site, x=left - 6, y=y + CELL - 4, text_anchor="end", class_="label")
        for step, cell in enumerate(row.cells):
            x, name = left + step * (CELL + GAP), f"{row.site}, {cell.note}"
            canvas.add("rect", title=name, x=x, y=y, width=CELL, height=CELL, rx=3, class_=f"k-{cell.kind}")
    width, height = left + picture.steps * (CELL + GAP), 18 + len(picture.rows) * (CELL + GAP)
    return canvas.done(width, height, f"schedule of {picture.network}")


def scatter(points: Sequence[Point], x_name: str, y_name: str, line: float | None = None) -> Markup:
    """Points over two linear axes; ``line`` is a horizontal mark (the target)."""
    finite = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    heights = [p.y for p in finite] + ([line] if line is not None else [])
    canvas, frame = _Canvas(), _axes([p.x for p in finite], heights, x_name, y_name)
    canvas.parts += frame.parts
    if line is not None:
        y = frame.y(line)
        canvas.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="target")
        canvas.add("text", f"target {line:g}", x=WIDTH - RIGHT, y=y - 4, text_anchor="end", class_="tick")
    for point in finite:
        canvas.add("circle", title=point.label, cx=frame.x(point.x), cy=frame.y(point.y), r=5, class_=point.style)
    return canvas.done(WIDTH, HEIGHT, f"{y_name} over {x_name}")


def curve(values: Sequence[float], x_name: str, y_name: str) -> Markup:
    """A line with a mark per value over 0, 1, 2, ..."""
    shown = [(i, v) for i, v in enumerate(values) if math.isfinite(v)]
    canvas, frame = _Canvas(), _axes([float(i) for i, _ in shown], [0.0, *(v for _, v in shown)], x_name, y_name)
    canvas.parts += frame.parts
    path = " ".join(f"{_plain(frame.x(i))},{_plain(frame.y(v))}" for i, v in shown)
    canvas.add("polyline", points=path, class_="curve")
    for i, v in shown:
        canvas.add("circle", title=f"step {i}: {v:.4g}", cx=frame.x(i), cy=frame.y(v), r=3, class_="dot")
    return canvas.done(WIDTH, HEIGHT, f"{y_name} over {x_name}")


def heat_map(matrix: Sequence[Sequence[float]], name: str) -> Markup:
    """A square matrix, strong colour for large values; large matrices are thinned out to 64 rows."""
    stride = max(1, math.ceil(len(matrix) / MAX_CELLS))
    steps = range(0, len(matrix), stride)
    values = [matrix[a][b] for a in steps for b in steps if math.isfinite(matrix[a][b])]
    low, high = min(values, default=0.0), max(values, default=1.0)
    edge = max(5.0, min(18.0, 420 / max(len(steps), 1)))
    canvas = _Canvas()
    for i, a in enumerate(steps):
        if i % max(1, len(steps) // 10) == 0:
            canvas.add("text", str(a), x=26, y=24 + i * edge + edge, text_anchor="end", class_="tick")
            canvas.add("text", str(a), x=30 + i * edge + edge / 2, y=16, text_anchor="middle", class_="tick")
        for j, b in enumerate(steps):
            value = matrix[a][b]
            strength = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
            x, y, side = 30 + j * edge, 20 + i * edge, edge - 0.5
            title, opacity = f"{a}, {b}: {value:.4f}", round(strength, 3)
            canvas.add("rect", title=title, class_="heat", fill_opacity=opacity, x=x, y=y, width=side, height=side)
    size = len(steps) * edge
    canvas.add("text", f"{low:.3f} (pale) to {high:.3f} (strong)", x=30, y=36 + size, class_="tick")
    return canvas.done(40 + size, 44 + size, name)


@dataclass
class _Frame:
    low: tuple[float, float]
    high: tuple[float, float]
    parts: list[str]

    def x(self, value: float) -> float:
        return LEFT + (value - self.low[0]) / (self.high[0] - self.low[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low[1]) / (self.high[1] - self.low[1]) * (HEIGHT - TOP - BOTTOM)


def _axes(xs: Sequence[float], ys: Sequence[float], x_name: str, y_name: str) -> _Frame:
    across, up = ticks(min(xs, default=0.0), max(xs, default=1.0)), ticks(min(ys, default=0.0), max(ys, default=1.0))
    frame = _Frame((across[0], up[0]), (across[-1], up[-1]), [])
    canvas = _Canvas()
    with canvas.group("axes"):
        for value in up:
            y = frame.y(value)
            canvas.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
            canvas.add("text", f"{value:g}", x=LEFT - 6, y=y + 4, text_anchor="end", class_="tick")
        for value in across:
            canvas.add(
                "text", f"{value:g}", x=frame.x(value), y=HEIGHT - BOTTOM + 16, text_anchor="middle", class_="tick"
            )
        middle = (TOP + HEIGHT - BOTTOM) / 2
        canvas.add("text", x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="label")
        turn = f"rotate(-90 14 {_plain(middle)})"
        canvas.add("text", y_name, x=14, y=middle, text_anchor="middle", transform=turn, class_="label")
    frame.parts = canvas.parts
    return frame


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
