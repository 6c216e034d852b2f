"""What stands where in a scene, token by token: the targets of the `SceneHead` of training."""

from __future__ import annotations

import numpy as np

from .drawing import BACKGROUNDS, COLOURS, SHAPES, Array, signed_distance
from .scenes import SIZES, TEXTURES, Scene, grid, local

TOKEN_EDGE = 2  # pixels of a token: space-to-depth 2, patch 1
NEAR = 0.5  # a token this many radii outside of a thing still names it
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(TEXTURES) + 1, len(SIZES) + 1, len(BACKGROUNDS))  # 0: "no thing"
NUMBERS = 5  # distance to the outline, offset to the centre (2), position (2)


def scene_maps(scene: Scene, size: int) -> tuple[Array, Array, Array]:
    """Targets of the ``(size / 2)**2`` tokens of an image, in the order of the transformer's sequence.

    Returns:
        Class numbers ``[tokens, 5]`` (colour, shape, texture, size of the nearest thing, background), numbers
        ``[tokens, 5]`` of unit scale, and the thing's number from 1 on in the caption's order ``[tokens]`` (0: none is
        near), all float32.
    """
    cells = size // TOKEN_EDGE
    gx, gy = grid(cells)
    classes = np.zeros((cells, cells, len(CLASSES)), np.float32)
    classes[..., -1] = BACKGROUNDS.index(scene.background)
    numbers = np.zeros((cells, cells, NUMBERS), np.float32)
    owner = np.zeros((cells, cells), np.float32)
    numbers[..., 0] = 1
    numbers[..., 3], numbers[..., 4] = 2 * gx - 1, 2 * gy - 1
    for number, thing in reversed(list(enumerate(scene.things, 1))):  # the front one is written last
        x, y = local(thing, gx, gy)
        distance = signed_distance(thing.shape, x, y, thing.radius) / thing.radius
        here = (distance < NEAR) & ((distance < 0) | (distance < numbers[..., 0]))
        kinds = ((list(COLOURS), thing.colour), (SHAPES, thing.shape), (TEXTURES, thing.texture))
        labels = [names.index(name) for names, name in (*kinds, (list(SIZES), thing.size))]
        classes[here, :-1] = np.array(labels) + 1
        numbers[here, 0] = np.clip(distance[here], -1, 1)
        numbers[here, 1] = x[here] / thing.radius
        numbers[here, 2] = y[here] / thing.radius
        owner[here] = number
    return classes.reshape(-1, len(CLASSES)), numbers.reshape(-1, NUMBERS), owner.reshape(-1)
