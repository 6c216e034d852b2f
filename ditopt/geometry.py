"""How the tokens of a sequence lie in space: frames x rows x columns, and text before or behind them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ditopt.errors import InputError


@dataclass(frozen=True)
class Geometry:
    """Tokens in raster order (columns fastest, frames slowest), with ``text`` tokens of a prompt beside them.

    An image has one frame. ``text_first``: text stands before the video's tokens, else behind them.

    Raises:
        InputError: a size is below 1, or there is a negative number of text tokens.
    """

    frames: int
    rows: int
    columns: int
    text: int = 0
    text_first: bool = False
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # where it is a field of a file

    def __post_init__(self) -> None:
        if min(self.frames, self.rows, self.columns) < 1 or self.text < 0:
            raise InputError(f"{self}: frames, rows and columns have to be at least 1, text at least 0")

    def __str__(self) -> str:
        text = f" with {self.text} text tokens" if self.text else ""
        return f"geometry of {self.frames} x {self.rows} x {self.columns} tokens{text}"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return self.frames, self.rows, self.columns

    @property
    def video(self) -> int:
        """Tokens without text."""
        return math.prod(self.sizes)

    @property
    def tokens(self) -> int:
        """All tokens of the sequence."""
        return self.video + self.text

    def of_tokens(self, tokens: int) -> Geometry | None:
        """That of a sequence of so many tokens: with this text, or of the video alone; None if neither makes them."""
        return next((each for each in (self, replace(self, text=0)) if each.tokens == tokens), None)

    def expect(self, tokens: int) -> None:
        """Check that a sequence has the tokens of this geometry.

        Raises:
            InputError: it has another number.
        """
        if tokens != self.tokens:
            raise InputError(f"{self} makes {self.tokens} tokens, the sequence has {tokens}")


@functools.lru_cache(maxsize=16)
def cells_of(sizes: tuple[int, ...], grid: tuple[int, ...]) -> npt.NDArray[np.intp]:
    """The cell of each token, both in raster order; sizes that the grid does not divide give cells of unequal size."""
    places = np.unravel_index(np.arange(math.prod(sizes)), sizes)
    inside = [place * cells // size for place, cells, size in zip(places, grid, sizes, strict=True)]
    return np.asarray(np.ravel_multi_index(tuple(inside), grid))
