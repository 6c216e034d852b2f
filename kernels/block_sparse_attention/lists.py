"""Which blocks of keys every block of queries attends to, as one padded table for all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.kernels.patterns.candidates import block_for

QUERY_TASK = 64
"""Blocks of queries have a multiple of so many tokens."""


def blocks(tokens: int, block: int) -> int:
    """How many blocks of ``block`` tokens hold ``tokens``; the last one may be short."""
    return -(-tokens // block)


def kernel_blocks(queries: int, keys: int) -> tuple[int, int]:
    """Tokens of the blocks of queries and of keys that kernels are given for sequences of these lengths."""
    return -(-block_for(queries) // QUERY_TASK) * QUERY_TASK, block_for(keys)


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Lists of whole blocks; what no list names is not attended to.

    A list that counts as many as there are key blocks is all of them, and its indices are not read: so ``W`` need only
    be as long as the longest of the others.

    Attributes:
        indices: ``[B or 1, H, Qb, W]`` int32: key blocks in ascending order; behind a list's count anything.
        counts: ``[B or 1, H, Qb]`` int32: how many of ``W``, or of all, a query block has.
        query_block: tokens of a query block; the last one may be short.
        key_block: tokens of a key block.
    """

    indices: Tensor
    counts: Tensor
    query_block: int
    key_block: int

    @classmethod
    def from_map(cls, attended: Tensor, query_block: int, key_block: int, width: int | None = None) -> BlockLists:
        """The lists of a boolean map ``[B or 1, H, Qb, Kb]``, padded to ``width`` (None: to the longest).

        Lists of all blocks have no length.

        Raises:
            ValueError: a list is longer than ``width``, or this than there are key blocks.
        """
        counts, longest = attended.sum(-1), longest_list(attended)
        width = longest if width is None else width
        if not longest <= width <= max(1, attended.shape[-1]):
            raise ValueError(f"lists of {longest} of {attended.shape[-1]} key blocks cannot be padded to {width}")
        first = torch.argsort(~attended, dim=-1, stable=True)[..., :width]  # what is attended to first, in its order
        return cls(first.to(torch.int32).contiguous(), counts.to(torch.int32).contiguous(), query_block, key_block)

    def to(self, device: torch.device) -> BlockLists:
        """The same lists on ``device``."""
        return BlockLists(self.indices.to(device), self.counts.to(device), self.query_block, self.key_block)

    def to_map(self, key_blocks: int) -> Tensor:
        """The boolean map ``[B or 1, H, Qb, key_blocks]``."""
        spare = torch.where(self.used(key_blocks), self.indices.long(), key_blocks)
        found = torch.zeros(*self.counts.shape, key_blocks + 1, dtype=torch.bool, device=self.indices.device)
        return found.scatter_(-1, spare, True)[..., :key_blocks] | (self.counts == key_blocks)[..., None]

    def used(self, key_blocks: int) -> Tensor:
        """``[B or 1, H, Qb, W]``: which entries are read."""
        entries = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return (entries < self.counts[..., None]) & (self.counts != key_blocks)[..., None]

    def density(self, queries: int, keys: int) -> Tensor:
        """``[H]``: the share of all query and key pairs that each head attends to."""
        key_blocks, query_blocks = blocks(keys, self.key_block), self.counts.shape[-1]
        key_sizes = _sizes(key_blocks, self.key_block, keys).to(self.indices.device)
        query_sizes = _sizes(query_blocks, self.query_block, queries).to(self.indices.device)
        attended = self.to_map(key_blocks).double() @ key_sizes
        return (attended @ query_sizes).mean(0) / (queries * keys)


def longest_list(attended: Tensor) -> int:
    """Of the lists of a map ``[..., Kb]`` the longest, but for those of all blocks; at least 1."""
    counts = attended.sum(-1)
    some = counts[counts < attended.shape[-1]]
    return max(1, int(some.max())) if some.numel() else 1


def _sizes(count: int, block: int, tokens: int) -> Tensor:
    """Tokens of each of ``count`` blocks."""
    return (tokens - block * torch.arange(count)).clamp(max=block).double()


def check(lists: BlockLists, batch: int, heads: int, queries: int) -> str | None:
    """What is wrong with the shapes of lists for attention of these sizes; None if nothing is."""
    indices, counts = lists.indices, lists.counts
    if indices.ndim != 4 or counts.shape != indices.shape[:3]:
        return f"indices are {list(indices.shape)} and counts {list(counts.shape)}, not [B, H, Qb, W] and [B, H, Qb]"
    if indices.dtype != torch.int32 or counts.dtype != torch.int32:
        return f"indices are {indices.dtype} and counts {counts.dtype}, not torch.int32"
    if lists.query_block < 1 or lists.key_block < 1:
        return f"blocks of {lists.query_block} queries and {lists.key_block} keys"
    query_blocks = blocks(queries, lists.query_block)
    if counts.shape[0] not in (1, batch) or counts.shape[1:] != (heads, query_blocks):
        return (
            f"lists are for {list(counts.shape)} [B, H, Qb], the operands have {[batch, heads, query_blocks]} "
            f"({queries} queries in blocks of {lists.query_block})"
        )
    return None


def check_entries(lists: BlockLists, keys: int) -> str | None:
    """What is wrong with the entries themselves: a count beyond the padding, an index out of range or out of order."""
    width, key_blocks = lists.indices.shape[-1], blocks(keys, lists.key_block)
    beyond = (lists.counts < 0) | ((lists.counts > width) & (lists.counts != key_blocks))
    if beyond.any():
        return told(lists.counts, int(beyond.flatten().nonzero()[0]), None, width, key_blocks)
    before = torch.nn.functional.pad(lists.indices, (1, 0), value=-1)[..., :-1]
    wrong = lists.used(key_blocks) & ((lists.indices <= before) | (lists.indices >= key_blocks))
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        return told(lists.counts, at // width, int(lists.indices.flatten()[at]), width, key_blocks)
    return None


def told(counts: Tensor, row: int, index: int | None, width: int, key_blocks: int) -> str:
    """The message for a wrong list, number ``row`` of ``counts``: its count, or its entry ``index``."""
    heads, query_blocks = counts.shape[1:]
    where = (
        f"batch {row // query_blocks // heads}, head {row // query_blocks % heads}, query block {row % query_blocks}"
    )
    if index is None:
        count = int(counts.flatten()[row])
        return f"the list of {where} has {count} entries, its padding has room for 0 to {width}; all are {key_blocks}"
    return f"the list of {where} names key block {index}; there are {key_blocks}, named once each, in ascending order"
