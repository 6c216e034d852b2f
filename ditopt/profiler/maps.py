"""Attention maps: pooled by blocks of queries and keys, the blocks that hold most, mass by distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ditopt.measures import Numbers

TOP = 0.9
"""The top blocks of a map's row are the fewest that hold so much of its mass."""


def pooled_rows(mass: Tensor, real: Tensor) -> Tensor:
    """``[q, Kb]``: means of ``[q, r, Kb]`` over the real rows ``[q, r]`` of blocks."""
    share = real / real.sum(1, keepdim=True)
    return torch.einsum("qr,qrk->qk", share.to(mass.dtype), mass)


def pooled_keys(values: Tensor, cells: int) -> Tensor:
    """``[..., K]`` summed over so many neighbours that there are at most ``cells``."""
    size = -(-values.shape[-1] // cells)
    fill = -values.shape[-1] % size
    filled = torch.nn.functional.pad(values, (0, fill))
    return filled.view(*values.shape[:-1], -1, size).sum(-1)


def top_blocks(maps: Tensor, share: float = TOP) -> Tensor:
    """``[..., Q, K]`` boolean: of every row the fewest blocks that hold ``share`` of its mass; ties go to the first."""
    ordered, order = maps.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    needed = before < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(maps, dtype=torch.bool).scatter(-1, order, needed)


def mass_in(maps: Tensor, blocks: Tensor) -> Tensor:
    """``[...]``: the mass of maps ``[..., Q, K]`` that lies in ``blocks``, mean over rows of blocks."""
    return (maps * blocks).sum(-1).mean(-1)


def by_distance(probabilities: Tensor, places: Sequence[int], weights: Tensor, reach: int) -> Numbers:
    """``[2 * reach + 1]``: mean mass by the distance of key and query in raster order, from ``-reach`` on.

    ``probabilities`` are ``[r, L]`` of weighted rows at ``places`` among the L keys; rows elsewhere are left out.
    """
    length = probabilities.shape[1]
    weighted = (probabilities * weights[:, None]).cpu().numpy()
    found = np.zeros(2 * reach + 1, dtype=np.float32)
    for row, place in enumerate(places):
        if 0 <= place < length:
            first, last = max(0, place - reach), min(length, place + reach + 1)
            found[first - place + reach : last - place + reach] += weighted[row, first:last]
    return found
