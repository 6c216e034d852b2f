"""The measured cost model: times taken of this graph on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ditopt.decisions import DTYPES
from ditopt.sites import STEP

FULL, SIMPLIFIED = "full", "simplified"


def form_name(dtype: str | None = None, simplify: bool = False) -> str:
    """What the time of a computed step is called.

    >>> form_name(), form_name("bfloat16"), form_name("bfloat16", simplify=True)
    ('full', 'bfloat16', 'simplified bfloat16')
    """
    words = [SIMPLIFIED] * simplify + ([dtype] if dtype else [])
    return " ".join(words) or FULL


FORMS: dict[str, tuple[str | None, bool]] = {
    form_name(dtype, simplify): (dtype, simplify) for dtype in (None, *DTYPES) for simplify in (False, True)
}
"""All ways to compute a step by name: in which dtype, and whether simplified."""


@dataclass(frozen=True)
class MeasuredCost:
    """``seconds`` holds what a ``full`` and a ``predicted`` step take, and what predicting each range saves.

    Where whole steps cannot be predicted there is no ``predicted``. Under the other names of ``form_name`` is what a
    step takes that is computed so.
    """

    seconds: Mapping[str, float]

    def in_form(self, dtype: str | None = None, simplify: bool = False) -> dict[str, float]:
        """The times of a network that computes so; ranges are taken to save the same share of a step.

        Raises:
            KeyError: this form was not timed.
        """
        share = self.seconds[form_name(dtype, simplify)] / self.seconds[FULL]
        left = {name: value for name, value in self.seconds.items() if name == FULL or name not in FORMS}
        return {name: value if name == "predicted" else value * share for name, value in left.items()}

    def step_seconds(self, predicted: Collection[str], dtype: str | None = None, simplify: bool = False) -> float:
        """Seconds of a step in which the sites ``predicted`` are not computed, and the rest is computed as named.

        Raises:
            KeyError: a site or a form was not timed.
        """
        if STEP in predicted:
            return self.seconds["predicted"]
        seconds = self.in_form(dtype, simplify)
        left = seconds[FULL] - sum(seconds[site] for site in predicted)
        return max(left, seconds.get("predicted", 0.0))
