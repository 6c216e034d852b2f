"""Attention inside frames (Sparse VideoGen's spatial heads, arXiv 2502.01776)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import FRAMES, Booleans, Boxes, Pattern


class Spatial(Pattern):
    """All of the query's own frame, and of ``frames`` frames to either side."""

    kind: Literal["spatial"] = "spatial"
    frames: Annotated[int, Field(ge=0)] = 0

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes of frames that are near enough."""
        return queries.gap(keys, FRAMES) <= self.frames
