"""Edits of an attention's heads while a graph is interpreted: left out, or under a mask of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Pattern
from ditopt.profiler.interpret import Edit
from ditopt.profiler.pattern_errors import Candidates, candidates_of

MIDDLING = 0.4
"""The density of the pattern that is planted as an error: that of the candidates which is nearest to it."""


def without_head(head: int) -> Edit:
    """Leaves one head of an attention's result ``[B, H, S, D]`` out."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        left = value.clone()
        left[:, head] = 0
        return left

    return edit


def under_masks(masks: Mapping[int, Tensor]) -> Edit:
    """Computes heads anew under boolean masks ``[S, L]``, beside the model's own; rows that see no key give zeros."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        query, key, values, own = given[:4] if len(given) > 3 else (*given[:3], None)
        causal = bool(given[5]) if len(given) > 5 else False
        scale = given[6] if len(given) > 6 else None
        ratio = query.shape[1] // key.shape[1]  # of grouped queries
        found = value.clone()
        for head, mask in masks.items():
            allowed = mask.to(query.device)
            if causal:
                allowed = allowed & torch.ones_like(allowed).tril()
            seen = allowed.any(1)
            bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill_(~allowed, -torch.inf)
            bias[~seen] = 0
            if own is not None:
                of_head = own if own.ndim < 3 or own.shape[-3] == 1 else own[..., head : head + 1, :, :]
                bias = bias.masked_fill(~of_head, -torch.inf) if of_head.dtype == torch.bool else bias + of_head
            one = F.scaled_dot_product_attention(
                query[:, head : head + 1],
                key[:, head // ratio : head // ratio + 1],
                values[:, head // ratio : head // ratio + 1],
                attn_mask=bias,
                scale=scale,
            )
            found[:, head] = torch.where(seen[:, None], one[:, 0], 0)
        return found

    return edit


def mask_of(pattern: Pattern, geometry: Geometry, query_block: int, key_block: int) -> Tensor:
    """``[S, S]`` boolean: which keys a query attends to, whole blocks in raster order."""
    return widened(
        torch.from_numpy(pattern.block_map(geometry, query_block, key_block)), query_block, key_block, geometry
    )


def middling(found: Candidates) -> tuple[str, Tensor] | None:
    """Name and blocks ``[Qb, Kb]`` of the candidate whose density is nearest to ``MIDDLING``; None: none is sparse."""
    usable = [at for at, density in enumerate(found.density) if 0.05 < density < 0.95]
    if not usable:
        return None
    at = min(usable, key=lambda place: abs(float(found.density[place]) - MIDDLING))
    return found.names[at], found.kept[:, at]


def middling_mask(geometry: Geometry, block: int) -> Tensor | None:
    """The mask ``[S, S]`` of that candidate."""
    found = middling(candidates_of(geometry, block))
    return None if found is None else widened(found[1], block, block, geometry)


def widened(blocks: Tensor, query_block: int, key_block: int, geometry: Geometry) -> Tensor:
    """``[S, S]`` of blocks ``[Qb, Kb]``."""
    wide = blocks.repeat_interleave(query_block, 0).repeat_interleave(key_block, 1)
    return wide[: geometry.tokens, : geometry.tokens]
