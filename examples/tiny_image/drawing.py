"""What scenes are drawn with: colours, shapes as signed distances, textured backgrounds.

This file is shared: the folder of each shipped model has a link to it, so that a model loads from its folder alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Field = npt.NDArray[np.floating[Any]]  # coordinates and distances, in the precision they are given in

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.16, 0.14),
    "yellow": (0.96, 0.86, 0.14),
    "green": (0.16, 0.80, 0.26),
    "cyan": (0.12, 0.86, 0.92),
    "blue": (0.18, 0.34, 0.95),
    "magenta": (0.92, 0.20, 0.88),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
BACKGROUNDS = ("sand", "bricks", "night", "snow", "tiles", "grass")


def signed_distance(shape: str, x: Field, y: Field, radius: float) -> Field:
    """Distance to the outline of a centred shape (negative inside); areas are about equal.

    ``x``, ``y`` and the result share one shape and the unit of ``radius``.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius * 0.92
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.82
    if shape == "triangle":
        inner = radius * 0.68
        sides = [x * np.cos(a) + y * np.sin(a) for a in np.pi / 2 + np.arange(3) * 2 * np.pi / 3]
        return np.asarray(np.maximum.reduce(sides) - np.float32(inner))
    if shape == "cross":
        long, short = radius * 1.08, radius * 0.40
        bar = np.maximum(np.abs(x) - long, np.abs(y) - short)
        return np.minimum(bar, np.maximum(np.abs(x) - short, np.abs(y) - long))
    if shape == "diamond":
        return (np.abs(x) + np.abs(y)) * np.float32(np.sqrt(0.5)) - radius * 0.82
    if shape == "star":
        return _star_distance(x, y, radius * 1.28)
    raise ValueError(f"shape {shape!r} is unknown; known are {', '.join(SHAPES)}")


def _star_distance(x: Field, y: Field, tip: float) -> Field:
    """Distance to the nearer edge of a five-pointed star that stands on two tips, ``tip`` from the middle to a tip."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    off = np.abs((angle + sector / 2) % sector - sector / 2)  # from the nearest tip's direction
    rho = np.hypot(x, y)
    along, across = rho * np.cos(off), rho * np.sin(off)
    notch = 0.46 * tip * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = notch - np.array([tip, 0.0])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return np.asarray((along - np.float32(tip)) * np.float32(normal[0]) + across * np.float32(normal[1]))


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Array:
    """Periodic value noise in [-1, 1], ``[size, size]``, with ``cells`` cells along an edge."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    position = (np.arange(size, dtype=np.float32) + 0.5) / size * cells
    low = np.floor(position).astype(int)
    t = position - low
    t = (t * t * (3 - 2 * t)).astype(np.float32)
    low, high = low % cells, (low + 1) % cells
    rows = grid[low] * (1 - t)[:, None] + grid[high] * t[:, None]
    return np.asarray(rows[:, low] * (1 - t)[None] + rows[:, high] * t[None])


def background(kind: str, rng: np.random.Generator, size: int) -> Array:
    """A still texture ``[size, size, 3]`` of low saturation, in [0, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    phase = rng.uniform(0, 1, 2).astype(np.float32)
    soft = _smooth_noise(rng, 8, size)
    broad = _smooth_noise(rng, 3, size)

    def tint(colour: tuple[float, float, float], level: Array) -> Array:
        return np.asarray(colour, np.float32) * level[..., None]

    if kind == "sand":
        ripple = np.sin(2 * np.pi * (5 * y + 0.35 * broad + phase[0]))
        return tint((0.66, 0.58, 0.44), 1 + 0.10 * ripple + 0.05 * soft)
    if kind == "bricks":
        row = np.floor(8 * (y + phase[1]))
        u = (4 * (x + phase[0]) + 0.5 * (row % 2)) % 1
        v = (8 * (y + phase[1])) % 1
        mortar = ((u < 0.10) | (v < 0.20)).astype(np.float32)
        level = 1 + 0.10 * soft
        share = mortar[..., None]
        return np.asarray(tint((0.46, 0.31, 0.27), level) * (1 - share) + tint((0.62, 0.60, 0.57), level) * share)
    if kind == "night":
        image = tint((0.09, 0.10, 0.17), 1 + 0.25 * broad)
        for sx, sy in rng.uniform(0, 1, (14, 2)):
            glow = np.exp(-((x - sx) ** 2 + (y - sy) ** 2) / (2 * 0.013**2))
            image = image + 0.75 * glow[..., None].astype(np.float32)
        return image
    if kind == "snow":
        return tint((0.86, 0.89, 0.94), 1 + 0.05 * soft + 0.04 * broad)
    if kind == "tiles":
        check = (np.floor(6 * (x + phase[0])) + np.floor(6 * (y + phase[1]))) % 2
        return tint((0.46, 0.47, 0.50), 0.72 + 0.56 * check + 0.05 * soft)
    if kind == "grass":
        blades = np.sin(2 * np.pi * (9 * x + 0.5 * soft + phase[0]))
        return tint((0.25, 0.33, 0.20), 1 + 0.22 * blades + 0.12 * broad)
    raise ValueError(f"background {kind!r} is unknown; known are {BACKGROUNDS}")
