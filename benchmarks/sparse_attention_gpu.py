"""``python -m benchmarks.sparse_attention --device cuda``: block-sparse attention in Triton against dense kernels.

24 heads of bfloat16, 32,760 and 118,800 tokens (21 x 30 x 52 and 33 x 45 x 80: two video models' at 480 and 720 rows),
64 and 128 channels, random lists of the blocks that plans use. Equal budgets give every head the density, unequal ones
one dense head among 23. Equal ones are also timed with a rest, whose means (of ``POOL`` tokens each) are made before;
a pair of a query and a mean counts as one of a query and a key; and with int8 scores, where quantising keys is part of
the time. Dense kernels are those that PyTorch has for this GPU; the fastest is timed in turn with the sparse one, and
the ideal is its time by the density, of which a share is told. Before a time is told the result is held against
float64; with int8 scores against those of the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ditopt.kernels.block_sparse_attention.cpu  # noqa: F401  # so that all this runs on processors, too
from ditopt.kernels.block_sparse_attention.int8 import int8_scores
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, kernel_blocks
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, block_sparse_refusal
from ditopt.profiler.timing import time_in_turn, timed, warmed

HEADS = 24
TOKENS = (32_760, 118_800)
CHANNELS = (64, 128)
POOL = 16
"""Tokens of a group of a rest."""
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Operands = tuple[Tensor, Tensor, Tensor]


def operands(tokens: int, heads: int, channels: int, device: torch.device) -> Operands:
    """Seeded query, key and value ``[1, H, S, D]`` of bfloat16, tokens before heads."""
    generator = torch.Generator(device).manual_seed(0)
    size = (1, tokens, heads, channels)
    query, key, value = (
        torch.randn(size, generator=generator, device=device).mul(1.5).bfloat16().transpose(1, 2) for _ in range(3)
    )
    return query, key, value


def lists_of(tokens: int, heads: int, density: float, equal: bool, device: torch.device) -> BlockLists:
    """Random lists; ``equal``: every head has the density, else the first head has all blocks."""
    query_block, key_block = kernel_blocks(tokens, tokens)
    rows, columns = blocks(tokens, query_block), blocks(tokens, key_block)
    generator = torch.Generator(device).manual_seed(0)
    order = torch.rand(1, heads, rows, columns, generator=generator, device=device).argsort(-1)
    attended = order < max(1, round(density * columns))
    if not equal:
        attended[:, 0] = True
    return BlockLists.from_map(attended, query_block, key_block)


def dense_seconds(parts: Operands) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of every dense kernel that takes the operands, in turn; and why others do not."""
    runs, reasons = {}, {}
    for name, backend in DENSE.items():
        run = partial(dense, parts, backend)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, several to every kernel that it has not
                runs[name] = warmed(timed(run))
        except RuntimeError as error:
            reasons[name] = str(error).splitlines()[0]
    return time_in_turn(runs), reasons


def dense(parts: Operands, backend: SDPBackend) -> Tensor:
    """Attention by one of PyTorch's kernels and no other."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*parts)


def sparse(parts: Operands, lists: BlockLists, rest: PooledRest | None = None, int8: Tensor | None = None) -> Tensor:
    """Attention to listed blocks, and to means of others, by the device's kernel; ``int8``: heads with int8 scores."""
    sizes = (lists.query_block, lists.key_block, parts[0].shape[3] ** -0.5)
    means = () if rest is None else (rest.key, rest.value, rest.heads, rest.pool)
    result: Tensor = BLOCK_SPARSE_ATTENTION(*parts, lists.indices, lists.counts, *sizes, *means, int8=int8)[0]
    return result


