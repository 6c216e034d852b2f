"""What is not listed by means and, to first order, by what keys and values have together: PISA's form, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_sparse_attention import cpu, reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import FIRST_ORDER, ZEROTH_ORDER, PooledRest, moments
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION
from tests.kernels.block_sparse import ROUNDING, Operands, check_against, drawn, operands
from tests.kernels.test_pooled_rest import attend, rest_of


def published(query: Tensor, key: Tensor, value: Tensor, listed: list[list[int]], block: int, scale: float) -> Tensor:
    """Of one head, as PISA's kernel has it (arXiv 2602.01077): its three phases, one query after the other."""
    tokens, parts = len(key), range(0, len(key), block)
    blocks = [(key[at : at + block], value[at : at + block]) for at in parts]
    together = sum(((keys - keys.mean(0)).T @ values for keys, values in blocks), torch.zeros(1))
    rows = []
    for place, one in enumerate(query):
        accumulated, total, of_rest = torch.zeros(value.shape[1]).double(), 0.0, 0.0
        for number, (keys, values) in enumerate(blocks):
            if number in listed[place // block]:
                shares = torch.exp(scale * keys @ one)
                accumulated, total = accumulated + shares @ values, total + float(shares.sum())
            else:
                share = float(torch.exp(scale * keys.mean(0) @ one))
                accumulated, of_rest = accumulated + share * values.sum(0), of_rest + share * len(keys)
        accumulated = accumulated + one @ together * (of_rest / tokens * scale)
        rows.append(accumulated / (total + of_rest))
    return torch.stack(rows)


@pytest.mark.parametrize("listed", [[[0, 2], [1]], [[], [0, 1, 2, 3, 4]], [[4], [3]]])
def test_the_reference_is_what_is_published(listed: list[list[int]]) -> None:
    query, key, value = (part.double() for part in operands((1, 1, 1, 128, 300, 8, 6)))
    attended = torch.tensor([[[[number in each for number in range(5)] for each in listed]]])
    parts, lists = (query, key, value), BlockLists.from_map(attended, 64, 64)
    found, _ = reference.block_sparse_attention(*parts, lists, 0.2, rest_of(parts, [FIRST_ORDER], 64))
    expected = published(query[0, 0], key[0, 0], value[0, 0], listed, 64, 0.2)
    torch.testing.assert_close(found[0, 0], expected)
    zeroth, _ = reference.block_sparse_attention(*parts, lists, 0.2, rest_of(parts, [ZEROTH_ORDER], 64))
    whole = [len(each) == 5 for each in listed]
    differs = ((found - zeroth).abs().amax((0, 1, 3)) > 1e-6).view(2, 64).all(1).tolist()
    assert differs == [not each for each in whole], "where nothing is skipped there is no such term"


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    heads=st.lists(st.integers(0, 2), min_size=2, max_size=2),
    queries=st.integers(1, 200),
    keys=st.integers(1, 900),
    depth=st.integers(1, 96),
    width=st.integers(1, 80),
    density=st.floats(0.0, 1.0),
    pool=st.sampled_from([4, 16, 64]),
    scale=st.floats(0.01, 0.3),
)
def test_it_is_as_near_to_float64_as_rounding_allows(
    lanes: int,
    dtype: torch.dtype,
    batch: int,
    group: int,
    heads: list[int],
    queries: int,
    keys: int,
    depth: int,
    width: int,
    density: float,
    pool: int,
    scale: float,
) -> None:
    parts = operands((batch, 2, 2 // group, queries, keys, depth, width), dtype)
    lists, rest = drawn(2, queries, keys, density, batch), rest_of(parts, heads, pool)
    ours = attend(parts, lists, scale, rest, lanes)
    wide = PooledRest(rest.key.double(), rest.value.double(), rest.heads, pool)
    size = PooledRest(wide.key, wide.value.abs(), rest.heads.clamp(max=1), pool)
    query, key, value = (part.double() for part in parts)
    bounds = query.abs() @ (2 * key.abs().mT @ value.abs() / keys).repeat_interleave(group, 1)
    further = scale * bounds * (rest.heads == FIRST_ORDER)[:, None, None]
    check_against(ours, parts, lists, scale, wide, size, further)


def test_heads_without_it_are_bit_for_bit_as_they_were() -> None:
    parts, lists = operands((2, 3, 3, 200, 300, 32, 16)), drawn(3, 200, 300, 0.4)
    before, logs = attend(parts, lists, 0.2, rest_of(parts, [0, 1, 1], 16))
    found, found_logs = attend(parts, lists, 0.2, rest_of(parts, [0, 1, 2], 16))
    assert torch.equal(found[:, :2], before[:, :2]) and torch.equal(found_logs, logs), "no mass comes with it"
    assert (found[:, 2] - before[:, 2]).abs().max() > 1e-3


def near_means(spread: float) -> Operands:
    """Groups of 16 keys and values that differ from their means alike in every group."""
    generator = torch.Generator().manual_seed(0)
    of_keys, of_values = (torch.randn(1, 2, 16, 8, generator=generator) for _ in range(2))
    means = [torch.randn(1, 2, 20, 8, generator=generator).repeat_interleave(16, 2) for _ in range(2)]
    key, value = (mean + (part - part.mean(2, keepdim=True)).repeat(1, 1, 20, 1) * by
                  for mean, part, by in zip(means, (of_keys, of_values), (spread, 1.0), strict=True))  # fmt: skip
    return torch.randn(1, 2, 130, 8, generator=generator), key, value


def test_its_error_is_of_second_order_where_groups_are_alike() -> None:
    """Of a tenth of the spread it has a hundredth, and means alone a tenth."""
    errors = {}
    for spread in (0.1, 0.01):
        query, key, value = (part.double() for part in near_means(spread))
        parts, lists = (query, key, value), drawn(2, 130, 320, 0.3)
        dense, _ = reference.block_sparse_attention(*parts, drawn(2, 130, 320, 1.1), 0.4)
        for order in (ZEROTH_ORDER, FIRST_ORDER):
            out, _ = reference.block_sparse_attention(*parts, lists, 0.4, rest_of(parts, [order] * 2, 16))
            errors[spread, order] = float((out - dense).norm() / dense.norm())
    assert errors[0.01, FIRST_ORDER] < 0.1 * errors[0.01, ZEROTH_ORDER]
    assert errors[0.1, FIRST_ORDER] / errors[0.01, FIRST_ORDER] == pytest.approx(100, rel=0.2)
    assert errors[0.1, ZEROTH_ORDER] / errors[0.01, ZEROTH_ORDER] == pytest.approx(10, rel=0.2)


def test_moments_are_of_the_tokens_that_there_are() -> None:
    _, key, value = operands((2, 2, 2, 1, 70, 8, 6), torch.bfloat16)
    found = moments(key, value, 16)
    assert found.dtype == torch.float32 and found.shape == (2, 2, 8, 6)
    wide = moments(key.double(), value.double(), 16, torch.float64)
    torch.testing.assert_close(found.double(), wide, rtol=1e-4, atol=1e-5)
    assert (moments(key, torch.ones_like(value), 16).abs() < 1e-5).all(), "what differs from means sums up to nothing"


def test_means_that_are_large_do_not_drown_what_differs_from_them() -> None:
    """In bfloat16 a product of rounded means would be off by more than the term itself."""
    _, key, value = operands((1, 1, 1, 1, 256, 8, 8))
    key, value = (key + 30).bfloat16(), (value + 30).bfloat16()
    wide = moments(key.double(), value.double(), 16, torch.float64)
    assert float((moments(key, value, 16) - wide).norm() / wide.norm()) < 1e-4


def test_it_reads_every_key_and_value_of_its_head() -> None:
    first = torch.tensor([True, False]).expand(1, 2, 1, 2)
    parts, lists = operands((1, 2, 2, 64, 128, 16, 16)), BlockLists.from_map(first, 64, 64)
    parts[2][0, :, 100, 3] = math.nan
    rest = rest_of((parts[0], parts[1], parts[2].nan_to_num(0)), [1, 2], 64)
    out, _ = attend(parts, lists, 0.2, rest)
    assert out[0, 0].isfinite().all(), "by means that are numbers nothing of it is seen"
    assert out[0, 1, :, 3].isnan().all() and out[0, 1, :, :3].isfinite().all()


def test_the_operator_takes_it() -> None:
    parts, lists = operands((2, 4, 2, 130, 50, 32, 16)), drawn(4, 130, 50, 0.4)
    rest = rest_of(parts, [1, 0, 2, 2], 16)
    arguments = (*parts, lists.indices, lists.counts, 64, 64, 0.2, rest.key, rest.value, rest.heads, 16)
    torch.library.opcheck(BLOCK_SPARSE_ATTENTION, arguments, test_utils=("test_schema", "test_faketensor"))
    plain = cpu.block_sparse_attention(*parts, lists.indices, lists.counts, 64, 64, 0.2)[0]
    found = BLOCK_SPARSE_ATTENTION(*arguments)[0]
    assert torch.equal(found[:, 1], plain[:, 1]) and not torch.equal(found[:, 2], plain[:, 2])
