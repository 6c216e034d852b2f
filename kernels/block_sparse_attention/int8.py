"""Queries and keys as int8, keys without their mean: the scores of heads that ask for ``qk: int8``.

As SageAttention has it (arXiv 2410.02367, 2411.10958). Keys often share a large offset, which takes up int8's range
and says nothing: ``q . (k - m)`` differs from ``q . k`` by the same for all keys of a query, which softmax does not
see, and its logarithm gets back as ``scale * q . m``. So any ``m`` is exact. Scales are symmetric, one for each query
and one for each block of keys (SageAttention's are for blocks of queries, too).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention.lists import blocks

LARGEST = 127
"""Numbers are from -127 to 127."""
SMALLEST = 1e-30
"""What a largest number counts as at least, so that nothing is divided by 0."""


@dataclass(frozen=True, eq=False)
class Int8Keys:
    """Keys as int8: ``(number * scale of its block) + mean`` is the key, but for rounding.

    Attributes:
        numbers: ``[B, Hkv, L, D]`` int8.
        scales: ``[B, Hkv, Kb]`` float32, NaN of a block that holds what is not finite.
        mean: ``[B, Hkv, D]`` float32: what was subtracted.
    """

    numbers: Tensor
    scales: Tensor
    mean: Tensor


def mean_of(key: Tensor) -> Tensor:
    """``[B, Hkv, L, D]`` -> ``[B, Hkv, D]`` float32: the mean over tokens, 0 in channels where it is not finite."""
    return key.mean(2, dtype=torch.float32).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def quantised(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., N, D]`` -> int8 of the same shape, and ``[...]`` float32: a scale for all N tokens.

    It is NaN if one of them is not finite. All in float32, and halves are rounded away from 0, so that kernels give the
    same numbers.
    """
    wide = tokens.float()
    scale = wide.abs().amax((-2, -1)).clamp(min=SMALLEST) / LARGEST
    scale = scale.masked_fill(~wide.isfinite().flatten(-2).all(-1), torch.nan)
    shares = wide / scale[..., None, None]
    return torch.trunc(shares + torch.copysign(shares.new_tensor(0.5), shares)).nan_to_num().to(torch.int8), scale


def quantised_keys(key: Tensor, key_block: int) -> Int8Keys:
    """``[B, Hkv, L, D]`` in blocks of so many tokens, the last of what there is."""
    mean, tokens = mean_of(key), key.shape[2]
    smooth = key.float() - mean[:, :, None]
    filled = F.pad(smooth, (0, 0, 0, blocks(tokens, key_block) * key_block - tokens))
    numbers, scales = quantised(filled.unflatten(2, (-1, key_block)))
    return Int8Keys(numbers.flatten(2, 3)[:, :, :tokens], scales, mean)


def int8_scores(query: Tensor, key: Tensor, key_block: int) -> Tensor:
    """``[B, H, S, D]``, ``[B, Hkv, L, D]`` -> ``[B, H, S, L]``: ``q . k`` as int8 gives it, in the queries' dtype."""
    return scores_of(query, quantised_keys(key, key_block), key_block)


def scores_of(query: Tensor, keys: Int8Keys, key_block: int) -> Tensor:
    """``[B, H, S, D]`` and keys in blocks of so many tokens -> ``[B, H, S, L]``: ``int8_scores``."""
    group, length = query.shape[1] // keys.numbers.shape[1], keys.numbers.shape[2]
    numbers, scales = quantised(query[..., None, :])
    of_keys = keys.scales.repeat_interleave(key_block, dim=-1)[..., :length].repeat_interleave(group, dim=1)
    products = numbers[..., 0, :].to(query) @ keys.numbers.repeat_interleave(group, dim=1).to(query).transpose(-2, -1)
    shift = query @ keys.mean.repeat_interleave(group, dim=1).to(query)[..., None]
    return products * scales.to(query)[..., None] * of_keys.to(query)[:, :, None] + shift


def check_int8(heads: Tensor, count: int) -> str | None:
    """What is wrong with the numbers that say which of ``count`` heads have int8 scores; None if nothing is."""
    if heads.shape == (count,) and heads.dtype == torch.int32:
        return None
    return f"the heads that have int8 scores are {heads.dtype} {list(heads.shape)}, not torch.int32 [{count}]"
