"""``adaspa``: our operators against the paper's search (arXiv 2502.21079, equations 13 and 14, algorithms 1 and 2).

At a search step a first pass over the keys gives every query's log-sum-exp, a second one the sums of
``exp(q k - LSE)`` by block of queries and of keys; at later search steps the second pass alone, with the log-sum-exp of
the first search. The blocks of largest sums, as many as a sparsity lets be, are attended to up to the next search;
heads of which these hold more than 0.8 of the mass get fewer, as many others more.

Where ours departs:

- Every search takes the log-sum-exp of its own queries and keys: what is chosen is the same, or nearer to the truth.
- Every row of blocks keeps the same share, where the paper takes the largest of the whole map of a head; a query's own
  block is kept in any case. So a kernel's rows are even, and no query is left without keys.
- Which share a head keeps is told by the price of its error, not by its recall.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ditopt.kernels.block_sparse_attention.cpu
import ditopt.kernels.block_sparse_attention.draft  # noqa: F401  # operators
from ditopt.kernels.ops import DRAFT_LISTS

TOKENS, BLOCK, DEPTH = 512, 64, 16
BLOCKS = TOKENS // BLOCK
SCALE = DEPTH**-0.5


def operands(step: int) -> tuple[Tensor, Tensor]:
    """``[S, D]``: queries and keys of a head whose map changes little from step to step."""
    generator = torch.Generator().manual_seed(0)
    query, key = 1.6 * torch.randn(2, TOKENS, DEPTH, generator=generator)
    centres = 2 * torch.randn(BLOCKS, DEPTH, generator=generator)
    query += centres[torch.randperm(BLOCKS, generator=generator)].repeat_interleave(BLOCK, 0)
    key += centres.repeat_interleave(BLOCK, 0)
    drift = 0.05 * step * torch.randn(2, TOKENS, DEPTH, generator=torch.Generator().manual_seed(step))
    return query + drift[0], key + drift[1]


def first_pass(query: Tensor, key: Tensor) -> Tensor:
    """Algorithm 1, lines 5 to 13: the log-sum-exp of every query, block of keys by block of keys."""
    largest, total = torch.full((TOKENS,), -math.inf), torch.zeros(TOKENS)
    for part in key.split(BLOCK):
        scores = SCALE * query @ part.T
        now = torch.maximum(largest, scores.amax(1))
        total = total * (largest - now).exp() + (scores - now[:, None]).exp().sum(1)
        largest = now
    return total.log() + largest


def second_pass(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    """Algorithm 1, lines 15 to 21, and algorithm 2: ``W_sum`` ``[S / B, S / B]``."""
    sums = torch.zeros(BLOCKS, BLOCKS)
    for p, (queries, logs) in enumerate(zip(query.split(BLOCK), lse.split(BLOCK), strict=True)):
        for q, keys in enumerate(key.split(BLOCK)):
            sums[p, q] = (SCALE * queries @ keys.T - logs[:, None]).exp().sum()
    return sums


def chosen(sums: Tensor, keep: int) -> list[list[int]]:
    """Of every row its own block and the largest others, ``keep`` in all: our form of equation 14."""
    found = []
    for row, of_row in enumerate(sums):
        ranked = sorted(range(BLOCKS), key=lambda one: (one != row, -float(of_row[one])))
        found.append(sorted(ranked[:keep]))
    return found


def ours(query: Tensor, key: Tensor, keep: int) -> list[list[int]]:
    """The lists of ``by: mass``."""
    own = torch.zeros(1, 1, BLOCKS, BLOCKS, dtype=torch.int32)
    own[..., 0] = torch.arange(BLOCKS)
    counts = torch.ones(1, 1, BLOCKS, dtype=torch.int32)
    limits = torch.tensor([keep], dtype=torch.int32), torch.tensor([math.inf])
    found = DRAFT_LISTS(
        query[None, None], key[None, None], own, counts, *limits, BLOCK, BLOCK, SCALE, None, None, "mass"
    )
    return [found[0][0, 0, row, : found[1][0, 0, row]].tolist() for row in range(BLOCKS)]


def recall(sums: Tensor, lists: list[list[int]]) -> float:
    """Of the attention's mass what the blocks hold."""
    return sum(float(sums[row, blocks].sum()) for row, blocks in enumerate(lists)) / float(sums.sum())


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_lists_are_of_the_largest_block_sums(keep: int) -> None:
    query, key = operands(0)
    sums = second_pass(query, key, first_pass(query, key))
    torch.testing.assert_close(sums.sum(1), torch.full((BLOCKS,), float(BLOCK)), rtol=1e-4, atol=1e-3)
    assert ours(query, key, keep) == chosen(sums, keep)


@pytest.mark.parametrize("step", [1, 4])
def test_a_cached_log_sum_exp_chooses_no_better(step: int) -> None:
    """The paper's later searches against ours, by the mass that the chosen blocks truly hold."""
    cached = first_pass(*operands(0))
    query, key = operands(step)
    truth = second_pass(query, key, first_pass(query, key))
    theirs, found = chosen(second_pass(query, key, cached), 3), ours(query, key, 3)
    assert recall(truth, found) >= recall(truth, theirs) - 1e-6
    same = sum(len({*one} & {*other}) for one, other in zip(theirs, found, strict=True)) / (3 * BLOCKS)
    assert same > 0.9, "they are the same but for near ties"


def test_rows_of_even_lengths_hold_little_less_than_the_largest_of_the_whole_map() -> None:
    query, key = operands(0)
    sums = second_pass(query, key, first_pass(query, key))
    keep = 3
    largest = sums.flatten().topk(keep * BLOCKS).indices.tolist()
    papers = [[at % BLOCKS for at in largest if at // BLOCKS == row] for row in range(BLOCKS)]
    assert recall(sums, papers) - recall(sums, ours(query, key, keep)) < 0.05
