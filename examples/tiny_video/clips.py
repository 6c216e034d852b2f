"""Procedural training clips: captioned scenes of moving shapes, rendered with signed distances.

A scene is one to three coloured, textured shapes that move, rotate and occlude each other over a
textured background. Everything is a function of a seed, so a caption list or a training run can be
made again bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .drawing import BACKGROUNDS, COLOURS, Array, background, signed_distance

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

SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS: dict[str, tuple[float, float]] = {  # unit displacement (x to the right, y downwards)
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "spinning": (0.0, 0.0),
}


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
    still = background(scene.background, rng, size)
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
