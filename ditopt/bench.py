"""``ditopt bench``: whole generations of every honest rival, interleaved; medians, and paired quality.

The reference of every quality figure is the dense Inductor run with the same prompt and noise.
"""

from __future__ import annotations

import importlib.util
import platform
import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ditopt
from ditopt.adapters import DiffusersAdapter
from ditopt.console import Reporter
from ditopt.contenders import SOLVERS, Contender, Sample, compiled_calls, flow_solver, installed
from ditopt.contest import (
    CAST,
    CONVERGED_FACTOR,
    CONVERGED_PROMPTS,
    DENSE,
    PILOT_ROUNDS,
    SHEET_PROMPTS,
    Contest,
    Entry,
)
from ditopt.device import describe_device
from ditopt.errors import InputError, PlanMismatchError
from ditopt.plan import Plan
from ditopt.report.measured import BenchResult, RivalResult
from ditopt.report.sheet import save_sheet

MIN_REPEATS = 5


@dataclass(frozen=True)
class BenchPlan:
    """A plan to measure, its file's name for the result, and where its contact sheet goes (None: nowhere)."""

    plan: Plan
    source: str = ""
    sheet: Path | None = None


def settings_of(plan: Plan, given: Mapping[str, Any], accepted: Mapping[str, Any], order: int = 1) -> dict[str, Any]:
    """What the pipeline is called with: the plan's steps, guidance and other settings, changed by ``given``."""
    steps = -(-plan.sampler.steps // order)
    found: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": plan.sampler.guidance}
    found |= plan.settings
    return {name: value for name, value in found.items() if name in accepted} | dict(given)


def run_bench(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    repeats: int = MIN_REPEATS,
    seed: int = 1000,
    score_prompts: Sequence[str] = (),
    reporter: Reporter | None = None,
    sheet: Path | None = None,
    source: str = "",
    retarget: bool = False,
) -> BenchResult:
    """Measure a plan on a diffusers pipeline against dense, fewer steps, UniPC and DPM-Solver++.

    The rivals run the model as it is; where the plan computes in a dtype of its own, there is one more of each in it.

    Args:
        pipe: the pipeline; its networks and scheduler are left as they were.
        plan: made for this model and these settings.
        prompts: not those of the calibration; every one is judged.
        settings: of the pipeline's call; default those of the plan.
        repeats: the least number of generations a median is over, at least 5.
        seed: of the first prompt's noise; prompt i uses ``seed + i``, for every contender.
        score_prompts: what the pipeline's attribute score is over, untimed; default ``prompts``. Prompt i has the
            noise of ``seed + i`` here too, so what both lists begin with is generated once.
        reporter: prints progress.
        sheet: where to write a contact sheet.
        source: the plan's file name, for the result.
        retarget: fit a plan that was made for another size or schedule to this one; else it is refused.

    Raises:
        InputError: no prompts, or too few repeats.
        PlanMismatchError: the plan is for another model, schedule or scheduler.
    """
    measured = run_benches(
        pipe,
        [BenchPlan(plan, source, sheet)],
        prompts,
        settings=settings,
        repeats=repeats,
        seed=seed,
        score_prompts=score_prompts,
        reporter=reporter,
        retarget=retarget,
    )
    return measured[0]


def run_benches(
    pipe: Any,
    plans: Sequence[BenchPlan],
    prompts: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    repeats: int = MIN_REPEATS,
    seed: int = 1000,
    score_prompts: Sequence[str] = (),
    reporter: Reporter | None = None,
    retarget: bool = False,
) -> list[BenchResult]:
    """Measure several plans for one setting in one interleaved run: ``run_bench`` for each, with shared dense runs.

    Every plan has rivals at its own latency; a rival that two plans ask for is run once. ``recompiles`` are the
    frames that Dynamo and the plan's variants that Inductor compiled after the warm-up. Peak memory and what Dynamo
    counts are of the whole run.

    Raises:
        InputError: no plans, no prompts, too few repeats, or plans that call the pipeline differently.
        PlanMismatchError: a plan is for another model, schedule or scheduler.
    """
    if not plans:
        raise InputError("no plans to benchmark; give at least one")
    if not prompts:
        raise InputError("no prompts to benchmark on; give at least one")
    if repeats < MIN_REPEATS:
        raise InputError(f"repeats is {repeats}; a median needs at least {MIN_REPEATS} generations")
    if importlib.util.find_spec("skimage") is None:
        raise InputError("SSIM needs scikit-image, which is not installed: pip install 'ditopt[bench]'")
    probe = DiffusersAdapter(pipe, {})
    order = int(getattr(pipe.scheduler, "order", 1))
    own = type(pipe.scheduler).__name__
    try:
        called = [settings_of(each.plan, settings or {}, probe.accepted, order) for each in plans]
        for each, found in zip(plans, called, strict=True):
            if each.plan.sampler.class_name != own:
                raise PlanMismatchError(
                    f"plan is for {each.plan.sampler.class_name}, the pipeline samples with {own}; "
                    "make a plan for it with `ditopt optimize`"
                )
            if found != called[0]:
                raise InputError(
                    f"plans {plans[0].source} and {each.source} call the pipeline differently ({called[0]} and "
                    f"{found}); measure them one by one"
                )
        adapter = DiffusersAdapter(pipe, called[0])
        contest = Contest(adapter, tuple(prompts), repeats, seed, order, reporter or Reporter(quiet=True), retarget)
        entries = [contest.enter(each.plan) for each in plans]
        contest.run(tuple(score_prompts) or tuple(prompts))
    finally:
        probe.restore()
    for each, entry in zip(plans, entries, strict=True):
        if each.sheet is not None:
            _save_sheet(each.sheet, contest, entry)
    return [_result(contest, entry, each.source) for each, entry in zip(plans, entries, strict=True)]


def _save_sheet(path: Path, contest: Contest, entry: Entry) -> None:
    shown_roles = (DENSE, "optimized", "fewer_steps", "fewer_steps_cast")
    rows = {role: entry.roles[role] for role in shown_roles if role in entry.roles}
    shown = [{role: part[name] for role, name in rows.items()} for part in contest.made[:SHEET_PROMPTS]]
    save_sheet(path, contest.prompts[: len(shown)], shown)


def _result(contest: Contest, entry: Entry, source: str) -> BenchResult:
    """An entry's figures, put together."""
    seconds = {role: contest.seconds[name] for role, name in entry.roles.items() if name in contest.seconds}
    medians = {role: statistics.median(values) for role, values in seconds.items()}
    rows, plan = entry.rows, entry.plan
    ratings = [row["ssim"] for row in rows if row["ssim"] is not None]
    unit = 2**20 if platform.system() == "Darwin" else 2**10  # bytes there, KiB elsewhere

    def rival(role: str, steps: int) -> RivalResult:
        if role not in medians:
            return RivalResult(steps, reason=contest.failed[entry.roles[role]])
        values = [row[f"{role}_db"] for row in rows]
        return RivalResult(steps, medians[role], statistics.mean(values), min(values))

    def rivals(ending: str) -> dict[str, RivalResult]:
        return {name + ending: rival(name + ending, n) for name, n in contest.rival_steps(entry, ending).items()}

    found = {name: figures for ending in entry.endings for name, figures in rivals(ending).items()}
    if CAST in entry.roles:
        found[CAST] = rival(CAST, contest.adapter.steps)
    return BenchResult(
        dense_eager_s=medians["dense_eager"],
        dense_inductor_s=medians[DENSE],
        optimized_s=medians["optimized"],
        speedup_vs_inductor=medians[DENSE] / medians["optimized"],
        psnr_db=statistics.mean(row["psnr_db"] for row in rows),
        worst_psnr_db=min(row["psnr_db"] for row in rows),
        rel_l2=statistics.mean(row["rel_l2"] for row in rows),
        ssim=statistics.mean(ratings) if ratings else None,
        **found,
        converged=entry.converged,
        attribute_score=entry.attribute_score,
        graph_breaks=contest.ended.breaks - contest.cold.breaks,
        recompiles=sum(contest.recompiled(entry)),
        variants=entry.variants,
        compile_s=max(0.0, entry.first_s - medians["optimized"]),
        first_generation_s=entry.first_s,
        compile_cache="cold" if entry.new_graphs else "warm",
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        slot_bytes=sum(program.statistics.peak_slot_bytes for program in entry.programs),
        steps=contest.adapter.steps,
        kept=sum(len(plan.kept_steps(name)) for name in entry.sessions),
        plan={"path": source, **plan.to_data()},
        versions=versions(),
        settings={**contest.adapter.settings, "seed": contest.seed},
        prompts=len(contest.prompts),
        per_prompt=rows,
        seconds=seconds,
        notes=entry.notes,
    )


def versions() -> dict[str, str]:
    """What ran: libraries, interpreter, processor, threads."""
    import diffusers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "ditopt": ditopt.__version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": describe_device(torch.device("cpu")),
        "threads": str(torch.get_num_threads()),
        "accelerator": device,
    }


__all__ = [
    "CONVERGED_FACTOR",
    "CONVERGED_PROMPTS",
    "MIN_REPEATS",
    "PILOT_ROUNDS",
    "SHEET_PROMPTS",
    "SOLVERS",
    "BenchPlan",
    "Contender",
    "Sample",
    "compiled_calls",
    "flow_solver",
    "installed",
    "run_bench",
    "run_benches",
    "settings_of",
    "versions",
]
