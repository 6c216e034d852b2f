"""Which rows of an attention map are looked at: of every block of queries some, always the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ALL_ROWS = 512
"""Sequences of so many tokens or fewer are looked at in full; of longer ones a quarter, no fewer and no more than:"""
MOST_ROWS = 1024
SPREAD = (math.sqrt(5) - 1) / 2


def second_moments(outputs: Tensor, weights: Tensor) -> Tensor:
    """``[H, E, E]``: weighted second moments of ``[H, R, E]`` over rows; ``weights`` ``[R]``."""
    scaled = outputs * weights.sqrt()[:, None]
    return torch.bmm(scaled.transpose(1, 2), scaled)


@dataclass(frozen=True)
class Sample:
    """Query rows of a sequence of ``tokens`` in blocks of ``block``.

    ``rows`` ``[Qb, r]`` are positions in the sequence, ascending; a short last block repeats its last row. ``real``
    ``[Qb, r]`` says which are no such fillers.
    """

    tokens: int
    block: int
    rows: Tensor
    real: Tensor

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return int(self.rows.shape[0])

    @property
    def each(self) -> int:
        """Rows of a block."""
        return int(self.rows.shape[1])

    def weights(self, first: int, last: int, order: Tensor | None = None) -> Tensor:
        """``[Qb, r]`` float32: the share that a row stands for of the tokens from ``first`` up to ``last``.

        ``order`` ``[S]`` says which token stands where; None: each at its own place.
        """
        counts = torch.arange(self.tokens) if order is None else order
        counts = (counts >= first) & (counts < last)
        inside = self.real & counts[self.rows]
        tokens = torch.stack([part.sum() for part in counts.split(self.block)])
        weights = inside * (tokens / inside.sum(1).clamp(min=1))[:, None]
        return (weights / weights.sum().clamp(min=1e-30)).float()


@lru_cache(maxsize=64)
def sample_rows(tokens: int, block: int, wanted: int | None = None) -> Sample:
    """Rows of every block, the same ones whenever it is asked; about ``wanted`` in all (None: by the constants above).

    Inside a block they are spread evenly, but shifted from block to block, so that no column of the geometry is missed.
    """
    blocks = -(-tokens // block)
    if wanted is None:
        wanted = tokens if tokens <= ALL_ROWS else min(max(tokens // 4, ALL_ROWS), MOST_ROWS)
    each = min(block, -(-wanted // blocks))
    starts = torch.arange(blocks)[:, None] * block
    length = (tokens - starts).clamp(max=block)
    shift = torch.where(length > each, (torch.arange(blocks, dtype=torch.float64)[:, None] * SPREAD) % 1, 0)
    apart = (length / each).clamp(min=1)
    within = ((torch.arange(each) + shift) * apart).long()
    return Sample(tokens, block, starts + within.clamp(max=length - 1), within < length)
