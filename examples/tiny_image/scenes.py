"""Procedural training images: captioned scenes of coloured, textured shapes, rendered with signed distances.

A scene has one to three things over a textured background. Either the caption names the place of each, or there are two
and it names how they stand to each other (``above``, ``inside``, ...). Everything is a function of a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .drawing import BACKGROUNDS, COLOURS, SHAPES, Array, background, signed_distance

SIZE = 64
TEXTURES = ("plain", "striped", "checked")  # the caption does not name the first
SIZES = {"small": (0.115, 0.125), "large": (0.18, 0.195)}  # radii, as a share of the canvas edge
PLACES: dict[str, tuple[float, float]] = {  # x to the right, y downwards, as shares of the canvas edge
    "at the top left": (0.27, 0.27),
    "at the top": (0.5, 0.27),
    "at the top right": (0.73, 0.27),
    "at the left": (0.27, 0.5),
    "in the middle": (0.5, 0.5),
    "at the right": (0.73, 0.5),
    "at the bottom left": (0.27, 0.73),
    "at the bottom": (0.5, 0.73),
    "at the bottom right": (0.73, 0.73),
}
RELATIONS: dict[str, tuple[str, str]] = {  # where the first and the second thing of such a pair stand
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
    "left of": ("at the left", "at the right"),
    "right of": ("at the right", "at the left"),
    "inside": ("in the middle", "in the middle"),
}
AROUND = ("circle", "square", "triangle", "diamond")  # shapes that another can be inside of
AROUND_SCALE = 1.4  # of the radius of a large thing that has another inside of it
STRAY = 0.025  # a centre is at most this far from its place along either axis
TILT = 0.08  # radians from upright, at most
APART = 0.4  # centres of things with named places are at least this far apart
STRIPE = 0.11  # period of a texture, as a share of the canvas edge
DARK = 0.62  # brightness of the dark stripes and checks


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; ``place`` is one of `PLACES`, lengths are in canvas edges, angles in radians."""

    size: str
    texture: str
    colour: str
    shape: str
    place: str
    centre: tuple[float, float]
    radius: float
    angle: float

    @property
    def phrase(self) -> str:
        """The words of the caption that describe this thing, without its place."""
        texture = "" if self.texture == TEXTURES[0] else f"{self.texture} "
        return f"a {self.size} {texture}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A captioned image before rendering; the first thing is the one in front.

    ``relation`` is one of `RELATIONS`, or empty where the caption names places.
    """

    things: tuple[Thing, ...]
    relation: str
    background: str
    seed: int

    def pieces(self) -> Iterator[tuple[str, int]]:
        """The caption in pieces, each with whose it is: a thing's number from 0, -1 for the background, -2 nobody's."""
        for i, thing in enumerate(self.things):
            if i:
                last = i == len(self.things) - 1
                yield self.relation or ("and" if last else ","), -2
            yield (thing.phrase if self.relation else f"{thing.phrase} {thing.place}"), i
        yield f"over {self.background}", -1

    @property
    def caption(self) -> str:
        """The caption, e.g. ``a small red circle above a large striped blue cross over sand``."""
        return " ".join(text for text, _ in self.pieces()).replace(" ,", ",")


def sample_scene(seed: int) -> Scene:
    """Draw a scene; the things of a scene differ in colour."""
    rng = np.random.default_rng([seed, 17])
    kind = str(rng.choice(["one", "two", "three", "pair"], p=[0.25, 0.25, 0.15, 0.35]))
    relation = str(rng.choice(list(RELATIONS))) if kind == "pair" else ""
    places = list(RELATIONS[relation]) if relation else _places(rng, ["one", "two", "three"].index(kind) + 1)
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: len(places)]]
    things = []
    for i, (place, colour) in enumerate(zip(places, colours, strict=True)):
        size = str(rng.choice(list(SIZES)))
        shape, texture = str(rng.choice(SHAPES)), str(rng.choice(TEXTURES))
        scale = 1.0
        if relation == "inside":
            size = "small" if i == 0 else "large"
            if i == 1:
                shape, texture, scale = str(rng.choice(AROUND)), TEXTURES[0], AROUND_SCALE
        x, y = (at + float(rng.uniform(-STRAY, STRAY)) for at in PLACES[place])
        radius = scale * float(rng.uniform(*SIZES[size]))
        things.append(Thing(size, texture, colour, shape, place, (x, y), radius, float(rng.uniform(-TILT, TILT))))
    return Scene(tuple(things), relation, str(rng.choice(BACKGROUNDS)), seed)


def _places(rng: np.random.Generator, count: int) -> list[str]:
    """``count`` places far enough from each other."""
    while True:
        chosen = [list(PLACES)[i] for i in rng.permutation(len(PLACES))[:count]]
        at = np.array([PLACES[place] for place in chosen])
        gaps = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))
        if (gaps[~np.eye(count, dtype=bool)] >= APART).all():
            return chosen


def local(thing: Thing, x: Array, y: Array) -> tuple[Array, Array]:
    """Canvas coordinates in a thing's own frame: from its centre, turned by its angle."""
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    dx, dy = x - np.float32(thing.centre[0]), y - np.float32(thing.centre[1])
    return dx * cos + dy * sin, dy * cos - dx * sin


def _brightness(texture: str, x: Array, y: Array) -> Array:
    """Brightness inside a thing, at coordinates in its own frame."""
    if texture == "plain":
        return np.ones_like(x)
    wave = np.sin(x * (2 * np.pi / STRIPE))
    if texture == "checked":
        wave = wave * np.sin(y * (2 * np.pi / STRIPE)) * 1.6
    share = np.clip(0.5 + 1.5 * wave, 0, 1)
    return np.asarray(DARK + (1 - DARK) * share, np.float32)


def grid(size: int) -> tuple[Array, Array]:
    """Coordinates x and y of pixel centres in canvas edges, each ``[size, size]``."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def render(scene: Scene, size: int = SIZE) -> Array:
    """Render ``[size, size, 3]`` float32 in [0, 1]."""
    image = background(scene.background, np.random.default_rng([scene.seed, 19]), size)
    gx, gy = grid(size)
    for thing in reversed(scene.things):
        x, y = local(thing, gx, gy)
        alpha = np.clip(0.5 - signed_distance(thing.shape, x, y, thing.radius) * size, 0, 1)[..., None]
        paint = np.asarray(COLOURS[thing.colour], np.float32) * _brightness(thing.texture, x, y)[..., None]
        image = image * (1 - alpha) + paint * alpha
    return np.clip(image, 0, 1).astype(np.float32)
