"""A diagonal band: tokens near each other in raster order (Sparse-vDiT's diagonal, arXiv 2506.03065)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Booleans, Boxes, Pattern, whole


class Band(Pattern):
    """Keys at most ``width`` rows of tokens before or behind the query, in raster order; 0 is the token itself."""

    kind: Literal["band"] = "band"
    width: Annotated[float, Field(ge=0)]

    @property
    def separable(self) -> bool:
        """No: raster order takes all axes together."""
        return False

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes whose nearest tokens are near enough."""
        return queries.near(keys, geometry.sizes, whole(self.width * geometry.columns))
