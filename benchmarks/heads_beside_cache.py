"""What sparse heads add to the best plan without them, at equal quality and at equal time.

    python -m benchmarks.heads_beside_cache --set height=112 --set width=112 --json docs/results/heads_beside_cache.json

For each of several targets the flow of ``optimize`` finds the fastest plan without sparse heads and, beside it, the
fastest with them, from one profile. All of them then generate other prompts, in turn, in one process: their seconds
are medians over the turns. The plans without heads are a curve of seconds over PSNR; what heads add is read off it,
between neighbouring plans in straight lines over the logarithm of the seconds, and nowhere beyond its ends. Plans are
kept in a folder beside the figures as they are found, from which an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ditopt.adapters import adapt
from ditopt.cli_inputs import pipe_settings
from ditopt.console import Reporter
from ditopt.device import describe_device
from ditopt.plan import Plan, Rule
from ditopt.plan_text import write_text_atomically
from ditopt.prepare import Preparation, Prepared, as_it_was, seeded
from ditopt.profile import Profile
from ditopt.profiler.take import TABLES, add_sparse_tables, take_profile
from ditopt.target import Target
from ditopt.techniques import ALL_TECHNIQUES, HOIST, Techniques
from ditopt.verify import VerifiedSearch, affordable_trials

MODEL = Path("examples/tiny_video")
TARGETS_DB = (40.0, 37.0, 34.0, 31.0)
PROFILED, HELD_OUT, JUDGED_SEED = 2, 2, 5000


@dataclass(frozen=True)
class Point:
    """A plan measured: ``family`` cached or heads, its target and PSNR in dB, seconds of a generation."""

    family: str
    target: float
    psnr: float
    worst_psnr: float
    rel_l2: float
    seconds: float
    computed: int
    sparse_rules: int


@dataclass(frozen=True)
class Gain:
    """What heads add at one target: PSNR in dB and the share of seconds saved; None beyond the curve's ends.

    ``seconds_at_db`` is what a plan without heads takes for the PSNR, ``db_at_seconds`` the PSNR it has at the time.
    """

    target: float
    psnr: float
    seconds: float
    seconds_at_db: float | None
    db_at_seconds: float | None

    @property
    def saved(self) -> float | None:
        """Of the seconds of the plan without heads of equal PSNR."""
        return None if self.seconds_at_db is None else 1 - self.seconds / self.seconds_at_db

    @property
    def more_db(self) -> float | None:
        """Over the plan without heads that takes as long."""
        return None if self.db_at_seconds is None else self.psnr - self.db_at_seconds


def read_off(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """The height of a curve of points at ``at``, in straight lines between neighbours; None beyond its ends.

    >>> read_off([(0.0, 1.0), (2.0, 3.0)], 0.5)
    1.5
    >>> read_off([(0.0, 1.0), (2.0, 3.0)], 2.5) is None
    True
    """
    points = sorted(curve)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= at <= right:
            return low if right == left else low + (high - low) * (at - left) / (right - left)
    return None


def gains(points: Sequence[Point]) -> list[Gain]:
    """What heads add, by plan with heads; the curve is of those plans without that no other beats in both."""
    cached = [each for each in points if each.family == "cached"]
    front = [
        each for each in cached if not any(other.psnr >= each.psnr and other.seconds < each.seconds for other in cached)
    ]
    found = []
    for each in (point for point in points if point.family == "heads"):
        log_seconds = read_off([(cache.psnr, math.log(cache.seconds)) for cache in front], each.psnr)
        found.append(
            Gain(
                each.target,
                each.psnr,
                each.seconds,
                None if log_seconds is None else math.exp(log_seconds),
                read_off([(math.log(cache.seconds), cache.psnr) for cache in front], math.log(each.seconds)),
            )
        )
    return found


def found_plans(
    prepared: Prepared,
    profile: Profile,
    chosen: Techniques,
    target: float,
    pairs: tuple[Sequence[Any], Sequence[Any]],
    reporter: Reporter,
    reasons: list[str],
) -> dict[str, Sequence[Rule]]:
    """The rules of the fastest plans for a target, by family; without ``heads`` where none were worth it."""
    search = VerifiedSearch(
        prepared.evaluator,
        profile,
        Target(min_psnr=target),
        *pairs,
        reporter,
        affordable_trials(profile),
        8,
        chosen.predictors,
        chosen.dtypes,
        second_order=False,
        sparse=True,
        reasons=reasons,
    )
    search()
    if search.without_heads is None or search.with_heads is None:
        return {}
    plans: dict[str, Sequence[Rule]] = {"cached": search.without_heads.rules}
    if search.with_heads is not search.without_heads:
        plans["heads"] = search.with_heads.rules
    return plans


def measured(
    prepared: Prepared,
    plans: Mapping[tuple[str, float], Sequence[Rule]],
    pairs: Sequence[Any],
    turns: int,
    reporter: Reporter,
) -> list[Point]:
    """All plans on ``pairs``: quality against dense runs, then seconds, in turn."""
    evaluator = prepared.evaluator
    evaluator.dense(pairs)
    (network,) = evaluator.sessions
    qualities = {key: evaluator.quality(rules, pairs)[0] for key, rules in plans.items()}
    timed = evaluator.times_in_turn(list(plans.values()), pairs, turns)
    points = []
    for (family, target), seconds in zip(plans, timed, strict=True):
        quality, rules = qualities[family, target], plans[family, target]
        plan = evaluator.template.model_copy(update={"rules": tuple(rules)})
        points.append(
            Point(
                family,
                target,
                quality.psnr,
                quality.worst_psnr,
                quality.rel_l2,
                statistics.median(seconds),
                len(plan.kept_steps(network)),
                sum(each.do.kind == "sparse" for each in rules),
            )
        )
        reporter.say(f"  {family} at {target:g} dB: {points[-1].seconds:.3g} s, {points[-1].psnr:.1f} dB")
    return points


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profile once, search for every target, measure all that was found."""
    from diffusers import DiffusionPipeline

    texts = [line.strip() for line in arguments.prompts.read_text().splitlines() if line.strip()]
    chosen = Techniques.choose([name for name in ALL_TECHNIQUES if name != HOIST])
    profiled = seeded(texts[:PROFILED], 0)
    held_out = seeded(texts[PROFILED : PROFILED + HELD_OUT], PROFILED)
    judged = seeded(texts[PROFILED + HELD_OUT :][: arguments.limit], JUDGED_SEED)
    pipe = DiffusionPipeline.from_pretrained(arguments.model, trust_remote_code=True)
    settings = pipe_settings(arguments.steps, 1.0, arguments.set)
    adapter, reporter = adapt(pipe, None, settings), Reporter()
    reasons: list[str] = []
    plans: dict[tuple[str, float], Sequence[Rule]] = {}
    with as_it_was(adapter, always=True):
        prepared = Preparation(adapter, reporter, reasons, lambda _: nullcontext(), settings, chosen.ranges)(
            profiled[0]
        )
        facts = {"ranges": chosen.ranges, "pairs": [*profiled, *held_out], "tables": TABLES}
        checkpoints = prepared.checkpoints(facts, settings, True)
        profile = take_profile(prepared, chosen, checkpoints, profiled, reporter)
        profile = add_sparse_tables(prepared, profile, checkpoints, profiled, reporter, reasons)
        prepared.evaluator.dense(held_out)
        folder = arguments.json.with_suffix("") / checkpoints.folder.name
        for target in arguments.targets:
            known = plans_in(folder, target)
            if known is None:
                reporter.say(f"target {target:g} dB")
                known = found_plans(prepared, profile, chosen, target, (profiled, held_out), reporter, reasons)
                keep_plans(folder, prepared.evaluator.template, target, known)
            plans |= {(family, target): rules for family, rules in known.items()}
        points = measured(prepared, plans, judged, arguments.turns, reporter)
    added = gains(points)
    return {
        "points": [asdict(each) for each in points],
        "gains": [asdict(each) | {"saved": each.saved, "more_db": each.more_db} for each in added],
        "settings": settings,
        "prompts": {"profiled": profiled, "held_out": held_out, "judged": judged},
        "turns": arguments.turns,
        "reasons": reasons,
        "model": {"folder": str(arguments.model), **profile.plan["model"], "weights": dict(profile.weights)},
        "device": describe_device(torch.device("cpu")),
        "torch": torch.__version__,
        "command": f"python -m benchmarks.heads_beside_cache {shlex.join(sys.argv[1:])}",
    }


