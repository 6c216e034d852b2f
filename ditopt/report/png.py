"""PNG pictures without a library: indexed or RGB, as data URIs that a page can hold."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ditopt.errors import InputError

Bytes = npt.NDArray[np.uint8]

HEAT_STOPS = (
    (0.0, (10, 8, 32)),
    (0.2, (66, 16, 96)),
    (0.4, (134, 34, 102)),
    (0.6, (203, 65, 73)),
    (0.8, (245, 137, 28)),
    (1.0, (252, 244, 170)),
)
"""Dark to bright and about even in lightness, so that it reads the same on a light and on a dark page."""
LEVELS = 32
"""Colours of a heat map: more are not told apart, and fewer make smaller files."""


def heat_palette(levels: int = LEVELS) -> Bytes:
    """``[levels, 3]`` colours from little to much."""
    at = np.linspace(0, 1, levels)
    stops = [stop for stop, _ in HEAT_STOPS]
    channels = [np.interp(at, stops, [colour[i] for _, colour in HEAT_STOPS]) for i in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def heat_levels(values: npt.ArrayLike, low: float, high: float) -> Bytes:
    """Levels of the palette for values between ``low`` and ``high``; what is beyond is at an end, NaN is at the low.

    >>> heat_levels([-1.0, 0.0, 1.0, float("nan")], 0.0, 1.0).tolist()
    [0, 0, 31, 0]
    """
    span = high - low if high > low else 1.0
    share = (np.nan_to_num(np.asarray(values, dtype=np.float64), nan=low, posinf=high, neginf=low) - low) / span
    return np.asarray(np.clip(np.round(share * (LEVELS - 1)), 0, LEVELS - 1), dtype=np.uint8)


def png(pixels: Bytes, palette: Bytes | None = None) -> bytes:
    """A PNG file of ``[H, W, 3]`` colours, or of ``[H, W]`` places in a ``[N, 3]`` palette.

    Source: PNG specification, third edition (W3C, 2025), chapters 7, 9 and 11.

    Raises:
        InputError: the pixels have another shape or type.
    """
    shape = pixels.shape[2:]
    if pixels.dtype != np.uint8 or shape != (() if palette is not None else (3,)) or 0 in pixels.shape:
        what = f"{pixels.dtype} {list(pixels.shape)}"
        raise InputError(f"a picture of {what} should be uint8 [H, W, 3], or [H, W] with a palette")
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    colour_type = 2 if palette is None else 3
    filters = [(0, rows)]
    if palette is None:  # of indices the differences mean nothing
        sideways, down = rows.copy(), rows.copy()
        sideways[:, 3:] -= rows[:, :-3]
        down[1:] -= rows[:-1]
        filters += [(1, sideways), (2, down)]
    packed = min((_packed(kind, part) for kind, part in filters), key=len)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))]
    chunks += [(b"PLTE", palette.tobytes())] if palette is not None else []
    chunks += [(b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def data_uri(pixels: Bytes, palette: Bytes | None = None) -> str:
    """A picture as the text that stands for its address. Raises as ``png``."""
    return "data:image/png;base64," + base64.b64encode(png(pixels, palette)).decode("ascii")


def heat_uri(levels: Bytes) -> str:
    """A heat map ``[H, W]`` of levels as a data URI."""
    return data_uri(levels, heat_palette())


def strip(frames: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Frames of one size under each other: one picture of which the page shows a part at a time."""
    return np.concatenate(list(frames), axis=0)


def resized(values: npt.NDArray[np.floating[Any]], rows: int, columns: int) -> npt.NDArray[np.float64]:
    """``[..., R, C]`` as ``[..., rows, columns]``: means where it shrinks (NaN left out), repeats where it grows."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).astype(np.float64), known.astype(np.float64)
    for axis, size in ((-2, rows), (-1, columns)):
        total, count = _summed(total, size, axis), _summed(count, size, axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _summed(values: npt.NDArray[np.float64], size: int, axis: int) -> npt.NDArray[np.float64]:
    length = values.shape[axis]
    places = np.arange(size) * length // size
    found = np.take(values, places, axis=axis) if size >= length else np.add.reduceat(values, places, axis=axis)
    return np.asarray(found)


def _packed(kind: int, rows: Bytes) -> bytes:
    lines = np.empty((rows.shape[0], rows.shape[1] + 1), dtype=np.uint8)
    lines[:, 0] = kind
    lines[:, 1:] = rows
    return zlib.compress(lines.tobytes(), 9)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
