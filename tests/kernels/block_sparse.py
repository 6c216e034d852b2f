"""What every implementation of attention to listed blocks is tested with: operands, lists, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.block_sparse_attention.pooled import PooledRest

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a number, relative."""
Operands = tuple[Tensor, Tensor, Tensor]


def operands(
    shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Operands:
    """Query, key and value as projections leave them: tokens before heads."""
    batch, heads, key_heads, queries, keys, depth, width = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, heads, depth), (batch, keys, key_heads, depth), (batch, keys, key_heads, width))
    query, key, value = ((1.5 * torch.randn(s, generator=generator)).to(dtype).transpose(1, 2) for s in shapes)
    return query, key, value


def drawn(
    heads: int, queries: int, keys: int, density: float, batch: int = 1, block: int = 64, key_block: int | None = None
) -> BlockLists:
    """Random lists; with few blocks some are empty. ``key_block``: as ``block`` where it is None."""
    key_block = key_block or block
    shape = (batch, heads, blocks(queries, block), blocks(keys, key_block))
    attended = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    return BlockLists.from_map(attended, block, key_block)


def check(ours: tuple[Tensor, Tensor], parts: Operands, lists: BlockLists, scale: float) -> None:
    """Against float64: what rounding allows."""
    check_against(ours, parts, lists, scale)


def check_against(
    ours: tuple[Tensor, Tensor],
    parts: Operands,
    lists: BlockLists,
    scale: float,
    rest: PooledRest | None = None,
    absolute: PooledRest | None = None,
) -> None:
    """Against float64: what rounding allows; ``rest`` is in float64, ``absolute`` the same with its values' sizes.

    The result is rounded once, and numerators once where they are bfloat16. Float32 sums of ``depth`` products put an
    error into scores that is a few times their unit of rounding at the largest score, and so into every numerator; the
    polynomial and the sums over keys have some more.
    """
    query, key, value = (part.double() for part in parts)
    exact, logs = reference.block_sparse_attention(query, key, value, lists, scale, rest)
    size, _ = reference.block_sparse_attention(query, key, value.abs(), lists, scale, absolute)
    rounding = ROUNDING[parts[0].dtype]
    largest = scale * float(query.norm(dim=-1).amax() * key.norm(dim=-1).amax())
    bound = 2.1 * rounding * size + (8 * largest + 40) * 2**-24 * size
    out, found = ours
    assert not out.isnan().any() and ((out.double() - exact).abs() <= bound + 1e-30).all()
    assert torch.equal(found.isinf(), logs.isinf())
    finite = logs.isfinite()
    budget = (8 * largest + 40) * 2**-24 + (2**-13 if parts[0].dtype == torch.bfloat16 else 0.0)
    assert ((found.double() - logs)[finite].abs() <= budget).all()
