"""``ditopt bench``: whole generations of every honest rival, interleaved; medians, and paired quality.

The reference of every quality figure is the dense Inductor run with the same prompt and noise.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ditopt
from ditopt._torch import compile_counts
from ditopt.adapters import DiffusersAdapter
from ditopt.backend import Session
from ditopt.console import Reporter, Stage
from ditopt.errors import InputError, PlanMismatchError
from ditopt.plan import Plan, write_text_atomically
from ditopt.quality import psnr, relative_l2, value_range
from ditopt.report.sheet import save_sheet

MIN_REPEATS = 5
PILOT_ROUNDS = 3
CONVERGED_FACTOR = 4
CONVERGED_PROMPTS = 4
SHEET_PROMPTS = 4
SOLVERS = {"unipc": "UniPCMultistepScheduler", "dpmpp": "DPMSolverMultistepScheduler"}
SIZES = ("height", "width", "num_frames")

Sample = tuple[Tensor, float]


@dataclass(frozen=True)
class RivalResult:
    """A rival at the optimised loop's latency; ``reason`` says why there are no figures."""

    steps: int
    seconds: float | None = None
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark measured; seconds are medians of whole generations, decibels are means over prompts."""

    dense_eager_s: float
    dense_inductor_s: float
    optimized_s: float
    speedup_vs_inductor: float
    psnr_db: float
    worst_psnr_db: float
    rel_l2: float
    ssim: float | None
    fewer_steps: RivalResult
    unipc: RivalResult
    dpmpp: RivalResult
    converged: dict[str, float]
    attribute_score: dict[str, float] | None
    graph_breaks: int
    recompiles: int
    variants: int
    compile_s: float
    first_generation_s: float
    compile_cache: str
    peak_rss_mb: float
    slot_bytes: int
    steps: int
    kept: int
    plan: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    prompts: int
    per_prompt: list[dict[str, Any]]
    seconds: dict[str, list[float]]
    notes: list[str]

    def to_data(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all.

        Raises:
            PlanError: the folder is missing or not writable.
        """
        write_text_atomically(Path(path), json.dumps(self.to_data(), indent=2, default=str) + "\n")


@dataclass(frozen=True)
class Contender:
    """One way to generate: compiled calls of the networks (None: eager), a scheduler (None: the pipeline's), settings."""

    adapter: DiffusersAdapter
    calls: Mapping[str, Any]
    scheduler: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def generate(self, prompt: str, seed: int) -> Sample:
        """The sample and the wall-clock seconds of the whole generation."""
        swapped = self.adapter.scheduler(self.scheduler) if self.scheduler is not None else nullcontext()
        with installed(self.adapter.networks, self.calls), swapped:
            began = time.perf_counter()
            sample = self.adapter.checked_rollout(prompt, seed, **self.settings)  # on the host: nothing is still running
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


