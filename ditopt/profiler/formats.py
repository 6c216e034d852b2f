"""Candidate precisions of a linear layer, each as a pure function that gives the product as the format would.

All take inputs ``x [N, in]`` and a weight ``w [out, in]`` and give ``x @ w.T [N, out]`` without bias, in the dtype of
``x`` (float32 or float64). Values are rounded as the format rounds them, and multiplied in that wider dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
"""From inputs ``[N, in]`` and a weight ``[out, in]`` to their product ``[N, out]``."""

INT8_MAX, FP8_MAX = 127.0, 448.0
EXACT = 1024
"""So many products of two int8 numbers add up in float32 without rounding: 1,024 * 127 * 127 < 2**24."""
FACTOR = 64
"""A Hadamard matrix is applied as a Kronecker product of two, the inner one at most so large."""
MOST_DECIBELS = 200.0
"""Stands for a product without any error, and its negative for errors where there is no signal."""


def bfloat16(x: Tensor, w: Tensor) -> Tensor:
    """Inputs, weight and result rounded to bfloat16; sums in the wider dtype, as matrix units do."""
    return _bfloat16(_bfloat16(x) @ _bfloat16(w).T)


def int8_dynamic(x: Tensor, w: Tensor) -> Tensor:
    """Int8 with scales absmax / 127 per token and per output channel, found on the fly; sums are exact, as in int32.

    Source: ZeroQuant (Yao et al. 2022, arXiv 2206.01861), token-wise activations.
    """
    (tokens, token_scales), (channels, channel_scales) = _to_int8(x), _to_int8(w)
    return _integer_product(tokens, channels) * token_scales * channel_scales.T


def int8_weight(x: Tensor, w: Tensor) -> Tensor:
    """Only the weight in int8, with a scale per output channel; inputs stay as they are."""
    channels, scales = _to_int8(w)
    return (x @ channels.T) * scales.T


def fp8_e4m3(x: Tensor, w: Tensor) -> Tensor:
    """Both in ``torch.float8_e4m3fn`` (3 bits of mantissa, up to 448), with scales absmax / 448 as `int8_dynamic` has.

    Source: FP8 Formats for Deep Learning (Micikevicius et al. 2022, arXiv 2209.05433).
    """
    (tokens, token_scales), (channels, channel_scales) = _to_fp8(x), _to_fp8(w)
    return (tokens @ channels.T) * token_scales * channel_scales.T


def int8_smooth(x: Tensor, w: Tensor) -> Tensor:
    """`int8_dynamic` after outlier channels were moved into the weight, in halves: ``(x / s) @ (w * s).T``.

    s = max|x|^0.5 / max|w|^0.5 per input channel, of the inputs given.
    Source: SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), equation 4 with a = 0.5.
    """
    scale = smoothing(x, w)
    return int8_dynamic(x / scale, w * scale)


def int8_rotated(x: Tensor, w: Tensor) -> Tensor:
    """`int8_dynamic` after inputs and weight were turned by one rotation, which spreads outliers: ``(x H) (w H)^T``.

    Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456).
    """
    return int8_dynamic(rotated(x), rotated(w))


FORMATS: dict[str, Product] = {
    "bfloat16": bfloat16,
    "int8_dynamic": int8_dynamic,
    "int8_weight": int8_weight,
    "fp8_e4m3": fp8_e4m3,
    "int8_smooth": int8_smooth,
    "int8_rotated": int8_rotated,
}
"""The candidates by name, in the order of the label ``format``."""


def smoothing(x: Tensor, w: Tensor) -> Tensor:
    """What SmoothQuant divides each input channel by, ``[in]``; 1 where inputs or weights are all zero."""
    largest, heaviest = x.abs().amax(0), w.abs().amax(0)
    return torch.where((largest > 0) & (heaviest > 0), (largest / heaviest).sqrt(), 1.0)


def rotated(values: Tensor) -> Tensor:
    """The last dimension turned by a block-diagonal orthonormal Hadamard matrix.

    Its blocks are as large as the largest power of two that divides the dimension; one of odd size stays as it is.
    """
    size = values.shape[-1] & -values.shape[-1]
    inner = min(size, FACTOR)
    blocks = values.unflatten(-1, (-1, size // inner, inner)) @ _hadamard(inner).to(values)
    if size > inner:  # Sylvester's matrix of a * b is the Kronecker product of those of a and b
        blocks = (blocks.transpose(-1, -2) @ _hadamard(size // inner).to(values)).transpose(-1, -2)
    found: Tensor = blocks.flatten(-3) / math.sqrt(size)
    return found


def decibels(found: Tensor, reference: Tensor) -> float:
    """Signal to noise of a product, ``10 log10(|reference|^2 / |found - reference|^2)``, at most 200 dB."""
    signal = float(torch.linalg.vector_norm(reference))
    noise = float(torch.linalg.vector_norm(found - reference))
    if noise == 0 or signal == 0:
        return MOST_DECIBELS if noise == 0 else -MOST_DECIBELS
    return min(max(20 * math.log10(signal / noise), -MOST_DECIBELS), MOST_DECIBELS)


def _bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


def _scales(values: Tensor, largest: float) -> Tensor:
    """What brings each row's largest entry to ``largest``, ``[rows, 1]``; 1 for a row of zeros."""
    found = values.abs().amax(-1, keepdim=True) / largest
    return torch.where(found > 0, found, 1.0)


def _to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers up to 127 and the scale of each row."""
    scales = _scales(values, INT8_MAX)
    return (values / scales).round_(), scales


def _to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    scales = _scales(values, FP8_MAX)
    within = (values / scales).clamp_(-FP8_MAX, FP8_MAX)  # what is beyond would turn into NaN
    return within.to(torch.float8_e4m3fn).to(values.dtype), scales


def _integer_product(x: Tensor, w: Tensor) -> Tensor:
    """The product of whole numbers up to 127, rounded once at the end, if at all."""
    if x.dtype == torch.float64 or x.shape[-1] <= EXACT:
        return x @ w.T
    total = x.new_zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for left, right in zip(x.split(EXACT, dim=1), w.split(EXACT, dim=1), strict=True):
        total += left @ right.T
    return total.to(x.dtype)


@functools.lru_cache(maxsize=16)
def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of +1 and -1, ``[size, size]``."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
