"""An analytic detector: reads what a caption names off an image, with no learned weights.

Colours are found by hue and saturation, shapes by overlap with upright templates of the same area, textures by how
brightness varies within a thing, sizes by area, places and relations by centroids, backgrounds by mean colour of what
no thing covers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .drawing import BACKGROUNDS, COLOURS, SHAPES, Array
from .scenes import PLACES, RELATIONS, SIZES, TEXTURES
from .seeing import Mask, colour_masks, nearest_background, shape_scores, without_specks

MIN_AREA = 0.012  # of the canvas; the smallest thing that is rendered, a small star, covers 0.029
LARGE_AREA = 0.056  # small things cover at most 0.044 of the canvas, large ones at least 0.072
UNEVEN = 0.07  # standard deviation of brightness within a thing above which it has a texture; textures have 0.16
ALONG = 0.4  # share of that variance between columns above which the texture is stripes
TOGETHER = 0.12  # centres nearer than this are those of a thing inside another
_LEAST_VALUE = 0.36  # the dark parts of a green thing have 0.5
_DEGREES = (-4.0, 0.0, 4.0)
KINDS = ("background", "colour", "shape", "texture", "size", "place", "relation")

Attributes = dict[str, str]


@dataclass(frozen=True)
class Seen:
    """A thing as it is seen; the centre in canvas edges (x, y), the area as a share of the canvas."""

    shape: str
    texture: str
    size: str
    place: str
    centre: tuple[float, float]
    area: float


def parse_caption(caption: str) -> tuple[list[Attributes], str, str]:
    """The things (``size``, ``texture``, ``colour``, ``shape``, ``place``), the relation and the background named.

    ``place`` is empty where the caption has a relation, the relation is empty where it has places.
    """
    thing = (
        rf"a ({'|'.join(SIZES)}) (?:({'|'.join(TEXTURES[1:])}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
        rf"(?: ({'|'.join(sorted(PLACES, key=len, reverse=True))}))?"
    )
    end = rf" over ({'|'.join(BACKGROUNDS)})"
    relations = "|".join(RELATIONS)
    between = rf"(?: and |, | (?:{relations}) )"
    if not re.fullmatch(rf"{thing}(?:{between}{thing})*{end}", caption):
        raise ValueError(
            f"caption {caption!r} is not of the form 'a SIZE [TEXTURE] COLOUR SHAPE PLACE [and ...] over BACKGROUND'"
            " or 'a SIZE [TEXTURE] COLOUR SHAPE RELATION a SIZE [TEXTURE] COLOUR SHAPE over BACKGROUND'"
        )
    names = ("size", "texture", "colour", "shape", "place")
    things = [dict(zip(names, found, strict=True)) for found in re.findall(thing, caption)]
    for found in things:
        found["texture"] = found["texture"] or TEXTURES[0]
    relation = re.search(rf"(?:{'|'.join(SHAPES)}) ({relations}) a ", caption)
    return things, relation.group(1) if relation else "", caption.rsplit(" ", 1)[1]


def _filled(mask: Mask) -> Mask:
    """A mask ``[H, W]`` with holes filled: pixels that have some of it on all four sides."""
    reach = np.logical_or.accumulate
    sides = [reach(mask, 0), reach(mask, 1), reach(mask[::-1], 0)[::-1], reach(mask[:, ::-1], 1)[:, ::-1]]
    return np.asarray(np.logical_and.reduce(sides))


def _texture(image: Array, mask: Mask) -> str:
    """The texture of what a mask ``[H, W]`` covers, clear of its outline."""
    padded = np.pad(mask, 1)
    inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    if inner.sum() < 9:
        return TEXTURES[0]
    value = image.max(-1) / image.max(-1)[inner].max()
    spread = float(value[inner].var())
    if spread < UNEVEN**2:
        return "plain"
    counts = inner.sum(0)
    used = counts > 0
    columns = (value * inner).sum(0)[used] / counts[used]
    between = float((counts[used] * (columns - value[inner].mean()) ** 2).sum() / counts.sum())
    return "striped" if between > ALONG * spread else "checked"


def read_things(image: Array) -> dict[str, Seen]:
    """What is seen of each colour in an image ``[H, W, 3]`` in [0, 1]."""
    height, width = image.shape[:2]
    seen: dict[str, Seen] = {}
    for colour, raw in colour_masks(image, _LEAST_VALUE).items():
        mask = without_specks(raw)
        whole = _filled(mask)
        area = float(whole.mean())
        if area < MIN_AREA:
            continue
        scores = shape_scores(whole, SHAPES, _DEGREES)
        y, x = (
            (float(part.mean()) + 0.5) / edge for part, edge in zip(np.nonzero(whole), (height, width), strict=True)
        )
        seen[colour] = Seen(
            shape=max(SHAPES, key=lambda name: scores[name]),
            texture=_texture(image, mask),
            size="large" if area > LARGE_AREA else "small",
            place=min(PLACES, key=lambda name: float(np.hypot(x - PLACES[name][0], y - PLACES[name][1]))),
            centre=(x, y),
            area=area,
        )
    return seen


def read_relation(first: Seen, second: Seen) -> str:
    """How the first thing stands to the second, one of `RELATIONS`; ``none`` if it is around it."""
    dx, dy = (b - a for a, b in zip(first.centre, second.centre, strict=True))
    if np.hypot(dx, dy) < TOGETHER:
        return "inside" if first.area < second.area else "none"
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def read_background(image: Array) -> str:
    """The background whose mean colour is nearest, over pixels of low saturation in ``[H, W, 3]``."""
    covered = np.any(list(colour_masks(image, _LEAST_VALUE).values()), axis=0)
    return nearest_background(image[~covered])


def count_by_kind(image: Array, caption: str) -> dict[str, tuple[int, int]]:
    """(right, total) attributes of one image ``[H, W, 3]`` in [0, 1] against its caption, for each of `KINDS`.

    Each thing has four (colour present, shape, texture, size) and its place, if the caption names it; the image has its
    background and the relation, if there is one. A thing whose colour is not found has all of its own wrong.
    """
    things, relation, background = parse_caption(caption)
    seen = read_things(image)
    found = [(thing, seen.get(thing["colour"])) for thing in things]
    counts = {"background": (int(read_background(image) == background), 1)}
    counts["colour"] = (sum(match is not None for _, match in found), len(things))
    for kind in ("shape", "texture", "size", "place"):
        named = [(thing[kind], match) for thing, match in found if thing[kind]]
        counts[kind] = (sum(match is not None and getattr(match, kind) == name for name, match in named), len(named))
    matches = [match for _, match in found if match is not None]
    right = bool(relation) and len(matches) == len(things) and read_relation(*matches) == relation
    counts["relation"] = (int(right), int(bool(relation)))
    return counts


def count_right(image: Array, caption: str) -> tuple[int, int]:
    """(right, total) attributes of one image ``[H, W, 3]`` in [0, 1] against its caption, all kinds together."""
    counts = count_by_kind(image, caption).values()
    return sum(right for right, _ in counts), sum(total for _, total in counts)


def attribute_score(images: list[Array], captions: list[str]) -> float:
    """Share of attributes right over paired images and captions, in [0, 1]."""
    counts = [count_right(image, caption) for image, caption in zip(images, captions, strict=True)]
    return sum(right for right, _ in counts) / sum(total for _, total in counts)
