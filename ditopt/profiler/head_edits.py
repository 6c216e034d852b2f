"""Edits of an attention's heads while a graph is interpreted: left out, or under a map of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.profiler.interpret import Edit
from ditopt.profiler.tried import Candidates

MIDDLING = 0.4
"""The density of the pattern that is planted as an error: that of the candidates which is nearest to it."""


@dataclass(frozen=True)
class BlockMask:
    """Which blocks of keys a block of queries attends to: ``kept`` ``[Qb, Kb]``, blocks of so many tokens each."""

    kept: npt.NDArray[np.bool_]
    query_block: int
    key_block: int


def without_head(head: int) -> Edit:
    """Leaves one head of an attention's result ``[B, H, S, D]`` out."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        left = value.clone()
        left[:, head] = 0
        return left

    return edit


def under_blocks(masks: Mapping[int, BlockMask]) -> Edit:
    """Computes heads anew on the keys that their masks keep, block by block of queries, under the model's own mask too.

    Queries that keep no key give zeros. No map of all queries and keys is ever made.
    """

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        query, key, values, own = given[:4] if len(given) > 3 else (*given[:3], None)
        causal = bool(given[5]) if len(given) > 5 else False
        scale = given[6] if len(given) > 6 else None
        ratio = query.shape[1] // key.shape[1]  # of grouped queries
        found = value.clone()
        for head, mask in masks.items():
            of_head = _of_head(own, head)
            for block, row in enumerate(mask.kept):
                rows = slice(block * mask.query_block, min((block + 1) * mask.query_block, query.shape[2]))
                keys = _keys(row, mask.key_block, key.shape[2]).to(query.device)
                found[:, head, rows] = 0
                if not len(keys):
                    continue
                bias = _bias(of_head, causal, rows, keys, query)
                one = F.scaled_dot_product_attention(
                    query[:, head : head + 1, rows],
                    key[:, head // ratio : head // ratio + 1, keys],
                    values[:, head // ratio : head // ratio + 1, keys],
                    attn_mask=bias,
                    scale=scale,
                )
                found[:, head, rows] = one[:, 0] if bias is None else one[:, 0].nan_to_num(0.0)
        return found

    return edit


def middling(found: Candidates) -> tuple[str, npt.NDArray[np.bool_]] | None:
    """Name and blocks ``[Qb, Kb]`` of the candidate whose density is nearest to ``MIDDLING``; None: none is sparse."""
    usable = [at for at, density in enumerate(found.density) if 0.05 < density < 0.95]
    if not usable:
        return None
    at = min(usable, key=lambda place: abs(float(found.density[place]) - MIDDLING))
    return found.names[at], found.kept[:, at].numpy()


def _keys(row: npt.NDArray[np.bool_], block: int, tokens: int) -> Tensor:
    starts = torch.from_numpy(np.flatnonzero(row) * block)
    every = (starts[:, None] + torch.arange(block)).flatten()
    return every[every < tokens]


def _of_head(own: Tensor | None, head: int) -> Tensor | None:
    """The model's own mask of a head, broadcastable to ``[B, 1, S, L]``."""
    if own is None or own.ndim < 3 or own.shape[-3] == 1:
        return own
    return own[..., head : head + 1, :, :]


def _bias(own: Tensor | None, causal: bool, rows: slice, keys: Tensor, query: Tensor) -> Tensor | None:
    """What is added to the scores of some rows with some keys; None: nothing."""
    bias = None
    if own is not None:
        of_rows = own if own.shape[-2] == 1 else own[..., rows, :]
        of_keys = of_rows if own.shape[-1] == 1 else of_rows[..., keys]
        bias = (
            torch.zeros(of_keys.shape, dtype=query.dtype, device=query.device).masked_fill_(~of_keys, -torch.inf)
            if of_keys.dtype == torch.bool
            else of_keys.to(query.dtype)
        )
    if causal:
        at = torch.arange(rows.start, rows.stop, device=query.device)
        later = torch.where(keys[None] > at[:, None], -torch.inf, 0.0).to(query.dtype)
        bias = later if bias is None else bias + later
    return bias
