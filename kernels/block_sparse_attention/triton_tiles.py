"""What one program of the Triton kernels does with a tile: load, quantise, meet keys, look at a list.

Imports Triton, as ``triton`` does, whose parts these are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    pointers: tl.tensor, first: tl.tensor, second: tl.tensor, FIRST: tl.constexpr, SECOND: tl.constexpr
) -> tl.tensor:
    """A tile, zero where ``first`` (if ``FIRST``) or ``second`` (if ``SECOND``) is false."""
    if FIRST and SECOND:
        return tl.load(pointers, mask=first & second, other=0.0)
    elif FIRST:
        return tl.load(pointers, mask=first, other=0.0)
    elif SECOND:
        return tl.load(pointers, mask=second, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def finite(tops: tl.tensor) -> tl.tensor:
    """What is subtracted from scores: their maximum, or nothing where it is infinite, so that infinity stays it."""
    return tl.where(tl.abs(tops) == float("inf"), 0.0, tops)


@triton.jit
def meet(
    sums: tl.tensor,
    totals: tl.tensor,
    tops: tl.tensor,
    queries: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    begin: tl.tensor,
    there: tl.tensor,
    added: tl.tensor,
    factor: tl.tensor,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_DEPTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    POOLED: tl.constexpr,
) -> tl.tensor:
    """A tile of queries meets the keys from ``begin`` that are ``there`` if ``MASKED``: online softmax, base 2.

    If ``POOLED``, they have ``added`` to their scores. Queries and keys may be int8, with their scales in ``factor``.
    """
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, PADDED_DEPTH)
    width = tl.arange(0, PADDED_WIDTH)
    wide = begin.to(tl.int64)
    keys = load_tile(
        key + wide * key_stride + columns[None, :] * key_stride + depth[:, None],
        there[None, :],
        (depth < DEPTH)[:, None],
        MASKED,
        DEPTH != PADDED_DEPTH,
    )
    if WIDEN:
        keys = keys.to(queries.dtype)
    scores = tl.dot(queries, keys, input_precision="ieee").to(tl.float32) * factor
    if POOLED:
        scores += added[None, :]
    if MASKED:
        scores = tl.where(there[None, :], scores, float("-inf"))
    higher = tl.maximum(tops, tl.max(scores, 1))
    shift = finite(higher)
    weights = tl.exp2(scores - shift[:, None])
    fading = tl.exp2(tops - shift)
    values = load_tile(
        value + wide * value_stride + columns[:, None] * value_stride + width[None, :],
        there[:, None],
        (width < WIDTH)[None, :],
        MASKED,
        WIDTH != PADDED_WIDTH,
    )
    if WIDEN:
        values = values.to(tl.float32)
    sums = tl.dot(weights.to(values.dtype), values, sums * fading[:, None], input_precision="ieee")
    return sums, totals * fading + tl.sum(weights, 1), higher


@triton.jit
def meet_listed(
    sums: tl.tensor,
    totals: tl.tensor,
    tops: tl.tensor,
    queries: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    entries: tl.tensor,
    full: tl.tensor,
    whole: tl.tensor,
    short: tl.tensor,
    keys: tl.tensor,
    key_blocks: tl.tensor,
    factor: tl.tensor,
    scales: tl.tensor,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_DEPTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    INT8: tl.constexpr,
) -> tl.tensor:
    """A tile of queries meets the first ``whole`` blocks of its list, and the last of all behind it if it is ``short``.

    The list is read in ``entries`` unless it is ``full``, of all blocks.

    If ``INT8``, queries and keys are, and each block of keys has one of ``scales`` beside the ``factor``.
    """
    STEPS: tl.constexpr = (KEY_BLOCK + COLUMNS - 1) // COLUMNS
    UNEVEN: tl.constexpr = KEY_BLOCK % COLUMNS != 0
    columns = tl.arange(0, COLUMNS)
    for step in range(0, whole * STEPS):
        block = tl.load(entries + step // STEPS, mask=full == 0, other=0)
        block = tl.where(full, step // STEPS, block)
        begin = block * KEY_BLOCK + step % STEPS * COLUMNS
        end = tl.minimum((block + 1) * KEY_BLOCK, keys)
        scaled = factor
        if INT8:
            scaled = factor * tl.load(scales + block)
        sums, totals, tops = meet(
            sums, totals, tops, queries, key, value, key_stride, value_stride, begin, begin + columns < end,
            scaled, scaled, DEPTH, WIDTH, PADDED_DEPTH, PADDED_WIDTH, COLUMNS, UNEVEN, WIDEN, False,
        )  # fmt: skip
    if not UNEVEN:
        last = (key_blocks - 1) * KEY_BLOCK
        scaled = factor
        if INT8:
            scaled = factor * tl.load(scales + key_blocks - 1)
        for step in range(0, tl.where(short, tl.cdiv(keys - last, COLUMNS), 0)):
            begin = last + step * COLUMNS
            sums, totals, tops = meet(
                sums, totals, tops, queries, key, value, key_stride, value_stride, begin,
                begin + columns < keys, scaled, scaled, DEPTH, WIDTH, PADDED_DEPTH, PADDED_WIDTH, COLUMNS, True, WIDEN,
                False,
            )  # fmt: skip
    return sums, totals, tops


@triton.jit
def largest_of(tokens: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """The largest absolute number, along an axis or (None) of all; NaN where one is not finite."""
    sizes = tl.abs(tokens)
    found = tl.max(sizes, AXIS)
    odd = tl.max((sizes < float("inf")).to(tl.int32) ^ 1, AXIS)
    return tl.where(odd > 0, float("nan"), found)


@triton.jit
def rounded(tokens: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Float32 over a scale as int8, halves away from 0; as ``int8.quantised``."""
    shares = tl.div_rn(tokens, scale)
    return (shares + tl.where(shares >= 0, 0.5, -0.5)).to(tl.int8)


