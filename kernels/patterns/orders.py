"""Orders of the video's tokens in which a pattern's blocks are few: permutations, what stands where."""

from __future__ import annotations

import numpy as np

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Integers


def by_pixel(geometry: Geometry) -> Integers:
    """Frames fastest: a place's tokens of all frames stand together, so temporal patterns are contiguous."""
    raster = np.arange(geometry.video).reshape(geometry.frames, -1)
    return np.ascontiguousarray(raster.T).reshape(-1)


def by_tile(geometry: Geometry, tile: tuple[int, int, int]) -> Integers:
    """Tile by tile (frames, rows, columns of tokens), in raster order inside: windows of tiles are contiguous.

    Tiles at an axis's end are short where its size is no multiple.
    """
    axes = np.indices(geometry.sizes).reshape(3, -1)
    inner, outer = axes % np.reshape(tile, (3, 1)), axes // np.reshape(tile, (3, 1))
    return np.lexsort((*inner[::-1], *outer[::-1]))  # the last key counts most


def inverse(order: Integers) -> Integers:
    """The permutation that undoes ``order``."""
    found = np.empty_like(order)
    found[order] = np.arange(len(order))
    return found
