"""What the charts are drawn with: a canvas of SVG elements, axes, round numbers. No library, no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40


class Canvas:
    """Collects SVG elements; texts are escaped."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, tag: str, text: str = "", title: str = "", **attributes: object) -> None:
        """Add an element with its attributes (``_`` stands for ``-``); ``title`` is shown on hover."""
        names = " ".join(f'{key.strip("_").replace("_", "-")}="{escape(plain(v))}"' for key, v in attributes.items())
        inner = f"{f'<title>{escape(title)}</title>' if title else ''}{escape(text)}"
        self.parts.append(f"<{tag} {names}>{inner}</{tag}>")

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        """Elements that share a CSS class."""
        self.parts.append(f'<g class="{escape(name)}">')
        yield
        self.parts.append("</g>")

    def done(self, width: float, height: float, label: str) -> Markup:
        """The finished picture; ``label`` is what a screen reader says."""
        head = f'<svg viewBox="0 0 {plain(width)} {plain(height)}" role="img" aria-label="{escape(label)}"'
        return Markup(f'{head} style="max-width:{plain(width)}px">{"".join(self.parts)}</svg>')


def plain(value: object) -> str:
    """A coordinate with two digits at most, anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


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


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis that cover two positive numbers.

    >>> log_ticks(0.002, 0.5)
    [0.001, 0.01, 0.1, 1.0]
    >>> log_ticks(3, 8), log_ticks(6, 9)
    ([2.0, 5.0, 10.0], [2.0, 5.0, 10.0, 20.0])
    """
    decades = range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)
    if len(decades) > 3:
        return [float(f"1e{k}") for k in decades]
    fine = [float(f"{f}e{k}") for k in range(decades[0] - 1, decades[-1] + 1) for f in (1, 2, 5)]
    first = max((i for i, value in enumerate(fine) if value <= low * (1 + 1e-9)), default=0)
    last = next((i for i, value in enumerate(fine) if value >= high * (1 - 1e-9)), len(fine) - 1)
    if last - first < 2:
        first, last = max(first - 1, 0), last + 1
    return fine[first : last + 1]


@dataclass(frozen=True)
class Axis:
    """One axis: its marks, and where in the picture its ends are."""

    name: str
    marks: tuple[float, ...]
    start: float
    stop: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], name: str, start: float, stop: float, log: bool = False) -> Axis:
        """The axis that holds all of ``values``; of a logarithmic one, those above 0."""
        if log:
            known = [value for value in values if value > 0] or [1.0]
            return cls(name, tuple(log_ticks(min(known), max(known))), start, stop, True)
        return cls(name, tuple(ticks(min(values, default=0.0), max(values, default=1.0))), start, stop)

    def at(self, value: float) -> float:
        """Where a value stands in the picture."""
        low, high, here = self.marks[0], self.marks[-1], value
        if self.log:
            low, high, here = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        return self.start + (here - low) / (high - low) * (self.stop - self.start)

    def holds(self, value: float) -> bool:
        """Whether a value can be drawn."""
        return math.isfinite(value) and (value > 0 or not self.log)


def draw_axes(canvas: Canvas, across: Axis, up: Axis, size: tuple[int, int]) -> None:
    """Grid, numbers and names of a chart's axes."""
    width, height = size
    with canvas.group("axes"):
        for value in up.marks:
            y = up.at(value)
            canvas.add("line", x1=LEFT, x2=width - RIGHT, y1=y, y2=y, class_="grid")
            canvas.add("text", f"{value:g}", x=LEFT - 6, y=y + 4, text_anchor="end", class_="tick")
        for value in across.marks:
            x = across.at(value)
            canvas.add("text", f"{value:g}", x=x, y=height - BOTTOM + 16, text_anchor="middle", class_="tick")
        middle = (TOP + height - BOTTOM) / 2
        centre = (LEFT + width - RIGHT) / 2
        canvas.add("text", across.name, x=centre, y=height - 6, text_anchor="middle", class_="label")
        turn = f"rotate(-90 14 {plain(middle)})"
        canvas.add("text", up.name, x=14, y=middle, text_anchor="middle", transform=turn, class_="label")
