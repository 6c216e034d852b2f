"""What any of some patterns attends to."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, SerializeAsAny

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Booleans, Boxes, Pattern


class Union(Pattern):
    """Two patterns or more."""

    kind: Literal["union"] = "union"
    of: Annotated[tuple[SerializeAsAny[Pattern], ...], Field(min_length=2)]

    @property
    def separable(self) -> bool:
        """Whether all of them are."""
        return all(pattern.separable for pattern in self.of)

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Boxes that one of them connects."""
        return reduce(np.logical_or, (pattern.reaches(queries, keys, geometry) for pattern in self.of))
