"""Freed memory goes back to the system: glibc holds on to what tensors of many sizes leave, more than is in use."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import cache


def trim() -> None:
    """Give back what is free; nothing where the C library has no ``malloc_trim``. Takes some milliseconds."""
    _malloc_trim()(0)


def collect() -> None:
    """Free what only cycles hold, and give it back. Takes some tenths of a second."""
    gc.collect()
    trim()


@cache
def _malloc_trim() -> Callable[[int], object]:
    if sys.platform != "linux":
        return lambda _: None
    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found if found is not None else lambda _: None
