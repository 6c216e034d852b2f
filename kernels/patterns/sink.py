"""Keys that all queries attend to: the first frame, or places that gather most of the attention (stripes)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import AXES, FRAMES, Booleans, Boxes, Pattern, whole

Share = Annotated[float, Field(ge=0, lt=1)]


class Sink(Pattern):
    """The first ``frames`` frames, and ``places`` as shares of the geometry's frames, rows and columns.

    So the middle of the first frame is (0, 0.5, 0.5) at any resolution. Alone it is no pattern for a head: a query
    would not attend to itself. It is for unions.
    """

    kind: Literal["sink"] = "sink"
    frames: Annotated[int, Field(ge=0)] = 1
    places: tuple[tuple[Share, Share, Share], ...] = ()

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes of keys that hold a sink, from everywhere."""
        found = keys.first[FRAMES] < self.frames
        for place in self.places:
            at = whole(np.multiply(place, geometry.sizes))
            found = found | np.all([(keys.first[a] <= at[a]) & (keys.last[a] >= at[a]) for a in AXES], axis=0)
        return np.broadcast_to(found, (queries.first.shape[1], keys.first.shape[1]))
