"""Int8 scores on processors, against float64 of the same numbers; smoothing; what is not finite; refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt._torch import has_byte_dot_products
from ditopt.kernels import ops
from ditopt.kernels.block_sparse_attention import cpu, int8, reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import PooledRest
from tests.kernels.block_sparse import ROUNDING, Operands, check_against, drawn, operands
from tests.kernels.layouts import LAYOUTS, laid_out
from tests.kernels.test_block_sparse_attention import poisoned

needs_bytes = pytest.mark.skipif(not has_byte_dot_products(), reason="no dot products of bytes (avx512_vnni)")


def heads_of(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attend(
    parts: Operands,
    lists: BlockLists,
    heads: Tensor | None,
    scale: float = 0.2,
    rest: PooledRest | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    query, key, value = parts
    sizes = (lists.query_block, lists.key_block, scale)
    named: dict[str, Any] = {"mask": mask, "int8": heads}
    if rest is not None:
        named |= {"pooled_key": rest.key, "pooled_value": rest.value, "rest": rest.heads, "pool": rest.pool}
    with poisoned():
        return cpu.block_sparse_attention(query, key, value, lists.indices, lists.counts, *sizes, **named)


@needs_bytes
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("shape", "sizes", "density", "pool"),
    [
        ((1, 2, 2, 130, 200, 64, 64), (64, 64), 0.6, 0),
        ((2, 4, 2, 70, 150, 40, 24), (64, 64), 0.6, 0),  # two heads to a key's, short blocks
        ((1, 2, 2, 64, 90, 33, 33), (64, 4), 0.5, 0),  # channels that fill no word
        ((1, 1, 1, 65, 300, 128, 16), (64, 192), 1.1, 0),
        ((2, 4, 2, 70, 150, 40, 24), (64, 64), 0.5, 16),  # beside a rest
        ((1, 2, 1, 64, 300, 16, 48), (64, 48), 0.0, 4),  # nothing listed
    ],
)
def test_it_is_as_near_to_the_quantised_numbers_as_rounding_allows(
    shape: tuple[int, int, int, int, int, int, int],
    sizes: tuple[int, int],
    density: float,
    pool: int,
    dtype: torch.dtype,
) -> None:
    batch, heads, _, queries, keys, *_ = shape
    query, key, value = operands(shape, dtype)
    parts = (query, (key + 3 * key[:, :, :1]).to(dtype), value)  # an offset that all keys share
    lists, eight = drawn(heads, queries, keys, density, batch, *sizes), heads_of(*[1, 0, 1, 1][:heads])
    rest = wide = size = None
    if pool:
        rest = PooledRest.pooling(*parts[1:], eight, pool)
        wide = PooledRest(rest.key.double(), rest.value.double(), rest.heads, pool)
        size = PooledRest(rest.key.double(), rest.value.double().abs(), rest.heads, pool)
    found, plain = attend(parts, lists, eight, 0.2, rest), attend(parts, lists, None, 0.2, rest)
    check_against(found, parts, lists, 0.2, wide, size, int8=eight)
    for ours, native in zip(found, plain, strict=True):
        assert torch.equal(ours[:, eight == 0], native[:, eight == 0])
        assert (density > 0) == bool((ours[:, 0] != native[:, 0]).any())


@needs_bytes
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 130),
    keys=st.integers(1, 260),
    depth=st.integers(1, 90),
    key_block=st.sampled_from([2, 48, 64, 128]),
    density=st.floats(0.0, 1.1),
    masked=st.booleans(),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_any_sizes_and_masks_are_taken(
    batch: int, queries: int, keys: int, depth: int, key_block: int, density: float, masked: bool, dtype: torch.dtype
) -> None:
    parts = operands((batch, 2, 1, queries, keys, depth, 8), dtype)
    lists = drawn(2, queries, keys, density, key_block=key_block)
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(0)
        mask = torch.randn(queries, keys, generator=generator).masked_fill(torch.rand(queries, keys) < 0.3, -math.inf)
    check_against(attend(parts, lists, heads_of(1, 1), mask=mask), parts, lists, 0.2, mask=mask, int8=heads_of(1, 1))


@needs_bytes
def test_a_rest_to_first_order_goes_with_it() -> None:
    parts, lists, eight = operands((1, 2, 2, 70, 300, 32, 16)), drawn(2, 70, 300, 0.5), heads_of(1, 0)
    rest = PooledRest.pooling(*parts[1:], heads_of(2, 2), 16)
    out, logs = attend(parts, lists, eight, 0.2, rest)
    wide = [part.double() for part in parts]
    means = PooledRest.pooling(wide[1], wide[2], rest.heads, 16)
    exact, exact_logs = reference.block_sparse_attention(wide[0], wide[1], wide[2], lists, 0.2, means, int8=eight)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logs.double(), exact_logs, rtol=1e-5, atol=1e-5)


def errors(parts: Operands, lists: BlockLists, scale: float) -> tuple[float, float]:
    query, key, value = (part.double() for part in parts)
    exact, logs = reference.block_sparse_attention(query, key, value, lists, scale)
    out, found = attend(parts, lists, heads_of(1), scale)
    return float((out - exact).norm() / exact.norm()), float((found - logs).abs().max())


@needs_bytes
def test_without_smoothing_an_offset_of_keys_takes_up_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SageAttention's reason to smooth keys: channels in which all tokens have about the same large number."""
    query, key, value = operands((1, 1, 1, 64, 256, 64, 64))
    key[..., ::8] += 60.0
    smoothed, of_logs = errors((query, key, value), drawn(1, 64, 256, 1.1), 0.125)
    assert smoothed < 0.025 and of_logs < 0.03
    monkeypatch.setattr(cpu, "mean_of", lambda key: key.new_zeros(1, 1, 64))
    rough, _ = errors((query, key, value), drawn(1, 64, 256, 1.1), 0.125)
    assert rough > 0.12, "6 times as much"


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_makes_its_scores_nan_and_no_others(dtype: torch.dtype) -> None:
    lists = BlockLists.from_map(torch.tensor([[[[True, False], [False, True]]]]), 64, 64)
    for number in (math.nan, math.inf, -math.inf):
        for position in (0, 1, 2):
            parts = operands((1, 1, 1, 128, 128, 16, 16), dtype)
            parts[position][0, 0, 7, 3] = number
            out, logs = attend(parts, lists, heads_of(1))
            assert out[0, 0, 64:].isfinite().all() and logs[0, 0, 64:].isfinite().all()
            if position == 0:  # of a query its own row
                assert out[0, 0, 7].isnan().all() and logs[0, 0, 7].isnan()
                assert out[0, 0, [*range(7), *range(8, 64)]].isfinite().all()
            elif position == 1:
                assert out[0, 0, :64].isnan().all() and logs[0, 0, :64].isnan().all()
            else:
                assert not out[0, 0, :64, 3].isfinite().any() and logs.isfinite().all()


