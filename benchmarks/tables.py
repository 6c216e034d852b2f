"""The tables of README.md and docs/results.md, from the figures that ``benchmarks.flow`` leaves in a folder.

``python -m benchmarks.tables docs/results/zen4`` prints a line a goal; ``--full`` every contender, and what else is
measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import GOALS, MARGINS_DB, Goal
from ditopt.report.figures import OPTIMISED, bench_rows

Figures = Mapping[str, Any]


def read(folder: Path) -> dict[Goal, Figures]:
    """The figures of the goals that are there: ``NAME/bench.json``, as the flow leaves them, or ``NAME.bench.json``."""
    found = {}
    for goal in GOALS:
        for path in (folder / goal.name / "bench.json", folder / f"{goal.name}.bench.json"):
            if path.exists():
                found[goal] = json.loads(path.read_text())
                break
    if not found:
        raise SystemExit(f"{folder}: no figures of {', '.join(goal.name for goal in GOALS)} are there")
    return found


def asked(figures: Figures) -> str:
    """What the plan was asked for."""
    target = figures["plan"]["target"]
    return f"`--target-speedup {target['speedup']:g} --min-psnr {target['min_psnr']:g}`"


def decibels(contender: Figures | None) -> str:
    """A rival's PSNR, with its steps."""
    return "-" if not contender else f"{contender['psnr_db']:.1f} ({contender['steps']})"


def converged(figures: Figures) -> str:
    """How much nearer than dense to converged runs, with its standard error."""
    found = figures.get("converged")
    if not found:
        return "-"
    return f"{found['optimized_db'] - found['dense_db']:+.2f} ({found['gain_stderr_db']:.2f})"


def attributes(figures: Figures) -> str:
    """Scores of plan and dense, and over how many captions."""
    found = figures.get("attribute_score")
    return f"{found['optimized']:.3f} ({found['dense']:.3f}; {found['prompts']})" if found else "-"


def short(all_figures: Mapping[Goal, Figures]) -> Iterator[str]:
    """A line a goal."""
    yield (
        "| goal | evaluations | over Inductor | mean PSNR (worst) | Euler, UniPC, DPM-Solver++ of equal time (steps) | "
        "Euler in bfloat16 | nearer to converged (s.e.) | attributes (dense; captions) |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for goal, each in all_figures.items():
        guidance = "no guidance" if goal.guidance == 1 else f"guidance {goal.guidance:g}"
        rivals = ", ".join(decibels(each.get(name)) for name in MARGINS_DB)
        yield (
            f"| {guidance}, {goal.speedup}x at {goal.psnr_db:g} dB | {each['kept']} of {each['steps']} | "
            f"**{each['speedup_vs_inductor']:.2f}x** | **{each['psnr_db']:.1f} dB** ({each['worst_psnr_db']:.1f}) | "
            f"{rivals} | {decibels(each.get('fewer_steps_cast'))} | {converged(each)} | {attributes(each)} |"
        )


def full(all_figures: Mapping[Goal, Figures]) -> Iterator[str]:
    """Every contender, then what else is measured."""
    for guidance in dict.fromkeys(goal.guidance for goal in all_figures):
        group = {goal: each for goal, each in all_figures.items() if goal.guidance == guidance}
        yield f"| guidance {guidance:g} | evaluations | seconds | over Inductor | mean PSNR | worst |"
        yield "|---|---|---|---|---|---|"
        for number, each in enumerate(group.values()):
            for name, steps, seconds, speedup, psnr, worst in bench_rows(each):
                if number and name.startswith("dense"):  # goals of one guidance scale share their dense runs
                    continue
                quality = "- | -" if psnr is None else f"{psnr:.1f} dB | {worst:.1f} dB"
                title = f"**ditopt**, {asked(each)}" if name == OPTIMISED else name
                yield f"| {title} | {steps} | {seconds:.2f} | {speedup:.2f}x | {quality} |"
        yield ""
    yield (
        "| goal | nearer to converged, dB (s.e.) | attributes (dense; captions) | variants | breaks | recompiles | "
        "first generation, warm cache | slots |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for goal, each in all_figures.items():
        yield (
            f"| {goal.name} | {converged(each)} | {attributes(each)} | {each['variants']} | "
            f"{each['graph_breaks']} | {each['recompiles']} | {each['first_generation_s']:.1f} s | "
            f"{each['slot_bytes'] / 2**20:.2f} MiB |"
        )


def main(words: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args(words)
    figures = read(given.folder)
    print("\n".join(full(figures) if given.full else short(figures)))


if __name__ == "__main__":
    main()
