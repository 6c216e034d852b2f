"""Attention to one place in all frames (Sparse VideoGen's temporal heads, arXiv 2502.01776)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import COLUMNS, ROWS, Booleans, Boxes, Pattern


class Temporal(Pattern):
    """In every frame the tokens at most ``rows`` rows and ``columns`` columns away: diagonals in raster order."""

    kind: Literal["temporal"] = "temporal"
    rows: Annotated[int, Field(ge=0)] = 0
    columns: Annotated[int, Field(ge=0)] = 0

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes that are near enough in space, at whatever time."""
        return (queries.gap(keys, ROWS) <= self.rows) & (queries.gap(keys, COLUMNS) <= self.columns)
