"""What the flow must show: optimize and bench the shipped model at four targets, and hold the figures to them.

    python -m benchmarks.flow --model examples/tiny_video --out build/flow
    python -m benchmarks.flow --only unguided-42

Both targets of one guidance scale share a benchmark, and so its dense runs. Every target's plan, figures and report
stay in the output folder; a run that was interrupted goes on from them, and what belongs to other weights, prompts,
limits, sources, library versions or another processor is made again. Writes one table as JSON and Markdown. Exits
with 1 where a figure misses its bound or a part could not be measured.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.goals import GOALS, Check, Goal, checks
from ditopt.plan import Plan
from ditopt.plan_text import write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ditopt", "passes", "kernels", "cost_models")
SEEN = 5
"""So many held-out prompts, the first ones, were looked at when constants of the search were chosen: they come last."""


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside the goal; ``limit`` prompts are timed, ``score_limit`` are scored.

    Those are the first of the held-out ones behind ``skip``; the skipped ones come last.
    """

    model: Path
    out: Path
    limit: int
    score_limit: int
    skip: int = SEEN

    @property
    def calibration(self) -> Path:
        """The prompts that plans are made with."""
        return self.model / "calibration_prompts.txt"

    @property
    def prompts(self) -> Path:
        """The held-out prompts."""
        return self.model / "prompts.txt"


@dataclass(frozen=True)
class Part:
    """A goal with its files."""

    goal: Goal
    settings: Settings

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.settings.out / self.goal.name

    @property
    def plan(self) -> Path:
        """What ``ditopt optimize`` writes."""
        return self.folder / "plan.yaml"

    @property
    def figures(self) -> Path:
        """What the benchmark writes."""
        return self.folder / "bench.json"

    def plan_facts(self) -> dict[str, Any]:
        """What the plan was made from."""
        parts = [path for kind in ("safetensors", "json", "py") for path in self.settings.model.rglob(f"*.{kind}")]
        model, prompts = digest(parts, self.settings.model), digest([self.settings.calibration])
        asked = " ".join(map(str, self.words))
        return {"model": model, "prompts": prompts, "asked": asked, "sources": source_digest(), **surroundings()}

    @property
    def words(self) -> tuple[object, ...]:
        """What ``ditopt optimize`` is asked for, beside files."""
        goal = self.goal
        return "--target-speedup", goal.asked, "--min-psnr", goal.asked_db, "--guidance", goal.guidance

    def bench_facts(self) -> dict[str, Any]:
        """What the figures were made from."""
        settings = self.settings
        limits = {"limit": settings.limit, "score_limit": settings.score_limit, "skip": settings.skip}
        return {**self.plan_facts(), **limits, "held_out": digest([settings.prompts]), "plan": digest([self.plan])}

    @property
    def has_plan(self) -> bool:
        """Whether the plan is there, made from what is here now."""
        return is_kept(self.plan, self.plan_facts)

    @property
    def has_figures(self) -> bool:
        """Whether the figures are there, of this plan and of what is here now."""
        return self.has_plan and is_kept(self.figures, self.bench_facts)

    @property
    def is_dense(self) -> bool:
        """Whether the search has ended without a plan, so that there is nothing to measure."""
        return self.has_plan and self.stays_dense is not None

    @property
    def stays_dense(self) -> str | None:
        """Why the search ended without a plan; None where there is one."""
        plan = Plan.load(self.plan)
        return None if plan.rules else str(plan.measured.get("dense", "the plan has no rules"))


def digest(files: Iterable[Path], below: Path | None = None) -> str:
    """A hash of the files' contents and names, which are paths relative to ``below`` where that is given."""
    found = hashlib.sha256()
    for name, path in sorted((path.relative_to(below).as_posix() if below else path.name, path) for path in files):
        found.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:20]


def source_digest() -> str:
    """A hash of the code that makes plans and measures them, in whichever language."""
    files = (path for folder in SOURCES for path in (ROOT / folder).rglob("*"))
    return digest((path for path in files if path.is_file() and "__pycache__" not in path.parts), ROOT)


@cache
def surroundings() -> dict[str, str]:
    """The libraries and the processor that figures hold for."""
    import torch

    from ditopt.device import describe_device

    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {**versions, "cpu": describe_device(torch.device("cpu"))}


def stamp_of(path: Path) -> Path:
    """The file that says what ``path`` was made from."""
    return path.with_suffix(".stamp.json")


def is_kept(path: Path, facts: Callable[[], dict[str, Any]]) -> bool:
    """Whether ``path`` is there, whole, and made from ``facts``."""
    stamp = stamp_of(path)
    return path.exists() and stamp.exists() and json.loads(stamp.read_text()) == facts()


