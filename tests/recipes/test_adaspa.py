"""``adaspa``: our operators against the paper's search (arXiv 2502.21079, equations 13 and 14, algorithms 1 and 2).

At a search step a first pass over the keys gives every query's log-sum-exp, a second one the sums of
``exp(q k - LSE)`` by block of queries and of keys; at later search steps the second pass alone, with the log-sum-exp of
the first search. The blocks of largest sums, as many as a sparsity lets be, are attended to up to the next search;
heads of which these hold more than 0.8 of the mass get fewer, as many others more.

Where ours departs:

- Every search takes the log-sum-exp of its own queries and keys: what is chosen is the same, or nearer to the truth.
- Searches are in every N-th computed step, from the first behind the dense start on, where the paper names them (steps
  10 and 30 of 50, the first ten dense).
- Every row of blocks keeps the same share, where the paper takes the largest of the whole map of a head; a query's own
  block is kept in any case. So a kernel's rows are even, and no query is left without keys.
- Which share a head keeps is told by the price of its error, not by its recall.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ditopt.kernels.block_sparse_attention.cpu
import ditopt.kernels.block_sparse_attention.draft  # noqa: F401  # operators
from ditopt.geometry import Geometry
from ditopt.kept import Use, uses
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, DRAFT_LISTS
from ditopt.profiler.draft_blocks import drafts_of
from ditopt.recipes import find_recipe

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


WARM, SEARCHES, STEPS = 2, (2, 6), 10
"""As the paper's of 50 steps, a fifth of it: dense up to step 10, searches in steps 10 and 30."""


def values(step: int) -> Tensor:
    return torch.randn(TOKENS, DEPTH, generator=torch.Generator().manual_seed(100 + step))


def literal(keep: int) -> list[Tensor]:
    """Algorithm 1 over a generation, row by row: dense, then what the latest search chose."""
    found, lists = [], [[*range(BLOCKS)]] * BLOCKS
    for step in range(STEPS):
        query, key = operands(step)
        if step in SEARCHES:
            lists = chosen(second_pass(query, key, first_pass(query, key)), keep)
        rows = []
        for queries, listed in zip(query.split(BLOCK), lists, strict=True):
            keys, content = (torch.cat([part.split(BLOCK)[at] for at in listed]) for part in (key, values(step)))
            weights = (SCALE * queries @ keys.T).exp()
            rows.append(weights @ content / weights.sum(1, keepdim=True))
        found.append(torch.cat(rows))
    return found


@pytest.mark.parametrize("keep", [2, 3])
def test_indices_are_reused_up_to_the_next_search(keep: int) -> None:
    """The steps that ``refresh: 4`` finds in are the paper's, and what is read in between its indices."""
    draft, results = f"draft {keep}", []
    in_turn = uses(["dense"] * WARM + [draft] * (STEPS - WARM), lambda do: 4 if do == draft else None)
    assert tuple(step for step, use in enumerate(in_turn) if use is Use.FOUND) == SEARCHES
    assert all(use is Use.READ for use in (*in_turn[3:6], *in_turn[7:]))
    indices, counts = torch.zeros(1, 1, BLOCKS, BLOCKS, dtype=torch.int32), torch.zeros(1, 1, BLOCKS, dtype=torch.int32)
    for step, use in enumerate(in_turn):
        query, key = operands(step)
        given = [part[None, None] for part in (query, key, values(step))]
        if use is Use.NONE:
            results.append(F.scaled_dot_product_attention(given[0], given[1], given[2], scale=SCALE)[0, 0])
            continue
        if use is Use.FOUND:
            for row, listed in enumerate(ours(query, key, keep)):
                indices[0, 0, row, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
                counts[0, 0, row] = len(listed)
        results.append(BLOCK_SPARSE_ATTENTION(*given, indices, counts, BLOCK, BLOCK, SCALE)[0][0, 0])
    for result, expected in zip(results, literal(keep), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_the_recipe_is_the_papers_within_what_is_profiled() -> None:
    recipe = find_recipe("adaspa")
    assert recipe is not None and recipe.dense_first == 10 / 50 and not recipe.alike, "heads have budgets of their own"
    names = drafts_of(Geometry(4, 16, 16), 64, steps=8).names
    allowed = [json.loads(name) for name in names if recipe.allows(name)]
    assert [(each["by"], each["keep"], each["refresh"]) for each in allowed] == [
        ("mass", keep, every) for every in (4, 8) for keep in (0.25, 0.125)
    ]
    assert not recipe.missing(names) and recipe.missing(drafts_of(Geometry(4, 16, 16), 64, steps=3).names)
