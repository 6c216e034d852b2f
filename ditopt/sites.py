"""Sites: the places in a model where a decision can be made. Data only; no torch.

A site is named by module path (``blocks.3.attn1``), never by the class name of a model. A contiguous
run of blocks is one site, written with its first and last block: ``blocks.2..5``. The whole forward
is the site ``step``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEP = "step"


@dataclass(frozen=True)
class AttentionSite:
    """One attention call: ``[B, H, S, D]`` queries against ``[B, Hkv, L, D]`` keys."""

    name: str
    graph: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    masked: bool


@dataclass(frozen=True)
class LinearSite:
    """One matrix product with a weight ``[out_features, in_features]`` over ``rows`` rows."""

    name: str
    graph: int
    in_features: int
    out_features: int
    rows: int


@dataclass(frozen=True)
class BlockSite:
    """One entry of a stack of blocks; ``streams`` are the shapes of the tensors it hands on."""

    name: str
    graph: int
    index: int
    streams: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StepSite:
    """The whole forward; ``outputs`` are the shapes of what it returns."""

    graph: int
    outputs: tuple[tuple[int, ...], ...]
    name: str = STEP


Site = AttentionSite | LinearSite | BlockSite | StepSite


def range_names(blocks: Sequence[str]) -> dict[str, tuple[int, int]]:
    """All contiguous ranges of a stack of blocks by site name, as (first, last) positions.

    >>> range_names(["blocks.0", "blocks.1"])
    {'blocks.0': (0, 0), 'blocks.0..1': (0, 1), 'blocks.1': (1, 1)}
    """
    count = len(blocks)
    return {range_name(blocks[a], blocks[b]): (a, b) for a in range(count) for b in range(a, count)}


def range_name(first: str, last: str) -> str:
    """The name of the range from block ``first`` to block ``last``: ``blocks.2..5``, or both names in full.

    >>> range_name("blocks.2", "blocks.5")
    'blocks.2..5'
    >>> range_name("double.1", "single.4")
    'double.1..single.4'
    """
    if first == last:
        return first
    stem, _, _ = first.rpartition(".")
    other, _, number = last.rpartition(".")
    return f"{first}..{number}" if stem == other else f"{first}..{last}"