def keep(path: Path, facts: dict[str, Any]) -> None:
    """Say that ``path`` is finished and what it was made from."""
    write_text_atomically(stamp_of(path), json.dumps(facts, indent=2) + "\n")


def optimize(part: Part) -> None:
    """Make a part's plan."""
    settings = part.settings
    ditopt("optimize", settings.model, "--prompts", settings.calibration, "-o", part.plan, *part.words)


def bench(parts: Sequence[Part]) -> None:
    """Measure the plans of parts of one guidance scale in one interleaved run, in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=bench_here, args=(tuple(parts),))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the benchmark ended with {process.exitcode}")


def bench_here(parts: Sequence[Part]) -> None:
    """``bench`` in this process."""
    from ditopt.bench import BenchPlan, run_benches
    from ditopt.cli_inputs import Dtype, load_pipeline, read_prompts
    from ditopt.console import Reporter

    settings = parts[0].settings
    held_out = read_prompts(settings.prompts)
    prompts = [*held_out[settings.skip :], *held_out[: settings.skip]]
    results = run_benches(
        load_pipeline(str(settings.model), None, Dtype.float32, None),
        [BenchPlan(Plan.load(part.plan), str(part.plan)) for part in parts],
        prompts[: settings.limit],
        settings={"guidance_scale": parts[0].goal.guidance},
        score_prompts=prompts[: settings.score_limit],
        reporter=Reporter(),
    )
    for part, result in zip(parts, results, strict=True):
        result.save(part.figures)


def report(part: Part) -> None:
    """Write a part's page."""
    ditopt("report", part.plan, "-o", part.folder / "report.html", "--bench", part.figures)


def ditopt(*words: object) -> None:
    """One command in a process of its own, as a user runs it."""
    subprocess.run([sys.executable, "-m", "ditopt.cli", *map(str, words)], check=True)


@dataclass(frozen=True)
class Task:
    """Something to do for parts; ``expected_s`` by experience, to weigh tasks against each other."""

    title: str
    parts: tuple[Part, ...]
    expected_s: float
    run: Callable[[], None]


@dataclass
class Flow:
    """The tasks for the chosen parts, done in order; a part that fails is left, the others go on."""

    parts: Sequence[Part]
    say: Callable[[str], None]
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Do what is not done yet, with an ETA before each task."""
        tasks = list(self.tasks())
        left, done, spent = sum(task.expected_s for task in tasks), 0.0, 0.0
        for number, task in enumerate(tasks, 1):
            pace = spent / done if done else 1.0
            eta = timedelta(seconds=round(pace * left))
            self.say(
                f"[{number}/{len(tasks)}] {task.title}, about {pace * task.expected_s / 60:.0f} min; all: ETA {eta}"
            )
            began = time.monotonic()
            try:
                task.run()
            except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
                for part in task.parts:
                    self.failures.setdefault(part.goal.name, f"{task.title}: {error}")
                self.say(f"failed: {error}")
            else:
                spent, done = spent + time.monotonic() - began, done + task.expected_s
            left -= task.expected_s

    def tasks(self) -> Iterator[Task]:
        """Plans first, then one benchmark for all parts of a guidance scale."""
        for guidance in dict.fromkeys(part.goal.guidance for part in self.parts):
            group = [part for part in self.parts if part.goal.guidance == guidance]
            for part in group:
                if not part.has_plan:
                    title = f"optimize {part.goal.name}"
                    yield Task(title, (part,), 55 * part.goal.generation_s, partial(self._optimize, part))
            missing = tuple(part for part in group if not (part.has_figures or part.is_dense))
            if missing:
                title = f"bench {' and '.join(part.goal.name for part in missing)}"
                yield Task(title, missing, bench_seconds(missing), partial(self._bench, missing))

    def _optimize(self, part: Part) -> None:
        part.folder.mkdir(parents=True, exist_ok=True)
        facts = part.plan_facts()  # of what the search begins with: sources edited meanwhile are others
        optimize(part)
        keep(part.plan, facts)

    def _bench(self, parts: Sequence[Part]) -> None:
        measurable = [part for part in parts if part.has_plan and not part.is_dense]
        facts = [part.bench_facts() for part in measurable]
        if measurable:
            bench(measurable)
        for part, made_from in zip(measurable, facts, strict=True):
            keep(part.figures, made_from)
            report(part)


def bench_seconds(parts: Sequence[Part]) -> float:
    """About what a benchmark takes.

    Dense generations once, in bfloat16 at half of them, converged ones of four times the steps; a plan's and its six
    rivals' at a third of them each; and pilots.
    """
    from ditopt.contest import CONVERGED_FACTOR, CONVERGED_PROMPTS

    settings = parts[0].settings
    scored = max(0, settings.score_limit - settings.limit)
    converged = CONVERGED_FACTOR * min(settings.limit, CONVERGED_PROMPTS)
    shared = 1.5 * settings.limit + scored + converged + 20
    generations = shared + len(parts) * (7 * settings.limit + scored + 30) / 3
    return generations * parts[0].goal.generation_s


@dataclass(frozen=True)
class Outcome:
    """What became of a part: ``met``, ``missed``, ``failed`` or ``not run``, why, and its figures against bounds."""

    part: Part
    status: str
    reason: str
    checks: tuple[Check, ...]


def outcome(part: Part, failures: Mapping[str, str]) -> Outcome:
    """Judge a part by what lies in its folder."""
    name = part.goal.name
    if part.has_figures:
        made = tuple(checks(part.goal, json.loads(part.figures.read_text())))
        return Outcome(part, "met" if all(check.met for check in made) else "missed", "", made)
    nothing = tuple(checks(part.goal, None))
    if name in failures:
        return Outcome(part, "failed", failures[name], nothing)
    if part.is_dense:
        return Outcome(part, "missed", f"stays dense: {part.stays_dense}", nothing)
    return Outcome(part, "not run", "", ())


def as_data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The table as JSON-able data."""
    settings = outcomes[0].part.settings
    return {
        "model": str(settings.model),
        "met": all(found.status == "met" for found in outcomes),
        "limit": settings.limit,
        "score_limit": settings.score_limit,
        "skip": settings.skip,
        "parts": [
            {
                **asdict(found.part.goal),
                "name": found.part.goal.name,
                "status": found.status,
                "reason": found.reason,
                "checks": [{**asdict(check), "met": check.met} for check in found.checks],
                "figures": str(found.part.figures) if found.part.has_figures else None,
                "versions": json.loads(found.part.figures.read_text())["versions"] if found.part.has_figures else None,
            }
            for found in outcomes
        ],
    }


def rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """The table's rows: goal, figure, measured, bound, met."""
    for found in outcomes:
        name = found.part.goal.name
        told = f"{found.status}: {found.reason}" if found.reason else found.status
        yield name, f"**{told}**", "", "", ""
        for check in found.checks:
            yield name, *check.cells


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The table as Markdown."""
    settings = outcomes[0].part.settings
    lines = [
        f"`python -m benchmarks.flow --model {settings.model} --limit {settings.limit} "
        f"--score-limit {settings.score_limit} --skip {settings.skip}`",
        "",
        "| goal | figure | measured | bound | met |",
        "|---|---|---:|---:|---|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(outcomes)),
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Measure and judge as the command line says; 0 where every chosen part meets its goal and no other misses its."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny_video"))
    parser.add_argument("--out", type=Path, default=Path("build/flow"))
    parser.add_argument("--only", action="append", choices=[goal.name for goal in GOALS], help="a part, repeatable")
    parser.add_argument("--limit", type=int, default=16, help="time the first N held-out prompts")
    parser.add_argument("--score-limit", type=int, default=64, help="score the first N held-out prompts, untimed")
    parser.add_argument("--skip", type=int, default=SEEN, help="put the first N held-out prompts last")
    parser.add_argument("--json", type=Path, default=Path("docs/results/flow.json"), help="the .md goes beside it")
    given = parser.parse_args(words)
    for name in ("limit", "score_limit"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: give at least 1")
    if given.skip < 0:
        parser.error(f"--skip {given.skip}: give 0 or more")
    settings = Settings(given.model, given.out, given.limit, given.score_limit, given.skip)
    parts = [Part(goal, settings) for goal in GOALS]
    chosen = [part for part in parts if not given.only or part.goal.name in given.only]

    console = Console()
    flow = Flow(chosen, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    try:
        flow.run()
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to go on from what was finished")
        return 130
    outcomes = [outcome(part, flow.failures) for part in parts]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(given.json, json.dumps(as_data(outcomes), indent=2) + "\n")
    write_text_atomically(given.json.with_suffix(".md"), as_markdown(outcomes))
    table = Table("goal", "figure", "measured", "bound", "met")
    for row in rows(outcomes):
        table.add_row(*(cell.replace("**", "") for cell in row))
    console.print(table)
    fine = all(found.status == "met" or (found.status == "not run" and found.part not in chosen) for found in outcomes)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
