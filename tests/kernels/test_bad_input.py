"""Operands and lists that are none: every operator and the reference refuse them by name, or have a defined result."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import clusters, cpu, draft, linear, reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, CLUSTER_ORDER, DRAFT_LISTS, LINEAR_REST
from tests.kernels.block_sparse import Operands, but_the_last, operands

REGISTERED = clusters, cpu, draft, linear
"""Modules that implement the operators below."""
Run = Callable[[Operands, BlockLists], object]


def plain(parts: Operands, lists: BlockLists) -> object:
    return reference.block_sparse_attention(*parts, lists, 0.2)


def kernel(parts: Operands, lists: BlockLists) -> object:
    return BLOCK_SPARSE_ATTENTION(*parts, lists.indices, lists.counts, 64, 64, 0.2)


def drafted(parts: Operands, lists: BlockLists) -> object:
    heads = parts[0].shape[1]
    limits = torch.ones(heads, dtype=torch.int32), torch.full((heads,), math.inf)
    return DRAFT_LISTS(*parts[:2], lists.indices, lists.counts, *limits, 64, 64, 0.2)


def linear_part(parts: Operands, lists: BlockLists) -> object:
    projection = torch.zeros(parts[0].shape[1], 16, 16)
    return LINEAR_REST(*parts, lists.indices, lists.counts, projection, 64, 64)


def clustered(parts: Operands, lists: BlockLists) -> object:
    heads, tokens = parts[0].shape[1:3]
    order, of_heads = torch.arange(tokens), torch.ones(heads, dtype=torch.int32)
    return CLUSTER_ORDER(*parts[:2], order, of_heads, 0, tokens, 2, 1)


WITH_LISTS = [plain, kernel, drafted, linear_part]


def of_sizes(heads: int, key_heads: int, queries: int, keys: int) -> Operands:
    return operands((1, heads, key_heads, queries, keys, 16, 16))


def of_all(heads: int, queries: int, keys: int) -> BlockLists:
    counts = torch.full((1, heads, -(-queries // 64)), -(-keys // 64), dtype=torch.int32)
    return BlockLists(counts.new_zeros((*counts.shape, 1)), counts, 64, 64)


@pytest.mark.parametrize("run", [*WITH_LISTS, clustered])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 2), (1, 2), (2, 3)])
def test_heads_that_do_not_match_are_refused(run: Run, heads: int, key_heads: int) -> None:
    with pytest.raises(ValueError, match=r"heads.* do not match"):
        run(of_sizes(heads, key_heads, 130, 130), but_the_last(heads, 130, 130))


@pytest.mark.parametrize("run", WITH_LISTS)
def test_lists_of_other_heads_or_queries_are_refused(run: Run) -> None:
    for lists in (but_the_last(3, 130, 130), but_the_last(2, 200, 130)):
        with pytest.raises(ValueError, match=r"lists are for \[1, . ?, .\]|the operands have"):
            run(of_sizes(2, 2, 130, 130), lists)


@pytest.mark.parametrize("run", WITH_LISTS)
@pytest.mark.parametrize(
    ("entries", "count", "told"),
    [
        ([0, 3], 2, "names key block 3"),
        ([-1, 1], 2, "names key block -1"),
        ([1, 0], 2, "names key block 0"),
        ([0, 1], 4, "has 4 entries, its padding has room for 0 to 2"),
        ([0, 1], -1, "has -1 entries"),
    ],
)
def test_lists_that_are_wrong_are_refused(run: Run, entries: list[int], count: int, told: str) -> None:
    lists = but_the_last(2, 130, 130)
    lists.indices[0, 1, 2] = torch.tensor(entries, dtype=torch.int32)
    lists.counts[0, 1, 2] = count
    with pytest.raises(ValueError, match=f"head 1, query block 2 {told}"):
        run(of_sizes(2, 2, 130, 130), lists)


@pytest.mark.parametrize("run", [kernel, drafted, linear_part, clustered])
@pytest.mark.parametrize(("queries", "keys"), [(0, 130), (130, 0), (0, 0)])
def test_no_kernel_takes_operands_without_any_token(run: Run, queries: int, keys: int) -> None:
    with pytest.raises(ValueError, match="a size is 0, so there is no token, head or channel at all"):
        run(of_sizes(2, 2, queries, keys), of_all(2, queries, keys))


def test_attention_to_no_key_is_defined_as_that_of_an_empty_list() -> None:
    out, logs = reference.block_sparse_attention(*of_sizes(2, 2, 130, 0), of_all(2, 130, 0), 0.2)
    assert out.shape == (1, 2, 130, 16) and not out.any() and (logs == -math.inf).all()


@pytest.mark.parametrize("run", [plain, kernel])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_is_in_every_result_that_attends_to_it_and_in_no_other(run: Run, part: int) -> None:
    parts, lists = of_sizes(1, 1, 130, 130), but_the_last(1, 130, 130)
    parts[part][0, 0, 7, 3] = math.nan
    lists.counts[0, 0, 1], lists.indices[0, 0, 1, 0] = 1, 1  # the second block of queries does not attend to it
    out = run(parts, lists)
    assert isinstance(out, tuple) and isinstance(out[0], Tensor)
    wrong = out[0].isnan().any(-1)[0, 0]
    expected = torch.zeros(130, dtype=torch.bool)
    if part == 0:
        expected[7] = True
    else:
        expected[:64] = expected[128:] = True
    assert torch.equal(wrong, expected)
