"""Linear attention to what lists leave out: against SLA's formula (arXiv 2509.24006) written out, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ditopt.kernels.block_sparse_attention.cpu
import ditopt.kernels.block_sparse_attention.linear  # noqa: F401  # the operators
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, LINEAR_REST

HEADS, GROUPS, DEPTH, WIDTH = 4, 2, 8, 6


def literal(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: tuple[int, int], projection: Tensor) -> Tensor:
    """One head, ``[S, D]``, ``[L, D]``, ``[L, E]``, in float64.

    ``O = O_s + Proj(O_l)``: softmax attention over the critical blocks, and linear attention over the others with
    ``phi = softmax`` over channels, ``H = sum phi(K_j)^T V_j`` and ``Z = sum phi(K_j)``.
    """
    out = []
    for row, query in enumerate(q):
        numerator, denominator = torch.zeros(v.shape[1], dtype=torch.float64), 0.0
        h, z = torch.zeros(q.shape[1], v.shape[1], dtype=torch.float64), torch.zeros(q.shape[1], dtype=torch.float64)
        for column, (key, value) in enumerate(zip(k, v, strict=True)):
            if kept[row // block[0], column // block[1]]:
                weight = math.exp(float(query @ key) / math.sqrt(q.shape[1]))
                numerator, denominator = numerator + weight * value, denominator + weight
            else:
                feature = torch.softmax(key, 0)
                h, z = h + torch.outer(feature, value), z + feature
        sparse = numerator / denominator if denominator else numerator
        phi = torch.softmax(query, 0)
        linear = (phi @ h) / (phi @ z) if float(z.sum()) else torch.zeros(v.shape[1], dtype=torch.float64)
        out.append(sparse + linear @ projection)
    return torch.stack(out)


def case(tokens: int, keys: int, block: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
    drawing = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, heads, length, width, generator=drawing)
        for heads, length, width in ((HEADS, tokens, DEPTH), (GROUPS, keys, DEPTH), (GROUPS, keys, WIDTH))
    )
    kept = torch.rand(1, HEADS, blocks(tokens, block[0]), blocks(keys, block[1]), generator=drawing) < 0.4
    kept[0, 0], kept[0, 1] = False, True
    return q, k, v, kept, torch.randn(HEADS, WIDTH, WIDTH, generator=drawing)


@pytest.mark.parametrize(("tokens", "keys", "key_block"), [(128, 64, 16), (70, 37, 8)])
def test_the_sum_is_what_the_paper_says(tokens: int, keys: int, key_block: int) -> None:
    """With a head that keeps nothing, one that keeps all, short last blocks and keys that heads share."""
    block = (64, key_block)
    q, k, v, kept, projection = case(tokens, keys, block)
    lists = BlockLists.from_map(kept, *block)
    both, _ = BLOCK_SPARSE_ATTENTION(q, k, v, lists.indices, lists.counts, *block, DEPTH**-0.5)
    found = both + LINEAR_REST(q, k, v, lists.indices, lists.counts, projection, *block)
    assert found.shape == (2, HEADS, tokens, WIDTH) and not found.isnan().any()
    for sample in range(2):
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            query, key, value = (each.double() for each in (q[sample, head], k[sample, group], v[sample, group]))
            expected = literal(query, key, value, kept[0, head], block, projection[head].double())
            torch.testing.assert_close(found[sample, head].double(), expected, rtol=1e-4, atol=1e-5)


def test_without_a_projection_or_with_nothing_skipped_nothing_is_added() -> None:
    q, k, v, kept, projection = case(64, 64, (64, 16))
    lists = BlockLists.from_map(kept, 64, 16)
    found = LINEAR_REST(q, k, v, lists.indices, lists.counts, projection, 64, 16)
    assert not found[:, 1].any(), "that head keeps everything"
    projection[2] = 0
    assert not LINEAR_REST(q, k, v, lists.indices, lists.counts, projection, 64, 16)[:, 2].any()
    q[0, 3, 5, 0] = math.nan
    found = LINEAR_REST(q, k, v, lists.indices, lists.counts, projection, 64, 16)
    assert found[0, 3, 5].isnan().all() and int(found.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_schema_holds(dtype: torch.dtype) -> None:
    q, k, v, kept, projection = case(70, 37, (64, 8))
    lists = BlockLists.from_map(kept, 64, 8)
    given = (*(each.to(dtype) for each in (q, k, v)), lists.indices, lists.counts, projection, 64, 8)
    torch.library.opcheck(LINEAR_REST, given, test_utils=("test_schema", "test_faketensor"))
    assert LINEAR_REST(*given).dtype == dtype


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"projection": torch.zeros(HEADS, WIDTH, DEPTH)}, r"are torch.float32 \[4, 6, 8\], not .*\[4, 6, 6\]"),
        ({"projection": torch.zeros(HEADS, WIDTH, WIDTH).double()}, "projections are torch.float64"),
        ({"counts": torch.full((1, HEADS, 1), 9, dtype=torch.int32)}, "has 9 entries, its padding has room for"),
        ({"counts": torch.zeros(1, HEADS, 2, dtype=torch.int32)}, r"indices are .* and counts"),
        ({"key": torch.zeros(2, 3, 64, DEPTH)}, "heads, tokens or channels do not match"),
    ],
)  # fmt: skip
def test_wrong_operands_are_told(change: dict[str, Tensor], told: str) -> None:
    q, k, v, kept, projection = case(64, 64, (64, 16))
    lists = BlockLists.from_map(kept, 64, 16)
    given = {"query": q, "key": k, "value": v, "indices": lists.indices, "counts": lists.counts,
             "projection": projection, **change}  # fmt: skip
    with pytest.raises(ValueError, match=f"ditopt::linear_rest: .*{told}"):
        LINEAR_REST(*given.values(), 64, 16)
