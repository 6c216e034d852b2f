"""What blocks of keys are chosen by where a call finds them itself: a score for each, by block of queries and head.

Plain torch, for any device; nothing waits for the host. All are logarithms, so that their softmax is a share: of what
means would attend to, of attention's mass, or of the error. Infinity counts as the largest or smallest number there is,
and what is no number as the largest: NaN in a block's keys is attended to, as dense attention does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention.lists import blocks
from ditopt.kernels.block_sparse_attention.pooled import pool_tokens
from ditopt.kernels.patterns.draft import SELECTORS, Selector

SLAB = 1 << 20
"""So many probabilities are held at once, where a block of queries has no more."""


def score_means(
    query: Tensor, key: Tensor, value: Tensor | None, query_block: int, key_block: int, scale: float
) -> Tensor:
    """``scale * q_mean . k_mean``: the map of means (DraftAttention, arXiv 2505.14708)."""
    of_queries, of_keys = pool_tokens(query, query_block, torch.float32), pool_tokens(key, key_block, torch.float32)
    of_keys = of_keys.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return scale * of_queries @ of_keys.transpose(-2, -1)


def score_error(
    query: Tensor, key: Tensor, value: Tensor | None, query_block: int, key_block: int, scale: float
) -> Tensor:
    """``scale * q_mean . k_mean + log |H|``: H is ``sum (k - k_mean) v^T`` of a block, its norm Frobenius'.

    What means leave out of ``sum exp(scale * q . k) v`` is, to first order, ``exp(scale * q . k_mean) scale q H``, of
    which ``|q| |H|`` is a bound, and ``|q|`` is the same for all blocks. This is PISA's choice (arXiv 2602.01077;
    ``use_bias`` in its code, which adds 1e-5 to the norm). SVG-EAR (arXiv 2603.08982) chooses by an estimate of this
    error, too: blocks that means stand for well are not computed, however large their mass.
    """
    assert value is not None, "the error is one of values"
    means = pool_tokens(key, key_block, torch.float32).repeat_interleave(key_block, dim=2)[:, :, : key.shape[2]]
    spread = _by_block(key.float() - means, key_block)
    of_values = _by_block(value.float(), key_block)
    norms = [
        torch.linalg.vector_norm(one.transpose(-2, -1) @ other, dim=(-2, -1))  # a head's H at a time
        for one, other in zip(spread.flatten(0, 1), of_values.flatten(0, 1), strict=True)
    ]
    sizes = torch.stack(norms).log().view(*key.shape[:2], 1, -1).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return score_means(query, key, None, query_block, key_block, scale) + sizes


def score_mass(
    query: Tensor, key: Tensor, value: Tensor | None, query_block: int, key_block: int, scale: float
) -> Tensor:
    """The logarithm of attention's mass: sums of the softmax over a block's keys, mean over the block of queries.

    Exact block sums as AdaSpa's; all pairs are scored, a few blocks of queries at a time. Of a key that is not finite
    the block counts as the largest, and the others as if that key were 0.
    """
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    bad = ~_by_block(key.isfinite().all(-1, keepdim=True), key_block, True).flatten(-2).all(-1)
    clean = key.float().masked_fill(~key.isfinite(), 0.0)
    padding = blocks(keys, key_block) * key_block - keys
    clean = F.pad(clean, (0, 0, 0, padding))
    at_once = max(1, SLAB // (query_block * clean.shape[2])) * query_block
    found = []
    for sample in range(batch):
        for head in range(heads):
            of_keys = clean[sample, head // group].T
            for part in query[sample, head].split(at_once):
                scores = (scale * part.float()) @ of_keys
                scores[:, keys:] = -torch.inf
                sums = scores.softmax(-1).view(len(part), -1, key_block).sum(-1)
                found.append(pool_tokens(sums, query_block))
    mass = torch.cat(found).view(batch, heads, blocks(queries, query_block), -1)
    return mass.log().masked_fill(bad.repeat_interleave(group, 1)[:, :, None], torch.nan)


Score = Callable[[Tensor, Tensor, Tensor | None, int, int, float], Tensor]
SCORES: dict[Selector, Score] = {"means": score_means, "mass": score_mass, "error": score_error}


def draft_scores(
    query: Tensor,
    key: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    value: Tensor | None = None,
    by: Tensor | None = None,
    selectors: tuple[Selector, ...] = ("means",),
) -> Tensor:
    """``[B, H, Qb, Kb]`` float32: scores of the blocks of ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]``.

    ``by`` ``[H]`` int32 is every head's place in ``SELECTORS``, one of ``selectors``; with a single one it is not read.
    """
    scores = SCORES[selectors[0]](query, key, value, query_block, key_block, scale)
    for each in selectors[1:]:
        assert by is not None, "several selectors need to know each head's"
        other = SCORES[each](query, key, value, query_block, key_block, scale)
        scores = torch.where((by == SELECTORS.index(each))[:, None, None], other, scores)
    return scores.nan_to_num(nan=torch.finfo(scores.dtype).max)


def _by_block(tokens: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """``[B, H, L, D]`` -> ``[B, H, Kb, block, D]``, filled up behind."""
    missing = blocks(tokens.shape[2], block) * block - tokens.shape[2]
    filled: Tensor = F.pad(tokens, (0, 0, 0, missing), value=fill).unflatten(2, (-1, block))
    return filled
