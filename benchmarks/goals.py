"""The goals of the flow, and a benchmark's figures held to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A target, and the least speed-up over Inductor at it.

    ``asked`` and ``asked_db`` are what its plan is asked for: 6 to 8% more speed than the least, so that the noise of
    a clock does not decide, and more quality where there is more, as the mean of other prompts can be 2 to 4 dB below
    that of an optimisation's held-out ones.
    """

    guidance: float
    psnr_db: float
    speedup: float
    asked: float
    asked_db: float

    @property
    def name(self) -> str:
        """Of the part and of the folder that holds its files."""
        return f"{'unguided' if self.guidance == 1 else 'guided'}-{self.psnr_db:g}"

    @property
    def generation_s(self) -> float:
        """About what a dense generation takes on two cores; guidance calls the network twice a step."""
        return 6.0 if self.guidance == 1 else 12.0


GOALS = (
    Goal(1.0, 42.0, 3.0, 3.2, 43.0),
    Goal(1.0, 36.0, 4.5, 4.8, 40.0),
    Goal(4.0, 42.0, 2.0, 2.15, 43.0),
    Goal(4.0, 36.0, 2.6, 2.75, 38.0),
)
MARGINS_DB = {"fewer_steps": 6.0, "unipc": 3.0, "dpmpp": 3.0}
"""By how much a plan has to be above each rival at equal latency: of the model as it is, and in the plan's dtype."""
ATTRIBUTE_POINTS = 0.01
ROUNDING = 1e-9  # so that a score exactly one point lower is within one point


@dataclass(frozen=True)
class Check:
    """A figure against its bound; ``value`` None where it was not measured, which is a miss."""

    name: str
    value: float | None
    bound: float
    least: bool = True

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        if self.value is None:
            return False
        return self.value >= self.bound - ROUNDING if self.least else self.value <= self.bound + ROUNDING

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """For a table: figure, measured, bound, met."""
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        return self.name, value, f"{'≥' if self.least else '≤'} {self.bound:.3g}", "yes" if self.met else "NO"


def _above(figures: Mapping[str, Any], rival: str) -> float | None:
    ours, theirs = figures.get("psnr_db"), (figures.get(rival) or {}).get("psnr_db")
    return None if ours is None or theirs is None else float(ours - theirs)


def checks(goal: Goal, figures: Mapping[str, Any] | None) -> Iterator[Check]:
    """Every bound of the issue that a benchmark's figures (None: there are none) can be held to."""
    found = figures or {}
    yield Check("× Inductor", found.get("speedup_vs_inductor"), goal.speedup)
    yield Check("PSNR dB", found.get("psnr_db"), goal.psnr_db)
    for name, margin in MARGINS_DB.items():
        yield Check(f"dB above {name}", _above(found, name), margin)
        if found.get("dense_cast"):
            yield Check(f"dB above {name} in the plan's dtype", _above(found, f"{name}_cast"), margin)
    converged = found.get("converged")
    gain = converged["optimized_db"] - converged["dense_db"] if converged else None
    yield Check("dB nearer to converged", gain, 0.0)  # its standard error is in the figures, and excuses nothing
    score = found.get("attribute_score")
    yield Check("attribute score kept", score["optimized"] - score["dense"] if score else None, -ATTRIBUTE_POINTS)
    yield Check("graph breaks", found.get("graph_breaks"), 0, least=False)
    yield Check("recompiles", found.get("recompiles"), 0, least=False)
    yield Check("variants", found.get("variants"), 8, least=False)
