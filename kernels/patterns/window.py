"""A window of tiles in space and time (Sliding Tile Attention, arXiv 2502.04507)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import AXES, Booleans, Boxes, Pattern

Extent = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class Window(Pattern):
    """Tiles at most ``reach`` (frames, rows, columns of tiles) from the query's; a ``tile`` is so many tokens."""

    kind: Literal["window"] = "window"
    tile: tuple[Size, Size, Size] = (1, 8, 8)
    reach: tuple[Extent, Extent, Extent] = (1, 1, 1)

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes in tiles that are near enough along all axes."""
        frames, rows, columns = (queries.gap(keys, axis, self.tile[axis]) <= self.reach[axis] for axis in AXES)
        return frames & rows & columns
