"""Operands of attention in other layouts, the numbers the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("heads first", "channels strided", "a slice")


def laid_out(parts: Sequence[Tensor], layout: str) -> tuple[Tensor, ...]:
    """``parts`` ``[B, H, S, D]``, which come with tokens before heads, as ``layout`` of ``LAYOUTS`` says."""
    if layout == "heads first":
        return tuple(part.contiguous() for part in parts)
    if layout == "channels strided":
        return tuple(part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in parts)
    return tuple(torch.cat([part, part], -2)[:, :, : part.shape[2]] for part in parts)
