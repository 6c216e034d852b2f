"""Blocks that no list names, by the means of their keys: against float64, where they are exact, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_sparse_attention import cpu, reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import PooledRest, pool_tokens
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION
from tests.kernels.block_sparse import ROUNDING, Operands, check_against, drawn, operands
from tests.kernels.layouts import LAYOUTS, laid_out
from tests.kernels.test_block_sparse_attention import poisoned


def attend(
    parts: Operands, lists: BlockLists, scale: float, rest: PooledRest, lanes: int = cpu.WIDEST
) -> tuple[Tensor, Tensor]:
    """The kernel's result, in memory that held NaN."""
    of_rest = (rest.key, rest.value, rest.heads)
    with poisoned():
        return cpu.block_sparse_attention(
            *parts,
            lists.indices,
            lists.counts,
            lists.query_block,
            lists.key_block,
            scale,
            *of_rest,
            rest.pool,
            lanes=lanes,
        )


def rest_of(parts: Operands, heads: list[int], pool: int) -> PooledRest:
    return PooledRest.pooling(*parts[1:], torch.tensor(heads, dtype=torch.int32), pool)


def check(ours: tuple[Tensor, Tensor], parts: Operands, lists: BlockLists, scale: float, rest: PooledRest) -> None:
    """Against float64, given the same means."""
    wide = PooledRest(rest.key.double(), rest.value.double(), rest.heads, rest.pool)
    size = PooledRest(rest.key.double(), rest.value.double().abs(), rest.heads, rest.pool)
    check_against(ours, parts, lists, scale, wide, size)


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    own_lists=st.booleans(),
    group=st.integers(1, 2),
    heads=st.lists(st.integers(0, 1), min_size=2, max_size=2),
    queries=st.integers(1, 200),
    keys=st.integers(1, 1500),
    depth=st.integers(1, 96),
    width=st.integers(1, 80),
    density=st.floats(0.0, 1.0),
    pool=st.sampled_from([2, 4, 16, 64]),
    scale=st.floats(0.01, 0.3),
)
def test_it_is_as_near_to_float64_as_rounding_allows(
    lanes: int,
    dtype: torch.dtype,
    batch: int,
    own_lists: bool,
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
    lists, rest = drawn(2, queries, keys, density, batch if own_lists else 1), rest_of(parts, heads, pool)
    ours = attend(parts, lists, scale, rest, lanes)
    assert ours[0].dtype == dtype and ours[0].shape == (batch, 2, queries, width)
    check(ours, parts, lists, scale, rest)


def test_the_reference_is_what_it_says() -> None:
    """Softmax over keys and groups, written out for one query; the last group has 3 tokens."""
    query, key, value = (part.double() for part in operands((1, 1, 1, 1, 11, 4, 4)))
    lists = BlockLists.from_map(torch.tensor([[[[True, False]]]]), 64, 8)
    found, log = reference.block_sparse_attention(query, key, value, lists, 0.5, rest_of((query, key, value), [1], 4))
    scores = 0.5 * (query @ key.mT)[0, 0, 0, :8]
    last = 0.5 * query[0, 0, 0] @ key[0, 0, 8:].mean(0)
    mass = torch.cat([scores.exp(), 3 * last.exp()[None]])
    expected = mass @ torch.cat([value[0, 0, :8], value[0, 0, 8:].mean(0)[None]]) / mass.sum()
    torch.testing.assert_close(found[0, 0, 0], expected)
    torch.testing.assert_close(log[0, 0, 0], mass.sum().log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.4])
def test_groups_of_equal_keys_and_values_give_dense_attention(dtype: torch.dtype, density: float) -> None:
    """Also where no list names a block; 1,004 keys are 62 groups of 16 and one of 12."""
    query, key, value = operands((1, 2, 2, 130, 63, 32, 32), dtype)
    key, value = (part.repeat_interleave(16, 2)[:, :, :1004] for part in (key, value))
    parts, lists = (query, key, value), drawn(2, 130, 1004, density)
    out, logs = attend(parts, lists, 0.2, rest_of(parts, [1, 1], 16))
    wide = (query.double(), key.double(), value.double())
    exact, exact_logs = reference.block_sparse_attention(*wide, drawn(2, 130, 1004, 1.1), 0.2)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logs.double(), exact_logs, atol=2e-4, rtol=1e-5)


def test_heads_without_a_rest_are_bit_for_bit_those_of_the_plain_call() -> None:
    parts, lists = operands((2, 3, 3, 200, 300, 32, 16)), drawn(3, 200, 300, 0.4)
    plain, _ = cpu.block_sparse_attention(*parts, lists.indices, lists.counts, 64, 64, 0.2)
    found, _ = attend(parts, lists, 0.2, rest_of(parts, [0, 1, 0], 16))
    assert torch.equal(found[:, 0::2], plain[:, 0::2]) and not torch.equal(found[:, 1], plain[:, 1])


def test_lists_of_all_blocks_leave_nothing_to_the_rest() -> None:
    parts, lists = operands((1, 2, 2, 200, 300, 32, 16)), drawn(2, 200, 300, 1.1)
    plain = cpu.block_sparse_attention(*parts, lists.indices, lists.counts, 64, 64, 0.2)
    found = attend(parts, lists, 0.2, rest_of(parts, [1, 1], 4))
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_an_empty_list_without_a_rest_still_gives_zero() -> None:
    parts, lists = operands((1, 2, 2, 64, 300, 16, 16)), drawn(2, 64, 300, 0.0)
    out, logs = attend(parts, lists, 0.2, rest_of(parts, [0, 1], 64))
    assert (out[:, 0] == 0).all() and (logs[:, 0] == -math.inf).all()
    assert (out[:, 1] != 0).all() and logs[:, 1].isfinite().all()


