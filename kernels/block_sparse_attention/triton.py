"""``ditopt::block_sparse_attention`` on NVIDIA's GPUs, in Triton: flash attention over the listed blocks.

A head with a rest then goes over all groups' means, a tile at a time, and merges the sorted list with them: a tile
takes from the list the few entries that fall into it, and hides the groups of these. So a rest needs no memory beyond
its means, and tiles are full however short the gaps of a list are.

Imported when the operator is first called with CUDA tensors, for it imports Triton. Its speed is not yet measured.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditopt.kernels.block_sparse_attention.gpu import OLDEST, TILES, tile_for
from ditopt.kernels.block_sparse_attention.int8 import LARGEST, SMALLEST, Int8Keys, mean_of
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.block_sparse_attention.pooled import ZEROTH_ORDER, PooledRest
from ditopt.kernels.block_sparse_attention.triton_tiles import (
    finite,
    largest_of,
    listed_groups,
    load_tile,
    meet,
    meet_listed,
    quantise,
    rounded,
    wrong_entries,
)
from ditopt.kernels.ops import block_sparse_refusal

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET=1`` was set when Triton was imported: kernels run as Python, on the processor."""
FURTHEST = 2**31 // max(tile.columns for widths in TILES.values() for tiles in widths.values() for tile in tiles)
"""Elements from a token to the next with which the widest tile of keys would reach beyond int32 offsets."""


