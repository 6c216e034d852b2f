"""Attention to listed blocks: lists and maps, the kernels against float64, what is defined and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditopt._torch import has_bfloat16_dot_products
from ditopt.kernels.block_sparse_attention import cpu
from ditopt.kernels.block_sparse_attention.lists import BlockLists, check_entries
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION
from tests.kernels.block_sparse import (
    ROUNDING,
    Operands,
    but_the_last,
    check,
    check_empty_and_full_lists,
    check_lists_of_all_blocks,
    check_numbers_that_are_not_finite,
    drawn,
    operands,
)
from tests.kernels.layouts import LAYOUTS, laid_out


@contextmanager
def poisoned() -> Iterator[None]:
    """In it ``Tensor.new_empty`` gives memory that holds NaN."""
    made = Tensor.new_empty

    def filled(self: Tensor, *size: int, **settings: Any) -> Tensor:
        return made(self, *size, **settings).fill_(math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", filled)
        yield


def attend(parts: Operands, lists: BlockLists, scale: float, lanes: int = cpu.WIDEST) -> tuple[Tensor, Tensor]:
    """The kernel's result, in memory that held NaN."""
    with poisoned():
        return cpu.block_sparse_attention(
            *parts, lists.indices, lists.counts, lists.query_block, lists.key_block, scale, lanes=lanes
        )


@settings(max_examples=40, deadline=None)
@given(
    attended=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4),
    block=st.integers(1, 5),
)
def test_lists_and_maps_are_the_same(attended: list[list[bool]], block: int) -> None:
    given = torch.tensor(attended).reshape(1, 2, 2, 3)
    lists = BlockLists.from_map(given, block, block)
    assert torch.equal(lists.to_map(3), given) and check_entries(lists, 3 * block) is None
    assert lists.density(2 * block, 3 * block) == pytest.approx(given.double().mean((0, 2, 3)))


def test_lists_are_padded_as_far_as_asked_for() -> None:
    given = torch.tensor([[[[True, False, True], [False, False, False]]]])
    lists = BlockLists.from_map(given, 64, 64, 3)
    assert lists.indices.shape == (1, 1, 2, 3) and torch.equal(lists.to_map(3), given)
    for width in (1, 4):
        with pytest.raises(ValueError, match=f"lists of 2 of 3 key blocks cannot be padded to {width}"):
            BlockLists.from_map(given, 64, 64, width)


def test_short_blocks_at_the_end_count_by_their_tokens() -> None:
    lists = BlockLists.from_map(torch.tensor([[[[True, False], [False, True]]]]), 64, 64)
    assert float(lists.density(100, 70)) == pytest.approx((64 * 64 + 36 * 6) / (100 * 70))


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    own_lists=st.booleans(),
    group=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    queries=st.integers(1, 300),
    keys=st.integers(1, 420),
    depth=st.integers(1, 256),
    width=st.integers(1, 80),
    density=st.floats(0.0, 1.0),
    block=st.sampled_from([64, 128]),
    scale=st.floats(0.01, 0.3),
)
def test_it_is_as_near_to_float64_as_rounding_allows(
    lanes: int,
    dtype: torch.dtype,
    batch: int,
    own_lists: bool,
    group: int,
    key_heads: int,
    queries: int,
    keys: int,
    depth: int,
    width: int,
    density: float,
    block: int,
    scale: float,
) -> None:
    heads = group * key_heads
    parts = operands((batch, heads, key_heads, queries, keys, depth, width), dtype)
    lists = drawn(heads, queries, keys, density, batch if own_lists else 1, block)
    ours = attend(parts, lists, scale, lanes)
    assert ours[0].dtype == dtype and ours[0].shape == (batch, heads, queries, width)
    assert ours[1].dtype == torch.float32 and ours[1].shape == (batch, heads, queries)
    check(ours, parts, lists, scale)


