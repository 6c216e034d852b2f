"""What a cost model answers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class CostModel(Protocol):
    """Prices one step of one network."""

    def step_seconds(self, predicted: Collection[str], dtype: str | None = None) -> float:
        """Seconds of a step in which ``predicted`` (``step`` or block ranges) are not computed, the rest in ``dtype``.

        None is the model's own dtype.
        """
        ...
