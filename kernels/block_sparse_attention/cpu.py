"""``ditopt::block_sparse_attention`` on processors: a C++ kernel, built when first called, for the vectors there are.

Float32 runs in AVX-512, AVX2 or whatever else there is; bfloat16 by dot products of pairs where the processor has them,
and as float32 where not, as float16 does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ditopt._torch import has_bfloat16_dot_products
from ditopt.kernels.block_sparse_attention.int8 import mean_of
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, told
from ditopt.kernels.block_sparse_attention.masks import log_dtype
from ditopt.kernels.block_sparse_attention.pooled import FIRST_ORDER, PooledRest, moments
from ditopt.kernels.cpp import built, called, dense_rows, numbers, strides_of
from ditopt.kernels.ops import LIBRARY, NO_BYTES, block_sparse_refusal

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-ffp-contract=fast", "-Wno-psabi")
WIDEST = 16
"""Floats of the widest vectors; 8 and 4 are what processors without AVX-512, or without AVX, have."""


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    rest: Tensor | None = None,
    pool: int = 0,
    mask: Tensor | None = None,
    int8: Tensor | None = None,
    lanes: int = WIDEST,
) -> tuple[Tensor, Tensor]:
    """Attention to listed blocks: ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]``, lists -> result, log-sum.

    The result is ``[B, H, S, E]`` of the operands' dtype and lies as ``[B, S, H, E]``; the natural logarithm of the
    softmax's sum is ``[B, H, S]`` float32, under a mask float64 (``masks.log_dtype``). Any strides. Sums are
    float32. ``BlockLists`` tells of the lists; a query without a listed key has a result of zero and a logarithm of
    -inf. NaN and infinity go where dense attention to the listed keys has them. ``PooledRest`` tells of the operands
    behind the scale: with them heads attend to what their lists do not name by its means, too. ``mask`` broadcasts to
    ``[B, H, S, L]``: true for keys that a query may attend to, or what is added to the scores; keys that it hides (by
    false or -inf) from 64 queries in a row are passed over, and a query from which all is hidden is one without a
    listed key. ``int8`` ``[H]`` int32 is not 0 for heads whose queries meet listed keys as int8 (``int8``); of these a
    block of keys, and a query, with a number that is not finite has NaN for scores. ``lanes``: how many floats the
    kernel's vectors may have.

    Raises:
        ValueError: the kernel does not take these operands, or a list is wrong; it says which and why.
        RuntimeError: the kernel cannot be built, or memory is short.
    """
    lists = BlockLists(indices, counts, query_block, key_block)
    try:
        pooled = PooledRest.of(pooled_key, pooled_value, rest, pool)
        refused = block_sparse_refusal(query, key, value, lists, scale, pooled, mask, int8)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        raise ValueError(f"ditopt::block_sparse_attention: {refused}")
    kernel = library(lanes)
    if int8 is not None and not kernel.ditopt_bytes():
        raise ValueError(f"ditopt::block_sparse_attention: in vectors of {lanes} floats {NO_BYTES}")
    int8 = int8 if int8 is not None and int8.any() else None
    dtype = query.dtype
    pairs = dtype == torch.bfloat16 and lanes == WIDEST and has_bfloat16_dot_products()
    pairs = pairs and not (query.shape[3] % 2 or value.shape[3] % 2) and bool(kernel.ditopt_pairs())
    if pooled_key is None or pooled_value is None or rest is None:
        pooled_key, pooled_value, rest = key[:, :, :0], value[:, :, :0], torch.empty(0, dtype=torch.int32)
    parts = [part.float() if not pairs else part for part in (query, key, value, pooled_key, pooled_value)]
    query, key, value, pooled_key, pooled_value = map(dense_rows, parts)
    (batch, heads, queries, depth), (_, key_heads, keys, channels) = query.shape, value.shape
    out = query.new_empty(batch, queries, heads, channels).transpose(1, 2)
    logs = query.new_empty(batch, heads, queries, dtype=log_dtype(mask))
    words = batch * key_heads * channels if pairs else 0
    interleaved, of_pooled = (
        torch.empty(words * blocks(part.shape[2], 2), dtype=torch.int32) for part in (value, pooled_value)
    )
    width = indices.shape[-1]
    first_order = (rest == FIRST_ORDER).nonzero().flatten().tolist()
    kept = torch.empty_like(logs) if first_order else None
    blocked = (len(counts), width, query_block, key_block, pooled_key.shape[2], pool)
    sizes = (batch, heads, key_heads, queries, keys, depth, channels, *blocked)
    strides = strides_of(query, key, value, out, pooled_key, pooled_value)
    added = None if mask is None else _added(mask, (batch, heads, queries, keys))
    strides += [0] * 4 if added is None else added.stride()
    listed = (indices.contiguous(), counts.contiguous())
    of_rest = (pooled_key, pooled_value, rest.contiguous(), of_pooled)
    threads, element = torch.get_num_threads(), query.element_size()
    masked, eight = mask is not None, int8 is not None
    space = working_memory(threads * kernel.ditopt_space(numbers(sizes), element, masked, eight))
    of_int8 = _room_for_int8(key, int8) if int8 is not None else (None,) * 5
    tensors = (query, key, value, out, logs, kept, *listed, interleaved, *of_rest, added, space, *of_int8)
    wrong = numbers([0] * 3)
    run = kernel.ditopt_block_sparse_attention
    failed = called(run, tensors, sizes, strides, ctypes.c_float(scale), element, threads, wrong)
    if failed == 1:
        row, what, index = wrong
        wrong_list = told(counts, row, None if what == 1 else index, width, blocks(keys, key_block))
        raise ValueError(f"ditopt::block_sparse_attention: {wrong_list}")
    if failed:
        raise RuntimeError("ditopt::block_sparse_attention: there is no memory for the order of so many tasks")
    if kept is not None:
        add_first_order(out, (query, key, value), -torch.expm1(kept - logs), first_order, pool, scale)
    return out.to(dtype), logs


def _room_for_int8(key: Tensor, heads: Tensor) -> tuple[Tensor, ...]:
    """Which heads have int8 scores, the mean of keys, and room for int8 keys, four to a word, their sums and scales."""
    batch, key_heads, keys, depth = key.shape
    rows = (batch, key_heads, keys)
    numbers = torch.empty((*rows, 4 * blocks(depth, 4)), dtype=torch.int8)
    return (
        heads.contiguous(),
        mean_of(key).contiguous(),
        numbers,
        torch.empty(rows, dtype=torch.int32),
        torch.empty(rows),
    )


def _added(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """What a mask adds to scores: float32 of so many ``sizes``, with a stride of 0 where one value is for all."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.float().expand(sizes)


