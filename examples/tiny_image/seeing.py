"""What analytic detectors see with: colours by hue, shapes by overlap with templates, backgrounds by mean colour.

This file is shared: the folder of each shipped model has a link to it, so that a model loads from its folder alone.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from .drawing import BACKGROUNDS, COLOURS, Array, Field, background, signed_distance

_TEMPLATE = 32

Mask = npt.NDArray[np.bool_]


def hue_saturation_value(pixels: Array) -> tuple[Field, Field, Field]:
    """Hue, saturation and value, each ``[...]`` in [0, 1], of ``[..., 3]`` in [0, 1]."""
    high, low = pixels.max(-1), pixels.min(-1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = np.moveaxis(pixels, -1, 0)
    hue = np.where(high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)) / 6
    return hue, span / np.maximum(high, 1e-6), high


def colour_masks(pixels: Array, least_value: float = 0.48) -> dict[str, Mask]:
    """Per colour the boolean mask ``[...]`` of those of ``[..., 3]`` that are vivid and nearest to its hue.

    Vivid is a saturation above 0.52 and a value above ``least_value``.
    """
    hue, saturation, value = hue_saturation_value(pixels)
    vivid = (saturation > 0.52) & (value > least_value)
    anchors = np.array([hue_saturation_value(np.array([[rgb]], np.float32))[0].item() for rgb in COLOURS.values()])
    gap = np.abs(hue[..., None] - anchors)
    nearest = np.minimum(gap, 1 - gap).argmin(-1)
    return {name: vivid & (nearest == i) for i, name in enumerate(COLOURS)}


@functools.cache
def _templates(shapes: tuple[str, ...], degrees: tuple[float, ...]) -> dict[str, Mask]:
    """Per shape ``[angles, N, N]`` masks, centred, of one common area."""
    axis = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 3.2 - 1.6
    y, x = (part.astype(np.float32) for part in np.meshgrid(axis, axis, indexing="ij"))
    cell = (3.2 / _TEMPLATE) ** 2
    found = {}
    for shape in shapes:
        inside = signed_distance(shape, x, y, 1.0) < 0
        scale = np.sqrt(inside.sum() * cell / np.pi)
        turned = []
        for angle in np.deg2rad(degrees):
            cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
            turned.append(signed_distance(shape, x * cos + y * sin, y * cos - x * sin, 1.0) < 0)
        found[shape] = np.stack(turned)
    return found


def shape_scores(mask: Mask, shapes: tuple[str, ...], degrees: tuple[float, ...]) -> dict[str, float]:
    """Best intersection over union of one mask ``[H, W]`` with each shape, turned by each of ``degrees``."""
    rows, cols = np.nonzero(mask)
    unit = np.sqrt(len(rows) / np.pi)
    axis = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 3.2 - 1.6
    r = np.clip(np.round(axis * unit + rows.mean()).astype(int), -1, mask.shape[0])
    c = np.clip(np.round(axis * unit + cols.mean()).astype(int), -1, mask.shape[1])
    padded = np.pad(mask, 1)
    view = padded[np.ix_(r + 1, c + 1)]
    return {
        shape: float(((view & turned).sum((1, 2)) / (view | turned).sum((1, 2))).max())
        for shape, turned in _templates(shapes, degrees).items()
    }


def without_specks(mask: Mask) -> Mask:
    """The mask ``[H, W]`` with specks removed: pixels that have at least five of nine neighbours set."""
    padded = np.pad(mask.astype(np.int8), 1)
    height, width = mask.shape
    votes = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    return np.asarray(votes >= 5)


def nearest_background(pixels: Array) -> str:
    """The background whose mean colour is nearest to that of ``[N, 3]``; ``none`` where N is 0."""
    if not len(pixels):
        return "none"
    return min(BACKGROUNDS, key=lambda name: float(np.abs(pixels.mean(0) - _background_anchor(name)).sum()))


@functools.cache
def _background_anchor(name: str) -> Array:
    stills = [background(name, np.random.default_rng(seed), 64).reshape(-1, 3) for seed in range(8)]
    return np.asarray(np.concatenate(stills).mean(0))
