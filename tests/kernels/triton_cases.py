"""The Triton kernel against float64: on the processor where ``TRITON_INTERPRET=1`` is set, else on the GPU.

``test_block_sparse_triton.py`` runs this file, in a process of its own: Triton decides when it is first imported
whether its functions, and those of its own library, are compiled or interpreted.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_sparse_attention import int8, reference, triton
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION
from tests.kernels import block_sparse
from tests.kernels.block_sparse import (
    ROUNDING,
    Operands,
    but_the_last,
    check_empty_and_full_lists,
    check_lists_of_all_blocks,
    check_numbers_that_are_not_finite,
    drawn,
    operands,
)
from tests.kernels.layouts import LAYOUTS, laid_out

DEVICE = torch.device("cpu" if triton.INTERPRETED else "cuda")
# numpy, which interprets, tells of what is not finite as C does not
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# batch, heads, key heads, queries, keys, depth, width; tokens of a block of queries and of keys; density
SHAPES = [
    ((1, 2, 2, 130, 200, 64, 64), (64, 64), 0.6),
    ((2, 4, 2, 70, 150, 40, 24), (64, 64), 0.6),  # two queries' heads to a key's, channels padded, short blocks
    ((2, 2, 1, 192, 256, 128, 128), (128, 64), 0.7),  # whole blocks
    ((1, 1, 1, 200, 270, 32, 48), (192, 128), 0.8),  # several tiles to a block of queries and of keys
    ((1, 2, 2, 64, 90, 96, 33), (64, 4), 0.5),  # blocks of fewer keys than a tile
    ((1, 1, 1, 65, 100, 32, 16), (64, 48), 0.9),
    ((1, 1, 1, 40, 70, 256, 256), (64, 64), 1.1),
    ((1, 1, 1, 1, 1, 1, 1), (64, 64), 1.1),
]


def attend(
    parts: Operands,
    lists: BlockLists,
    scale: float = 0.2,
    rest: PooledRest | None = None,
    int8: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel's result, in memory that held NaN, on the processor."""
    made = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **kind: Any) -> Tensor:
        found = made(self, *size, **kind)
        return found.fill_(math.nan) if found.is_floating_point() else found

    query, key, value = (part.to(DEVICE) for part in parts)
    there = lists.to(DEVICE)
    given = (query, key, value, there.indices, there.counts, lists.query_block, lists.key_block, scale)
    if rest is not None:
        given = (*given, *(part.to(DEVICE) for part in (rest.key, rest.value, rest.heads)), rest.pool)  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", poisoned)
        run = triton.block_sparse_attention if triton.INTERPRETED else BLOCK_SPARSE_ATTENTION
        out, logs = run(*given, int8=None if int8 is None else int8.to(DEVICE))
    assert out.transpose(1, 2).is_contiguous()
    return out.cpu(), logs.cpu()


def check(parts: Operands, lists: BlockLists, scale: float = 0.2) -> None:
    ours = attend(parts, lists, scale)
    assert ours[0].dtype == parts[0].dtype and ours[0].shape == (*parts[0].shape[:3], parts[2].shape[3])
    assert ours[1].dtype == torch.float32 and ours[1].shape == parts[0].shape[:3]
    block_sparse.check(ours, parts, lists, scale)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("shape", "sizes", "density"), SHAPES)
