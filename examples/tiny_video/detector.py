"""An analytic detector: reads colour, shape, motion and background off a clip, with no learned weights.

Colours are found by hue and saturation, shapes by overlap with rotated templates of the same area,
motion by the path of the centroid, backgrounds by mean colour and texture of what no thing covers.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import numpy.typing as npt

from .clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Array, Field, signed_distance

STILL = 0.13  # a centroid that travels less than this share of the canvas is not moving
MIN_AREA = 0.012  # of the canvas; the smallest thing that is rendered, a triangle, covers 0.078
KINDS = ("background", "colour", "shape", "motion")
_TEMPLATE = 32

Attributes = dict[str, str]
Mask = npt.NDArray[np.bool_]


def parse_caption(caption: str) -> tuple[list[Attributes], str]:
    """The things (``colour``, ``shape``, ``motion``) and the background that a caption names."""
    pattern = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
    things = [dict(zip(("colour", "shape", "motion"), found, strict=True)) for found in re.findall(pattern, caption)]
    background = re.search(rf"over ({'|'.join(BACKGROUNDS)})$", caption)
    if not things or background is None:
        raise ValueError(f"caption {caption!r} is not of the form 'a COLOUR SHAPE MOTION [and ...] over BACKGROUND'")
    return things, background.group(1)


def _hue_saturation_value(clip: Array) -> tuple[Field, Field, Field]:
    high, low = clip.max(-1), clip.min(-1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = np.moveaxis(clip, -1, 0)
    hue = np.where(high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)) / 6
    return hue, span / np.maximum(high, 1e-6), high


def colour_masks(clip: Array) -> dict[str, Mask]:
    """Per colour the boolean mask ``[F, H, W]`` of the vivid pixels nearest to its hue."""
    hue, saturation, value = _hue_saturation_value(clip)
    vivid = (saturation > 0.52) & (value > 0.48)
    anchors = np.array([_hue_saturation_value(np.array([[rgb]], np.float32))[0].item() for rgb in COLOURS.values()])
    gap = np.abs(hue[..., None] - anchors)
    nearest = np.minimum(gap, 1 - gap).argmin(-1)
    return {name: vivid & (nearest == i) for i, name in enumerate(COLOURS)}


@functools.cache
def _templates() -> dict[str, Mask]:
    """Per shape ``[angles, N, N]`` masks, centred, of one common area."""
    axis = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 3.2 - 1.6
    y, x = (part.astype(np.float32) for part in np.meshgrid(axis, axis, indexing="ij"))
    cell = (3.2 / _TEMPLATE) ** 2
    found = {}
    for shape in SHAPES:
        inside = signed_distance(shape, x, y, 1.0) < 0
        scale = np.sqrt(inside.sum() * cell / np.pi)
        turned = []
        for angle in np.deg2rad(np.arange(0, 120, 7.5)):
            cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
            turned.append(signed_distance(shape, x * cos + y * sin, y * cos - x * sin, 1.0) < 0)
        found[shape] = np.stack(turned)
    return found


def _shape_scores(mask: Mask) -> dict[str, float]:
    """Best intersection over union of one mask ``[H, W]`` with each shape's templates."""
    rows, cols = np.nonzero(mask)
    unit = np.sqrt(len(rows) / np.pi)
    axis = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE * 3.2 - 1.6
    r = np.clip(np.round(axis * unit + rows.mean()).astype(int), -1, mask.shape[0])
    c = np.clip(np.round(axis * unit + cols.mean()).astype(int), -1, mask.shape[1])
    padded = np.pad(mask, 1)
    view = padded[np.ix_(r + 1, c + 1)]
    return {
        shape: float(((view & turned).sum((1, 2)) / (view | turned).sum((1, 2))).max())
        for shape, turned in _templates().items()
    }


def _largest_part(mask: Mask) -> Mask:
    """The mask with specks removed: pixels that have at least five of nine neighbours set."""
    padded = np.pad(mask.astype(np.int8), 1)
    height, width = mask.shape
    votes = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    return np.asarray(votes >= 5)


def read_things(clip: Array) -> dict[str, Attributes]:
    """What is seen of each colour: ``{colour: {"shape": ..., "motion": ...}}`` for a clip ``[F, H, W, 3]``."""
    frames, height, width = clip.shape[:3]
    seen: dict[str, Attributes] = {}
    for colour, raw in colour_masks(clip).items():
        mask = np.stack([_largest_part(frame) for frame in raw])
        areas = mask.sum((1, 2))
        clear = np.nonzero(areas >= max(MIN_AREA * height * width, 0.45 * areas.max()))[0]
        if len(clear) < 3:
            continue
        best = clear[np.argsort(-areas[clear])][:3]
        scores = [_shape_scores(mask[frame]) for frame in best]
        shape = max(SHAPES, key=lambda name: sum(score[name] for score in scores))
        centres = np.array([[part.mean() for part in np.nonzero(mask[frame])[::-1]] for frame in clear])
        slope = np.polyfit(clear, centres, 1)[0] * (frames - 1) / np.array([width, height])
        motion = "spinning"
        if np.abs(slope).max() > STILL:
            motion = max(MOTIONS, key=lambda name: float(np.dot(slope, MOTIONS[name])))
        seen[colour] = {"shape": shape, "motion": motion}
    return seen


def read_background(clip: Array) -> str:
    """The background whose mean colour is nearest, over pixels of low saturation in ``[F, H, W, 3]``."""
    covered = np.any(list(colour_masks(clip).values()), axis=0)
    pixels = clip[~covered]
    if not len(pixels):
        return "none"
    return min(BACKGROUNDS, key=lambda name: float(np.abs(pixels.mean(0) - _background_anchor(name)).sum()))


@functools.cache
def _background_anchor(name: str) -> Array:
    from .clips import _background

    stills = [_background(name, np.random.default_rng(seed), 64).reshape(-1, 3) for seed in range(8)]
    return np.asarray(np.concatenate(stills).mean(0))


def count_by_kind(clip: Array, caption: str) -> dict[str, tuple[int, int]]:
    """(right, total) attributes of one clip ``[F, H, W, 3]`` in [0, 1] against its caption, for each of `KINDS`.

    Each thing has three (colour present, shape, motion) and the clip one (background); a thing whose
    colour is not found has all three wrong.
    """
    things, background = parse_caption(caption)
    seen = read_things(clip)
    found = [(thing, seen.get(thing["colour"])) for thing in things]
    right = {
        "background": int(read_background(clip) == background),
        "colour": sum(match is not None for _, match in found),
        "shape": sum(match is not None and match["shape"] == thing["shape"] for thing, match in found),
        "motion": sum(match is not None and match["motion"] == thing["motion"] for thing, match in found),
    }
    return {kind: (right[kind], 1 if kind == "background" else len(things)) for kind in KINDS}


def count_right(clip: Array, caption: str) -> tuple[int, int]:
    """(right, total) attributes of one clip ``[F, H, W, 3]`` in [0, 1] against its caption, all kinds together."""
    counts = count_by_kind(clip, caption).values()
    return sum(right for right, _ in counts), sum(total for _, total in counts)


def attribute_score(clips: list[Array], captions: list[str]) -> float:
    """Share of attributes right over paired clips and captions, in [0, 1]."""
    counts = [count_right(clip, caption) for clip, caption in zip(clips, captions, strict=True)]
    return sum(right for right, _ in counts) / sum(total for _, total in counts)
