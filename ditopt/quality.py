"""Paired quality metrics between a sample and the dense run with the same prompt and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS: dict[str, float] = {"high": 42.0, "balanced": 36.0, "fast": 32.0}
"""Quality levels as the mean paired PSNR in dB that held-out prompts must reach."""
DEFAULT_LEVEL = "balanced"

EXACT = "exact"
"""The level at which nothing is approximated: what differs is the order of sums."""
CAP_DB = 120.0


@dataclass(frozen=True)
class Quality:
    """How near samples are to their dense twins: means over prompts, and the worst prompt."""

    psnr: float
    worst_psnr: float
    rel_l2: float
    per_prompt: tuple[float, ...]


def value_range(reference: Tensor) -> float:
    """The peak for PSNR: 1 for samples in [0, 1], else the span of the reference's values."""
    low, high = float(reference.min()), float(reference.max())
    return 1.0 if low >= -1e-4 and high <= 1 + 1e-4 else high - low


def psnr(sample: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape, at most ``CAP_DB``."""
    error = float((sample.double() - reference.double()).square().mean())
    if error == 0:
        return CAP_DB
    return min(CAP_DB, 10 * math.log10(value_range(reference) ** 2 / error))


def relative_l2(sample: Tensor, reference: Tensor) -> float:
    """``||sample - reference|| / ||reference||``."""
    norm = float(torch.linalg.vector_norm(reference.double()))
    return float(torch.linalg.vector_norm(sample.double() - reference.double())) / max(norm, 1e-30)


def compare(samples: Sequence[Tensor], references: Sequence[Tensor]) -> Quality:
    """Paired quality over prompts."""
    values = tuple(psnr(a, b) for a, b in zip(samples, references, strict=True))
    errors = [relative_l2(a, b) for a, b in zip(samples, references, strict=True)]
    return Quality(sum(values) / len(values), min(values), sum(errors) / len(errors), values)


def ssim(sample: Tensor, reference: Tensor) -> float:
    """Mean structural similarity over frames of ``[..., H, W, C]`` samples (needs the ``bench`` extra)."""
    from skimage.metrics import structural_similarity

    frames = reference.reshape(-1, *reference.shape[-3:]).float().numpy()
    others = sample.reshape(-1, *sample.shape[-3:]).float().numpy()
    peak = value_range(reference)
    pairs = zip(others, frames, strict=True)
    settings = {"channel_axis": -1, "data_range": peak}
    scores = [structural_similarity(a, b, **settings) for a, b in pairs]  # type: ignore[no-untyped-call]
    return float(sum(scores) / len(scores))