def check(out: Tensor, parts: Operands, lists: BlockLists, rest: PooledRest | None = None, int8: bool = False) -> None:
    """Hold the first and the last block of queries of the first and the last head against float64.

    Raises:
        RuntimeError: a result is further off than two roundings to bfloat16 and some float32 sums put it.
    """
    query, key, value = parts
    tokens = torch.arange(key.shape[2], device=key.device)
    attended = lists.to_map(blocks(key.shape[2], lists.key_block))
    for head in (0, query.shape[1] - 1):
        for row in (0, lists.counts.shape[2] - 1):
            listed = attended[0, head, row].nonzero().flatten()
            where = torch.isin(tokens // lists.key_block, listed)
            some = slice(row * lists.query_block, (row + 1) * lists.query_block)
            keys, values = key[0, head, where].double(), value[0, head, where].double()
            sizes = torch.ones_like(keys[:, 0])
            if rest is not None:
                first = torch.arange(0, key.shape[2], rest.pool, device=key.device)
                skipped = ~torch.isin(first // lists.key_block, listed)
                keys = torch.cat([keys, rest.key[0, head, skipped].double()])
                values = torch.cat([values, rest.value[0, head, skipped].double()])
                sizes = torch.cat([sizes, (key.shape[2] - first[skipped]).clamp(max=rest.pool).double()])
            queries = query[0, head, some].double()
            scores = queries @ keys.T
            if int8:
                own = int8_scores(queries[None, None], key[:, head, None].double(), lists.key_block)
                scores = torch.cat([own[0, 0, :, where], scores[:, int(where.sum()) :]], -1)
            scores = scores * query.shape[3] ** -0.5
            shares = torch.softmax(scores + sizes.log(), -1)
            error, size = (out[0, head, some].double() - shares @ values).abs(), shares @ values.abs()
            if not (error <= (2.1 * 2**-8 + 1e-4) * size).all():
                told = f"head {head}, block of queries {row} is off by {float((error / size).max()):.2g} of its size"
                raise RuntimeError(f"block-sparse attention gives a wrong result, so its time is not told: {told}")


def measure(
    device: torch.device,
    tokens: int,
    channels: int,
    heads: int = HEADS,
    densities: tuple[float, ...] = DENSITIES,
    tell: Callable[[str], object] = print,
) -> Iterator[dict[str, Any]]:
    """Seconds of the best dense kernel and of the sparse one, and the share of the ideal, by density and budget."""
    parts = operands(tokens, heads, channels, device)
    with torch.no_grad():
        every, reasons = dense_seconds(parts)
        for name in DENSE:
            tell(f"    {name:9} {1e3 * every[name]:9.3f} ms" if name in every else f"    {name:9} {reasons[name]}")
        means = PooledRest.pooling(*parts[1:], torch.ones(heads, dtype=torch.int32, device=device), POOL)
        best = min(every, key=lambda name: every[name])
        eight = torch.ones(heads, dtype=torch.int32, device=device)
        scale = channels**-0.5
        refused = block_sparse_refusal(*parts, lists_of(tokens, heads, 1.0, True, device), scale, int8=eight)
        if refused is not None:
            tell(f"    without int8 scores: {refused}")
        for density in densities:
            kinds: list[tuple[bool, PooledRest | None, Tensor | None]] = [(True, None, None)]
            if density < 1:
                kinds += [(False, None, None), (True, means, None)]
            kinds += [(True, None, eight)] if refused is None else []
            for equal, rest, int8 in kinds:
                lists = lists_of(tokens, heads, density, equal, device)
                real = float(lists.density(tokens, tokens).mean())
                cost = real + (0 if rest is None else 1 / POOL)
                check(sparse(parts, lists, rest, int8), parts, lists, rest, int8 is not None)
                ours = partial(sparse, parts, lists, rest, int8)
                runs = {"dense": partial(dense, parts, DENSE[best]), "ditopt": ours}
                seconds = time_in_turn({name: warmed(timed(run)) for name, run in runs.items()})
                ideal = seconds["dense"] * cost / seconds["ditopt"]
                tflops = 4 * heads * tokens**2 * channels * cost / seconds["ditopt"] / 1e12
                kind = "" if equal else ", one dense head"
                kind = kind if rest is None else f", a rest of means of {POOL}"
                kind = kind if int8 is None else ", int8 scores"
                told = f"  density {real:.3f}{kind}: {1e3 * seconds['ditopt']:.3f} ms"
                tell(f"{told} to {1e3 * seconds['dense']:.3f} ms, {tflops:.0f} TFLOP/s, {ideal:.0%} of the ideal")
                found = {"tokens": tokens, "channels": channels, "heads": heads, "density": real, "equal": equal}
                found |= {"pool": 0 if rest is None else POOL, "int8": int8 is not None}
                yield {**found, "best_dense": best, "seconds": seconds, "of_ideal": ideal}


def run(device: torch.device) -> list[dict[str, Any]]:
    """All figures."""
    rows: list[dict[str, Any]] = []
    for tokens in TOKENS:
        for channels in CHANNELS:
            print(f"{HEADS} heads, {tokens} tokens, {channels} channels, bfloat16")
            rows += measure(device, tokens, channels)
    return rows
