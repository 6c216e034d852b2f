"""Coordinates and tokens drawn of a large tensor, always the same of a size, and per-channel fits of such tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COORDINATES = 8192
"""Coordinates drawn of a larger tensor; norms are then right to about a per cent."""
TOKENS, ENTRIES = 256, 1 << 17
"""Per-channel fits see so many drawn tokens of a tensor, fewer where that would be more than so many numbers."""
FLAT = 1e-12
"""A channel whose variance is below this share of its squared mean is constant: what varies is rounding."""


@dataclass(frozen=True)
class Centred:
    """Drawn tokens ``[n, C]`` minus their mean ``[C]``, and the sums over tokens of squares of what is left ``[C]``."""

    values: Tensor
    mean: Tensor
    power: Tensor


def drawn(size: int, count: int) -> Tensor:
    """``count`` of ``size`` positions in ascending order, always the same: one at random in each of equal parts.

    Each is as likely as the others, so a sum over them, times ``size / count``, estimates that over all without bias.
    """
    if size <= count:
        return torch.arange(size)
    within = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return ((torch.arange(count) + within) * (size / count)).long().clamp_(max=size - 1)


def coordinates(value: Tensor, count: int = COORDINATES) -> Tensor:
    """At most ``count`` entries of a tensor, float32 on the CPU, scaled so that inner products stay what they are."""
    size = value.numel()
    scale = math.sqrt(max(size / count, 1.0))
    return (torch.take(value, _position(size, count, value.device)).float() * scale).cpu()


def drawn_tokens(value: Tensor, count: int = TOKENS) -> Tensor:
    """At most ``count`` tokens ``[n, C]`` of a tensor ``[..., C]``, float32."""
    most = min(count, max(ENTRIES // value.shape[-1], 1))
    return value[_token(tuple(value.shape[:-1]), most, value.device)].float()


def centred(tokens: Tensor) -> Centred:
    """Tokens ``[n, C]`` without their mean."""
    mean = tokens.mean(0)
    values = tokens - mean
    return Centred(values, mean, values.square().sum(0))


def fitted(before: Centred, now: Centred) -> Tensor:
    """``[2, C]``: per channel the a and b that make ``a X + b`` nearest to Y; a is 1 where X does not vary."""
    change = ((now.values - before.values) * before.values).sum(0)  # near 1 the change tells a more exactly than Y does
    varies = before.power > FLAT * len(before.values) * before.mean.square()
    gain = 1 + torch.where(varies, change / before.power, 0.0)
    return torch.stack([gain, now.mean - gain * before.mean])


def relative_error(
    before: Sequence[Centred], now: Sequence[Centred], fits: Sequence[Tensor], sizes: Sequence[int]
) -> float:
    """``||a X + b - Y|| / ||Y||`` of tensors side by side; ``sizes`` are the numbers of tokens that each stands for."""
    missed = norm = 0.0
    for x, y, (gain, offset), size in zip(before, now, fits, sizes, strict=True):
        count = len(y.values)
        apart = torch.addcmul(y.values, x.values, gain, value=-1).square().sum()
        beside = (y.mean - gain * x.mean - offset).square().sum()
        missed += float(apart + count * beside) * size / count
        norm += float(y.power.sum() + count * y.mean.square().sum()) * size / count
    return math.sqrt(missed / norm) if norm else (math.inf if missed else 0.0)


@functools.lru_cache(maxsize=64)
def _position(size: int, count: int, device: torch.device) -> Tensor:
    return drawn(size, count).to(device)


@functools.lru_cache(maxsize=64)
def _token(shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.unravel_index(drawn(math.prod(shape), count).to(device), shape)
