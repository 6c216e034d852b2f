"""What a plan asks of a head, read once for every decision."""

from __future__ import annotations

import functools

from ditopt.decisions import HeadDecision, Sparse
from ditopt.kernels.patterns.choice import SparseChoice

Heads = tuple[HeadDecision, ...]
"""What every head of a site does."""


def choice_of(decision: HeadDecision) -> SparseChoice | None:
    """What a sparse decision asks for; None of a dense one."""
    return _choice(decision) if isinstance(decision, Sparse) else None


@functools.lru_cache(maxsize=256)
def _choice(decision: Sparse) -> SparseChoice:
    return SparseChoice.from_data(decision.settings)
