"""All keys, or none."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Booleans, Boxes, Pattern


class Everything(Pattern):
    """Dense attention."""

    kind: Literal["dense"] = "dense"

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Everything."""
        return np.ones((queries.first.shape[1], keys.first.shape[1]), dtype=bool)


class Nothing(Pattern):
    """A head that is skipped: its result is zero, but for text."""

    kind: Literal["skip"] = "skip"

    def reaches(self, queries: Boxes, keys: Boxes, geometry: Geometry) -> Booleans:
        """Nothing."""
        return np.zeros((queries.first.shape[1], keys.first.shape[1]), dtype=bool)
