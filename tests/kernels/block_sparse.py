"""What every implementation of attention to listed blocks is tested with: operands, lists, float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention import reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.block_sparse_attention.pooled import PooledRest

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a number, relative."""
Operands = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Operands, BlockLists, float], tuple[Tensor, Tensor]]
"""An implementation: of operands, lists and a scale, in memory that held NaN."""


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


def but_the_last(heads: int, queries: int, keys: int) -> BlockLists:
    """Lists of all blocks of keys but the last: so they have entries, which are read."""
    attended = torch.ones(1, heads, blocks(queries, 64), blocks(keys, 64), dtype=torch.bool)
    attended[..., -1] = False
    return BlockLists.from_map(attended, 64, 64)


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
    further: Tensor | float = 0.0,
    mask: Tensor | None = None,
    int8: Tensor | None = None,
) -> None:
    """Against float64: what rounding allows; ``rest`` is in float64, ``absolute`` the same with its values' sizes.

    ``further`` is the size of what is added behind, in float32, and rounded with the result once more.

    The result is rounded once, and numerators once where they are bfloat16. Float32 sums of ``depth`` products put an
    error into scores that is a few times their unit of rounding at the largest score, and so into every numerator; the
    polynomial and the sums over keys have some more.
    """
    query, key, value = (part.double() for part in parts)
    exact, logs = reference.block_sparse_attention(query, key, value, lists, scale, rest, mask, int8)
    size, _ = reference.block_sparse_attention(query, key, value.abs(), lists, scale, absolute, mask, int8)
    rounding = ROUNDING[parts[0].dtype]
    largest = scale * float(query.norm(dim=-1).amax() * key.norm(dim=-1).amax())
    if mask is not None and mask.dtype != torch.bool:
        largest += float(mask[mask.isfinite()].abs().amax()) if mask.isfinite().any() else 0.0
    bound = 2.1 * rounding * size + (8 * largest + 40) * 2**-24 * size
    bound = bound + 4 * rounding * further + (16 * largest + 80 + 2 * key.shape[-1]) * 2**-24 * further
    out, found = ours
    assert not out.isnan().any() and ((out.double() - exact).abs() <= bound + 1e-30).all()
    assert torch.equal(found.isinf(), logs.isinf())
    finite = logs.isfinite()
    budget = (8 * largest + 40) * 2**-24 + (2**-13 if parts[0].dtype == torch.bfloat16 else 0.0)
    assert ((found.double() - logs)[finite].abs() <= budget).all()


def check_empty_and_full_lists(attend: Attend) -> None:
    """Queries without a listed key give zero and -inf, those with all keys dense attention."""
    parts = operands((1, 2, 2, 200, 200, 32, 32))
    attended = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    attended[0, 1, 2] = False
    out, logs = attend(parts, BlockLists.from_map(attended, 64, 64), 0.2)
    dense = F.scaled_dot_product_attention(*parts, scale=0.2)
    assert (out[0, 1, 128:192] == 0).all() and (logs[0, 1, 128:192] == -math.inf).all()
    dense[0, 1, 128:192] = 0
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=2e-5)


def check_lists_of_all_blocks(attend: Attend) -> None:
    """They need no room among shorter ones, and nothing of what stands in it is read."""
    parts = operands((1, 2, 2, 130, 300, 32, 32))
    attended = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    attended[0, 0], attended[0, 1, 1] = True, True
    lists = BlockLists.from_map(attended, 64, 64)
    assert lists.indices.shape[-1] < 4 and torch.equal(lists.to_map(5), attended)
    found = attend(parts, lists, 0.2)
    check(found, parts, lists, 0.2)
    narrow = lists.indices.masked_fill((lists.counts == 5)[..., None], 2**30)
    again = attend(parts, BlockLists(narrow, lists.counts, 64, 64), 0.2)
    wide = lists.indices.new_full((1, 2, 3, 5), -1)
    wide[..., : lists.indices.shape[-1]] = lists.indices
    for other in (again, attend(parts, BlockLists(wide, lists.counts, 64, 64), 0.2)):
        assert all(torch.equal(one, two) for one, two in zip(found, other, strict=True))


def check_numbers_that_are_not_finite(attend: Attend, dtype: torch.dtype) -> None:
    """NaN and infinity are where they are in float64, and only where lists name them."""
    lists = BlockLists.from_map(torch.tensor([[[[True, False], [False, True]]]]), 64, 64)
    for number, position in ((math.nan, 0), (math.nan, 1), (math.nan, 2), (math.inf, 2)):
        parts = operands((1, 1, 1, 128, 128, 16, 16), dtype)
        parts[position][0, 0, 7, 3] = number
        out, logs = attend(parts, lists, 0.25)
        query, key, value = (part.double() for part in parts)
        exact, exact_logs = reference.block_sparse_attention(query, key, value, lists, 0.25)
        assert torch.equal(logs.isnan(), exact_logs.isnan())
        assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
        assert out[0, 0, 64:].isfinite().all() and not out.isfinite().all()
