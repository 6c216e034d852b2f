"""Means of groups of keys and values: what stands for the blocks that a head's list does not name.

Zeroth-order compensation as in SVG-EAR: a query that is as near to all keys of a group as to their
mean gives the group the mass that it gives the mean, times the number of tokens. And its first-order term as in PISA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks

ZEROTH_ORDER, FIRST_ORDER = 1, 2
"""How heads count what their lists do not name: by means, or by how keys and values go together around them, too."""


@dataclass(frozen=True, eq=False)
class PooledRest:
    """Groups of ``pool`` consecutive tokens of the key sequence by their means.

    A group that lies in a block which the head's list does not name counts as one key, with the score
    ``scale * query . key + log(tokens of the group)``. Heads of ``FIRST_ORDER`` add to that what ``moments`` say, times
    the share of the softmax that all these groups have.

    Attributes:
        key: ``[B, Hkv, G, D]``: means of keys; the last group may be short.
        value: ``[B, Hkv, G, E]``: means of values.
        heads: ``[H]`` int32: ``ZEROTH_ORDER`` or ``FIRST_ORDER`` for heads that have a rest; those of 0 lose what their
            lists do not name.
        pool: tokens of a group; a divisor of the lists' key block.
    """

    key: Tensor
    value: Tensor
    heads: Tensor
    pool: int

    @classmethod
    def of(cls, key: Tensor | None, value: Tensor | None, heads: Tensor | None, pool: int) -> PooledRest | None:
        """What an operator was given; None if nothing.

        Raises:
            ValueError: it was given a part of it.
        """
        if key is None or value is None or heads is None:
            if key is not None or value is not None or heads is not None or pool:
                raise ValueError("pooled keys, pooled values, the heads that have a rest and the pool go together")
            return None
        return cls(key, value, heads, pool)

    @classmethod
    def pooling(cls, key: Tensor, value: Tensor, heads: Tensor, pool: int) -> PooledRest:
        """Of keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, E]``."""
        return cls(pool_tokens(key, pool), pool_tokens(value, pool), heads, pool)


def pool_tokens(tokens: Tensor, pool: int, dtype: torch.dtype | None = None) -> Tensor:
    """``[..., L, D]`` -> ``[..., G, D]``: means of groups of ``pool`` tokens, the last of what there is.

    They are of ``dtype``; None: of the tokens' own.
    """
    whole = tokens.shape[-2] // pool * pool
    parts = [tokens[..., :whole, :].unflatten(-2, (-1, pool)).mean(-2, dtype=dtype)] if whole else []
    if whole < tokens.shape[-2]:
        parts.append(tokens[..., whole:, :].mean(-2, keepdim=True, dtype=dtype))
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


def moments(key: Tensor, value: Tensor, pool: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[..., L, D]``, ``[..., L, E]`` -> ``[..., D, E]``: mean over all keys of ``(k - mean of its group) v^T``.

    To first order in ``k - mean``, a group adds ``exp(scale * q . mean) * scale * q H`` to the numerator and nothing to
    the denominator, with ``H = sum (k - mean) v^T``. PISA (arXiv 2602.01077, its hybrid form) takes the sum of H over
    all groups, of which each then has a part as large as its share of the mass: so there is one matrix for a head, and
    the term is ``(mass of the rest) * scale * q H / L``.
    """
    means = pool_tokens(key, pool, dtype).repeat_interleave(pool, dim=-2)[..., : key.shape[-2], :]
    return (key.to(dtype) - means).transpose(-2, -1) @ value.to(dtype) / key.shape[-2]


def check_pooled(rest: PooledRest, key: Tensor, value: Tensor, lists: BlockLists, heads: int) -> str | None:
    """What is wrong with pooled operands beside those that they are of; None if nothing is."""
    if rest.pool < 1 or lists.key_block % rest.pool:
        return f"a pool of {rest.pool} tokens does not divide blocks of {lists.key_block} keys"
    groups = blocks(key.shape[2], rest.pool)
    for name, found, whole in (("keys", rest.key, key), ("values", rest.value, value)):
        wanted = (*whole.shape[:2], groups, whole.shape[3])
        if found.shape != wanted or found.dtype != whole.dtype:
            return f"pooled {name} are {found.dtype} {list(found.shape)}, not {whole.dtype} {list(wanted)}"
    if rest.heads.shape != (heads,) or rest.heads.dtype != torch.int32:
        return f"the heads that have a rest are {rest.heads.dtype} {list(rest.heads.shape)}, not torch.int32 [{heads}]"
    return None
