"""Orders of the video's tokens in which blocks are compact, or a pattern's blocks few: permutations, what stands where.

A further order is a function from a geometry and a block's tokens to a permutation of the video, and a line in
``ORDERS``. Text stays where it is. ``clusters`` is none of these: calls find it by their queries and keys
(``block_sparse_attention.clusters``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import AXES, Integers

Tile = tuple[int, int, int]
TILES, CLUSTERS = "tiles", "clusters"


def by_pixel(geometry: Geometry) -> Integers:
    """Frames fastest: a place's tokens of all frames stand together, so temporal patterns are contiguous."""
    raster = np.arange(geometry.video).reshape(geometry.frames, -1)
    return np.ascontiguousarray(raster.T).reshape(-1)


def by_tile(geometry: Geometry, tile: Tile) -> Integers:
    """Tile by tile (frames, rows, columns of tokens): windows of tiles are contiguous.

    Tiles are walked to and fro, so that neighbours in the sequence are neighbours in space: a block that is no whole
    tile then has parts of two that touch. Inside halves follow each other, halved again along the axes in turn (Morton
    order), so that parts of a block are compact, too. At an axis's end tiles are short where its size is no multiple.
    """
    inner, outer = np.divmod(_places(geometry), np.reshape(tile, (3, 1)))[::-1]
    counts = [-(-size // extent) for size, extent in zip(geometry.sizes, tile, strict=True)]
    walked = outer.copy()
    for axis in AXES[1:]:  # turned round in every other line of the axes before it
        line = np.ravel_multi_index(tuple(walked[:axis]), tuple(counts[:axis]))
        walked[axis] = np.where(line % 2, counts[axis] - 1 - outer[axis], outer[axis])
    bits = max((extent - 1).bit_length() for extent in tile)
    key = np.ravel_multi_index(tuple(walked), tuple(counts)) << 3 * bits | _interleaved(inner, bits)
    return np.asarray(np.argsort(key, kind="stable"))


def by_hilbert(geometry: Geometry) -> Integers:
    """Along the Hilbert curve of the enclosing cube whose side is a power of two, what lies outside left out.

    Of as many dimensions as the geometry has axes of more than one token; by J. Skilling, "Programming the Hilbert
    curve" (AIP Conf. Proc. 707, 2004). Neighbours in the sequence touch wherever the curve does not leave the geometry.
    """
    axes = [axis for axis in AXES if geometry.sizes[axis] > 1]
    if not axes:
        return np.arange(geometry.video)
    bits = (max(geometry.sizes) - 1).bit_length()
    place = _places(geometry)[axes]
    for level in reversed(range(1, bits)):  # undo the turns of every cube, from the largest on
        low = (1 << level) - 1
        for axis in range(len(axes)):
            turned = place[axis] >> level & 1 == 1
            swapped = np.where(turned, 0, (place[0] ^ place[axis]) & low)
            place[0] ^= np.where(turned, low, swapped)
            place[axis] ^= swapped
    for axis in range(1, len(axes)):  # Gray code
        place[axis] ^= place[axis - 1]
    spread = np.zeros_like(place[0])
    for level in range(1, bits):
        spread ^= np.where(place[-1] >> level & 1 == 1, (1 << level) - 1, 0)
    place ^= spread
    return np.asarray(np.argsort(_interleaved(place, bits), kind="stable"))


@functools.lru_cache(maxsize=32)
def compact_tile(geometry: Geometry, block: int) -> Tile:
    """The tile of ``block`` tokens, a power of two, whose order makes the most compact blocks (``spread``).

    >>> compact_tile(Geometry(6, 28, 28), 64)
    (4, 4, 4)
    """
    bits = block.bit_length() - 1
    shapes = [(1 << f, 1 << r, 1 << (bits - f - r)) for f in range(bits + 1) for r in range(bits + 1 - f)]
    fitting = [
        shape for shape in shapes if all(extent < 2 * size for extent, size in zip(shape, geometry.sizes, strict=True))
    ]
    return min(fitting or shapes, key=lambda tile: spread(by_tile(geometry, tile), geometry, block))


def spread(order: Integers, geometry: Geometry, block: int) -> float:
    """Mean squared distance, in tokens, of the video's tokens to the middle of their block of the sequence."""
    places = np.stack(np.unravel_index(order, geometry.sizes)).astype(float)
    before = geometry.text if geometry.text_first else 0
    starts = np.flatnonzero(np.diff((before + np.arange(geometry.video)) // block, prepend=-1))
    tokens = np.diff(starts, append=geometry.video)
    sums, squares = (np.add.reduceat(each, starts, axis=1) for each in (places, places**2))
    return float((squares - sums**2 / tokens).sum() / geometry.video)


ORDERS: dict[str, Callable[[Geometry, int], Integers]] = {
    "hilbert": lambda geometry, block: by_hilbert(geometry),
    "pixels": lambda geometry, block: by_pixel(geometry),
    TILES: lambda geometry, block: by_tile(geometry, compact_tile(geometry, block)),
}
"""Permutations of the video's tokens by name, for sequences in blocks of so many."""
COMPACT = (TILES, "hilbert")
"""Those whose blocks are compact in space and time."""


@dataclass(frozen=True)
class TokenOrder:
    """An order by its name in ``ORDERS``, or ``clusters``.

    ``tile`` (frames, rows, columns) is that of ``tiles``, None: as it fits.
    """

    name: str
    tile: Tile | None = None

    @property
    def is_found(self) -> bool:
        """Whether each call finds it, for its queries and for its keys; tokens stand in raster order before."""
        return self.name == CLUSTERS

    @classmethod
    def from_data(cls, written: Any) -> TokenOrder:
        """The order that a word (``tiles``, ``clusters``) or a mapping (``{tiles: [4, 4, 4]}``) describes.

        Raises:
            ValueError: it is unknown, or a tile is no three sizes of at least 1.
        """
        if isinstance(written, str) and written in (*ORDERS, CLUSTERS):
            return cls(written)
        if isinstance(written, dict) and list(written) == [TILES]:
            tile = written[TILES]
            if not isinstance(tile, list | tuple) or len(tile) != 3 or any(type(n) is not int or n < 1 for n in tile):
                raise ValueError(
                    f"order {{{TILES}: {tile!r}}}: a tile is frames, rows and columns of tokens, at least 1 each, e.g. "
                    f"{{{TILES}: [4, 4, 4]}}"
                )
            return cls(TILES, (tile[0], tile[1], tile[2]))
        names = ", ".join([*ORDERS, CLUSTERS])
        raise ValueError(f"order {written!r} is unknown; write one of {names}, or {{{TILES}: [4, 4, 4]}}")

    def to_data(self) -> str | dict[str, list[int]]:
        """The word or mapping that describes it."""
        return self.name if self.tile is None else {self.name: list(self.tile)}

    def of_video(self, geometry: Geometry, block: int) -> Integers:
        """The permutation of the video's tokens, as ``Pattern.block_map`` takes it; sequences are in such blocks."""
        return _of_video(self, geometry, block)

    def of_sequence(self, geometry: Geometry, block: int) -> Integers:
        """``[S]``: which token stands at each place of the whole sequence, text where it was."""
        before = geometry.text if geometry.text_first else 0
        found = np.arange(geometry.tokens)
        found[before : before + geometry.video] = before + self.of_video(geometry, block)
        return found


@functools.lru_cache(maxsize=32)
def _of_video(order: TokenOrder, geometry: Geometry, block: int) -> Integers:
    if order.tile is not None:
        # Larger than the video a tile is all of it.
        limits = zip(order.tile, geometry.sizes, strict=True)
        found = by_tile(geometry, tuple(min(extent, size) for extent, size in limits))  # type: ignore[arg-type]  # three
    elif order.is_found:
        found = np.arange(geometry.video)
    else:
        found = ORDERS[order.name](geometry, block)
    found.setflags(write=False)
    return found


@functools.lru_cache(maxsize=32)
def compact_order(geometry: Geometry, block: int) -> TokenOrder | None:
    """Of tiles and Hilbert curve what makes the more compact blocks; None where raster order's are no less compact.

    >>> compact_order(Geometry(6, 28, 28), 64)
    TokenOrder(name='tiles', tile=None)
    """
    found = {each: spread(each.of_video(geometry, block), geometry, block) for each in map(TokenOrder, COMPACT)}
    best = min(found, key=lambda each: found[each])
    return best if found[best] < spread(np.arange(geometry.video), geometry, block) else None


def inverse(order: Integers) -> Integers:
    """The permutation that undoes ``order``."""
    found: Integers = np.empty_like(order)
    found[order] = np.arange(len(order))
    return found


def _places(geometry: Geometry) -> Integers:
    """``[3, N]``: frame, row and column of every token."""
    return np.asarray(np.indices(geometry.sizes).reshape(3, math.prod(geometry.sizes)), dtype=np.int64)


def _interleaved(numbers: Integers, bits: int) -> Integers:
    """``[N]``: the bits of ``[D, N]`` numbers in turn, from the highest on."""
    found: Integers = np.zeros_like(numbers[0])
    for level in reversed(range(bits)):
        for each in numbers:
            found = found << 1 | each >> level & 1
    return found
