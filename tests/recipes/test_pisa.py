"""``pisa``: our operators against the paper's sum (arXiv 2602.01077, and ``piecewise_attn`` of its code).

Of every block of queries the blocks of keys with the highest score are exact, the others are expanded around their
means: their numerators to zeroth order each, ``exp(q . k_mean) sum v``, and together to first order by one matrix,
``(mass of the rest) q H / T`` with ``H = sum over blocks of sum (k - k_mean) v^T``; denominators to zeroth order, which
is exact to the first. The score is ``q_mean . k_mean + log |H_j|`` (the code's ``use_bias``).

Where ours departs:

- A query's own block is among the exact ones in any case (the code has a sink of its choice), and text.
- The score's norm is that of ``H_j``, as in the code; the paper has that of ``H_j - H_mean``. The code adds 1e-5 to it.
- Profiles try groups of 16 tokens in place of whole blocks of 64 for what is not exact; here both are compared.
- The paper's density is one for all heads and layers; which sites are sparse, and how, is priced here.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import ditopt.kernels.block_sparse_attention.cpu
import ditopt.kernels.block_sparse_attention.draft  # noqa: F401  # operators
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import FIRST_ORDER, PooledRest, pool_tokens
from ditopt.kernels.block_sparse_attention.reference import block_sparse_attention
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, DRAFT_LISTS
from ditopt.kernels.patterns.candidates import candidates
from ditopt.kernels.patterns.registry import pattern_to_data
from ditopt.profiler.draft_blocks import drafts_of
from ditopt.profiler.moments import compensated_of
from ditopt.recipes import RECIPES

TOKENS, BLOCK, DEPTH, WIDTH = 300, 64, 16, 12
SCALE = DEPTH**-0.5


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """``[S, D]``, ``[S, D]``, ``[S, E]`` float32; the last block is short, and some blocks of keys are all alike."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, TOKENS, DEPTH, generator=generator)
    key[:128] = 0.1 * key[:128] + 1.5
    return query, key, torch.randn(TOKENS, WIDTH, generator=generator)


def blocks_of(tokens: Tensor, size: int = BLOCK) -> list[Tensor]:
    return list(tokens.split(size))


def piecewise(query: Tensor, key: Tensor, value: Tensor, keep: int, group: int) -> tuple[Tensor, list[list[int]]]:
    """The paper's output ``[S, E]`` float64, and the exact blocks of every block of queries.

    ``group`` tokens are expanded around one mean: the paper's are whole blocks.
    """
    query, key, value = query.double(), key.double(), value.double()
    spreads = [(k - k.mean(0)).T @ v for k, v in zip(blocks_of(key), blocks_of(value), strict=True)]
    around = [(k - k.mean(0)).T @ v for k, v in zip(blocks_of(key, group), blocks_of(value, group), strict=True)]
    matrix = torch.stack(around).sum(0)
    rows, exact = [], []
    for number, own in enumerate(blocks_of(query)):
        scores = [
            SCALE * float(own.mean(0) @ k.mean(0)) + math.log(float(h.norm()))
            for k, h in zip(blocks_of(key), spreads, strict=True)
        ]
        scores[number] = math.inf
        chosen = sorted(range(len(scores)), key=lambda j: -scores[j])[:keep]
        exact.append(sorted(chosen))
        for q in own:
            numerator, denominator, rest = torch.zeros(WIDTH, dtype=torch.float64), 0.0, 0.0
            for j, (k, v) in enumerate(zip(blocks_of(key), blocks_of(value), strict=True)):
                if j in chosen:
                    weights = (SCALE * k @ q).exp()
                    numerator += weights @ v
                    denominator += float(weights.sum())
                else:
                    for some, their in zip(blocks_of(k, group), blocks_of(v, group), strict=True):
                        weight = math.exp(SCALE * float(some.mean(0) @ q))
                        numerator += weight * their.sum(0)
                        rest += weight * len(some)
            numerator += rest * SCALE * (q @ matrix) / TOKENS
            rows.append(numerator / (denominator + rest))
    return torch.stack(rows), exact


@pytest.mark.parametrize("group", [BLOCK, 16])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_exact_and_approximate_blocks_are_the_papers(keep: int, group: int) -> None:
    query, key, value = operands()
    expected, exact = piecewise(query, key, value, keep, group)
    q, k, v = (each[None, None] for each in (query, key, value))
    count = len(exact)
    own = torch.zeros(1, 1, count, count, dtype=torch.int32)
    own[..., 0] = torch.arange(count)
    limits = torch.tensor([keep], dtype=torch.int32), torch.tensor([math.inf])
    lists = DRAFT_LISTS(
        q, k, own, torch.ones(1, 1, count, dtype=torch.int32), *limits, BLOCK, BLOCK, SCALE, v, None, "error"
    )
    indices, counts = lists
    assert [indices[0, 0, row, : counts[0, 0, row]].tolist() for row in range(count)] == exact
    first_order = torch.tensor([FIRST_ORDER], dtype=torch.int32)
    means = pool_tokens(k, group), pool_tokens(v, group)
    found, _ = BLOCK_SPARSE_ATTENTION(q, k, v, *lists, BLOCK, BLOCK, SCALE, *means, first_order, group)
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-4, atol=2e-5)
    wide = PooledRest.pooling(k.double(), v.double(), first_order, group)
    plain, _ = block_sparse_attention(
        q.double(), k.double(), v.double(), BlockLists(indices, counts, BLOCK, BLOCK), SCALE, wide
    )
    torch.testing.assert_close(plain[0, 0], expected, rtol=1e-9, atol=1e-9)


def test_blocks_that_means_stand_for_well_are_not_exact() -> None:
    query, key, value = operands()
    _, exact = piecewise(query, key, value, 2, BLOCK)
    assert all(not {0, 1} & ({*chosen} - {number}) for number, chosen in enumerate(exact))


def test_the_recipe_allows_what_profiles_have_of_it() -> None:
    pisa, geometry = RECIPES["pisa"], Geometry(6, 28, 28)
    plain = [json.dumps(pattern_to_data(each), sort_keys=True) for each in candidates(geometry)]
    names = (*plain, *drafts_of(geometry, 64).names)
    tried = (*names, *compensated_of(names, 64, 16).names)
    allowed = [json.loads(name) for name in tried if pisa.allows(name)]
    assert [each["keep"] for each in allowed] == [0.5, 0.25, 0.125] and not pisa.missing(tried)
    assert all(each == {**each, "pattern": "draft", "by": "error", "rest": {"taylor": 16}} for each in allowed)
