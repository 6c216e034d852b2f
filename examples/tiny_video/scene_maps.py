"""What stands where in a scene, token by token: the targets of the `SceneHead` of training."""

from __future__ import annotations

import numpy as np

from .clips import FRAMES, MOTIONS, SHAPES, Scene, pose
from .drawing import BACKGROUNDS, COLOURS, Array, signed_distance

TOKEN_EDGE = 4  # pixels of a token: space-to-depth 2, patch 2
NEAR = 0.5  # a token this many radii outside of a thing still names it
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(MOTIONS) + 1, len(BACKGROUNDS))  # the first three: 0 is "no thing"
NUMBERS = 9  # distance to the outline, offset to the centre (2), orientation (2), velocity (2), position (2)
_TURNS = {"circle": 0, "square": 4, "triangle": 3, "cross": 4}  # rotational symmetry; a circle has no orientation
_SPEED = 0.5  # travel in canvas edges that counts as velocity 1


def scene_maps(scene: Scene, size: int, frames: int = FRAMES) -> tuple[Array, Array]:
    """Targets of the ``frames * (size / 4)**2`` tokens of a clip, in the order of the transformer's sequence.

    Returns:
        Class numbers ``[tokens, 4]`` (colour, shape, motion of the nearest thing, background) and numbers
        ``[tokens, 9]`` of unit scale, both float32.
    """
    cells = size // TOKEN_EDGE
    axis = ((np.arange(cells) + 0.5) / cells).astype(np.float32)
    gy, gx = np.meshgrid(axis, axis, indexing="ij")
    classes = np.zeros((frames, cells, cells, len(CLASSES)), np.float32)
    classes[..., 3] = BACKGROUNDS.index(scene.background)
    numbers = np.zeros((frames, cells, cells, NUMBERS), np.float32)
    numbers[..., 0] = 1
    numbers[..., 7], numbers[..., 8] = 2 * gx - 1, 2 * gy - 1
    for frame in range(frames):
        for thing in reversed(scene.things):  # the front one is written last
            cx, cy, angle = pose(thing, frame)
            cos, sin = np.cos(angle), np.sin(angle)
            dx, dy = gx - cx, gy - cy
            distance = signed_distance(thing.shape, dx * cos + dy * sin, dy * cos - dx * sin, thing.radius)
            distance = distance / thing.radius
            here = (distance < NEAR) & ((distance < 0) | (distance < numbers[frame, ..., 0]))
            labels = [list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), list(MOTIONS).index(thing.motion)]
            classes[frame][here, :3] = np.array(labels) + 1
            turns = _TURNS[thing.shape]
            orientation = (np.cos(turns * angle), np.sin(turns * angle)) if turns else (0.0, 0.0)
            velocity = np.array(MOTIONS[thing.motion]) * thing.travel / _SPEED
            numbers[frame][here, 0] = np.clip(distance[here], -1, 1)
            numbers[frame][here, 1] = dx[here] / thing.radius
            numbers[frame][here, 2] = dy[here] / thing.radius
            numbers[frame][here, 3:5] = orientation
            numbers[frame][here, 5:7] = velocity
    return classes.reshape(-1, len(CLASSES)), numbers.reshape(-1, NUMBERS)
