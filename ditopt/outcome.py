"""What a run of ``optimize`` ends with: the table, the plan's measured figures, and the side file that explains it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ditopt import store
from ditopt.errors import InputError, PlanError
from ditopt.exact import Hoisted, ahead_mib
from ditopt.plan import Plan, Rule
from ditopt.plan_text import write_text_atomically
from ditopt.profile import Profile
from ditopt.quality import Quality
from ditopt.report.explained import side_path
from ditopt.runtime.graphs import Graphs
from ditopt.runtime.schedule import bind
from ditopt.search import Solution
from ditopt.search.planned import Planned, planned_error
from ditopt.sites import STEP
from ditopt.tune import Tried, Tuner

DENSE, OURS, RIVAL = 1, 2, 3
"""Positions of the contenders in the closing table; the rival may be missing."""


@dataclass(frozen=True)
class Row:
    """One line of the closing table; ``dtype`` is what it computes in, where that is not the model's own."""

    name: str
    seconds: float
    speedup: float
    psnr: float | None
    worst_psnr: float | None
    evaluations: int
    dtype: str | None = None


@dataclass
class Result:
    """What ``optimize`` found. ``plan`` is None if nothing beat the dense compiled model."""

    plan: Plan | None
    rows: list[Row]
    reasons: list[str]
    quality: Quality | None = None
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Rules that met the target on the held-out prompts, with what they measured there.

    ``seconds`` are those of a generation under the rules and dense, once they are measured.
    """

    rules: tuple[Rule, ...]
    quality: Quality
    solutions: dict[str, Solution]
    tuners: dict[str, Tuner]
    seconds: tuple[float, float] | None = None

    @property
    def speedup(self) -> float:
        """Dense seconds over those of the rules; 0 before they are measured."""
        return self.seconds[1] / self.seconds[0] if self.seconds is not None else 0.0


def closing_table(rows: Sequence[Row]) -> Table:
    """The table that ``optimize`` ends with."""
    table = Table(title="whole generations, prompts not used in calibration")
    table.add_column("")
    for column in ("seconds", "speed-up", "PSNR dB", "worst dB", "evaluations"):
        table.add_column(column, justify="right")
    for row in rows:
        psnr = ["-" if value is None else f"{value:.1f}" for value in (row.psnr, row.worst_psnr)]
        table.add_row(row.name, f"{row.seconds:.2f}", f"{row.speedup:.2f}x", *psnr, str(row.evaluations))
    return table


def finished_plan(
    template: Plan, found: Found, rows: Sequence[Row], graphs: Mapping[str, Graphs], held_out: int, state_bytes: int
) -> Plan:
    """The plan with what was predicted for it and measured on ``held_out`` prompts and of its slots (bytes)."""
    ours, dense = rows[OURS], rows[DENSE]
    whole = template.model_copy(update={"rules": found.rules})
    bound = [part.resolve(whole) for of_network in graphs.values() for part in of_network.parts]
    measured: dict[str, Any] = {
        "prompts": held_out,
        "psnr": round(found.quality.psnr, 2),
        "worst_psnr": round(found.quality.worst_psnr, 2),
        "rel_l2": round(found.quality.rel_l2, 5),
        "dense_s": round(dense.seconds, 3),
        "plan_s": round(ours.seconds, 3),
        "speedup": round(ours.speedup, 2),
        "evaluations": ours.evaluations,
        "state_mib": round(state_bytes / 2**20, 3),
        "variants": sum(len(part.variants) for part in bound),
    }
    if len(rows) > RIVAL and rows[RIVAL].psnr is not None:
        rival = rows[RIVAL]
        measured["fewer_steps"] = {
            "steps": rival.evaluations,
            "psnr": round(rival.psnr or 0.0, 2),
            "seconds": round(rival.seconds, 3),
        }
        if rival.dtype is not None:
            measured["fewer_steps"]["dtype"] = rival.dtype
    predicted = {
        "seconds": round(sum(s.predicted_seconds for s in found.solutions.values()), 3),
        "relative_error": round(math.sqrt(sum(s.predicted_error**2 for s in found.solutions.values())), 5),
    }
    return whole.model_copy(update={"measured": measured, "predicted": predicted})


def exact_plan(template: Plan, found: Hoisted, rows: Sequence[Row], held_out: int) -> Plan:
    """The plan of what is computed ahead of the steps, with what was measured on ``held_out`` prompts."""
    ours, dense = rows[OURS], rows[DENSE]
    measured: dict[str, Any] = {
        "prompts": held_out,
        "max_rel_error": float(f"{found.apart:.3g}"),
        "dense_s": round(dense.seconds, 3),
        "plan_s": round(ours.seconds, 3),
        "speedup": round(ours.speedup, 3),
        "evaluations": ours.evaluations,
        "ahead_mib": ahead_mib(found.work),
    }
    return template.model_copy(update={"rules": found.rules, "measured": measured})


def write_outcome(
    path: Path | None,
    plan: Plan,
    profile: Profile | None,
    found: Found | None,
    result: Result,
    prompts: Mapping[str, Sequence[str]],
    further: Mapping[str, Any] | None = None,
) -> Path:
    """Write the plan, its copy in the user's cache, and the side file that ``ditopt explain`` reads.

    ``further`` are more parts of the side file. Without a search there are neither ``profile`` nor ``found``.

    Returns the plan's path: ``path``, or the cache's own if that is None.

    Raises:
        PlanError: a file cannot be written.
    """
    structures = plan.model.structure.split()
    target = path or store.plan_path(structures[0])
    plan.save(target)
    solutions, tuners = ({}, {}) if found is None else (found.solutions, found.tuners)
    side = {
        "explanations": {
            name: [asdict(entry) for entry in solution.explanations] for name, solution in solutions.items()
        },
        "trials": [_trial_data(tried, plan, tuner) for tuner in tuners.values() for tried in tuner.tried.values()],
        "reasons": result.reasons,
        "prompts": {kind: list(texts) for kind, texts in prompts.items()},
        "timings": result.timings,
        "table": result.rows,
        "profile": {name: part.figures() for name, part in (profile.networks if profile is not None else {}).items()},
        **(further or {}),
    }
    write_side(target, side)
    for structure in structures if path is not None else structures[1:]:
        try:
            store.keep_plan(target, structure)
        except PlanError as error:  # the plan itself is written: nothing is lost
            result.reasons.append(str(error))
    return target


def write_side(path: Path, side: Mapping[str, Any]) -> None:
    """Write the side file of the plan ``path``; dataclasses in it become mappings."""
    write_text_atomically(side_path(path), json.dumps(side, indent=1, default=asdict))


def check_writable(path: Path | None) -> None:
    """Refuse an output path (None: the user's folder of plans) before the long work starts.

    Raises:
        InputError: the folder is missing or not writable, or the path is a folder.
    """
    if path is None:
        folder = store.plan_dir()
        try:
            store.check_writable(folder)
        except OSError as error:
            raise InputError(
                f"no plan_path is given, and plans cannot be kept in {folder} ({error.strerror or error}); "
                "give plan_path, or set DITOPT_CACHE to a folder that can be written"
            ) from error
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a plan file, e.g. {path / 'plan.yaml'}")
    if not path.parent.is_dir():
        raise InputError(
            f"{path} cannot be written: folder {path.parent} does not exist; make it first or choose another"
        )
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: no permission in {path.parent}; choose another folder")


def _trial_data(tried: Tried, plan: Plan, tuner: Tuner) -> dict[str, Any]:
    trial_plan = plan.model_copy(update={"rules": tried.rules})
    kept = {name: list(trial_plan.kept_steps(name)) for name in plan.sampler.timesteps}
    return {
        "kept": next(iter(kept.values())),
        "evaluations": sum(map(len, kept.values())),
        "psnr": tried.quality.psnr,
        "worst_psnr": tried.quality.worst_psnr,
        "rel_l2": tried.quality.rel_l2,
        "predicted_error": _predicted_error(trial_plan, tuner),
        "seconds": tried.seconds,
        "measured_seconds": tried.measured_seconds,
        "stage": tried.stage,
        "met": tried.met,
    }


def _predicted_error(plan: Plan, tuner: Tuner) -> float | None:
    """What the profile has for a trial, where whole steps alone are predicted: rounding has no prediction.

    Nor have sparse heads, as each of these was tried because of what it was predicted to cost.
    """
    if any(rule.for_heads for rule in plan.rules):
        return None
    ranges = tuner.evaluator.sessions[tuner.network].ranges()
    steps = bind(plan, tuner.network, ranges, partial=bool(plan.breaks)).steps
    found: dict[int, Planned] = {}
    for number, step in enumerate(steps):
        for prediction in step.predictions:
            if prediction.site != STEP:
                return None
            found[number] = Planned(prediction.sources, prediction.factors)
    return planned_error(tuner.problem, found) if found else None
