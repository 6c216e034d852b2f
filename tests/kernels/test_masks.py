"""Attention to listed blocks under a mask of the model's own, against float64 and dense attention."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention import cpu, reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.masks import ALIKE
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION
from tests.kernels.block_sparse import ROUNDING, Operands, check_against, drawn, operands
from tests.kernels.test_block_sparse_attention import poisoned

LEAST = torch.finfo(torch.float32).min
FULL = BlockLists.from_map(torch.ones(1, 2, 3, 3, dtype=torch.bool), 64, 64)
Shape = Literal["keys", "queries and keys", "of samples and heads", "rows alone"]


def attend(
    parts: Operands, lists: BlockLists, scale: float, mask: Tensor, lanes: int = cpu.WIDEST
) -> tuple[Tensor, Tensor]:
    """The kernel's result, in memory that held NaN."""
    with poisoned():
        sizes = (lists.query_block, lists.key_block)
        return cpu.block_sparse_attention(*parts, lists.indices, lists.counts, *sizes, scale, mask=mask, lanes=lanes)


def drawn_mask(shape: Shape, sizes: tuple[int, int, int, int], shown: float, added: bool) -> Tensor:
    """Random, with whole blocks hidden; of float32 if ``added``."""
    batch, heads, queries, keys = sizes
    shapes = {
        "keys": (batch, 1, 1, keys),
        "queries and keys": (queries, keys),
        "of samples and heads": (batch, heads, queries, keys),
        "rows alone": (1, queries, 1),
    }
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(shapes[shape], generator=generator) < shown
    if seen.shape[-2] > 64:
        seen[..., 64:128, :96] = False
    return torch.randn(seen.shape, generator=generator).masked_fill(~seen, -math.inf) if added else seen


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=10, deadline=None)
@given(
    shape=st.sampled_from(("keys", "queries and keys", "of samples and heads", "rows alone")),
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(1, 200),
    keys=st.integers(1, 300),
    depth=st.integers(1, 80),
    density=st.floats(0.0, 1.0),
    shown=st.floats(0.0, 1.0),
    added=st.booleans(),
    scale=st.floats(0.01, 0.3),
)
def test_it_is_as_near_to_float64_as_rounding_allows(
    lanes: int,
    dtype: torch.dtype,
    shape: Shape,
    batch: int,
    group: int,
    queries: int,
    keys: int,
    depth: int,
    density: float,
    shown: float,
    added: bool,
    scale: float,
) -> None:
    parts = operands((batch, 2 * group, 2, queries, keys, depth, depth), dtype)
    lists = drawn(2 * group, queries, keys, density, batch)
    mask = drawn_mask(shape, (batch, 2 * group, queries, keys), shown, added)
    check_against(attend(parts, lists, scale, mask, lanes), parts, lists, scale, mask=mask)


@pytest.mark.parametrize("lowest", [-math.inf, LEAST, -1e4])
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_full_lists_give_dense_attention_however_keys_are_hidden(lowest: float, scale: float) -> None:
    """Rows of nothing but hidden keys too: shares are equal where dense attention has them equal."""
    parts = operands((1, 2, 2, 150, 150, 16, 16))
    mask = torch.zeros(1, 1, 150, 150)
    mask[..., 70:] = lowest
    mask[..., 5, :] = lowest
    mask[..., 64:128, :64] = lowest
    ours, _ = attend(parts, FULL, scale, mask)
    dense = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
    assert dense.isfinite().all()
    torch.testing.assert_close(ours, dense, atol=2e-5 if lowest != -1e4 else 2e-3, rtol=2e-3)


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("lowest", [LEAST, -1e9, -65504.0])
def test_the_logarithm_of_a_row_of_nothing_but_low_numbers_tells_how_many_they_are(lowest: float, lanes: int) -> None:
    parts = operands((1, 2, 2, 150, 150, 16, 16))
    mask = torch.zeros(1, 1, 150, 150)
    mask[..., 70:, :] = lowest
    attended = torch.tensor([[True, True, True], [True, False, True], [False, False, True]]).expand(1, 2, 3, 3)
    lists = BlockLists.from_map(attended, 64, 64)
    _, ours = attend(parts, lists, 0.2, mask, lanes)
    _, logs = reference.block_sparse_attention(*parts, lists, 0.2, mask=mask)
    wide = [part.double() for part in parts]
    _, exact = reference.block_sparse_attention(wide[0], wide[1], wide[2], lists, 0.2, mask=mask)
    assert ours.dtype == logs.dtype == exact.dtype == torch.float64
    for found in (ours, logs):
        torch.testing.assert_close(found, exact, atol=1e-5 if lowest != -65504.0 else 2e-2, rtol=0)
    of_keys = torch.tensor([86.0] * 58 + [22.0] * 22, dtype=torch.float64).log()
    if lowest != -65504.0:  # there scores have digits
        torch.testing.assert_close((ours - ALIKE)[..., 70:], of_keys.expand(1, 2, 80), atol=1e-5, rtol=0)
    assert ours[..., 70:].max() < ours[..., :70].min() - 6e4


