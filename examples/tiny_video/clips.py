"""Procedural training clips: captioned scenes of moving shapes, rendered with signed distances.

A scene is one to three coloured, textured shapes that move, rotate and occlude each other over a
textured background. Everything is a function of a seed, so a caption list or a training run can be
made again bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Field = npt.NDArray[np.floating[Any]]  # coordinates and distances, in the precision they are given in

FRAMES = 6
SIZE = 64
RADII = (0.18, 0.22)  # of a thing, as a share of the canvas edge
HOMES = (  # where things stand on average, by how many there are, in the order of the caption
    ((0.5, 0.5),),
    ((0.32, 0.32), (0.68, 0.68)),
    ((0.26, 0.26), (0.74, 0.5), (0.4, 0.76)),
)
STRAY = 0.05  # a centre is at most this far from its home along either axis, unless its path would leave the canvas
TILT = 0.1  # things start this near to upright, in radians; spinning ones then pass through all angles

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.16, 0.14),
    "yellow": (0.96, 0.86, 0.14),
    "green": (0.16, 0.80, 0.26),
    "cyan": (0.12, 0.86, 0.92),
    "blue": (0.18, 0.34, 0.95),
    "magenta": (0.92, 0.20, 0.88),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS: dict[str, tuple[float, float]] = {  # unit displacement (x to the right, y downwards)
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "spinning": (0.0, 0.0),
}
BACKGROUNDS = ("sand", "bricks", "night", "snow", "tiles", "grass")


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; lengths in units of the canvas edge, angles in radians."""

    colour: str
    shape: str
    motion: str
    centre: tuple[float, float]
    travel: float
    radius: float
    angle: float
    spin: float
    texture: int
    texture_phase: float

    @property
    def phrase(self) -> str:
        """The words of the caption that describe this thing."""
        return f"a {self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """A captioned clip before rendering; the first thing is the one in front."""

    things: tuple[Thing, ...]
    background: str
    seed: int

    @property
    def caption(self) -> str:
        """The caption, e.g. ``a red circle moving left and a blue cross spinning over sand``."""
        phrases = [thing.phrase for thing in self.things]
        listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
        return f"{listed} over {self.background}"


def sample_scene(seed: int, radii: tuple[float, float] = RADII) -> Scene:
    """Draw a scene; colours within a scene differ, and no thing is hidden for most of the clip."""
    rng = np.random.default_rng([seed, 7])
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    colours = [list(COLOURS)[i] for i in sorted(rng.permutation(len(COLOURS))[:count])]
    for _ in range(40):
        things = tuple(
            _sample_thing(rng, colour, radii, home) for colour, home in zip(colours, HOMES[count - 1], strict=True)
        )
        if _visible(things):
            break
    return Scene(things, str(rng.choice(BACKGROUNDS)), seed)


def _sample_thing(
    rng: np.random.Generator, colour: str, radii: tuple[float, float], home: tuple[float, float]
) -> Thing:
    motion = str(rng.choice(list(MOTIONS)))
    radius = float(rng.uniform(*radii))
    travel = float(rng.uniform(0.36, 0.52)) if motion != "spinning" else 0.0
    dx, dy = MOTIONS[motion]
    room = [0.5 - radius * 0.95 - abs(d) * travel / 2 for d in (dx, dy)]
    x, y = (float(np.clip(at + rng.uniform(-STRAY, STRAY), 0.5 - r, 0.5 + r)) for at, r in zip(home, room, strict=True))
    spin = float(rng.uniform(0.4, 0.5) if motion == "spinning" else rng.uniform(0.0, 0.06))
    return Thing(
        colour=colour,
        shape=str(rng.choice(SHAPES)),
        motion=motion,
        centre=(x, y),
        travel=travel,
        radius=radius,
        angle=float(rng.uniform(-TILT, TILT)),
        spin=spin,
        texture=int(rng.integers(3)),
        texture_phase=float(rng.uniform(0, 2 * np.pi)),
    )


def _visible(things: tuple[Thing, ...]) -> bool:
    """At no more than two frames may a thing's centre lie inside one in front of it."""
    for back in range(1, len(things)):
        hidden = 0
        for frame in range(FRAMES):
            x, y, _ = pose(things[back], frame)
            for front in things[:back]:
                fx, fy, _ = pose(front, frame)
                if np.hypot(x - fx, y - fy) < front.radius + 0.3 * things[back].radius:
                    hidden += 1
        if hidden > 2:
            return False
    return True


def pose(thing: Thing, frame: int) -> tuple[float, float, float]:
    """Centre x, centre y (canvas edges) and angle (radians) of a thing in a frame."""
    progress = frame / (FRAMES - 1) - 0.5
    dx, dy = MOTIONS[thing.motion]
    return (
        thing.centre[0] + dx * thing.travel * progress,
        thing.centre[1] + dy * thing.travel * progress,
        thing.angle + thing.spin * frame,
    )


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
    raise ValueError(f"shape {shape!r} is unknown; known are {SHAPES}")


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


def _background(kind: str, rng: np.random.Generator, size: int) -> Array:
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


def _texture(thing: Thing, x: Array, y: Array) -> Array:
    """Brightness inside a thing, in its own frame, so that it turns with it."""
    if thing.texture == 0:
        return np.ones_like(x)
    wave = np.sin(x * (2 * np.pi / 0.11) + thing.texture_phase)
    if thing.texture == 2:
        wave = wave * np.sin(y * (2 * np.pi / 0.11) + thing.texture_phase)
    return np.asarray(0.90 + 0.12 * wave, np.float32)


def render(scene: Scene, size: int = SIZE, frames: int = FRAMES) -> Array:
    """Render ``[frames, size, size, 3]`` float32 in [0, 1]."""
    rng = np.random.default_rng([scene.seed, 11])
    still = _background(scene.background, rng, size)
    clip = np.repeat(still[None], frames, 0)
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    gy, gx = np.meshgrid(axis, axis, indexing="ij")
    for frame in range(frames):
        for thing in reversed(scene.things):
            cx, cy, angle = pose(thing, frame)
            cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            x = (gx - np.float32(cx)) * cos + (gy - np.float32(cy)) * sin
            y = (gy - np.float32(cy)) * cos - (gx - np.float32(cx)) * sin
            alpha = np.clip(0.5 - signed_distance(thing.shape, x, y, thing.radius) * size, 0, 1)[..., None]
            paint = np.asarray(COLOURS[thing.colour], np.float32) * _texture(thing, x, y)[..., None]
            clip[frame] = clip[frame] * (1 - alpha) + paint * alpha
    return np.clip(clip, 0, 1).astype(np.float32)
