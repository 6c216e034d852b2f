"""What the kernels of ``ditopt::flash_attention`` have to give, written out."""

from __future__ import annotations

import torch
from torch import Tensor


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax over keys of ``scale * query key^T``, times ``value``, in the operands' dtype (float64 for an oracle).

    ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]`` -> ``[B, H, S, E]``; ``H`` is a multiple of ``Hkv``, and
    head ``h`` reads keys of head ``h // (H // Hkv)``.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    return torch.softmax(scale * query @ key.transpose(-2, -1), dim=-1) @ value