def test_no_infinity_of_a_listed_block_comes_in_by_its_mean() -> None:
    """A key of -inf has no mass, but its group's mean of +-inf must not make the other groups' NaN."""
    parts = operands((1, 1, 1, 64, 256, 16, 16))
    parts[1][0, 0, 3] = -math.inf
    parts[1][0, 0, 5] = math.inf
    query = parts[0].abs() + 0.1
    lists = BlockLists.from_map(torch.tensor([[[[True, False, True, False]]]]), 64, 64)
    parts = (query, *parts[1:])
    out, logs = attend(parts, lists, 0.2, rest_of(parts, [1], 64))
    assert out.isnan().all() and (logs == math.inf).all(), "as dense attention has it"
    parts[1][0, 0, 5] = 0.0
    out, logs = attend(parts, lists, 0.2, rest_of(parts, [1], 64))
    assert out.isfinite().all() and logs.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    parts, lists = operands((2, 3, 3, 70, 300, 32, 16)), drawn(3, 70, 300, 0.4)
    rest = rest_of(parts, [1, 0, 1], 16)
    expected, _ = attend(parts, lists, 0.2, rest)
    _, key, value = laid_out((rest.key, rest.key, rest.value), layout)
    turned = PooledRest(key, value, rest.heads, rest.pool)
    query, key, value = laid_out(parts, layout)
    assert torch.equal(attend((query, key, value), lists, 0.2, turned)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    parts, lists, before = (
        operands((1, 3, 3, 300, 430, 32, 32), dtype),
        drawn(3, 300, 430, 0.5),
        torch.get_num_threads(),
    )
    rest = rest_of(parts, [1, 0, 1], 16)
    torch.set_num_threads(3)
    many = attend(parts, lists, 0.2, rest)
    torch.set_num_threads(1)
    try:
        assert all(torch.equal(one, two) for one, two in zip(attend(parts, lists, 0.2, rest), many, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [64, 70, 3])
def test_means_are_of_the_tokens_that_there_are(tokens: int) -> None:
    whole = torch.randn(2, 3, tokens, 5, dtype=torch.float64)
    found = pool_tokens(whole, 16)
    assert found.shape == (2, 3, -(-tokens // 16), 5)
    for group in range(found.shape[2]):
        torch.testing.assert_close(found[:, :, group], whole[:, :, 16 * group : 16 * group + 16].mean(2))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_schema_and_the_fake_hold(dtype: torch.dtype) -> None:
    parts, lists = operands((2, 4, 2, 130, 50, 32, 16), dtype), drawn(4, 130, 50, 0.9)
    rest = rest_of(parts, [1, 0, 1, 1], 16)
    arguments = (*parts, lists.indices, lists.counts, 64, 64, 0.2, rest.key, rest.value, rest.heads, 16)
    torch.library.opcheck(BLOCK_SPARSE_ATTENTION, arguments, test_utils=("test_schema", "test_faketensor"))


def test_inductor_takes_it_with_the_means_in_the_graph() -> None:
    parts, lists = operands((1, 2, 2, 130, 133, 32, 32)), drawn(2, 130, 133, 0.4)
    heads = torch.tensor([1, 0], dtype=torch.int32)

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rest = PooledRest.pooling(key, value, heads, 16)
        pooled = (rest.key, rest.value, rest.heads, rest.pool)
        out, _ = BLOCK_SPARSE_ATTENTION(query, key, value, lists.indices, lists.counts, 64, 64, 0.2, *pooled)
        return torch.as_tensor(2 * out.transpose(1, 2).flatten(2))

    compiled: Any = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*parts), step(*parts))


def refused(parts: Operands, lists: BlockLists, *pooled: Any) -> str:
    with pytest.raises(ValueError, match=r"ditopt::block_sparse_attention: ") as caught:
        cpu.block_sparse_attention(*parts, lists.indices, lists.counts, 64, 64, 0.25, *pooled)
    return str(caught.value)


def test_what_the_kernel_does_not_take_has_a_reason() -> None:
    parts, lists = operands((1, 2, 2, 130, 130, 16, 16)), drawn(2, 130, 130, 0.5)
    rest = rest_of(parts, [1, 1], 16)
    assert "a pool of 48 tokens does not divide blocks of 64 keys" in refused(
        parts, lists, rest.key, rest.value, rest.heads, 48
    )
    assert "a pool of 0 tokens" in refused(parts, lists, rest.key, rest.value, rest.heads, 0)
    assert "pooled keys are torch.float32 [1, 2, 9, 16], not torch.float32 [1, 2, 17, 16]" in refused(
        parts, lists, rest.key, rest.value, rest.heads, 8
    )
    assert "pooled values are torch.float64" in refused(parts, lists, rest.key, rest.value.double(), rest.heads, 16)
    assert "torch.int64 [2], not torch.int32 [2]" in refused(parts, lists, rest.key, rest.value, rest.heads.long(), 16)
    assert "torch.int32 [1], not torch.int32 [2]" in refused(parts, lists, rest.key, rest.value, rest.heads[:1], 16)
    assert "for meta" in refused(parts, lists, rest.key.to("meta"), rest.value, rest.heads, 16)
    for part in ((rest.key,), (rest.key, rest.value), (rest.key, None, rest.heads, 16), (None, None, None, 16)):
        assert "go together" in refused(parts, lists, *part)
    with pytest.raises(ValueError, match="a pool of 48 tokens does not divide"):
        reference.block_sparse_attention(*parts, lists, 0.25, PooledRest(rest.key, rest.value, rest.heads, 48))