def keep_plans(folder: Path, template: Plan, target: float, plans: Mapping[str, Sequence[Rule]]) -> None:
    """Write what one target gave as plan files, for a run that is taken up later; ``cached`` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for family in sorted(plans, reverse=True):
        template.model_copy(update={"rules": tuple(plans[family])}).save(folder / f"{target:g}db.{family}.yaml")


def plans_in(folder: Path, target: float) -> dict[str, Sequence[Rule]] | None:
    """What ``keep_plans`` wrote for a target, if anything."""
    paths = {family: folder / f"{target:g}db.{family}.yaml" for family in ("cached", "heads")}
    if not paths["cached"].exists():
        return None
    return {family: Plan.load(path).rules for family, path in paths.items() if path.exists()}


def shown(points: Sequence[Point], added: Sequence[Gain]) -> Table:
    """The closing table."""
    table = Table(
        "target dB", "plan", "seconds", "PSNR dB", "computed steps", "saved at equal PSNR", "dB at equal time"
    )
    by_target = {each.target: each for each in added}
    for point in points:
        gain = by_target.get(point.target) if point.family == "heads" else None
        table.add_row(
            f"{point.target:g}",
            point.family,
            f"{point.seconds:.2f}",
            f"{point.psnr:.1f}",
            str(point.computed),
            "-" if gain is None or gain.saved is None else f"{gain.saved:.1%}",
            "-" if gain is None or gain.more_db is None else f"{gain.more_db:+.1f}",
        )
    return table


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=Path, default=MODEL / "prompts.txt")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS_DB, help="mean PSNR in dB")
    parser.add_argument("--limit", type=int, default=4, help="prompts that judge")
    parser.add_argument("--turns", type=int, default=5, help="timed generations of each plan")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the pipeline's call")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = run(arguments)
    write_text_atomically(arguments.json, json.dumps(found, indent=1) + "\n")
    points = [Point(**each) for each in found["points"]]
    Console().print(shown(points, gains(points)))


if __name__ == "__main__":
    main()