def test_a_query_from_which_all_is_hidden_is_one_without_keys() -> None:
    parts = operands((1, 2, 2, 150, 150, 16, 16))
    mask = torch.ones(150, 150, dtype=torch.bool)
    mask[5] = mask[100:] = False
    out, logs = attend(parts, FULL, 0.2, mask)
    hidden = ~mask.any(1)
    assert (out[:, :, hidden] == 0).all() and (logs[:, :, hidden] == -math.inf).all()
    assert logs[:, :, ~hidden].isfinite().all()


def test_blocks_that_are_hidden_are_not_read() -> None:
    """What they hold is no matter, so they cost nothing: NaN there is in no result."""
    parts = operands((1, 2, 2, 150, 192, 16, 16))
    for part in parts[1:]:
        part[:, :, 64:128] = math.nan
    mask = torch.ones(1, 1, 1, 192, dtype=torch.bool)
    mask[..., 64:128] = False
    lists = BlockLists.from_map(torch.ones(1, 2, 3, 3, dtype=torch.bool), 64, 64)
    # A run of blocks is cut into chunks of 96 keys: a list that leaves out the first block begins with the hidden one.
    first = BlockLists.from_map(torch.tensor([True, False, True]).expand(1, 2, 3, 3), 64, 64)
    expected, _ = attend(parts, first, 0.2, torch.ones(1, dtype=torch.bool))
    alone = BlockLists.from_map(torch.tensor([False, True, False]).expand(1, 2, 3, 3), 64, 64)
    nothing, _ = attend(parts, alone, 0.2, mask)
    assert (nothing == 0).all() and expected.isfinite().all()
    whole = tuple(part.nan_to_num(7.0) for part in parts)
    found, _ = attend(whole, lists, 0.2, mask)  # type: ignore[arg-type]  # three
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_nan_in_a_mask_is_nan_in_the_result() -> None:
    parts = operands((1, 1, 1, 10, 70, 8, 8))
    lists = BlockLists.from_map(torch.ones(1, 1, 1, 2, dtype=torch.bool), 64, 64)
    mask = torch.zeros(10, 70)
    mask[3, 65] = math.nan
    out, logs = attend(parts, lists, 0.2, mask)
    assert out[0, 0, 3].isnan().all() and logs[0, 0, 3].isnan()
    assert out[0, 0, 4:].isfinite().all()


def test_masks_that_are_none_are_refused_by_name_and_others_described_as_they_are() -> None:
    parts = operands((2, 2, 2, 70, 130, 8, 8))
    lists = drawn(2, 70, 130, 1.0)
    given = (*parts, lists.indices, lists.counts, 64, 64, 0.3)
    wrong = {
        r"a mask of shape \[70, 131\] does not broadcast to \[2, 2, 70, 130\]": torch.zeros(70, 131),
        r"a mask of shape \[3, 1, 1, 130\] does not broadcast": torch.zeros(3, 1, 1, 130),
        "a mask of torch.int64, which is neither boolean nor a bias": torch.zeros(70, 130, dtype=torch.int64),
    }
    for message, mask in wrong.items():
        with pytest.raises(ValueError, match=message):
            BLOCK_SPARSE_ATTENTION(*given, mask=mask)
    torch.library.opcheck(
        BLOCK_SPARSE_ATTENTION, given, {"mask": torch.zeros(70, 130)}, test_utils=("test_schema", "test_faketensor")
    )
    rest = PooledRest.pooling(*parts[1:], torch.ones(2, dtype=torch.int32), 16)
    with pytest.raises(ValueError, match=r"there is a mask, under which what a pattern skips has no means \(a rest\)"):
        BLOCK_SPARSE_ATTENTION(*given, rest.key, rest.value, rest.heads, 16, mask=torch.zeros(70, 130))
