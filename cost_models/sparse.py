"""What block-sparse attention takes, from what dense attention does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ditopt.errors import InputError


@dataclass(frozen=True)
class SparseCost:
    """Seconds of an attention site in one step, dense and block-sparse.

    Attributes:
        dense: what dense attention takes.
        overhead: what block-sparse attention takes whatever its lists are: packing queries, writing results.
        efficiency: pairs of queries and keys a second beyond that, of those of dense attention.

    Raises:
        InputError: dense attention takes no time, the overhead is negative, or the efficiency is not above 0.
    """

    dense: float
    overhead: float
    efficiency: float

    def __post_init__(self) -> None:
        if not (self.dense > 0 and self.overhead >= 0 and self.efficiency > 0):
            raise InputError(f"{self}: dense and efficiency have to be above 0, the overhead not below")

    @classmethod
    def measured(cls, dense: float, times: Mapping[float, float]) -> SparseCost:
        """The line of least squares through ``times``: seconds by density (0 to 1) of this site on this machine.

        Raises:
            InputError: fewer than two densities were timed, or seconds do not rise with them.
        """
        if len(times) < 2:
            raise InputError(
                f"block-sparse attention was timed at {len(times)} densities; it takes two to tell its cost"
            )
        slope, overhead = np.polyfit(list(times), list(times.values()), 1)
        if slope <= 1e-6 * max(times.values()):
            raise InputError(
                f"block-sparse attention takes no longer at higher densities: {dict(times)}; time it again"
            )
        return cls(dense, max(0.0, float(overhead)), dense / float(slope))

    def seconds(self, density: float) -> float:
        """What it takes block-sparse; ``density`` is the mean share of blocks that heads attend to, 0 to 1."""
        return self.overhead + self.dense * density / self.efficiency
