"""Lists that are found in a call: against the definition block by block, what is defined and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_sparse_attention.cpu import block_sparse_attention
from ditopt.kernels.block_sparse_attention.draft import draft_lists, draft_map
from ditopt.kernels.block_sparse_attention.lists import BlockLists, check_entries
from ditopt.kernels.block_sparse_attention.pooled import pool_tokens
from ditopt.kernels.ops import DRAFT_LISTS

INF = math.inf


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small ones, of which means in blocks of a power of two are exact; scores tie often."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def lists_of(always: Tensor, query_block: int, key_block: int, width: int | None = None) -> BlockLists:
    return BlockLists.from_map(always, query_block, key_block, width or always.shape[-1])


def called(query: Tensor, key: Tensor, lists: BlockLists, keep: list[int], mass: list[float], scale: float) -> Tensor:
    """The operator's lists, as a map ``[B, H, Qb, Kb]``."""
    given = (lists.indices, lists.counts, torch.tensor(keep, dtype=torch.int32), torch.tensor(mass))
    indices, counts = DRAFT_LISTS(query, key, *given, lists.query_block, lists.key_block, scale)
    found = BlockLists(indices, counts, lists.query_block, lists.key_block)
    assert found.indices.dtype == found.counts.dtype == torch.int32
    assert found.indices.is_contiguous() and found.indices.shape[-1] == lists.indices.shape[-1]
    assert check_entries(found, key.shape[2]) is None, "in range, in ascending order, inside the padding"
    return found.to_map(-(-key.shape[2] // lists.key_block))


def scores_of_means(
    query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, int], scale: float
) -> list[list[float]]:
    """By block of queries and of keys of one head, in Python's numbers."""

    def means(tokens: list[list[float]], block: int) -> list[list[float]]:
        parts = [tokens[at : at + block] for at in range(0, len(tokens), block)]
        return [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]

    of_keys = means(key.tolist(), sizes[1])
    return [
        [scale * sum(a * b for a, b in zip(of_query, each, strict=True)) for each in of_keys]
        for of_query in means(query.tolist(), sizes[0])
    ]


def scores_of_mass(
    query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, int], scale: float
) -> list[list[float]]:
    """Of one head: the logarithm of what each block of the full map holds, mean over its rows."""
    full = torch.softmax(scale * query.double() @ key.double().T, -1)
    return [
        [math.log(float(part.sum(1).mean())) for part in rows.split(sizes[1], 1)] for rows in full.split(sizes[0], 0)
    ]


def scores_of_error(
    query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, int], scale: float
) -> list[list[float]]:
    """Of one head: the scores of means, and for each block of keys ``log |sum (k - k_mean) v^T|``, key by key."""
    sizes_of = []
    for keys, values in zip(key.double().split(sizes[1], 0), value.double().split(sizes[1], 0), strict=True):
        left = torch.zeros(key.shape[1], value.shape[1], dtype=torch.float64)
        for one, other in zip(keys, values, strict=True):
            left += torch.outer(one - keys.mean(0), other)
        norm = math.sqrt(sum(each**2 for each in left.flatten().tolist()))
        sizes_of.append(math.log(norm) if norm else -math.inf)
    return [
        [score + size for score, size in zip(row, sizes_of, strict=True)]
        for row in scores_of_means(query, key, value, sizes, scale)
    ]


LITERAL = {"means": scores_of_means, "mass": scores_of_mass, "error": scores_of_error}


