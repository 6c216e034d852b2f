"""A contact sheet: the same prompt and noise, one row per contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditopt.errors import InputError

EDGE, GAP, CAPTION, MAX_FRAMES = 96, 4, 220, 8


def save_sheet(path: Path, prompts: Sequence[str], samples: Sequence[Mapping[str, Tensor]]) -> None:
    """Write a PNG with the frames of ``samples[i][contender]`` (``[..., H, W, C]`` in [0, 1]) for ``prompts[i]``.

    Raises:
        InputError: the samples are no pictures, or the file cannot be written.
    """
    import textwrap

    import PIL.Image
    import PIL.ImageDraw

    rows = [
        (prompt, name, frames) for prompt, made in zip(prompts, samples, strict=True) for name, frames in made.items()
    ]
    shape = rows[0][2].shape
    if len(shape) < 3 or shape[-1] not in (1, 3, 4):
        raise InputError(f"--sheet: samples of shape {list(shape)} are no pictures [..., H, W, C]; leave --sheet out")
    frames = min(MAX_FRAMES, rows[0][2].reshape(-1, *shape[-3:]).shape[0])
    size = (CAPTION + frames * (EDGE + GAP), GAP + len(rows) * (EDGE + GAP))
    sheet = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for i, (prompt, name, sample) in enumerate(rows):
        top = GAP + i * (EDGE + GAP)
        draw.text((8, top + 4), "\n".join([name, *textwrap.wrap(prompt, 32)]), fill="black")
        for j, frame in enumerate(sample.reshape(-1, *shape[-3:])[:frames]):
            levels = (frame[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).squeeze(-1).numpy()
            picture = PIL.Image.fromarray(levels).resize((EDGE, EDGE)).convert("RGB")
            sheet.paste(picture, (CAPTION + j * (EDGE + GAP), top))
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the sheet cannot be written: {error}") from None
