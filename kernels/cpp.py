"""C++ kernels for processors: compiled when first called, and given tensors through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ditopt._torch import load_cpp

PAIRS = ("-mavx512f", "-mavx512bw", "-mavx512bf16")
"""What the compiler is told for AVX-512's dot products of bfloat16 pairs."""


@cache
def built(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a file, compiled with ``flags``.

    Raises:
        RuntimeError: there is no compiler, or it does not take them; tells what it says.
    """
    try:
        return load_cpp(source.read_text(encoding="utf-8"), flags)
    except RuntimeError as problem:
        raise RuntimeError(f"{source.name} cannot be built: {_first_error(problem)}") from problem


@cache
def compiler_refusal(flags: tuple[str, ...]) -> str | None:
    """Why the compiler builds nothing with ``flags``, which this tries; None if it does."""
    try:
        load_cpp('extern "C" int ditopt_nothing() { return 0; }\n', flags)
    except RuntimeError as problem:
        return f"the C++ compiler builds nothing with {' '.join(flags)}: {_first_error(problem)}"
    return None


def called(
    function: Any, tensors: Iterable[Tensor | None], sizes: Sequence[int], strides: Sequence[int], *further: object
) -> int:
    """Call a kernel: addresses of tensors, null for None, sizes and strides as int64, and what is ``further``."""
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    result: int = function(*pointers, numbers(sizes), numbers(strides), *further)
    return result


def numbers(values: Sequence[int]) -> Any:
    """An array of int64."""
    return (ctypes.c_int64 * len(values))(*values)


def strides_of(*parts: Tensor) -> list[int]:
    """Of each tensor ``[B, H, S, D]`` the strides of all dimensions but the last, which is dense."""
    return [stride for part in parts for stride in part.stride()[:3]]


def dense_rows(part: Tensor) -> Tensor:
    """A tensor whose last dimension is dense."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _first_error(problem: RuntimeError) -> str:
    lines = str(problem).strip().splitlines()
    return next((line.strip() for line in lines if "error:" in line), lines[0] if lines else type(problem).__name__)
