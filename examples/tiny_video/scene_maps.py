"""What stands where in a scene, token by token: the targets of the auxiliary loss of training.

A transformer learns to draw what its middle layers can name (representation alignment: Yu et al., 2024,
arXiv 2410.06940, with features of a pretrained encoder). These scenes are procedural, so the true answer
takes the place of a pretrained encoder: for every token the thing it belongs to, and where in it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clips import BACKGROUNDS, COLOURS, FRAMES, MOTIONS, SHAPES, Array, Scene, pose, signed_distance

TOKEN_EDGE = 4  # pixels of a token: space-to-depth 2, patch 2
NEAR = 0.5  # a token this many radii outside of a thing still names it
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(MOTIONS) + 1, len(BACKGROUNDS))  # the first three: 0 is "no thing"
NUMBERS_WEIGHT = 3.0  # of the squared errors beside the cross-entropies
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


class SceneHead(nn.Module):
    """Reads `scene_maps` off token features ``[B, tokens, width]``; used in training alone and never saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, sum(CLASSES) + NUMBERS)
        )

    def forward(self, features: Tensor, classes: Tensor, numbers: Tensor) -> Tensor:
        """Mean over tokens of cross-entropies and weighted squared errors; tokens far from things count a quarter."""
        read = self.read(features).float()
        *logits, values = read.split([*CLASSES, NUMBERS], -1)
        near = classes[..., 0] > 0
        weight = torch.where(near, 1.0, 0.25)
        loss = sum(
            F.cross_entropy(part.flatten(0, 1), classes[..., i].flatten().long(), reduction="none").view_as(weight)
            for i, part in enumerate(logits)
        )
        loss = (loss / len(CLASSES) + NUMBERS_WEIGHT * (values - numbers).square().mean(-1)) * weight
        mean: Tensor = loss.sum() / weight.sum()
        return mean
