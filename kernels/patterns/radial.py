"""A band in every frame whose width decays with the distance in time (Radial Attention, arXiv 2506.19852)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import FRAMES, Booleans, Boxes, Pattern, whole


class Radial(Pattern):
    """Tokens at most a share ``width`` of a frame away, in raster order, in the query's own frame and the next.

    Beyond these, half of that with every doubling of the distance in frames, down to the same place. (The paper leaves
    out frames where that is less than a block; here they keep their diagonal.)
    """

    kind: Literal["radial"] = "radial"
    width: Annotated[float, Field(gt=0, le=1)] = 1.0

    @property
    def separable(self) -> bool:
        """No: raster order takes all axes together."""
        return False

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes near enough in their frames for the distance of these."""
        away = np.maximum(queries.gap(keys, FRAMES), 1)
        halvings = np.frexp(away)[1] - 1
        reach = whole(self.width * geometry.rows * geometry.columns * 2.0**-halvings)
        return queries.near(keys, geometry.sizes[1:], reach)