@triton.jit
def quantise(
    key: tl.tensor,
    mean: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_stride: tl.tensor,
    heads: tl.tensor,
    keys: tl.tensor,
    key_blocks: tl.tensor,
    DEPTH: tl.constexpr,
    PADDED_DEPTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """One program: a block of keys of one head without ``mean``, as int8, ``TOKENS`` at a time (``int8.Int8Keys``)."""
    program = tl.program_id(0).to(tl.int64)
    block, row = program % key_blocks, program // key_blocks
    key += row // heads * key_batch + row % heads * key_head
    numbers += row * keys * DEPTH
    depth = tl.arange(0, PADDED_DEPTH)[None, :]
    middle = tl.load(mean + row * DEPTH + depth, mask=depth < DEPTH, other=0.0)
    end = tl.minimum((block + 1) * KEY_BLOCK, keys)
    largest = tl.zeros((), tl.float32)
    for step in range(0, (KEY_BLOCK + TOKENS - 1) // TOKENS):
        tokens = block * KEY_BLOCK + step * TOKENS + tl.arange(0, TOKENS)[:, None]
        there = (tokens < end) & (depth < DEPTH)
        found = tl.load(key + tokens * key_stride + depth, mask=there, other=0.0).to(tl.float32)
        here = largest_of(tl.where(there, found - middle, 0.0), None)
        largest = tl.where((largest > here) | (largest != largest), largest, here)  # NaN stays
    scale = tl.div_rn(tl.where(largest < SMALLEST, SMALLEST, largest), LARGEST)
    tl.store(scales + program, scale)
    for step in range(0, (KEY_BLOCK + TOKENS - 1) // TOKENS):
        tokens = block * KEY_BLOCK + step * TOKENS + tl.arange(0, TOKENS)[:, None]
        there = (tokens < end) & (depth < DEPTH)
        found = tl.load(key + tokens * key_stride + depth, mask=there, other=0.0).to(tl.float32)
        tl.store(numbers + tokens * DEPTH + depth, rounded(found - middle, scale), mask=there)


@triton.jit
def wrong_entries(entries: tl.tensor, count: tl.tensor, key_blocks: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """How many entries of a list are out of range or out of order."""
    wrong = count * 0
    for begin in range(0, count, CHUNK):
        places = begin + tl.arange(0, CHUNK)
        used = places < count
        found = tl.load(entries + places, mask=used, other=0)
        before = tl.load(entries + places - 1, mask=used & (places > 0), other=-1)
        wrong += tl.sum((used & ((found <= before) | (found >= key_blocks))).to(tl.int32), 0)
    return wrong


@triton.jit
def listed_groups(
    entries: tl.tensor,
    place: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    after: tl.tensor,
    SHARE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """Which ``groups`` lie in listed blocks, and the place of the first entry for groups from ``after`` on.

    ``place`` is that of the first entry for these groups, a block has ``SHARE`` of them; ``WINDOW`` entries are enough.
    """
    places = place + tl.arange(0, WINDOW)
    found = tl.load(entries + places, mask=places < count, other=2147483647)
    listed = tl.max((found[None, :] == (groups // SHARE)[:, None]).to(tl.int32), 1) > 0
    return listed, place + tl.sum((found < after // SHARE).to(tl.int32), 0)
