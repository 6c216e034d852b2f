"""What the flow must show: optimize and bench the shipped model at four targets, and hold the figures to them.

    python -m benchmarks.flow --model examples/tiny_video --out build/flow

Every target's plan, figures and report stay in the output folder; a run that was interrupted goes on from them.
Exits with 1 where a figure misses its bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """A target, and the least speed-up over Inductor at it."""

    guidance: float
    psnr_db: float
    speedup: float

    @property
    def name(self) -> str:
        """Of the folder that holds its files."""
        return f"guidance{self.guidance:g}-psnr{self.psnr_db:g}"


GOALS = (Goal(1.0, 42.0, 3.0), Goal(1.0, 36.0, 4.5), Goal(4.0, 42.0, 2.0), Goal(4.0, 36.0, 2.6))
OVER_FEWER_STEPS_DB = 6.0
OVER_SOLVERS_DB = 3.0
ATTRIBUTE_POINTS = 0.01


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
        return self.value >= self.bound if self.least else self.value <= self.bound


def checks(goal: Goal, figures: dict[str, Any]) -> Iterator[Check]:
    """Every bound of the issue that a benchmark's figures can be held to."""
    quality = figures["psnr_db"]
    yield Check("× Inductor", figures["speedup_vs_inductor"], goal.speedup)
    yield Check("PSNR dB", quality, goal.psnr_db)
    names = (("fewer_steps", OVER_FEWER_STEPS_DB), ("unipc", OVER_SOLVERS_DB), ("dpmpp", OVER_SOLVERS_DB))
    for name, margin in names:
        rival = figures[name]["psnr_db"]
        yield Check(f"dB above {name}", None if rival is None else quality - rival, margin)
    converged = figures["converged"]
    yield Check("dB nearer to converged", converged["optimized_db"] - converged["dense_db"], 0.0)
    score = figures["attribute_score"]
    yield Check("attribute score kept", score and score["optimized"] - score["dense"], -ATTRIBUTE_POINTS)
    yield Check("graph breaks", figures["graph_breaks"], 0, least=False)
    yield Check("recompiles", figures["recompiles"], 0, least=False)
    yield Check("variants", figures["variants"], 8, least=False)


def measure(goal: Goal, model: Path, out: Path, limit: int | None) -> dict[str, Any]:
    """Run the three commands for one goal, each only if its output is not there yet."""
    folder = out / goal.name
    folder.mkdir(parents=True, exist_ok=True)
    plan, figures, page = folder / "plan.yaml", folder / "bench.json", folder / "report.html"
    guided = ["--guidance", str(goal.guidance)]
    if not plan.exists():
        prompts = str(model / "calibration_prompts.txt")
        ditopt("optimize", model, "--prompts", prompts, "-o", plan, "--min-psnr", goal.psnr_db, *guided)
    if not figures.exists():
        few = [] if limit is None else ["--limit", limit]
        ditopt("bench", model, "--plan", plan, "--prompts", model / "prompts.txt", "--json", figures, *guided, *few)
    ditopt("report", plan, "-o", page, "--bench", figures)
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def ditopt(*words: object) -> None:
    """One command in a process of its own, as a user runs it."""
    subprocess.run([sys.executable, "-m", "ditopt.cli", *map(str, words)], check=True)


def main() -> None:
    """Measure and judge as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny_video"))
    parser.add_argument("--out", type=Path, default=Path("build/flow"))
    parser.add_argument("--limit", type=int, help="use the first N prompts only")
    args = parser.parse_args()
    table, missed = Table("goal", "figure", "measured", "bound", "met"), False
    for goal in GOALS:
        for check in checks(goal, measure(goal, args.model, args.out, args.limit)):
            value = "not measured" if check.value is None else f"{check.value:.3g}"
            bound = f"{'≥' if check.least else '≤'} {check.bound:g}"
            table.add_row(goal.name, check.name, value, bound, "yes" if check.met else "NO")
            missed = missed or not check.met
    Console().print(table)
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
