"""What a mask of the model's own does to scores and to the logarithm of a softmax's sum."""

from __future__ import annotations

import torch
from torch import Tensor

VANISHING = 2.0**30
"""In units of a score that is not scaled yet: beside a bias below minus this float32 has no digits for scores."""
ALIKE = -(2.0**33)
"""What scores under such a bias are taken to be (times the scale where that is above 1).

It is below all others, and float64 has digits beside it for the logarithm of how many keys there are.
"""


def log_dtype(mask: Tensor | None) -> torch.dtype:
    """Of the log of the softmax's sum: float64 under a mask.

    A bias makes scores so large that float32 has no digits for how many keys there are, which says what a row of
    nothing but such keys has of each part of a softmax.
    """
    return torch.float32 if mask is None else torch.float64


def biased(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scores ``[B, H, S, L]``, scaled, with what a mask adds; those that vanish beside it are alike.

    They are so as in dense attention, where a row of nothing else has equal shares.
    """
    alike = mask.isfinite() & (mask < -VANISHING * scale) & scores.isfinite()
    return torch.where(alike, ALIKE * max(1.0, scale), scores + mask.to(scores))
