"""An analytic detector: reads colour, shape, motion and background off a clip, with no learned weights.

Colours are found by hue and saturation, shapes by overlap with rotated templates of the same area,
motion by the path of the centroid, backgrounds by mean colour and texture of what no thing covers.
"""

from __future__ import annotations

import re

import numpy as np

from .clips import MOTIONS, SHAPES
from .drawing import BACKGROUNDS, COLOURS, Array
from .seeing import colour_masks, nearest_background, shape_scores, without_specks

STILL = 0.13  # a centroid that travels less than this share of the canvas is not moving
MIN_AREA = 0.012  # of the canvas; the smallest thing that is rendered, a triangle, covers 0.078
KINDS = ("background", "colour", "shape", "motion")
_DEGREES = tuple(float(angle) for angle in np.arange(0, 120, 7.5))  # shapes are looked for at these angles

Attributes = dict[str, str]


def parse_caption(caption: str) -> tuple[list[Attributes], str]:
    """The things (``colour``, ``shape``, ``motion``) and the background that a caption names."""
    pattern = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
    things = [dict(zip(("colour", "shape", "motion"), found, strict=True)) for found in re.findall(pattern, caption)]
    background = re.search(rf"over ({'|'.join(BACKGROUNDS)})$", caption)
    if not things or background is None:
        raise ValueError(f"caption {caption!r} is not of the form 'a COLOUR SHAPE MOTION [and ...] over BACKGROUND'")
    return things, background.group(1)


def read_things(clip: Array) -> dict[str, Attributes]:
    """What is seen of each colour: ``{colour: {"shape": ..., "motion": ...}}`` for a clip ``[F, H, W, 3]``."""
    frames, height, width = clip.shape[:3]
    seen: dict[str, Attributes] = {}
    for colour, raw in colour_masks(clip).items():
        mask = np.stack([without_specks(frame) for frame in raw])
        areas = mask.sum((1, 2))
        clear = np.nonzero(areas >= max(MIN_AREA * height * width, 0.45 * areas.max()))[0]
        if len(clear) < 3:
            continue
        best = clear[np.argsort(-areas[clear])][:3]
        scores = [shape_scores(mask[frame], SHAPES, _DEGREES) for frame in best]
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
    return nearest_background(clip[~covered])


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
