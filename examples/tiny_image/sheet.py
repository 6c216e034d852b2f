"""A contact sheet of generated images with their captions."""

from __future__ import annotations

import textwrap

import numpy as np
import PIL.Image
import PIL.ImageDraw

from .drawing import Array

EDGE = 128  # pixels of an image as drawn
GAP = 6
TEXT = 66  # pixels of height for the caption and the note below an image
COLUMNS = 6


def contact_sheet(images: Array, captions: list[str], notes: list[str]) -> PIL.Image.Image:
    """The images ``[B, H, W, 3]`` in rows of six, enlarged without smoothing, each above its caption and note."""
    rows = -(-len(images) // COLUMNS)
    size = (COLUMNS * (EDGE + GAP) + GAP, rows * (EDGE + TEXT + GAP) + GAP)
    sheet = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for i, (image, caption, note) in enumerate(zip(images, captions, notes, strict=True)):
        row, column = divmod(i, COLUMNS)
        left, top = GAP + column * (EDGE + GAP), GAP + row * (EDGE + TEXT + GAP)
        levels = np.clip(np.round(image * 255), 0, 255).astype(np.uint8)
        sheet.paste(PIL.Image.fromarray(levels).resize((EDGE, EDGE), PIL.Image.Resampling.NEAREST), (left, top))
        lines = [*textwrap.wrap(caption, 26), note]
        draw.multiline_text((left, top + EDGE + 2), "\n".join(lines), fill="black", font_size=9, spacing=1)
    return sheet
