"""Our attention kernel against torch's, in turn, on seeded bfloat16 operands: time, rate and error to float64.

    python -m benchmarks.attention

Exits with 1 where this processor has no kernel.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch.nn import functional as F

from ditopt.kernels.flash_attention.cpu import flash_attention
from ditopt.kernels.ops import refusal
from ditopt.profiler.timing import time_in_turn, timed, warmed
from ditopt.quality import relative_l2

SHAPES = ((1, 3, 1536, 1536, 64), (1, 3, 1536, 24, 64), (1, 4, 2048, 2048, 128), (1, 8, 4096, 4096, 64))
"""Batch, heads, queries, keys, channels: the first two are the shipped model's."""


def main() -> int:
    """Time and print; 0, or 1 where there is nothing to time."""
    for batch, heads, queries, keys, depth in SHAPES:
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(batch, tokens, heads, depth).mul(1.5).to(torch.bfloat16).transpose(1, 2)
            for tokens in (queries, keys, keys)
        )
        scale = depth**-0.5
        refused = refusal(query, key, value, scale, query.dtype)
        if refused is not None:
            print(f"no kernel: {refused}")
            return 1
        contenders = {
            "ditopt": partial(flash_attention, query, key, value, scale),
            "torch": partial(F.scaled_dot_product_attention, query, key, value, scale=scale),
        }
        exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        errors = {name: relative_l2(run().double(), exact) for name, run in contenders.items()}
        seconds = time_in_turn({name: warmed(timed(run)) for name, run in contenders.items()})
        print(f"{batch} x {heads} heads, {queries} queries, {keys} keys, {depth} channels")
        for name, taken in seconds.items():
            rate = 4 * batch * heads * queries * keys * depth / taken / 1e9
            print(f"  {name:8}{1e3 * taken:9.3f} ms {rate:7.0f} GFLOP/s, relative error {errors[name]:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