@needs_bytes
def test_queries_and_keys_of_nothing_but_zeros_have_equal_shares() -> None:
    query, key, value = operands((1, 1, 1, 64, 128, 16, 16))
    for parts in ((0 * query, key, value), (query, 0 * key, value), (query, 0 * key + 5, value)):
        out, logs = attend(parts, drawn(1, 64, 128, 1.1), heads_of(1), 0.25)
        torch.testing.assert_close(out, value.mean(2, keepdim=True).expand(out.shape), atol=1e-5, rtol=1e-5)
        shift = 0.25 * parts[0] @ parts[1][..., :1, :].transpose(-2, -1)
        torch.testing.assert_close(logs, math.log(128) + shift[..., 0], atol=1e-4, rtol=1e-5)


@needs_bytes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    parts, lists = operands((2, 2, 2, 70, 100, 32, 16)), drawn(2, 70, 100, 0.8)
    query, key, value = laid_out(parts, layout)
    for ours, theirs in zip(
        attend((query, key, value), lists, heads_of(1, 1)), attend(parts, lists, heads_of(1, 1)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_where_it_is_not_taken_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, lists = operands((1, 2, 2, 64, 64, 16, 16)), drawn(2, 64, 64, 1.1)
    given = (*parts, lists.indices, lists.counts, 64, 64, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "has_byte_dot_products", lambda: True)
        with pytest.raises(
            ValueError, match=r"heads that have int8 scores are torch\.int64 \[2\], not torch\.int32 \[2\]"
        ):
            cpu.block_sparse_attention(*given, int8=torch.ones(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="in vectors of 4 floats there is no kernel with int8 scores"):
            cpu.block_sparse_attention(*given, int8=heads_of(1, 1), lanes=4)
    monkeypatch.setattr(ops, "has_byte_dot_products", lambda: False)
    with pytest.raises(
        ValueError, match=r"int8 scores .* for processors without dot products of bytes \(avx512_vnni\)"
    ):
        cpu.block_sparse_attention(*given, int8=heads_of(1, 1))


def test_numbers_are_as_near_as_their_scales_say() -> None:
    key = 1.5 * torch.randn(2, 3, 150, 16, generator=torch.Generator().manual_seed(0)) + 4
    found = int8.quantised_keys(key, 64)
    scales = found.scales.repeat_interleave(64, -1)[..., :150, None]
    again = found.numbers * scales + found.mean[:, :, None]
    assert ((again - key).abs() <= 0.5001 * scales).all() and found.numbers.abs().amax() == int8.LARGEST
    assert (found.mean - key.mean(2)).abs().max() < 1e-5
