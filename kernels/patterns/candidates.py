"""The patterns that are tried for a head: a few of each kind, of sizes that fit a geometry."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.band import Band
from ditopt.kernels.patterns.orders import TokenOrder, compact_tile
from ditopt.kernels.patterns.radial import Radial
from ditopt.kernels.patterns.sink import Sink
from ditopt.kernels.patterns.spatial import Spatial
from ditopt.kernels.patterns.temporal import Temporal
from ditopt.kernels.patterns.union import Union
from ditopt.kernels.patterns.whole import Nothing
from ditopt.kernels.patterns.window import Window


def block_for(tokens: int) -> int:
    """How many tokens a block of a sequence has: 64, and less where these would be few blocks."""
    return 64 if tokens >= 1024 else 16 if tokens >= 128 else 4


def candidates(geometry: Geometry, block: int | None = None, order: TokenOrder | None = None) -> tuple[Pattern, ...]:
    """Patterns worth trying on a geometry, ``skip`` first; dense attention is none of them.

    Left out are those that keep every block of ``block`` tokens (default: ``block_for``) in an order of the tokens
    (None: raster), and of those that keep the same blocks all but the first.
    """
    size = block_for(geometry.tokens) if block is None else block
    there = None if order is None else order.of_video(geometry, size)
    found: dict[bytes, Pattern] = {}
    for pattern in _tried(geometry) if order is None else _tried_compact(geometry, size):
        kept = pattern.block_map(geometry, size, order=there)
        if not kept.all():
            found.setdefault(np.packbits(kept).tobytes(), pattern)
    return tuple(found.values())


def _tried(geometry: Geometry) -> Iterator[Pattern]:
    """All of them, the simpler before those that may keep the same blocks."""
    frames, rows, columns = geometry.sizes
    yield Nothing()
    if frames == rows == 1:  # no geometry but a line, of which all is one row
        yield from (Band(width=1 / share) for share in (64, 32, 16, 8, 4, 2))
        return
    sinks: list[Pattern] = [Spatial(), Temporal(), Temporal(rows=1, columns=1)]
    yield from (*sinks, Spatial(frames=1))
    bands = [Band(width=width) for width in (1, 2, rows / 4, rows / 2, rows)]
    yield from bands
    radials = [Radial(width=width) for width in (0.25, 0.5)]
    yield from radials
    tile = (max(1, frames // 4), math.ceil(rows / 4), math.ceil(columns / 4))
    windows = [
        Window(tile=tile, reach=(1, 1, 1)),
        Window(tile=tile, reach=(frames, 1, 1)),
        Window(tile=tile, reach=(0, 1, 1)),
        Window(tile=(tile[0], math.ceil(rows / 8), math.ceil(columns / 8)), reach=(1, 1, 1)),
    ]
    yield from windows
    sinks += [bands[0], bands[3], radials[0], Radial(width=1.0), windows[0], windows[1]]
    yield from (Union(of=(pattern, Sink(frames=1))) for pattern in sinks)


def _tried_compact(geometry: Geometry, block: int) -> Iterator[Pattern]:
    """Those for blocks that are compact in space and time: what is told in tiles, and what all such blocks keep."""
    tile, far = compact_tile(geometry, block), geometry.frames
    yield from (Nothing(), Spatial(), Temporal(), Temporal(rows=1, columns=1))
    yield from (Window(tile=tile, reach=reach) for reach in ((1, 1, 1), (0, 1, 1), (far, 1, 1), (far, 0, 0), (2, 2, 2)))