def test_an_empty_list_gives_zero_and_a_full_one_dense_attention() -> None:
    check_empty_and_full_lists(attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_stay_where_lists_name_them(dtype: torch.dtype) -> None:
    check_numbers_that_are_not_finite(attend, dtype)


def test_a_score_of_infinity_is_in_the_logarithm() -> None:
    query, key, value = operands((1, 1, 1, 64, 128, 16, 16))
    query, lists = query.abs() + 0.1, drawn(1, 64, 128, 1.1)
    key[0, 0, 100, 3] = math.inf
    out, logs = attend((query, key, value), lists, 0.25)
    assert out.isnan().all() and (logs == math.inf).all()


@pytest.mark.parametrize("lanes", [8, 4])
def test_narrower_vectors_are_really_narrower(lanes: int) -> None:
    assert cpu.library(lanes).ditopt_lanes() == lanes


def test_a_first_block_without_a_finite_score_leaves_the_others() -> None:
    query, key, value = operands((1, 1, 1, 64, 200, 16, 16))
    query = query.abs() + 0.1
    key[:, :, :128] = -math.inf
    full, rest = drawn(1, 64, 200, 1.1), BlockLists.from_map(torch.tensor([[[[False, False, True, True]]]]), 64, 64)
    parts = query, key, value
    for ours, theirs in zip(attend(parts, full, 0.25), attend(parts, rest, 0.25), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    key[:] = -math.inf
    assert attend(parts, full, 0.25)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    query, key, value = operands((1, 1, 1, 64, 300, 16, 16), dtype)
    lists = drawn(1, 64, 300, 1.1)
    check(attend((10 * query, 10 * key, value), lists, 1.0), (10 * query, 10 * key, value), lists, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_early_keys_do_not_fade_in_a_long_sequence(dtype: torch.dtype) -> None:
    """Equal scores weigh all values alike: the first half of the keys has ones, the second none."""
    query, key, value = operands((1, 1, 1, 64, 60_000, 2, 2), dtype)
    value[:, :, :30_000], value[:, :, 30_000:] = 1.0, 0.0
    out, _ = attend((0 * query, key, value), drawn(1, 64, 60_000, 1.1), 0.25)
    assert (out.float() - 0.5).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    parts, lists = operands((2, 3, 3, 70, 100, 32, 16)), drawn(3, 70, 100, 0.8)
    expected, _ = attend(parts, lists, 0.2)
    query, key, value = laid_out(parts, layout)
    assert torch.equal(attend((query, key, value), lists, 0.2)[0], expected)
    assert expected.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    parts, lists, before = (
        operands((1, 3, 3, 400, 330, 32, 32), dtype),
        drawn(3, 400, 330, 0.5),
        torch.get_num_threads(),
    )
    torch.set_num_threads(3)
    many = attend(parts, lists, 0.2)
    torch.set_num_threads(1)
    try:
        assert all(torch.equal(one, two) for one, two in zip(attend(parts, lists, 0.2), many, strict=True))
    finally:
        torch.set_num_threads(before)


def test_parts_are_merged_by_their_logarithms() -> None:
    """Attention to two halves of the keys, merged by the log-sums, is attention to all."""
    parts = operands((1, 2, 2, 128, 256, 32, 32))
    halves = [torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])]
    each = [attend(parts, BlockLists.from_map(half.expand(1, 2, 2, 4), 64, 64), 0.2) for half in halves]
    outs, logs = torch.stack([out for out, _ in each]), torch.stack([log for _, log in each])
    merged = (outs * torch.softmax(logs, 0)[..., None]).sum(0)
    torch.testing.assert_close(merged, F.scaled_dot_product_attention(*parts, scale=0.2), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_fake_has_the_shape_and_the_strides(dtype: torch.dtype) -> None:
    parts, lists = operands((2, 4, 2, 130, 50, 32, 16), dtype), drawn(4, 130, 50, 0.9)
    arguments = (*parts, lists.indices, lists.counts, 64, 64, 0.2)
    torch.library.opcheck(BLOCK_SPARSE_ATTENTION, arguments, test_utils=("test_schema", "test_faketensor"))


def test_inductor_takes_it_as_it_is() -> None:
    parts, lists = operands((1, 2, 2, 130, 130, 32, 32)), drawn(2, 130, 130, 0.9)

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = torch.ops.ditopt.block_sparse_attention(query, key, value, lists.indices, lists.counts, 64, 64, 0.2)
        return torch.as_tensor(2 * out.transpose(1, 2).flatten(2))

    compiled: Any = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*parts), step(*parts))