def literal(
    query: Tensor,
    key: Tensor,
    always: Tensor,
    sizes: tuple[int, int],
    keep: list[int],
    mass: list[float],
    scale: float,
    value: Tensor | None = None,
    by: Sequence[str] | None = None,
    seen: Tensor | None = None,
) -> list[Any]:
    """The definition, one block after the other; ``by`` is what each head's blocks are chosen by.

    Blocks of which no pair is ``seen`` (``[B, H, S, L]`` boolean, a mask) are not there.
    """
    value = key if value is None else value
    found: list[Any] = []
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scored = LITERAL["means" if by is None else by[head]]
            of_head = scored(query[sample, head], key[sample, group], value[sample, group], sizes, scale)
            for row, scores in enumerate(of_head):
                forced = always[sample if len(always) > 1 else 0, head, row].tolist()
                there = [True] * len(scores)
                if seen is not None:
                    rows = seen[sample, head, sizes[0] * row : sizes[0] * (row + 1)]
                    there = [bool(part.any()) for part in rows.split(sizes[1], -1)]
                    scores = [score if held else -math.inf for score, held in zip(scores, there, strict=True)]
                    forced = [given and held for given, held in zip(forced, there, strict=True)]
                weights = [math.exp(score - max(scores)) for score in scores]
                best = sorted(range(len(scores)), key=lambda at: (not forced[at], -scores[at], at))
                kept, held = [], 0.0
                for rank, at in enumerate(best):
                    if forced[at] or (there[at] and rank < keep[head] and held < mass[head]):
                        kept.append(at)
                    held += weights[at] / sum(weights)
                found.append([at in kept for at in range(len(scores))])
    return found


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 2), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(1, 40), st.integers(1, 40)
    ),
    query_block=st.sampled_from([4, 8]),
    key_block=st.sampled_from([2, 4, 8]),
    keep=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    mass=st.lists(st.sampled_from([0.0, 0.37, 0.913, INF]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_lists_are_the_best_blocks_of_the_means(
    sizes: tuple[int, tuple[int, int], int, int], query_block: int, key_block: int, keep: list[int], mass: list[float],
    seed: int,
) -> None:  # fmt: skip
    batch, (heads, key_heads), queries, keys = sizes
    keep, mass = keep[:heads], mass[:heads]
    query = whole_numbers(batch, heads, queries, 4, seed=seed)
    key = whole_numbers(batch, key_heads, keys, 4, seed=seed + 1)
    if queries % query_block or keys % key_block:  # a mean of three is not exact: without ties, rounding is nothing
        query, key = (
            part + torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)) for part in (query, key)
        )
    shape = (1, heads, -(-queries // query_block), -(-keys // key_block))
    always = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    lists = lists_of(always, query_block, key_block)
    found = called(query, key, lists, keep, mass, 0.5)
    expected = literal(query, key, always, (query_block, key_block), keep, mass, 0.5)
    assert found.flatten(0, 2).tolist() == expected


def test_text_rows_and_columns_and_the_own_block_come_on_top() -> None:
    """As a plan has them: what is always kept counts among the blocks that a head may have."""
    always = torch.eye(6, dtype=torch.bool)
    always[0] = always[:, 0] = True
    query, key = whole_numbers(1, 1, 24, 4), whole_numbers(1, 1, 24, 4, seed=1)
    for keep in range(8):
        found = called(query, key, lists_of(always[None, None], 4, 4), [keep], [INF], 0.5)[0, 0]
        assert (found | ~always).all() and found[0].all()
        assert found[1:].sum(-1).tolist() == [min(max(2, keep), 6)] * 5


def test_lists_have_no_more_than_they_have_room_for() -> None:
    query, key = whole_numbers(2, 2, 32, 4), whole_numbers(2, 2, 32, 4, seed=1)
    lists = lists_of(torch.eye(8, dtype=torch.bool).expand(1, 2, 8, 8), 4, 4, width=3)
    wide = lists_of(torch.eye(8, dtype=torch.bool).expand(1, 2, 8, 8), 4, 4)
    found = called(query, key, lists, [100, 2], [INF, INF], 0.5)
    assert torch.equal(found, called(query, key, wide, [3, 2], [INF, INF], 0.5))
    assert found.sum(-1).unique().tolist() == [2, 3]


def test_of_equal_scores_the_first_are_taken() -> None:
    zero = torch.zeros(1, 1, 32, 4)
    own = torch.eye(8, dtype=torch.bool)[None, None]
    found = called(zero, zero, lists_of(own, 4, 4), [3], [INF], 0.5)[0, 0]
    assert found[5].nonzero().flatten().tolist() == [0, 1, 5] and found[0].nonzero().flatten().tolist() == [0, 1, 2]
    found = called(zero, zero, lists_of(own, 4, 4), [8], [0.5], 0.5)[0, 0]
    assert found.sum(-1).tolist() == [4] * 8, "of eight equal shares four are half"


def test_other_shares_come_as_numbers_and_a_mass_of_nothing_or_all_is_defined() -> None:
    query, key = (torch.randn(1, 3, 64, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    own = lists_of(torch.eye(8, dtype=torch.bool).expand(1, 3, 8, 8), 8, 8)
    counts = called(query, key, own, [0, 8, 8], [INF, 0.0, 1.0], 8**-0.5).sum(-1)[0]
    assert counts[:2].unique().tolist() == [1] and counts[2].min() >= 7, "the last block may weigh nothing in float32"
    ragged = called(query, key, own, [8, 8, 4], [0.6, 0.9, 0.9], 1.0).sum(-1)[0]
    assert len(ragged.unique()) > 2 and ragged[2].max() <= 4


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_no_number_is_attended_to(value: float, where: str) -> None:
    query, key = (torch.randn(1, 2, 256, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    (query if where == "query" else key)[0, 1, 200, 3] = value
    own = lists_of(torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4), 64, 64)
    for keep, mass in ((2, INF), (4, 0.5)):
        found = called(query, key, own, [keep] * 2, [mass] * 2, 0.35)
        untouched = called(query.nan_to_num(0, 0, 0), key.nan_to_num(0, 0, 0), own, [keep] * 2, [mass] * 2, 0.35)
        assert torch.equal(found[0, 0], untouched[0, 0]), "another head does not see it"
        assert found.sum(-1).max() <= keep
        if where == "key" and math.isnan(value):
            assert found[0, 1, :, 3].all()
    if math.isnan(value):
        indices, counts = DRAFT_LISTS(
            query,
            key,
            own.indices,
            own.counts,
            torch.full((2,), 2, dtype=torch.int32),
            torch.full((2,), INF),
            64,
            64,
            0.35,
        )
        out, _ = block_sparse_attention(query, key, torch.ones_like(key), indices, counts, 64, 64, 0.35)
        dense = torch.softmax(0.35 * query @ key.transpose(-2, -1), -1) @ torch.ones_like(key)
        assert torch.equal(out.isnan(), dense.isnan())


def test_scores_at_the_ends_of_the_numbers_are_ranked() -> None:
    scores = torch.tensor([[[[-3.4e38, 3.4e38, 0.0, 1.0]]]])
    none = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    found = draft_map(scores, none, torch.tensor([3]), torch.tensor([INF]))
    assert found.flatten().tolist() == [False, True, True, True]
    assert draft_map(scores, none, torch.tensor([4]), torch.tensor([0.99])).flatten().tolist() == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 70, 3])
def test_means_are_of_the_tokens_that_there_are(dtype: torch.dtype, tokens: int) -> None:
    """Summed in float32, whatever the strides."""
    values = whole_numbers(2, tokens, 3, 8).to(dtype).transpose(1, 2)
    found = pool_tokens(values, 16, torch.float32)
    expected = torch.stack([part.double().mean(-2) for part in values.split(16, dim=-2)], -2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_what_is_described_is_what_is_given() -> None:
    query, key = torch.randn(2, 4, 130, 8), torch.randn(2, 2, 70, 8)
    lists = lists_of(torch.ones(1, 4, 3, 5) > 0, 64, 16)
    given = (lists.indices, lists.counts, torch.ones(4, dtype=torch.int32), torch.ones(4))
    torch.library.opcheck(
        DRAFT_LISTS, (query, key, *given, 64, 16, 0.35), test_utils=("test_schema", "test_faketensor")
    )


def valid() -> dict[str, Any]:
    lists = lists_of(torch.tensor([True, True, True, False]).expand(1, 2, 2, 4), 16, 8)
    return {
        "query": torch.randn(1, 2, 32, 8),
        "key": torch.randn(1, 2, 32, 8),
        "indices": lists.indices,
        "counts": lists.counts,
        "keep": torch.ones(2, dtype=torch.int32),
        "mass": torch.ones(2),
    }


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        (
            "keep",
            torch.ones(3, dtype=torch.int32),
            r"keep is \[3\] of torch\.int32, not \[2\] of torch\.int32, one for",
        ),
        ("keep", torch.ones(2, dtype=torch.int64), r"keep is \[2\] of torch\.int64"),
        ("mass", torch.ones(2, dtype=torch.float64), r"mass is \[2\] of torch\.float64"),
        ("key", torch.randn(1, 3, 32, 8), "heads, tokens or channels do not match"),
        ("key", torch.randn(1, 2, 0, 8), "a size is 0"),
        ("counts", torch.ones(1, 2, 3, dtype=torch.int32), "indices are .* and counts"),
        ("counts", torch.full((1, 2, 2), 5, dtype=torch.int32), "has 5 entries, its padding has room for 0 to 4"),
        ("indices", torch.full((1, 2, 2, 4), 9, dtype=torch.int32), "names key block 9; there are 4"),
    ],
)
def test_what_does_not_fit_is_told(name: str, wrong: Tensor, told: str) -> None:
    operands = valid()
    draft_lists(**operands, query_block=16, key_block=8, scale=1.0)
    with pytest.raises(ValueError, match=rf"ditopt::draft_lists: .*{told}"):
        draft_lists(**{**operands, name: wrong}, query_block=16, key_block=8, scale=1.0)
