"""``ditopt bench``: whole generations of every honest rival, interleaved; medians, and paired quality.

The reference of every quality figure is the dense Inductor run with the same prompt and noise.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ditopt
from ditopt._torch import compile_counts
from ditopt.adapters import DiffusersAdapter
from ditopt.backend import Session
from ditopt.console import Reporter, Stage
from ditopt.device import describe_device
from ditopt.errors import InputError, PlanMismatchError
from ditopt.plan import Plan
from ditopt.quality import psnr, relative_l2, ssim
from ditopt.report.measured import BenchResult, RivalResult
from ditopt.report.sheet import save_sheet

MIN_REPEATS = 5
PILOT_ROUNDS = 3
CONVERGED_FACTOR = 4
CONVERGED_PROMPTS = 4
SHEET_PROMPTS = 4
SOLVERS = {"unipc": "UniPCMultistepScheduler", "dpmpp": "DPMSolverMultistepScheduler"}

Sample = tuple[Tensor, float]


@dataclass(frozen=True)
class Contender:
    """One way to generate: calls of the networks (None: eager), scheduler (None: the pipeline's), settings."""

    adapter: DiffusersAdapter
    calls: Mapping[str, Any]
    scheduler: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def generate(self, prompt: str, seed: int) -> Sample:
        """The sample and the wall-clock seconds of the whole generation."""
        swapped = self.adapter.scheduler(self.scheduler) if self.scheduler is not None else nullcontext()
        with installed(self.adapter.networks, self.calls), swapped:
            began = time.perf_counter()
            sample = self.adapter.checked_rollout(prompt, seed, **self.settings)  # ends on the host: no work is left
            return sample, time.perf_counter() - began


@contextmanager
def installed(networks: Mapping[str, nn.Module], calls: Mapping[str, Any]) -> Iterator[None]:
    """Let each network run by ``calls[name]`` (what ``Module.compile`` made; None: eager) while the context lasts."""
    before = {name: network._compiled_call_impl for name, network in networks.items()}
    try:
        for name, network in networks.items():
            network._compiled_call_impl = calls.get(name)
        yield
    finally:
        for name, network in networks.items():
            network._compiled_call_impl = before[name]


def compiled_calls(networks: Mapping[str, nn.Module], sessions: Mapping[str, Session]) -> dict[str, Any]:
    """The compiled call of every network: by ditopt where it has a session, else by Inductor alone."""
    made = {}
    for name, network in networks.items():
        with installed({name: network}, {}):
            if name in sessions:
                network.compile(backend="ditopt", options={"session": sessions[name]})
            else:
                network.compile(backend="inductor")
            made[name] = network._compiled_call_impl
    return made


def flow_solver(name: str, own: Any) -> Any:
    """Diffusers' multistep solver ``name`` (``unipc``, ``dpmpp``) in the form that goes with the scheduler ``own``.

    For flow matching its timesteps are kept exact; diffusers rounds them to integers, which would cost it accuracy.
    """
    import diffusers

    cls = getattr(diffusers, SOLVERS[name])
    config = own.config
    if "FlowMatch" not in type(own).__name__:
        return cls.from_config(config)
    shared = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type")
    kept = {key: config[key] for key in shared if config.get(key) is not None}
    made = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.get("shift") or 1.0, **kept)
    original = made.set_timesteps

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        exact = made.sigmas[: len(made.timesteps)] * made.config.num_train_timesteps
        made.timesteps = exact.to(device=made.timesteps.device, dtype=torch.float32)

    made.set_timesteps = set_timesteps
    return made


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
    reporter: Reporter | None = None,
    sheet: Path | None = None,
    source: str = "",
) -> BenchResult:
    """Measure a plan on a diffusers pipeline against dense, fewer steps, UniPC and DPM-Solver++.

    Args:
        pipe: the pipeline; its networks and scheduler are left as they were.
        plan: made for this model and these settings.
        prompts: not those of the calibration; every one is judged.
        settings: of the pipeline's call; default those of the plan.
        repeats: the least number of generations a median is over, at least 5.
        seed: of the first prompt's noise; prompt i uses ``seed + i``, for every contender.
        reporter: prints progress.
        sheet: where to write a contact sheet.
        source: the plan's file name, for the result.

    Raises:
        InputError: no prompts, or too few repeats.
        PlanMismatchError: the plan is for another model, schedule or scheduler.
    """
    if not prompts:
        raise InputError("no prompts to benchmark on; give at least one")
    if repeats < MIN_REPEATS:
        raise InputError(f"repeats is {repeats}; a median needs at least {MIN_REPEATS} generations")
    probe = DiffusersAdapter(pipe, {})
    order = int(getattr(pipe.scheduler, "order", 1))
    adapter = DiffusersAdapter(pipe, settings_of(plan, settings or {}, probe.accepted, order))
    own = type(pipe.scheduler).__name__
    if own != plan.sampler.class_name:
        raise PlanMismatchError(
            f"plan is for {plan.sampler.class_name}, the pipeline samples with {own}; "
            "make a plan for it with `ditopt optimize`"
        )
    bench = _Bench(adapter, plan, tuple(prompts), repeats, seed, order, reporter or Reporter(quiet=True))
    try:
        return bench.run(sheet, source)
    finally:
        probe.restore()


