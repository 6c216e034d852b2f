"""An invertible 2 x 2 space-to-depth, which stands where a larger video model has its autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2  # pixels per latent cell along each edge
CHANNELS = 3 * FACTOR * FACTOR
AXES = 3  # frame, y, x


def to_latents(clips: Tensor) -> Tensor:
    """``[B, F, H, W, 3]`` in [0, 1] -> ``[B, 12, F, H/2, W/2]`` of about unit scale (exactly invertible)."""
    b, f, h, w, c = clips.shape
    blocks = (clips * 2 - 1).reshape(b, f, h // 2, 2, w // 2, 2, c)
    return blocks.permute(0, 3, 5, 6, 1, 2, 4).reshape(b, 4 * c, f, h // 2, w // 2)


def from_latents(latents: Tensor) -> Tensor:
    """``[B, 12, F, H/2, W/2]`` -> ``[B, F, H, W, 3]``, the inverse of `to_latents`; values are not clipped.

    Pixels are moved, never mixed. The change of scale is exact for 8-bit levels ``k / 256`` and within one
    float32 rounding of the value otherwise.
    """
    b, c, f, h, w = latents.shape
    blocks = latents.reshape(b, 2, 2, c // 4, f, h, w).permute(0, 4, 5, 1, 6, 2, 3)
    return (blocks.reshape(b, f, 2 * h, 2 * w, c // 4) + 1) / 2


def coordinates(latents: Tensor) -> Tensor:
    """Where each cell of latents ``[B, 12, F, H, W]`` is (frame, y and x): ``[B, 3, F, H, W]`` of their dtype.

    Rotary positions turn queries and keys; they give values no position to average, so that without these channels,
    which the transformer gets behind the latents, no token can tell how far it is from the middle of a thing. Each
    axis runs from -1.7 to 1.7, which has unit scale.
    """
    ends = [torch.linspace(-1.7, 1.7, n, device=latents.device, dtype=latents.dtype) for n in latents.shape[2:]]
    axes = torch.stack(torch.meshgrid(*ends, indexing="ij"))
    return axes.expand(latents.shape[0], *axes.shape)
