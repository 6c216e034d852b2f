"""What a cost model answers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class CostModel(Protocol):
    """Prices one step of one network."""

    def step_seconds(self, predicted: Collection[str], dtype: str | None = None, simplify: bool = False) -> float:
        """Seconds of a step in which ``predicted`` (``step`` or block ranges) are not computed.

        The rest is computed in ``dtype`` (None: the model's own), ``simplify``-ed or as the model has it.
        """
        ...
