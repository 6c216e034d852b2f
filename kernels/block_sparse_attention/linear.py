"""``ditopt::linear_rest``: linear attention to the blocks that a head's list does not name, behind a projection.

The linear branch of SLA (arXiv 2509.24006): attention is the sum of softmax attention to the listed blocks, by itself,
and of what this gives. Sums by block of keys are made once, and those that a block of queries has skipped added up by
its map, so that it takes a small part of attention to all blocks. Plain torch, for any device; nothing waits for the
host.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, check_entries
from ditopt.kernels.ops import LIBRARY, linear_refusal

NOTHING = 1e-30
"""A denominator below that is of a query that has skipped nothing: its linear attention is 0."""


def features(tokens: Tensor) -> Tensor:
    """``[..., D]`` float32: the feature map, a softmax over channels."""
    return tokens.float().softmax(-1)


def block_sums(key: Tensor, value: Tensor, key_block: int) -> Tensor:
    """``sum phi(k) v^T`` by block of keys, ``sum phi(k)`` behind it: ``[..., Kb, D, E + 1]`` float32.

    Of ``[..., L, D]`` and ``[..., L, E]``.
    """
    fill = -key.shape[-2] % key_block
    keys = F.pad(features(key), (0, 0, 0, fill)).unflatten(-2, (-1, key_block))
    values = F.pad(F.pad(value.float(), (0, 1), value=1.0), (0, 0, 0, fill)).unflatten(-2, (-1, key_block))
    found: Tensor = keys.transpose(-2, -1) @ values
    return found


def linear_rest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    projection: Tensor,
    query_block: int,
    key_block: int,
) -> Tensor:
    """``phi(q) sum phi(k) v^T / (phi(q) . sum phi(k)) P``, sums over the keys that lists do not name: ``[B, H, S, E]``.

    ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]``; ``indices`` ``[B or 1, H, Qb, W]`` and ``counts``
    ``[B or 1, H, Qb]`` int32 are as of ``ditopt::block_sparse_attention``; ``projection`` ``[H, E, E]`` float32 is
    every head's P, applied from the right. A head whose projection is 0 loses what its lists do not name.

    Raises:
        ValueError: shapes or dtypes do not fit; on processors also: an entry of a list is wrong.
    """
    lists = BlockLists(indices, counts, query_block, key_block)
    refused = linear_refusal(query, key, value, lists, projection)
    if refused is None and indices.device.type == "cpu":
        refused = check_entries(lists, key.shape[2])
    if refused is not None:
        raise ValueError(f"ditopt::linear_rest: {refused}")
    batch, heads, tokens, _ = query.shape
    groups, count = key.shape[1], blocks(key.shape[2], key_block)
    sums = block_sums(key, value, key_block)
    skipped = (~lists.to_map(count)).float().expand(batch, -1, -1, -1).unflatten(1, (groups, -1))
    of_blocks = (skipped.flatten(2, 3) @ sums.flatten(-2)).view(batch, heads, -1, *sums.shape[-2:])
    queries = F.pad(features(query), (0, 0, 0, -tokens % query_block)).unflatten(2, (-1, query_block))
    found = (queries @ of_blocks).flatten(2, 3)[:, :, :tokens]
    result: Tensor = (found[..., :-1] / found[..., -1:].clamp(min=NOTHING)) @ projection
    return result.to(query.dtype).contiguous()


LIBRARY.impl("linear_rest", linear_rest, "CompositeExplicitAutograd")
