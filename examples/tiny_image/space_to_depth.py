"""An invertible 2 x 2 space-to-depth, which stands where a larger model has its autoencoder.

This file is shared: the folder of each shipped model has a link to it, so that a model loads from its folder alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2  # pixels per latent cell along each edge
CHANNELS = 3 * FACTOR * FACTOR
AXES = 3  # frame, y, x


def to_latents(pixels: Tensor) -> Tensor:
    """``[B, ..., H, W, 3]`` in [0, 1] -> ``[B, 12, ..., H/2, W/2]`` of about unit scale (exactly invertible).

    ``...`` is nothing for images, the frames for clips.
    """
    b, *inner, h, w, c = pixels.shape
    blocks = (pixels * 2 - 1).reshape(b, *inner, h // 2, 2, w // 2, 2, c)
    return blocks.movedim((-4, -2, -1), (1, 2, 3)).reshape(b, 4 * c, *inner, h // 2, w // 2)


def from_latents(latents: Tensor) -> Tensor:
    """``[B, 12, ..., H/2, W/2]`` -> ``[B, ..., H, W, 3]``, the inverse of `to_latents`; values are not clipped.

    Pixels are moved, never mixed. The change of scale is exact for 8-bit levels ``k / 256`` and within one
    float32 rounding of the value otherwise.
    """
    b, c, *inner, h, w = latents.shape
    blocks = latents.reshape(b, 2, 2, c // 4, *inner, h, w).movedim((1, 2, 3), (-4, -2, -1))
    return (blocks.reshape(b, *inner, 2 * h, 2 * w, c // 4) + 1) / 2


def coordinates(latents: Tensor) -> Tensor:
    """Where each cell of latents ``[B, 12, F, H, W]`` is (frame, y and x): ``[B, 3, F, H, W]`` of their dtype.

    Rotary positions turn queries and keys; they give values no position to average, so that without these channels,
    which the transformer gets behind the latents, no token can tell how far it is from the middle of a thing. Each
    axis runs from -1.7 to 1.7, which has unit scale.
    """
    ends = [torch.linspace(-1.7, 1.7, n, device=latents.device, dtype=latents.dtype) for n in latents.shape[2:]]
    axes = torch.stack(torch.meshgrid(*ends, indexing="ij"))
    return axes.expand(latents.shape[0], *axes.shape)
