"""Pictures of generated clips: a contact sheet with captions, and an animated grid."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from .drawing import Array

EDGE = 96  # pixels of a frame as drawn
GAP = 4
CAPTION = 260
COLUMNS = 4  # of the animated grid
FRAME_MS = 160


def contact_sheet(clips: Array, captions: list[str], notes: list[str]) -> PIL.Image.Image:
    """One row a clip of ``[B, F, H, W, 3]``: its caption and note at the left, its frames beside them."""
    count, frames = clips.shape[:2]
    sheet = PIL.Image.new("RGB", (CAPTION + frames * (EDGE + GAP), count * (EDGE + GAP) + GAP), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for row, (clip, caption, note) in enumerate(zip(clips, captions, notes, strict=True)):
        top = GAP + row * (EDGE + GAP)
        draw.text((8, top + 4), "\n".join([*textwrap.wrap(caption, 38), note]), fill="black")
        for column, frame in enumerate(clip):
            sheet.paste(_image(frame), (CAPTION + column * (EDGE + GAP), top))
    return sheet


def save_gif(clips: Array, path: Path) -> None:
    """Write all clips of ``[B, F, H, W, 3]`` as one looping grid, without captions."""
    count, frames = clips.shape[:2]
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    pages = []
    for frame in range(frames):
        page = PIL.Image.new("RGB", (columns * (EDGE + GAP) + GAP, rows * (EDGE + GAP) + GAP), "white")
        for i in range(count):
            row, column = divmod(i, columns)
            page.paste(_image(clips[i, frame]), (GAP + column * (EDGE + GAP), GAP + row * (EDGE + GAP)))
        pages.append(page)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=FRAME_MS, loop=0)


def _image(frame: Array) -> PIL.Image.Image:
    """A frame ``[H, W, 3]`` in [0, 1], enlarged without smoothing."""
    levels = np.clip(np.round(frame * 255), 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(levels).resize((EDGE, EDGE), PIL.Image.Resampling.NEAREST)