@dataclass
class _Bench:
    adapter: DiffusersAdapter
    plan: Plan
    prompts: tuple[str, ...]
    repeats: int
    seed: int
    order: int
    reporter: Reporter
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, sheet: Path | None, source: str) -> BenchResult:
        """All phases: warm-up, choice of the rivals' steps, interleaved rounds, converged runs."""
        networks = self.adapter.networks
        planned = [name for name in networks if name in self.plan.sampler.timesteps]
        self.sessions = {name: Session(plan=self.plan, network=name) for name in planned}
        inductor, optimised = compiled_calls(networks, {}), compiled_calls(networks, self.sessions)
        self.dense = Contender(self.adapter, inductor)
        self.contenders = {
            "dense_eager": Contender(self.adapter, {}),
            "dense_inductor": self.dense,
            "optimized": Contender(self.adapter, optimised),
        }
        self._remarks()
        before = compile_counts()
        files = _cached_graphs()
        with self.reporter.stage("bench: warm-up", 3) as stage:
            first = self._timed("optimized", 0)[1]
            added = _cached_graphs() - files
            self._check_geometry()
            stage.advance()
            for name in ("dense_inductor", "dense_eager"):
                self._timed(name, 0, num_inference_steps=2)
                stage.advance()
        steps = self._equal_steps()
        self._add_rivals(steps)
        warm = compile_counts()
        made, rows = self._rounds()
        converged = self._converged(made)
        after = compile_counts()
        medians = {name: statistics.median(values) for name, values in self.seconds.items()}
        if sheet is not None:
            names = ("dense_inductor", "optimized", "fewer_steps")
            shown = [{name: part[name] for name in names} for part in made[:SHEET_PROMPTS]]
            save_sheet(sheet, self.prompts[: len(shown)], shown)
        self._say_if_rival_was_faster(medians)
        programs = [program for session in self.sessions.values() for program in session.programs]
        ratings = [row["ssim"] for row in rows if row["ssim"] is not None]
        unit = 2**20 if platform.system() == "Darwin" else 2**10  # bytes there, KiB elsewhere
        evaluations = self._evaluations(steps)
        return BenchResult(
            dense_eager_s=medians["dense_eager"],
            dense_inductor_s=medians["dense_inductor"],
            optimized_s=medians["optimized"],
            speedup_vs_inductor=medians["dense_inductor"] / medians["optimized"],
            psnr_db=statistics.mean(row["psnr_db"] for row in rows),
            worst_psnr_db=min(row["psnr_db"] for row in rows),
            rel_l2=statistics.mean(row["rel_l2"] for row in rows),
            ssim=statistics.mean(ratings) if ratings else None,
            fewer_steps=self._rival("fewer_steps", steps, medians, rows),
            unipc=self._rival("unipc", evaluations, medians, rows),
            dpmpp=self._rival("dpmpp", evaluations, medians, rows),
            converged=converged,
            attribute_score=self._attributes(made),
            graph_breaks=after.breaks - before.breaks,
            recompiles=after.recompiles - warm.recompiles,
            variants=sum(len(program.variants.compiled) for program in programs),
            compile_s=max(0.0, first - medians["optimized"]),
            first_generation_s=first,
            compile_cache="cold" if added else "warm",
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            slot_bytes=sum(program.statistics.peak_slot_bytes for program in programs),
            steps=self.adapter.steps,
            kept=sum(len(self.plan.kept_steps(name)) for name in planned),
            plan={"path": source, **self.plan.to_data()},
            versions=versions(),
            settings={**self.adapter.settings, "seed": self.seed},
            prompts=len(self.prompts),
            per_prompt=rows,
            seconds=self.seconds,
            notes=self.notes,
        )

    def _say_if_rival_was_faster(self, medians: Mapping[str, float]) -> None:
        if medians["fewer_steps"] < medians["optimized"]:
            self._note(
                f"fewer steps took {medians['fewer_steps']:.3f} s, less than the optimised loop's "
                f"{medians['optimized']:.3f} s: the comparison at equal latency is not in its favour"
            )

    def _remarks(self) -> None:
        guidance = self.adapter.sampler().guidance
        if guidance != self.plan.sampler.guidance:
            self._note(f"the plan was made at guidance {self.plan.sampler.guidance:g}, this runs at {guidance:g}")

    def _check_geometry(self) -> None:
        """The figures of a plan hold for the size it was made at; say so where this is another."""
        for name, session in self.sessions.items():
            for program in session.programs:
                trace, wanted = program.variants.trace, self.plan.geometry.get(name)
                position = trace.find_argument(self.plan.inputs.latents, self.plan.inputs.forward)
                shape = tuple(trace.placeholders[position].meta["val"].shape) if position is not None else wanted
                if wanted and shape and shape != wanted:
                    found = f"this runs at {list(shape)}"
                    self._note(f"the plan was made for latents {list(wanted)} of {name}, {found}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.say(f"note: {text}")

    def _timed(self, name: str, index: int, **settings: Any) -> Sample:
        chosen = self.contenders[name]
        return replace(chosen, settings={**chosen.settings, **settings}).generate(
            self.prompts[index], self.seed + index
        )

    def _evaluations(self, steps: int) -> int:
        """Network evaluations (per branch) of ``steps`` steps of the pipeline's own scheduler."""
        return self.order * steps - (self.order - 1)

    def _equal_steps(self) -> int:
        """The fewest steps of the own scheduler that take as long as the optimised loop: rounded in its favour."""
        total = self.adapter.steps
        short = max(1, total // 3)
        if short == total:
            return total
        spent: dict[str, list[float]] = {"optimized": [], "dense": [], "short": []}
        with self.reporter.stage("bench: steps at equal latency", 3 * PILOT_ROUNDS) as stage:
            for _ in range(PILOT_ROUNDS):
                for name, steps in (("optimized", total), ("dense", total), ("short", short)):
                    which = "optimized" if name == "optimized" else "dense_inductor"
                    spent[name].append(self._timed(which, 0, num_inference_steps=steps)[1])
                    stage.advance()
        optimised, dense, brief = (statistics.median(spent[name]) for name in ("optimized", "dense", "short"))
        per_step = max((dense - brief) / (total - short), 1e-9)
        steps = min(total, max(1, math.ceil((optimised - (dense - per_step * total)) / per_step - 1e-6)))
        for _ in range(PILOT_ROUNDS):
            if steps == total or self._as_slow(steps):
                break
            steps += 1
        return steps

    def _as_slow(self, steps: int) -> bool:
        """Whether ``steps`` steps take as long as the optimised loop, the two timed in turns."""
        rival, optimised = [], []
        for _ in range(PILOT_ROUNDS):
            rival.append(self._timed("dense_inductor", 0, num_inference_steps=steps)[1])
            optimised.append(self._timed("optimized", 0)[1])
        return statistics.median(rival) >= statistics.median(optimised)

    def _add_rivals(self, steps: int) -> None:
        own = self.adapter.pipe.scheduler
        self.failed: dict[str, str] = {}
        calls = self.dense.calls
        self.contenders["fewer_steps"] = Contender(self.adapter, calls, None, {"num_inference_steps": steps})
        self._timed("fewer_steps", 0)
        count = {"num_inference_steps": self._evaluations(steps)}
        for name in SOLVERS:
            try:
                self.contenders[name] = Contender(self.adapter, calls, flow_solver(name, own), count)
                self._timed(name, 0)  # its warm-up
            except Exception as error:  # a rival that this pipeline cannot drive is a finding, not a failure
                self.contenders.pop(name, None)
                self.failed[name] = f"{SOLVERS[name]} does not run in this pipeline: {type(error).__name__}: {error}"
                self._note(self.failed[name])

    def _rounds(self) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
        """Every contender on every prompt, another one first in each turn; eager only ``repeats`` times."""
        count = max(self.repeats, len(self.prompts))
        frequent = [name for name in self.contenders if name != "dense_eager"]
        made: list[dict[str, Tensor]] = []
        rows: list[dict[str, Any]] = []
        with self.reporter.stage("bench: generations", count * len(frequent) + self.repeats) as stage:
            for turn in range(count):
                index = turn % len(self.prompts)
                names = [*frequent[turn % len(frequent) :], *frequent[: turn % len(frequent)]]
                if turn < self.repeats:
                    names.append("dense_eager")
                samples = {name: self._record(name, index, stage) for name in names}
                if turn < len(self.prompts):
                    rows.append(self._judge(index, samples))
                    made.append(self._kept_samples(index, samples))
        return made, rows

    def _record(self, name: str, index: int, stage: Stage) -> Tensor:
        sample, seconds = self._timed(name, index)
        self.seconds.setdefault(name, []).append(seconds)
        stage.advance()
        return sample

    def _judge(self, index: int, samples: Mapping[str, Tensor]) -> dict[str, Any]:
        reference, sample = samples["dense_inductor"], samples["optimized"]
        pictures = reference.ndim >= 3 and reference.shape[-1] in (1, 3, 4)
        return {
            "prompt": self.prompts[index],
            "seed": self.seed + index,
            "psnr_db": psnr(sample, reference),
            "rel_l2": relative_l2(sample, reference),
            "ssim": ssim(sample, reference) if pictures else None,
            **{f"{name}_db": psnr(samples[name], reference) for name in ("fewer_steps", *SOLVERS) if name in samples},
        }

    def _kept_samples(self, index: int, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What later phases read: everything of the first prompts; of the others what is scored."""
        if index < max(CONVERGED_PROMPTS, SHEET_PROMPTS):
            return dict(samples)
        scored = ("dense_inductor", "optimized") if hasattr(self.adapter.pipe, "attribute_score") else ()
        return {name: samples[name] for name in scored}

    def _converged(self, made: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """How far dense and optimised are from a run with four times the steps."""
        steps = CONVERGED_FACTOR * self.adapter.steps
        dense, optimised = [], []
        with self.reporter.stage(f"bench: converged runs, {steps} steps", min(CONVERGED_PROMPTS, len(made))) as stage:
            for index, samples in enumerate(made[:CONVERGED_PROMPTS]):
                far, _ = self._timed("dense_inductor", index, num_inference_steps=steps)
                dense.append(psnr(samples["dense_inductor"], far))
                optimised.append(psnr(samples["optimized"], far))
                stage.advance()
        mean = statistics.mean
        return {"dense_db": mean(dense), "optimized_db": mean(optimised), "steps": steps, "prompts": len(dense)}

    def _attributes(self, made: Sequence[Mapping[str, Tensor]]) -> dict[str, float] | None:
        score = getattr(self.adapter.pipe, "attribute_score", None)
        if score is None:
            return None
        try:
            return {
                short: float(score(torch.cat([samples[name] for samples in made]).numpy(), list(self.prompts)))
                for short, name in (("dense", "dense_inductor"), ("optimized", "optimized"))
            }
        except ValueError as error:
            self._note(f"no attribute score: {error}")
            return None

    def _rival(
        self, name: str, steps: int, medians: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> RivalResult:
        if name in self.failed:
            return RivalResult(steps, reason=self.failed[name])
        values = [row[f"{name}_db"] for row in rows]
        return RivalResult(steps, medians[name], statistics.mean(values), min(values))


def _cached_graphs() -> int:
    """The number of graphs in Inductor's cache on disk."""
    import getpass

    usual = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or usual
    return sum(1 for path in Path(folder, "fxgraph").glob("*/*/*") if path.is_file())


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