@triton.jit
def attend(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    logs: tl.tensor,
    indices: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    pooled_key: tl.tensor,
    pooled_value: tl.tensor,
    rest: tl.tensor,
    int8_key: tl.tensor,
    int8_scales: tl.tensor,
    int8_mean: tl.tensor,
    int8_heads: tl.tensor,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_stride: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_stride: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_stride: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    out_stride: tl.tensor,
    mean_key_batch: tl.tensor,
    mean_key_head: tl.tensor,
    mean_key_stride: tl.tensor,
    mean_value_batch: tl.tensor,
    mean_value_head: tl.tensor,
    mean_value_stride: tl.tensor,
    factor: tl.tensor,
    repeats: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    query_blocks: tl.tensor,
    key_blocks: tl.tensor,
    padding: tl.tensor,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_DEPTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    POOL: tl.constexpr,
    WINDOW: tl.constexpr,
    FURTHEST_ORDER: tl.constexpr,
    INT8: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """One program: ``ROWS`` queries of one head and their list; ``order`` says which list is whose, longest first."""
    TILES: tl.constexpr = QUERY_BLOCK // ROWS
    program = tl.program_id(0)
    row = tl.load(order + program // (TILES * repeats))  # int64, as are offsets made of it
    within = program % (TILES * repeats)
    head = row // query_blocks % heads
    batch = row // query_blocks // heads + within // TILES
    first = row % query_blocks * QUERY_BLOCK + within % TILES * ROWS
    rows = tl.arange(0, ROWS)
    present = first + rows < tokens
    if first >= tokens:
        return

    count = tl.load(counts + row)
    entries = indices + row * padding
    full = count == key_blocks  # whose entries are not read
    wrong = (count < 0) | ((count > padding) & (full == 0))
    rested = 0
    if POOL:
        rested = tl.load(rest + head)
        wrong = wrong | (rested > FURTHEST_ORDER)
    count = tl.where(wrong, 0, count)
    wrong = wrong | (wrong_entries(entries, tl.where(full, 0, count), key_blocks, 64) > 0)
    count = tl.where(wrong, 0, count)

    depth = tl.arange(0, PADDED_DEPTH)
    width = tl.arange(0, PADDED_WIDTH)
    queries = load_tile(
        query + batch * query_batch + head * query_head + (first + rows)[:, None] * query_stride + depth[None, :],
        present[:, None],
        (depth < DEPTH)[None, :],
        True,
        DEPTH != PADDED_DEPTH,
    )
    if WIDEN:
        queries = queries.to(tl.float32)
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    tops = tl.full((ROWS,), float("-inf"), tl.float32)
    totals = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED_WIDTH), tl.float32)

    columns = tl.arange(0, COLUMNS)
    last = (key_blocks - 1) * KEY_BLOCK
    ends = tl.load(entries + count - 1, mask=(count > 0) & (full == 0), other=-1) == key_blocks - 1
    short = (ends | full) & (keys - last < KEY_BLOCK)  # only the last block can be
    whole = count
    if KEY_BLOCK % COLUMNS == 0:
        whole = count - short.to(tl.int32)
    eight = count < 0
    if INT8:
        eight = tl.load(int8_heads + head) != 0
    sums, totals, tops = meet_listed(
        sums, totals, tops, queries, key, value, key_stride, value_stride, entries, full, tl.where(eight, 0, whole),
        short & (eight == 0), keys, key_blocks, factor, factor, DEPTH, WIDTH, PADDED_DEPTH, PADDED_WIDTH, KEY_BLOCK,
        COLUMNS, WIDEN, False,
    )  # fmt: skip
    if INT8:
        of_head = batch * (heads // group) + head // group
        wide = queries.to(tl.float32)
        largest = largest_of(wide, 1)
        scale = tl.div_rn(tl.where(largest < SMALLEST, SMALLEST, largest), LARGEST)
        sums, totals, tops = meet_listed(
            sums, totals, tops, rounded(wide, scale[:, None]), int8_key + of_head * keys * DEPTH, value, DEPTH,
            value_stride, entries, full, tl.where(eight, whole, 0), short & eight, keys, key_blocks,
            factor * scale[:, None], int8_scales + of_head * key_blocks, DEPTH, WIDTH, PADDED_DEPTH, PADDED_WIDTH,
            KEY_BLOCK, COLUMNS, WIDEN, True,
        )  # fmt: skip
        mean = tl.load(int8_mean + of_head * DEPTH + depth, mask=depth < DEPTH, other=0.0)
        tops += tl.where(eight, factor * tl.sum(wide * mean[None, :], 1), 0.0)
    nothing = count == 0
    if POOL:
        resting = (rested != 0) & (wrong == 0) & (full == 0)
        nothing = nothing & (resting == 0)
        pooled_key += batch * mean_key_batch + head // group * mean_key_head
        pooled_value += batch * mean_value_batch + head // group * mean_value_head
        groups = tl.cdiv(keys, POOL)
        place = count * 0
        for step in range(0, tl.where(resting, tl.cdiv(groups, COLUMNS), 0)):
            begin = step * COLUMNS
            each = begin + columns
            listed, place = listed_groups(entries, place, count, each, begin + COLUMNS, KEY_BLOCK // POOL, WINDOW)
            size = tl.minimum(keys - each * POOL, POOL)
            added = tl.log2(tl.maximum(size, 1).to(tl.float32))
            sums, totals, tops = meet(
                sums, totals, tops, queries, pooled_key, pooled_value, mean_key_stride, mean_value_stride, begin,
                (each < groups) & (listed == 0), added, factor, DEPTH, WIDTH, PADDED_DEPTH, PADDED_WIDTH, COLUMNS, True,
                WIDEN, True,
            )  # fmt: skip

    result = tl.where(nothing, 0.0, sums / totals[:, None])
    result = tl.where(wrong, float("nan"), result)
    log = (finite(tops) + tl.log2(totals)) * 0.6931471805599453
    log = tl.where(wrong, float("nan"), log)
    out += batch * out_batch + head * out_head + (first + rows)[:, None] * out_stride + width[None, :]
    tl.store(out, result.to(out.dtype.element_ty), mask=present[:, None] & (width < WIDTH)[None, :])
    tl.store(logs + (batch * heads + head) * tokens + first + rows, log, mask=present)


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
    int8: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to listed blocks: ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]``, lists -> result, log-sum.

    As ``cpu.block_sparse_attention``: the result is ``[B, H, S, E]`` of the operands' dtype and lies as
    ``[B, S, H, E]``, the natural logarithm of the softmax's sum is ``[B, H, S]`` float32. Any strides. Sums are
    float32, products of float32 operands too; softmax numerators are rounded to the operands' dtype before they meet
    the values. A wrong list (a count beyond the padding, an entry out of range or out of order) is not told, for that
    would wait for the GPU: nothing is read by it, and its queries have a result and a logarithm of NaN. With the
    operands behind the scale (``PooledRest``) heads attend to what their lists do not name by its means, too; one with
    a rest to first order, which is not known here, has NaN. ``int8`` ``[H]`` int32 is not 0 for heads whose queries
    meet listed keys as int8 (``int8``); of these a block of keys, and a query, with a number that is not finite has NaN
    for scores. Means of what is skipped are met as they are.

    Raises:
        ValueError: the kernel does not take these operands; it says why.
    """
    lists = BlockLists(indices, counts, query_block, key_block)
    pooled = None
    try:
        pooled = PooledRest.of(pooled_key, pooled_value, rest, pool)
        of_gpu = None if INTERPRETED else int8  # what is interpreted is on the processor
        refused = block_sparse_refusal(query, key, value, lists, scale, pooled, int8=of_gpu)
    except ValueError as error:
        refused = str(error)
    if refused is None and query.device.type == "cpu" and not INTERPRETED:
        refused = "operands are on cpu, where Triton runs in its interpreter only (TRITON_INTERPRET=1)"
    if refused is not None:
        raise ValueError(f"ditopt::block_sparse_attention: {refused}")
    query, key, value = (readable(part) for part in (query, key, value))
    (batch, heads, queries, _), channels = query.shape, value.shape[3]
    out = query.new_empty(batch, queries, heads, channels).transpose(1, 2)
    logs = query.new_empty(batch, heads, queries, dtype=torch.float32)
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else OLDEST
    if pooled is not None:
        pooled = PooledRest(readable(pooled.key), readable(pooled.value), pooled.heads.contiguous(), pool)
    eight = None if int8 is None else (quantised_keys(key, key_block), int8.contiguous())
    launch(query, key, value, out, logs, lists, scale, capability, pooled, eight)
    return out, logs


def quantised_keys(key: Tensor, key_block: int) -> Int8Keys:
    """As ``int8.quantised_keys``, of keys whose channels lie next to each other."""
    batch, heads, keys, depth = key.shape
    made = Int8Keys(
        torch.empty(key.shape, dtype=torch.int8, device=key.device),
        torch.empty(batch, heads, blocks(keys, key_block), dtype=torch.float32, device=key.device),
        mean_of(key).contiguous(),
    )
    with torch.cuda.device_of(key):
        quantise[(made.scales.numel(),)](
            *(key, made.mean, made.numbers, made.scales, *key.stride()[:3], heads, keys, made.scales.shape[2]),
            **quantise_constants(depth, key_block),
        )
    return made


def quantise_constants(depth: int, key_block: int) -> dict[str, Any]:
    """What ``quantise`` is compiled for."""
    return {
        "DEPTH": depth,
        "PADDED_DEPTH": max(16, triton.next_power_of_2(depth)),
        "KEY_BLOCK": key_block,
        "TOKENS": min(64, triton.next_power_of_2(key_block)),
        "SMALLEST": SMALLEST,
        "LARGEST": LARGEST,
        "num_warps": 8,
    }


def readable(part: Tensor) -> Tensor:
    """An operand whose channels lie next to each other, and whose tokens so near that a tile's offsets are int32."""
    return part if part.stride(3) == 1 and part.stride(2) < FURTHEST else part.contiguous()


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    lists: BlockLists,
    scale: float,
    capability: tuple[int, int],
    rest: PooledRest | None = None,
    int8: tuple[Int8Keys, Tensor] | None = None,
) -> None:
    """Fill ``out`` and ``logs`` in tiles for ``capability``; operands that are taken, channels next to each other.

    ``int8``: the keys, and which heads meet them.
    """
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    settings = constants(query, value, lists, capability, 0 if rest is None else rest.pool, int8 is not None)
    # without a rest, and without int8, the kernel reads none of them
    means = (key, value, lists.counts) if rest is None else (rest.key, rest.value, rest.heads)
    eight = (key, key, key, lists.counts)
    if int8 is not None:
        eight = (int8[0].numbers, int8[0].scales, int8[0].mean, int8[1])
    order = lists.counts.flatten().argsort(descending=True, stable=True)
    repeats = batch // lists.counts.shape[0]
    tiles = lists.query_block // settings["ROWS"]
    with torch.cuda.device_of(query):  # Triton launches on the current one
        attend[(order.numel() * repeats * tiles,)](
            *(query, key, value, out, logs, lists.indices.contiguous(), lists.counts.contiguous(), order),
            *(*means, *eight),
            *(stride for part in (query, key, value, out, *means[:2]) for stride in part.stride()[:3]),
            *(scale * math.log2(math.e), repeats, heads, heads // key.shape[1], queries, keys),
            *(lists.counts.shape[2], blocks(keys, lists.key_block), lists.indices.shape[3]),
            **settings,
        )


def constants(
    query: Tensor, value: Tensor, lists: BlockLists, capability: tuple[int, int], pool: int = 0, int8: bool = False
) -> dict[str, Any]:
    """What the kernel is compiled for: sizes of heads, blocks, tiles and groups (0: no rest), warps and stages.

    ``int8``: whether some heads may have int8 scores.
    """
    depth, width = query.shape[3], value.shape[3]
    tile = tile_for(capability, max(depth, width), query.dtype, lists.query_block, lists.key_block)
    return {
        "DEPTH": depth,
        "WIDTH": width,
        "PADDED_DEPTH": max(32 if int8 else 16, triton.next_power_of_2(depth)),  # the fewest that a product takes
        "PADDED_WIDTH": max(16, triton.next_power_of_2(width)),
        "QUERY_BLOCK": lists.query_block,
        "KEY_BLOCK": lists.key_block,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WIDEN": INTERPRETED and query.dtype == torch.bfloat16,  # whose bits it would multiply
        "POOL": pool,
        "WINDOW": _window(tile.columns, lists.key_block // pool) if pool else 0,
        "FURTHEST_ORDER": ZEROTH_ORDER,
        "INT8": int8,
        "SMALLEST": SMALLEST,
        "LARGEST": LARGEST,
        "enable_fp_fusion": True,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _window(columns: int, share: int) -> int:
    """How many blocks of ``share`` groups a tile of so many meets at most, up to a power of two."""
    return int(triton.next_power_of_2(blocks(columns - 1, share) + 1))
