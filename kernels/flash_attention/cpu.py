"""``ditopt::flash_attention`` on processors with dot products of bfloat16 pairs: a C++ kernel, built when first called.

SDPA converts bfloat16 operands to float32 products on such processors, unless they have AMX; here scores and values are
summed by ``vdpbf16ps``, which does twice as much an instruction, and what lies between them stays in the cache.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ditopt.kernels.cpp import PAIRS, built, called, dense_rows, strides_of
from ditopt.kernels.ops import LIBRARY, refusal

SOURCE = Path(__file__).with_name("avx512_bf16.cpp")
QUERIES = 64
"""Of a task, as in the source."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of bfloat16 tensors: ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]`` -> ``[B, H, S, E]``.

    Any strides; the result lies as ``[B, S, H, E]``, which is how heads are put together again. Sums are float32,
    softmax numerators are rounded to bfloat16 before they meet the values. NaN and infinity go where torch's go.

    Raises:
        ValueError: no kernel takes these operands; it says why.
        RuntimeError: the kernel cannot be built.
    """
    refused = refusal(query, key, value, scale, query.dtype)
    if refused is not None:
        raise ValueError(f"ditopt::flash_attention: {refused}")
    query, key, value = (dense_rows(part) for part in (query, key, value))
    (batch, heads, queries, depth), (_, key_heads, keys, channels) = query.shape, value.shape
    out = query.new_empty(batch, queries, heads, channels).transpose(1, 2)
    threads, device = torch.get_num_threads(), query.device
    interleaved = torch.empty(batch * key_heads * ((keys + 1) // 2) * channels, dtype=torch.int32, device=device)
    space = torch.empty(threads * (channels + depth // 2) * QUERIES, dtype=torch.float32, device=device)
    called(
        built(SOURCE, PAIRS).ditopt_attention,
        (query, key, value, out, interleaved, space),
        (batch, heads, key_heads, queries, keys, depth, channels),
        strides_of(query, key, value, out),
        ctypes.c_float(scale),
        ctypes.c_int(threads),
    )
    return out


LIBRARY.impl("flash_attention", flash_attention, "CPU")
