"""Attention to listed blocks against torch's dense one, in turn: how much of the ideal speed-up each density gives.

    python -m benchmarks.sparse_attention [--flex] [--densities 0.25 ...] [--device cuda] [--json FILE]

8 heads of 4,096 tokens and 64 channels, seeded operands, random lists of 64 x 64 blocks. Equal budgets give every head
the density; unequal ones one dense head among seven. The ideal is dense time times density. ``pooled`` attends to
the other blocks, too, by means of 16 tokens, which it makes itself: its ideal has a sixteenth more. ``--flex`` times
compiled FlexAttention on the same lists as well. ``--device cuda`` is for GPUs: ``benchmarks.sparse_attention_gpu``
tells of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import sparse_attention_gpu
from ditopt.device import describe_device
from ditopt.kernels.block_sparse_attention.cpu import block_sparse_attention
from ditopt.kernels.block_sparse_attention.gpu import gpu_refusal
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from ditopt.plan_text import write_text_atomically
from ditopt.profiler.timing import product_seconds, time_in_turn, timed, warmed

HEADS, TOKENS, CHANNELS, BLOCK, POOL = 8, 4096, 64, 64, 16
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)


def lists_of(density: float, equal: bool) -> BlockLists:
    """Random lists; ``equal``: every head has the density, else the first head has all blocks."""
    count, generator = TOKENS // BLOCK, torch.Generator().manual_seed(0)
    budget = max(1, round(density * count))
    order = torch.rand(1, HEADS, count, count, generator=generator).argsort(-1)
    attended = order < budget
    if not equal:
        attended[:, 0] = True
    return BlockLists.from_map(attended, BLOCK, BLOCK)


def flex(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists) -> Callable[[], Tensor]:
    """Compiled FlexAttention on the same lists, as full blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    count = TOKENS // BLOCK
    indices = (~lists.to_map(count)).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)
    none = torch.zeros_like(lists.counts)
    mask = BlockMask.from_kv_blocks(none, torch.zeros_like(indices), lists.counts, indices, BLOCK_SIZE=(BLOCK, BLOCK))
    compiled: Any = torch.compile(flex_attention, fullgraph=True)
    return partial(compiled, query, key, value, block_mask=mask)


def pooled(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists) -> Tensor:
    """Attention to listed blocks, and to all others by their means."""
    rest = PooledRest.pooling(key, value, torch.ones(HEADS, dtype=torch.int32), POOL)
    sizes = (BLOCK, BLOCK, CHANNELS**-0.5)
    return block_sparse_attention(
        query, key, value, lists.indices, lists.counts, *sizes, rest.key, rest.value, rest.heads, rest.pool
    )[0]


def measure(dtype: torch.dtype, density: float, equal: bool, with_flex: bool) -> dict[str, Any]:
    """Seconds of every contender and the share of the ideal speed-up."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, TOKENS, HEADS, CHANNELS).mul(1.5).to(dtype).transpose(1, 2) for _ in range(3))
    lists = lists_of(density, equal)
    real = float(lists.density(TOKENS, TOKENS).mean())
    contenders: dict[str, Callable[[], Tensor]] = {
        "torch": partial(F.scaled_dot_product_attention, query, key, value),
        "ditopt": lambda: block_sparse_attention(
            query, key, value, lists.indices, lists.counts, BLOCK, BLOCK, CHANNELS**-0.5
        )[0],
    }
    if real < 1:
        contenders["pooled"] = partial(pooled, query, key, value, lists)
    if with_flex:
        contenders["flex"] = flex(query, key, value, lists)
    with torch.no_grad():
        seconds = time_in_turn({name: warmed(timed(run)) for name, run in contenders.items()})
    pairs = {"torch": 1.0, "pooled": real + 1 / POOL}
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "density": real, "equal": equal}
    for name, taken in seconds.items():
        share = pairs.get(name, real)
        found[name] = {"seconds": taken, "gflops": 4 * HEADS * TOKENS**2 * CHANNELS * share / 1e9 / taken}
        if name != "torch":
            found[name]["of_ideal"] = seconds["torch"] * share / taken
    return found


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of 2,048 x 2,048 matrices."""
    square = torch.empty(2048, 2048, device="cpu")
    return 2 * 2048**3 / product_seconds(square, square, dtype) / 1e9


def main(argv: list[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flex", action="store_true", help="time compiled FlexAttention too")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="shares of all blocks")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernel is timed")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        refused = "FlexAttention is timed on processors only" if options.flex else gpu_refusal(device)
        if refused is not None:
            parser.error(f"--device cuda: {refused}")
    kept: dict[str, Any] = {"device": describe_device(device), "torch": torch.__version__, "rows": []}
    print(f"{kept['device']}, torch {kept['torch']}")
    if device.type == "cuda":
        kept["rows"] += sparse_attention_gpu.run(device)
    else:
        kept |= processor_figures(options.flex, options.densities)
    if options.json:
        write_text_atomically(options.json, json.dumps(kept, indent=2) + "\n")
    return 0


def processor_figures(with_flex: bool, densities: Sequence[float]) -> dict[str, Any]:
    """The peaks and all rows, printed as they come."""
    kept: dict[str, Any] = {"rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        kept[f"peak_{dtype}".replace("torch.", "")] = highest = peak(dtype)
        print(f"{dtype}: products reach {highest:.0f} GFLOP/s")
        for density in densities:
            for equal in (True, False) if density < 1 else (True,):
                found = measure(dtype, density, equal, with_flex)
                kept["rows"].append(found)
                print(f"  density {found['density']:.3f}{'' if equal else ', one dense head'}")
                for name in ("torch", "ditopt", "pooled", "flex"):
                    if name in found:
                        each = found[name]
                        share = f", {each['of_ideal']:.0%} of the ideal" if "of_ideal" in each else ""
                        print(f"    {name:7}{1e3 * each['seconds']:9.3f} ms {each['gflops']:7.0f} GFLOP/s{share}")
    return kept


if __name__ == "__main__":
    sys.exit(main())