def add_first_order(
    out: Tensor, parts: tuple[Tensor, Tensor, Tensor], shares: Tensor, heads: list[int], pool: int, scale: float
) -> None:
    """Add what ``moments`` tell to the result of ``heads``, whose rest has ``shares`` ``[B, H, S]`` of the softmax."""
    query, key, value = parts
    known: dict[int, Tensor] = {}
    for head in heads:
        group = head * key.shape[1] // query.shape[1]
        if group not in known:
            known[group] = moments(key[:, group], value[:, group], pool)
        linear = query[:, head].float() @ known[group]
        out[:, head] += (linear * (scale * shares[:, head, :, None])).to(out.dtype)


def library(lanes: int = WIDEST) -> ctypes.CDLL:
    """The kernel, compiled for vectors of at most ``lanes`` floats.

    Raises:
        RuntimeError: it cannot be built; tells what the compiler says.
    """
    found = built(SOURCE, (*FLAGS, f"-DDITOPT_LANES={lanes}"))
    found.ditopt_space.restype = ctypes.c_int64
    return found


def working_memory(size: int) -> Tensor:
    """So many bytes, which begin at a line of 64."""
    space = torch.empty(size + 64, dtype=torch.uint8)
    return space[-space.data_ptr() % 64 :]


LIBRARY.impl("block_sparse_attention", block_sparse_attention, "CPU")