def test_it_is_as_near_to_float64_as_rounding_allows(
    shape: tuple[int, int, int, int, int, int, int], sizes: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    batch, heads, _, queries, keys, *_ = shape
    own = batch if dtype != torch.float32 else 1  # lists for each of a batch, or the same for all
    check(operands(shape, dtype), drawn(heads, queries, keys, density, own, *sizes))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    queries=st.integers(1, 130),
    keys=st.integers(1, 150),
    depth=st.integers(1, 80),
    width=st.integers(1, 80),
    density=st.floats(0.0, 1.0),
    key_block=st.sampled_from([2, 48, 64, 128]),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_any_sizes_are_taken(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    depth: int,
    width: int,
    density: float,
    key_block: int,
    dtype: torch.dtype,
) -> None:
    parts = operands((batch, heads, 1, queries, keys, depth, width), dtype)
    check(parts, drawn(heads, queries, keys, density, key_block=key_block))


def test_an_empty_list_gives_zero_and_a_full_one_dense_attention() -> None:
    check_empty_and_full_lists(attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_stay_where_lists_name_them(dtype: torch.dtype) -> None:
    check_numbers_that_are_not_finite(attend, dtype)


def test_a_score_of_infinity_is_in_the_logarithm() -> None:
    query, key, value = operands((1, 1, 1, 64, 160, 16, 16))
    query, lists = query.abs() + 0.1, drawn(1, 64, 160, 1.1)
    key[0, 0, 100, 3] = math.inf
    out, logs = attend((query, key, value), lists, 0.25)
    assert out.isnan().all() and (logs == math.inf).all()
    key[0, 0, 20, 3] = math.nan
    out, logs = attend((query, key, value), lists, 0.25)
    assert out.isnan().all() and logs.isnan().all()


def test_a_first_block_without_a_finite_score_leaves_the_others() -> None:
    query, key, value = operands((1, 1, 1, 64, 200, 16, 16))
    query = query.abs() + 0.1
    key[:, :, :128] = -math.inf
    full, rest = drawn(1, 64, 200, 1.1), BlockLists.from_map(torch.tensor([[[[False, False, True, True]]]]), 64, 64)
    parts = query, key, value
    for ours, theirs in zip(attend(parts, full), attend(parts, rest), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    key[:] = -math.inf
    out, logs = attend(parts, full)
    assert out.isnan().all() and (logs == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    query, key, value = operands((1, 1, 1, 64, 200, 16, 16), dtype)
    check((10 * query, 10 * key, value), drawn(1, 64, 200, 1.1), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_early_keys_do_not_fade_in_a_long_sequence(dtype: torch.dtype) -> None:
    """Equal scores weigh all values alike: the first half of the keys has ones, the second none."""
    keys = 2_000 if triton.INTERPRETED else 60_000
    query, key, value = operands((1, 1, 1, 64, keys, 2, 2), dtype)
    value[:, :, : keys // 2], value[:, :, keys // 2 :] = 1.0, 0.0
    out, logs = attend((0 * query, key, value), drawn(1, 64, keys, 1.1))
    assert (out.float() - 0.5).abs().max() < 1e-4 and (logs - math.log(keys)).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    parts, lists = operands((2, 2, 2, 70, 100, 32, 16)), drawn(2, 70, 100, 0.8)
    query, key, value = laid_out(parts, layout)
    for ours, theirs in zip(attend((query, key, value), lists), attend(parts, lists), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        ([0, 1, 4], 3),
        ([0, 1, 2**30], 3),
        ([-(2**30), 1, 2], 3),
        ([0, 2, 1], 3),
        ([0, 1, 1], 3),
        ([0, 1, 2], 5),
        ([0, 1, 2], 2**30),
        ([0, 1, 2], -1),
    ],
)
def test_a_wrong_list_gives_nan_to_its_queries_and_to_no_others(entries: list[int], count: int) -> None:
    parts, lists = operands((1, 2, 2, 130, 200, 16, 16)), but_the_last(2, 130, 200)
    expected = attend(parts, lists)
    lists.indices[0, 1, 1] = torch.tensor(entries, dtype=torch.int32)
    lists.counts[0, 1, 1] = count
    for ours, right in zip(attend(parts, lists), expected, strict=True):
        right[0, 1, 64:128] = math.nan
        torch.testing.assert_close(ours, right, atol=0, rtol=0, equal_nan=True)


def test_a_wrong_entry_is_found_far_behind_in_a_list() -> None:
    parts, lists = operands((1, 1, 1, 64, 6400, 16, 16)), but_the_last(1, 64, 6400)
    assert lists.indices.shape[-1] == 99
    lists.indices[..., 98] = 100
    assert all(result.isnan().all() for result in attend(parts, lists))


def test_operands_that_do_not_fit_are_refused() -> None:
    lists = but_the_last(2, 130, 130)
    nothing = BlockLists(lists.indices, torch.zeros_like(lists.counts), 64, 64)
    for shape, listed, told in (
        ((1, 3, 2, 130, 130, 16, 16), but_the_last(3, 130, 130), "heads, tokens or channels do not match"),
        ((1, 2, 2, 130, 130, 16, 16), but_the_last(3, 130, 130), "lists are for"),
        ((1, 2, 2, 130, 0, 16, 16), nothing, "a size is 0, so there is no token"),
        ((1, 2, 2, 0, 130, 16, 16), lists, "a size is 0, so there is no token"),
    ):
        with pytest.raises(ValueError, match=told):
            attend(operands(shape), listed)


def test_lists_of_all_blocks_have_no_entries() -> None:
    check_lists_of_all_blocks(attend)


def test_lists_of_all_blocks_leave_no_rest_and_may_have_int8_scores() -> None:
    parts, lists = operands((1, 2, 2, 64, 300, 32, 32)), drawn(2, 64, 300, 1.1)
    assert lists.indices.shape[-1] == 1
    plain = attend(parts, lists)
    for found, other in zip(attend(parts, lists, 0.2, rest_of(parts, [1, 1], 16)), plain, strict=True):
        assert torch.equal(found, other)
    eight = heads_of(1, 0)
    block_sparse.check_against(attend(parts, lists, int8=eight), parts, lists, 0.2, int8=eight)


def test_what_is_behind_a_count_is_not_read() -> None:
    parts, lists = operands((1, 2, 2, 130, 200, 16, 16)), but_the_last(2, 130, 200)
    lists.counts[:] = 2
    expected, _ = attend(parts, lists)
    lists.indices[..., 2] = 2**30
    assert torch.equal(attend(parts, lists)[0], expected)


def rest_of(parts: Operands, heads: list[int], pool: int) -> PooledRest:
    return PooledRest.pooling(*parts[1:], torch.tensor(heads, dtype=torch.int32), pool)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("shape", "sizes", "density", "pool"),
    [
        ((2, 4, 2, 70, 150, 40, 24), (64, 64), 0.5, 16),  # the last group has 6 tokens
        ((1, 2, 2, 100, 700, 32, 32), (64, 64), 0.4, 4),  # several tiles of groups
        ((1, 2, 1, 64, 300, 16, 48), (64, 48), 0.4, 4),  # 12 groups to a block, cut by tiles
        ((1, 2, 2, 64, 900, 64, 16), (64, 8), 0.5, 8),  # groups are blocks
        ((1, 2, 2, 65, 300, 128, 256), (64, 128), 0.0, 128),  # nothing listed
    ],
)
def test_groups_that_no_list_names_count_by_their_means(
    shape: tuple[int, int, int, int, int, int, int],
    sizes: tuple[int, int],
    density: float,
    pool: int,
    dtype: torch.dtype,
) -> None:
    batch, heads, _, queries, keys, *_ = shape
    parts, lists = operands(shape, dtype), drawn(heads, queries, keys, density, batch, *sizes)
    rest = rest_of(parts, [1, 0, 1, 1][:heads], pool)
    wide = PooledRest(rest.key.double(), rest.value.double(), rest.heads, pool)
    size = PooledRest(rest.key.double(), rest.value.double().abs(), rest.heads, pool)
    block_sparse.check_against(attend(parts, lists, 0.2, rest), parts, lists, 0.2, wide, size)


def test_heads_without_a_rest_are_bit_for_bit_those_of_the_plain_call() -> None:
    parts, lists = operands((1, 3, 3, 70, 300, 32, 16)), drawn(3, 70, 300, 0.4)
    found, logs = attend(parts, lists, 0.2, rest_of(parts, [0, 1, 0], 16))
    plain, plain_logs = attend(parts, lists)
    assert torch.equal(found[:, 0::2], plain[:, 0::2]) and torch.equal(logs[:, 0::2], plain_logs[:, 0::2])
    assert (found[:, 1] - plain[:, 1]).abs().max() > 0.01


def test_what_a_listed_block_has_does_not_come_in_by_its_mean() -> None:
    """A listed key of -inf has no mass, and what is not finite in its mean makes nothing NaN."""
    query, key, value = operands((1, 1, 1, 64, 256, 16, 16))
    query, key[0, 0, 3] = query.abs() + 0.1, -math.inf
    lists = BlockLists.from_map(torch.tensor([[[[True, False, True, False]]]]), 64, 64)
    rest = rest_of((query, key, value), [1], 16)
    rest.value[0, 0, 0] = math.nan
    assert all(result.isfinite().all() for result in attend((query, key, value), lists, 0.2, rest))
    rest.value[0, 0, 5] = math.nan
    assert attend((query, key, value), lists, 0.2, rest)[0].isnan().all(), "one that is not listed does"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_means_do_not_matter(layout: str) -> None:
    parts, lists = operands((2, 3, 3, 70, 300, 32, 16)), drawn(3, 70, 300, 0.4)
    rest = rest_of(parts, [1, 0, 1], 16)
    _, key, value = laid_out((rest.key, rest.key, rest.value), layout)
    turned = PooledRest(key, value, rest.heads, rest.pool)
    for ours, theirs in zip(attend(parts, lists, 0.2, turned), attend(parts, lists, 0.2, rest), strict=True):
        assert torch.equal(ours, theirs)


def test_wrong_lists_and_rests_to_first_order_give_nan() -> None:
    parts, lists = operands((1, 2, 2, 64, 130, 16, 16)), but_the_last(2, 64, 130)
    lists.indices[0, 0, 0, 1] = 2**30
    for result in attend(parts, lists, 0.2, rest_of(parts, [1, 2], 16)):
        assert result.isnan().all()
    lists.indices[0, 0, 0, 1] = 1
    for result in attend(parts, lists, 0.2, rest_of(parts, [1, 2], 16)):
        assert result[:, 0].isfinite().all() and result[:, 1].isnan().all()


def heads_of(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("shape", "sizes", "density", "pool", "dtype"),
    [
        ((1, 2, 2, 130, 200, 64, 64), (64, 64), 0.6, 0, torch.bfloat16),
        ((2, 4, 2, 70, 150, 40, 24), (64, 64), 0.6, 0, torch.float32),  # channels padded, shared keys, a short block
        ((1, 2, 2, 64, 90, 96, 33), (64, 4), 0.5, 0, torch.float16),  # blocks of fewer keys than a tile
        ((1, 1, 1, 65, 300, 16, 16), (64, 192), 1.1, 0, torch.float32),  # several tiles to a block
        ((2, 4, 2, 70, 150, 40, 24), (64, 64), 0.5, 16, torch.bfloat16),  # beside a rest
        ((1, 2, 1, 64, 300, 16, 48), (64, 48), 0.0, 4, torch.float32),  # nothing listed
    ],
)
def test_int8_scores_are_those_of_the_quantised_numbers(
    shape: tuple[int, int, int, int, int, int, int],
    sizes: tuple[int, int],
    density: float,
    pool: int,
    dtype: torch.dtype,
) -> None:
    """Numbers and scales are the reference's to the bit, so what rounding allows is what it allows without them."""
    batch, heads, _, queries, keys, *_ = shape
    query, key, value = operands(shape, dtype)
    parts = (query, (key + 3 * key[:, :, :1]).to(dtype), value)  # an offset that all keys share
    lists = drawn(heads, queries, keys, density, batch, *sizes)
    eight = heads_of(*[1, 0, 1, 1][:heads])
    rest = rest_of(parts, [1, 0, 1, 1][:heads], pool) if pool else None
    wide = size = None
    if rest is not None:
        wide = PooledRest(rest.key.double(), rest.value.double(), rest.heads, pool)
        size = PooledRest(rest.key.double(), rest.value.double().abs(), rest.heads, pool)
    found = attend(parts, lists, 0.2, rest, eight)
    block_sparse.check_against(found, parts, lists, 0.2, wide, size, int8=eight)
    plain = attend(parts, lists, 0.2, rest)
    for ours, native in zip(found, plain, strict=True):
        assert torch.equal(ours[:, eight == 0], native[:, eight == 0])
        assert (density > 0) == bool((ours[:, 0] != native[:, 0]).any())


def test_keys_are_quantised_as_the_reference_does() -> None:
    _, key, _ = operands((2, 2, 2, 1, 150, 40, 8), torch.bfloat16)
    key[0, 0, 64:128] = key.float().mean(2).to(key)[0, 0]  # next to nothing is left of a block
    key[1, 1, 3, 5], key[1, 0, 140, 0] = math.nan, math.inf
    for key_block in (64, 48, 200):
        ours, theirs = triton.quantised_keys(key.to(DEVICE), key_block), int8.quantised_keys(key, key_block)
        torch.testing.assert_close(ours.mean.cpu(), theirs.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.scales.cpu(), theirs.scales, rtol=1e-6, atol=1e-12, equal_nan=True)
        sound = theirs.scales.isfinite().repeat_interleave(key_block, -1)[..., :150]
        assert not sound.all() and (ours.numbers.cpu()[sound].int() - theirs.numbers[sound].int()).abs().max() <= 1
        if triton.INTERPRETED:
            assert torch.equal(ours.numbers[sound], theirs.numbers[sound])


def test_without_smoothing_an_offset_of_keys_takes_up_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SageAttention's reason to smooth keys: channels in which all tokens have about the same large number."""
    query, key, value = operands((1, 1, 1, 64, 256, 64, 64))
    key[..., ::8] += 60.0
    lists = drawn(1, 64, 256, 1.1)
    exact, logs = reference.block_sparse_attention(query.double(), key.double(), value.double(), lists, 0.125)

    def errors() -> tuple[float, float]:
        out, found = attend((query, key, value), lists, 0.125, int8=heads_of(1))
        return float((out - exact).norm() / exact.norm()), float((found - logs).abs().max())

    smoothed, of_logs = errors()
    assert smoothed < 0.025 and of_logs < 0.03
    monkeypatch.setattr(triton, "mean_of", lambda key: key.new_zeros(1, 1, 64))
    assert errors()[0] > 0.12, "6 times as much"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_makes_int8_scores_nan_and_others_none(dtype: torch.dtype) -> None:
    lists = BlockLists.from_map(torch.tensor([[[[True, False], [False, True]]]]), 64, 64)
    for number in (math.nan, math.inf, -math.inf):
        for position in (0, 1, 2):
            parts = operands((1, 1, 1, 128, 128, 16, 16), dtype)
            parts[position][0, 0, 7, 3] = number
            out, logs = attend(parts, lists, 0.25, int8=heads_of(1))
            assert out[0, 0, 64:].isfinite().all() and logs[0, 0, 64:].isfinite().all()
            if position == 0:  # of a query its own row
                assert out[0, 0, 7].isnan().all() and logs[0, 0, 7].isnan()
                assert out[0, 0, [*range(7), *range(8, 64)]].isfinite().all()
            elif position == 1:
                assert out[0, 0, :64].isnan().all() and logs[0, 0, :64].isnan().all()
            else:
                assert not out[0, 0, :64, 3].isfinite().any() and logs.isfinite().all()
                assert out[0, 0, :64, [0, 1, 2]].isfinite().all()


def test_queries_and_keys_of_nothing_but_zeros_have_equal_shares() -> None:
    query, key, value = operands((1, 1, 1, 64, 128, 16, 16))
    for parts in ((0 * query, key, value), (query, 0 * key, value), (query, 0 * key + 5, value)):
        out, logs = attend(parts, drawn(1, 64, 128, 1.1), 0.25, int8=heads_of(1))
        torch.testing.assert_close(out, value.mean(2, keepdim=True).expand(out.shape), atol=1e-5, rtol=1e-5)
        shift = 0.25 * parts[0] @ parts[1][..., :1, :].transpose(-2, -1)
        torch.testing.assert_close(logs, math.log(128) + shift[..., 0], atol=1e-4, rtol=1e-5)


def test_wrong_lists_give_nan_under_int8_scores_too() -> None:
    parts, lists = operands((1, 1, 1, 64, 130, 16, 16)), but_the_last(1, 64, 130)
    lists.indices[0, 0, 0, 1] = 2**30
    assert all(result.isnan().all() for result in attend(parts, lists, int8=heads_of(1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_int8_scores(layout: str) -> None:
    parts, lists = operands((2, 2, 2, 70, 100, 32, 16)), drawn(2, 70, 100, 0.8)
    query, key, value = laid_out(parts, layout)
    for ours, theirs in zip(
        attend((query, key, value), lists, int8=heads_of(1, 1)), attend(parts, lists, int8=heads_of(1, 1)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
