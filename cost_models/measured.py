"""The measured cost model: times taken of this graph on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ditopt.sites import STEP


@dataclass(frozen=True)
class MeasuredCost:
    """``seconds`` holds what a ``full`` and a ``predicted`` step take, and what predicting each range saves.

    Where whole steps cannot be predicted there is no ``predicted``.
    """

    seconds: Mapping[str, float]

    def step_seconds(self, predicted: Collection[str]) -> float:
        """Seconds of a step in which the sites ``predicted`` are not computed.

        Raises:
            KeyError: a site was not timed.
        """
        if STEP in predicted:
            return self.seconds["predicted"]
        left = self.seconds["full"] - sum(self.seconds[site] for site in predicted)
        return max(left, self.seconds.get("predicted", 0.0))
