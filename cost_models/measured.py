"""The measured cost model: times taken of this graph on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ditopt.sites import STEP


@dataclass(frozen=True)
class MeasuredCost:
    """``seconds`` holds what a ``full`` and a ``predicted`` step take, and what predicting each range saves.

    Where whole steps cannot be predicted there is no ``predicted``. A dtype's name is what a full step takes in it.
    """

    seconds: Mapping[str, float]

    def in_dtype(self, dtype: str | None) -> dict[str, float]:
        """The times of a network that computes in ``dtype``; ranges are taken to save the same share of a step."""
        if dtype is None:
            return dict(self.seconds)
        share = self.seconds[dtype] / self.seconds["full"]
        left = {name: value for name, value in self.seconds.items() if name != dtype}
        return {name: value if name == "predicted" else value * share for name, value in left.items()}

    def step_seconds(self, predicted: Collection[str], dtype: str | None = None) -> float:
        """Seconds of a step in which the sites ``predicted`` are not computed, and the rest is in ``dtype``.

        Raises:
            KeyError: a site was not timed.
        """
        if STEP in predicted:
            return self.seconds["predicted"]
        seconds = self.in_dtype(dtype)
        left = seconds["full"] - sum(seconds[site] for site in predicted)
        return max(left, seconds.get("predicted", 0.0))
