"""Scores of int8 queries and keys, written out in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(numbers: Tensor, largest: Tensor) -> Tensor:
    """What numbers of -127 to 127 give back of tokens whose largest is so much."""
    step = largest / 127
    shares = numbers / step
    return torch.trunc(shares + 0.5 * shares.sign()) * step


def int8_scores(query: Tensor, key: Tensor, block: int) -> Tensor:
    """``[S, D]``, ``[L, D]`` -> ``[S, L]``: queries one by one, keys without their mean by blocks of so many."""
    query, key = query.double(), key.double()
    mean = key.mean(0)
    keys = torch.cat([rounded(part, part.abs().max()) for part in (key - mean).split(block)])
    return rounded(query, query.abs().amax(1, keepdim=True)) @ keys.T + (query @ mean)[:, None]