def refused(parts: Operands, lists: BlockLists, scale: float = 0.25) -> str:
    with pytest.raises(ValueError, match=r"ditopt::block_sparse_attention: ") as caught:
        cpu.block_sparse_attention(*parts, lists.indices, lists.counts, lists.query_block, lists.key_block, scale)
    return str(caught.value)


def test_what_the_kernel_does_not_take_has_a_reason() -> None:
    parts, lists = operands((1, 2, 2, 130, 130, 16, 16)), drawn(2, 130, 130, 1.1)
    query, key, value = parts
    assert "multiples of 64 and of 2" in refused(parts, drawn(2, 130, 130, 1.1, block=65))
    assert "scale is -1" in refused(parts, lists, -1.0)
    assert "operands are of torch.float32, torch.float16" in refused((query, key.half(), value), lists)
    assert "float64" in refused((query.double(), key.double(), value.double()), lists)
    assert "not [B, H, S, D]" in refused((query[0], key, value), lists)
    assert "do not match" in refused((query, key[:, :1], value), lists)
    assert "no token" in refused((query[:, :, :0], key, value), lists)
    assert "for meta" in refused((query, key.to("meta"), value), lists)
    assert "for meta" in refused(parts, BlockLists(lists.indices.to("meta"), lists.counts, 64, 64))
    assert "lists are for [1, 3, 3] [B, H, Qb], the operands have [1, 2, 3]" in refused(parts, drawn(3, 130, 130, 1.1))
    assert "(130 queries in blocks of 64)" in refused(parts, drawn(2, 200, 130, 1.1))
    narrow = BlockLists(lists.indices.long(), lists.counts, 64, 64)
    assert "torch.int64" in refused(parts, narrow)
    flat = BlockLists(lists.indices[0], lists.counts, 64, 64)
    assert "not [B, H, Qb, W]" in refused(parts, flat)


@pytest.mark.parametrize(
    ("entries", "count", "told"),
    [
        (
            [0, 1, 4],
            3,
            "head 1, query block 2 names key block 4; there are 4, named once each, in ascending order",
        ),
        ([-1, 1, 2], 3, "names key block -1"),
        ([0, 2, 1], 3, "names key block 1"),
        ([0, 1, 1], 3, "names key block 1"),
        ([0, 1, 2], 5, "head 1, query block 2 has 5 entries, its padding has room for 0 to 3; all are 4"),
        ([0, 1, 2], -1, "has -1 entries"),
    ],
)
def test_wrong_lists_are_told(entries: list[int], count: int, told: str) -> None:
    parts, lists = operands((1, 2, 2, 130, 200, 16, 16)), but_the_last(2, 130, 200)
    lists.indices[0, 1, 2] = torch.tensor(entries, dtype=torch.int32)
    lists.counts[0, 1, 2] = count
    assert told in refused(parts, lists) and told in str(check_entries(lists, 200))


def test_lists_of_all_blocks_have_no_entries() -> None:
    check_lists_of_all_blocks(attend)


def test_what_is_behind_a_count_is_not_read() -> None:
    parts, lists = operands((1, 2, 2, 130, 200, 16, 16)), but_the_last(2, 130, 200)
    lists.counts[:] = 2
    expected, _ = attend(parts, lists, 0.25)
    lists.indices[..., 2] = 2**30
    assert torch.equal(attend(parts, lists, 0.25)[0], expected)


def test_dot_products_of_pairs_are_used_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_bfloat16_dot_products():
        pytest.skip("this processor has no dot products of bfloat16 pairs (avx512_bf16)")
    parts, lists = operands((1, 1, 1, 64, 64, 16, 16), torch.bfloat16), drawn(1, 64, 64, 1.1)
    pairs, _ = attend(parts, lists, 0.25)
    monkeypatch.setattr(cpu, "has_bfloat16_dot_products", lambda: False)
    wide, _ = attend(parts, lists, 0.25)
    assert pairs.dtype == wide.dtype and not torch.equal(pairs, wide), "numerators are rounded in one of them only"