def compiled_calls(networks: Mapping[str, nn.Module], options: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """The compiled call of every network, the networks left as they were; ``options`` are the ditopt backend's."""
    made = {}
    for name, network in networks.items():
        with installed({name: network}, {}):
            if options is not None and name in options:
                network.compile(backend="ditopt", options=dict(options[name]))
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


def ssim(sample: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004; uniform 7 x 7 window) over the frames of ``[..., H, W, C]``."""
    x, y = (t.reshape(-1, *t.shape[-3:]).movedim(-1, -3).double() for t in (sample, reference))
    window, peak = min(7, *x.shape[-2:]), value_range(reference)
    count = window**2

    def mean(t: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(t, window, stride=1)

    mx, my = mean(x), mean(y)
    unbiased = count / max(count - 1, 1)
    vx, vy, vxy = (unbiased * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    score = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(score.mean())


def settings_of(plan: Plan, given: Mapping[str, Any], accepted: Mapping[str, Any], order: int = 1) -> dict[str, Any]:
    """What the pipeline is called with: the plan's steps, guidance and size, changed by ``given``."""
    steps = -(-plan.sampler.steps // order)
    found: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": plan.sampler.guidance}
    found |= {name: plan.geometry[name][0] for name in SIZES if len(plan.geometry.get(name, ())) == 1}
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
    adapter = DiffusersAdapter(pipe, settings_of(plan, settings or {}, probe._accepted, order))
    own = type(pipe.scheduler).__name__
    if own != plan.sampler.class_name:
        raise PlanMismatchError(f"plan is for {plan.sampler.class_name}, the pipeline samples with {own}; make a plan for it with `ditopt optimize`")
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
        inductor = compiled_calls(networks, None)
        optimised = compiled_calls(networks, {name: {"session": session} for name, session in self.sessions.items()})
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
        programs = [program for session in self.sessions.values() for program in session.programs]
        ratings = [row["ssim"] for row in rows if row["ssim"] is not None]
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
            unipc=self._rival("unipc", self._evaluations(steps), medians, rows),
            dpmpp=self._rival("dpmpp", self._evaluations(steps), medians, rows),
            converged=converged,
            attribute_score=self._attributes(made),
            graph_breaks=after.breaks - before.breaks,
            recompiles=after.recompiles - warm.recompiles,
            variants=sum(len(program.variants.compiled) for program in programs),
            compile_s=max(0.0, first - medians["optimized"]),
            first_generation_s=first,
            compile_cache="warm: nothing had to be compiled" if added == 0 and files else f"{added} graphs were new to Inductor's cache",
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10),
            slot_bytes=sum(program.statistics.peak_slot_bytes for program in programs),
            steps=self.adapter.steps,
            kept=sum(len(self.plan.kept_steps(name)) for name in planned),
            plan={"path": source, **{key: value for key, value in self.plan.to_data().items() if key in ("model", "device", "target", "predicted", "measured")}},
            versions=versions(),
            settings={key: value for key, value in self.adapter.settings.items() if isinstance(value, str | int | float | bool)} | {"seed": self.seed},
            prompts=len(self.prompts),
            per_prompt=rows,
            seconds=self.seconds,
            notes=self.notes,
        )  # fmt: skip

    def _remarks(self) -> None:
        guidance = self.adapter.sampler().guidance
        if guidance != self.plan.sampler.guidance:
            self._note(f"the plan was made at guidance {self.plan.sampler.guidance:g}, this runs at {guidance:g}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.say(f"note: {text}")

    def _timed(self, name: str, index: int, **settings: Any) -> Sample:
        contender = self.contenders[name]
        if settings:
            contender = Contender(self.adapter, contender.calls, contender.scheduler, {**contender.settings, **settings})
        return contender.generate(self.prompts[index], self.seed + index)

    def _evaluations(self, steps: int) -> int:
        """Network evaluations (per branch) of ``steps`` steps of the pipeline's own scheduler."""
        return self.order * steps - (self.order - 1)

    def _equal_steps(self) -> int:
        """The fewest steps of the own scheduler that take at least as long as the optimised loop, so rounded in their favour."""
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
        while steps < total and not self._as_slow(steps):
            steps += 1
        return steps

    def _as_slow(self, steps: int) -> bool:
        """Whether ``steps`` steps take as long as the optimised loop, the two timed in turns."""
        pairs = [(self._timed("dense_inductor", 0, num_inference_steps=steps)[1], self._timed("optimized", 0)[1]) for _ in range(PILOT_ROUNDS)]
        return statistics.median(a for a, _ in pairs) >= statistics.median(b for _, b in pairs)

    def _add_rivals(self, steps: int) -> None:
        own = self.adapter.pipe.scheduler
        self.failed: dict[str, str] = {}
        self.contenders["fewer_steps"] = Contender(self.adapter, self.dense.calls, None, {"num_inference_steps": steps})
        self._timed("fewer_steps", 0)
        for name in SOLVERS:
            try:
                solver = flow_solver(name, own)
                self.contenders[name] = Contender(self.adapter, self.dense.calls, solver, {"num_inference_steps": self._evaluations(steps)})
                self._timed(name, 0)  # its warm-up
            except Exception as error:  # a rival that this pipeline cannot drive is a finding, not a failure
                self.contenders.pop(name, None)
                self.failed[name] = f"{SOLVERS[name]} does not run in this pipeline: {type(error).__name__}: {error}"
                self._note(self.failed[name])

    def _rounds(self) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
        """Every contender on every prompt, in turns that begin with another one each time; eager only ``repeats`` times."""
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
        """What later phases read: all of the first prompts', dense and optimised of the others where they are scored."""
        few = max(CONVERGED_PROMPTS, SHEET_PROMPTS)
        scored = hasattr(self.adapter.pipe, "attribute_score")
        return {name: t for name, t in samples.items() if index < few or (scored and name in ("dense_inductor", "optimized"))}

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

    def _rival(self, name: str, steps: int, medians: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> RivalResult:
        if name in self.failed:
            return RivalResult(steps, reason=self.failed[name])
        values = [row[f"{name}_db"] for row in rows]
        return RivalResult(steps, medians[name], statistics.mean(values), min(values))


def _cached_graphs() -> int:
    """The number of graphs in Inductor's cache on disk."""
    import getpass

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
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
        "cpu": processor(),
        "threads": str(torch.get_num_threads()),
        "accelerator": device,
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
