"""The HTML report: one file, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import ditopt
from ditopt.plan import Plan
from ditopt.report import charts
from ditopt.report.explained import Explained, TableRow
from ditopt.report.figures import bench_notes, bench_rows, figure
from ditopt.report.picture import MEANINGS, kinds_in, pictures


def render_report(plan: Plan, explained: Explained | None, bench: Mapping[str, Any] | None, source: str) -> str:
    """The report on a plan as HTML.

    Args:
        plan: what to report on.
        explained: its side file, if there is one; without it the report has the schedule and figures only.
        bench: what ``ditopt bench --json`` wrote, if anything.
        source: the plan's file name, for the title.
    """
    loader = PackageLoader("ditopt", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = figure
    drawn = pictures(plan)
    found = explained or Explained()
    return environment.get_template("report.html.j2").render(
        plan=plan,
        data=plan.to_data(),
        source=source,
        version=ditopt.__version__,
        explained=explained,
        found=found,
        bench=bench,
        bench_rows=bench_rows(bench) if bench else [],
        bench_notes=bench_notes(bench) if bench else [],
        legend=[(kind, MEANINGS.get(kind, kind)) for kind in kinds_in(drawn)],
        schedules=[(picture.summary, charts.schedule(picture)) for picture in drawn],
        trials=_trials(plan, found, bench),
        profiles=[
            (
                name,
                charts.heat_map(part.similarity, f"similarity of steps, {name}") if part.similarity else None,
                charts.curve(part.sensitivity, "step", "growth of an error") if part.sensitivity else None,
            )
            for name, part in found.profile.items()
        ],
        kept={name: len(plan.kept_steps(name)) for name in plan.sampler.timesteps},
    )


def _rival(row: TableRow) -> bool:
    """Whether a line is neither the plan nor the dense run itself, which have no place among the rivals."""
    return row.psnr is not None and row.name != "ditopt"


def _trials(plan: Plan, found: Explained, bench: Mapping[str, Any] | None) -> Any:
    points = []
    for trial in found.trials:
        label = f"{trial.stage or 'trial'}: {trial.evaluations} evaluations, {trial.psnr:.2f} dB"
        points.append(charts.Point(trial.evaluations, trial.psnr, label, "met" if trial.met else "missed"))
    rivals: list[tuple[str, Any, Any]] = [(row.name, row.evaluations, row.psnr) for row in found.table if _rival(row)]
    if bench:
        rivals += [(name, n, db) for name, n, _, _, db, _ in bench_rows(bench)[3:]]
    for name, n, db in rivals:
        if n and db is not None:
            points.append(charts.Point(n, db, f"{name}: {n} evaluations, {db:.2f} dB", "rival"))
    target = plan.target.get("min_psnr")
    line = float(target) if isinstance(target, int | float) else None
    return charts.scatter(points, "network evaluations", "PSNR to dense (dB)", line) if points else None
