"""The contest behind a benchmark: generations of every contender in turn, for one plan or for several at once.

Plans for one pipeline and one setting share the dense runs, and every rival whose step count they have in common.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditopt._torch import CompileCounts, compile_counts, many_compiled_copies
from ditopt.adapters import DiffusersAdapter
from ditopt.backend import Session
from ditopt.console import Reporter, Stage
from ditopt.contenders import SOLVERS, Contender, Sample, compiled_calls, flow_solver
from ditopt.plan import Plan, cast_rules, format_steps
from ditopt.quality import psnr, relative_l2, ssim
from ditopt.runtime.program import Program

PILOT_ROUNDS = 3
EQUAL_ROUNDS = 5  # that say which of two takes longer
CONVERGED_FACTOR = 4
CONVERGED_PROMPTS = 8
SHEET_PROMPTS = 4
EAGER, DENSE, CAST = "dense_eager", "dense_inductor", "dense_cast"


@dataclass
class Entry:
    """A plan in the contest and what was found out about it.

    ``roles`` names the contender that plays each part for this plan: the two dense ones, ``optimized``, and the
    rivals ``fewer_steps``, ``unipc`` and ``dpmpp``, which run the model as it is. Where the plan computes in a dtype of
    its own there are also ``dense_cast``, the dense model in it, and rivals that run the model so (``unipc_cast``).
    ``steps`` are the own scheduler's at the plan's latency, by how the model is run (``endings``).
    """

    plan: Plan
    sessions: dict[str, Session]
    roles: dict[str, str]
    steps: dict[str, int] = field(default_factory=dict)
    first_s: float = 0.0
    new_graphs: int = 0
    warm_variants: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    converged: dict[str, float] = field(default_factory=dict)
    attribute_score: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def optimized(self) -> str:
        """The contender that runs the plan."""
        return self.roles["optimized"]

    @property
    def endings(self) -> dict[str, str]:
        """How the names of rivals' parts end, with the contender that runs the model as these do."""
        return {"": DENSE} | ({"_cast": self.roles[CAST]} if CAST in self.roles else {})

    @property
    def programs(self) -> list[Program]:
        """Every graph that was captured under the plan."""
        return [program for session in self.sessions.values() for program in session.programs]

    @property
    def variants(self) -> int:
        """Graphs that Inductor has compiled for the plan so far."""
        return sum(len(program.variants.compiled) for program in self.programs)


@dataclass
class Contest:
    """One contest. ``order`` is that of the pipeline's scheduler; prompt i has the noise of ``seed + i``.

    ``retarget``: plans made for another size or schedule are re-targeted, else refused.

    After ``run``: ``seconds`` holds every generation's by contender, ``made`` the samples that were kept by prompt and
    contender, ``failed`` why a contender does not run; ``cold``, ``warm`` and ``ended`` what Dynamo had counted before
    anything was compiled, when everything had run once, and at the end.
    """

    adapter: DiffusersAdapter
    prompts: tuple[str, ...]
    repeats: int
    seed: int
    order: int
    reporter: Reporter
    retarget: bool = False
    entries: list[Entry] = field(default_factory=list)
    contenders: dict[str, Contender] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    made: list[dict[str, Tensor]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    cold: CompileCounts = field(default_factory=compile_counts)
    warm: CompileCounts = field(default_factory=compile_counts)
    ended: CompileCounts = field(default_factory=compile_counts)

    def enter(self, plan: Plan) -> Entry:
        """Let a plan take part."""
        networks = self.adapter.networks
        if not self.contenders:
            self.contenders[EAGER] = Contender(self.adapter, {})
            self.contenders[DENSE] = Contender(self.adapter, compiled_calls(networks, {}))
        mismatch = "retarget" if self.retarget else "error"
        planned = [name for name in networks if name in plan.sampler.timesteps]
        sessions = {name: Session(plan=plan, network=name, on_mismatch=mismatch) for name in planned}
        name = f"optimized {len(self.entries)}"
        self.contenders[name] = Contender(self.adapter, compiled_calls(networks, sessions))
        entry = Entry(plan, sessions, {EAGER: EAGER, DENSE: DENSE, "optimized": name})
        self.entries.append(entry)
        self._enter_cast(entry)
        if self.retarget:
            self.note("calls of another size or schedule than the plan was made for run by the plan re-targeted", entry)
        guidance = self.adapter.sampler().guidance
        if guidance != plan.sampler.guidance:
            self.note(f"the plan was made at guidance {plan.sampler.guidance:g}, this runs at {guidance:g}", entry)
        return entry

    def _enter_cast(self, entry: Entry) -> None:
        """The dense model in the plan's dtype, one for all plans of the same."""
        computed = cast_rules(entry.plan.rules)
        if not computed:
            return
        told = (f"{rule.network} {format_steps(rule.steps)} {dtype}" for rule, dtype in computed)
        name = entry.roles[CAST] = " ".join([CAST, *told])
        if name not in self.contenders:
            cast = entry.plan.model_copy(update={"rules": tuple(rule for rule, _ in computed)})
            sessions = {name: Session(plan=cast, network=name, on_mismatch="retarget") for name in entry.sessions}
            self.contenders[name] = Contender(self.adapter, compiled_calls(self.adapter.networks, sessions))

    def run(self, score_prompts: Sequence[str]) -> None:
        """All phases: warm-up, choice of the rivals' steps, rounds, converged runs, attribute score."""
        with many_compiled_copies():
            self._run(score_prompts)

    def _run(self, score_prompts: Sequence[str]) -> None:
        self.cold = compile_counts()
        self._warm_up()
        self._choose_steps()
        self._add_rivals()
        self.warm = compile_counts()
        for entry in self.entries:
            entry.warm_variants = entry.variants
        self._rounds()
        self._converged()
        self._score(score_prompts)
        self.ended = compile_counts()
        for entry in self.entries:
            self._say_what_was_unfair(entry)

    def note(self, text: str, *entries: Entry) -> None:
        """Keep a remark with ``entries`` (default: all), and print it."""
        for entry in entries or self.entries:
            entry.notes.append(text)
        self.reporter.say(f"note: {text}")

    def evaluations(self, steps: int) -> int:
        """Network evaluations (per branch) of ``steps`` steps of the pipeline's own scheduler."""
        return self.order * steps - (self.order - 1)

    def rival_steps(self, entry: Entry, ending: str) -> dict[str, int]:
        """The steps of each rival of a plan; solvers evaluate the network once a step."""
        steps = entry.steps[ending]
        return {"fewer_steps": steps, **dict.fromkeys(SOLVERS, self.evaluations(steps))}

    def recompiled(self, entry: Entry) -> tuple[int, int]:
        """After the warm-up: frames that Dynamo compiled, variants of the plan that Inductor compiled."""
        return self.ended.recompiles - self.warm.recompiles, entry.variants - entry.warm_variants

    @property
    def _bases(self) -> tuple[str, ...]:
        """The contenders that run the model as rivals do, each once."""
        return tuple(dict.fromkeys(base for entry in self.entries for base in entry.endings.values()))

    def _generate(self, name: str, prompt: str, seed: int, **settings: Any) -> Sample:
        chosen = self.contenders[name]
        return replace(chosen, settings={**chosen.settings, **settings}).generate(prompt, seed)

    def _timed(self, name: str, index: int, **settings: Any) -> Sample:
        return self._generate(name, self.prompts[index], self.seed + index, **settings)

    def _warm_up(self) -> None:
        short = dict.fromkeys([DENSE, EAGER, *self._bases])
        with self.reporter.stage("bench: warm-up", len(self.entries) + len(short)) as stage:
            for entry in self.entries:
                files = _cached_graphs()
                entry.first_s = self._timed(entry.optimized, 0)[1]
                entry.new_graphs = _cached_graphs() - files
                if entry is not self.entries[0]:
                    self.note(
                        "first_generation_s, compile_s and compile_cache profit from graphs that the plans before it "
                        "compiled in this run",
                        entry,
                    )
                stage.advance()
            for name in short:
                self._timed(name, 0, num_inference_steps=2)
                stage.advance()

    def _choose_steps(self) -> None:
        """Per plan and dtype the fewest steps of the own scheduler that take as long: rounded in the rivals' favour.

        Pilots say how many; one more is given as long as the rival, timed in turns with the plan, is faster than it.
        """
        total = self.adapter.steps
        short = max(1, total // 3)
        if short == total:
            for entry in self.entries:
                entry.steps = dict.fromkeys(entry.endings, total)
            return
        pilots = [(base, steps) for base in self._bases for steps in (total, short)]
        pilots += [(entry.optimized, total) for entry in self.entries]
        spent: dict[tuple[str, int], list[float]] = {pilot: [] for pilot in pilots}
        with self.reporter.stage("bench: steps at equal latency", PILOT_ROUNDS * len(pilots)) as stage:
            for _ in range(PILOT_ROUNDS):
                for name, steps in pilots:
                    spent[name, steps].append(self._timed(name, 0, num_inference_steps=steps)[1])
                    stage.advance()
        median = {pilot: statistics.median(values) for pilot, values in spent.items()}
        for entry in self.entries:
            for ending, base in entry.endings.items():
                dense = median[base, total]
                per_step = max((dense - median[base, short]) / (total - short), 1e-9)
                left = median[entry.optimized, total] - (dense - per_step * total)
                steps = min(total, max(1, math.ceil(left / per_step - 1e-6)))
                while steps < total and not self._as_slow(entry, base, steps):
                    steps += 1
                entry.steps[ending] = steps

    def _as_slow(self, entry: Entry, base: str, steps: int) -> bool:
        """Whether ``base`` takes as long with so many steps as the entry's plan, the two timed in turns."""
        rival, optimised = [], []
        with self.reporter.stage(f"bench: {steps} steps against the plan", EQUAL_ROUNDS) as stage:
            for _ in range(EQUAL_ROUNDS):
                rival.append(self._timed(base, 0, num_inference_steps=steps)[1])
                optimised.append(self._timed(entry.optimized, 0)[1])
                stage.advance()
        return statistics.median(rival) >= statistics.median(optimised)

    def _add_rivals(self) -> None:
        for entry in self.entries:
            for ending, base in entry.endings.items():
                for rival, steps in self.rival_steps(entry, ending).items():
                    name = entry.roles[rival + ending] = f"{rival} {steps}" + base.removeprefix(DENSE)
                    if name not in self.contenders and name not in self.failed:
                        self._add_rival(name, rival, steps, self.contenders[base].calls)

    def _add_rival(self, name: str, rival: str, steps: int, calls: Mapping[str, Any]) -> None:
        own = self.adapter.pipe.scheduler
        settings = {"num_inference_steps": steps}
        try:
            solver = flow_solver(rival, own) if rival in SOLVERS else None
            self.contenders[name] = Contender(self.adapter, calls, solver, settings)
            self._timed(name, 0)  # its warm-up
        except Exception as error:
            if rival not in SOLVERS:
                raise
            # A solver that this pipeline cannot drive is a finding, not a failure.
            self.contenders.pop(name, None)
            reason = f"{SOLVERS[rival]} does not run in this pipeline: {type(error).__name__}: {error}"
            if reason not in self.failed.values():
                self.note(reason)
            self.failed[name] = reason

    def _rounds(self) -> None:
        """Every contender on every prompt, another one first in each turn; eager only ``repeats`` times."""
        count = max(self.repeats, len(self.prompts))
        frequent = [name for name in self.contenders if name != EAGER]
        with self.reporter.stage("bench: generations", count * len(frequent) + self.repeats) as stage:
            for turn in range(count):
                index = turn % len(self.prompts)
                names = [*frequent[turn % len(frequent) :], *frequent[: turn % len(frequent)]]
                if turn < self.repeats:
                    names.append(EAGER)
                samples = {name: self._record(name, index, stage) for name in names}
                if turn < len(self.prompts):
                    for entry in self.entries:
                        entry.rows.append(self._judged(entry, index, samples))
                    self.made.append(self._kept_samples(index, samples))

    def _record(self, name: str, index: int, stage: Stage) -> Tensor:
        sample, seconds = self._timed(name, index)
        self.seconds.setdefault(name, []).append(seconds)
        stage.advance()
        return sample

    def _judged(self, entry: Entry, index: int, samples: Mapping[str, Tensor]) -> dict[str, Any]:
        reference, sample = samples[DENSE], samples[entry.optimized]
        pictures = reference.ndim >= 3 and reference.shape[-1] in (1, 3, 4)
        rivals = {role: name for role, name in entry.roles.items() if role not in (EAGER, DENSE, "optimized")}
        return {
            "prompt": self.prompts[index],
            "seed": self.seed + index,
            "psnr_db": psnr(sample, reference),
            "rel_l2": relative_l2(sample, reference),
            "ssim": ssim(sample, reference) if pictures else None,
            **{f"{role}_db": psnr(samples[name], reference) for role, name in rivals.items() if name in samples},
        }

    def _kept_samples(self, index: int, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What later phases read: everything of the first prompts; of the others what is scored."""
        if index < max(CONVERGED_PROMPTS, SHEET_PROMPTS):
            return dict(samples)
        return {name: samples[name] for name in self._scored()}

    def _scored(self) -> list[str]:
        scores = hasattr(self.adapter.pipe, "attribute_score")
        return [DENSE, *(entry.optimized for entry in self.entries)] if scores else []

    def _converged(self) -> None:
        """How far dense and optimised are from a run with four times the steps."""
        steps, count = CONVERGED_FACTOR * self.adapter.steps, min(CONVERGED_PROMPTS, len(self.made))
        far = []
        with self.reporter.stage(f"bench: converged runs, {steps} steps", count) as stage:
            for index in range(count):
                far.append(self._timed(DENSE, index, num_inference_steps=steps)[0])
                stage.advance()
        for entry in self.entries:
            dense, optimised = (
                [psnr(samples[name], reference) for samples, reference in zip(self.made, far, strict=False)]
                for name in (DENSE, entry.optimized)
            )
            gains = [ours - theirs for ours, theirs in zip(optimised, dense, strict=True)]
            entry.converged = {
                "dense_db": statistics.mean(dense),
                "optimized_db": statistics.mean(optimised),
                "gain_stderr_db": statistics.stdev(gains) / math.sqrt(count) if count > 1 else 0.0,
                "steps": steps,
                "prompts": count,
            }

    def _score(self, prompts: Sequence[str]) -> None:
        """The pipeline's own score of dense and optimised samples, paired; what the rounds made is not made again."""
        names = self._scored()
        if not names:
            return
        clips: dict[str, list[Tensor]] = {name: [] for name in names}
        with self.reporter.stage("bench: attribute score", len(prompts)) as stage:
            for index, prompt in enumerate(prompts):
                known = self.made[index] if self.prompts[index : index + 1] == (prompt,) else {}
                for name in names:
                    found = known.get(name)
                    clips[name].append(
                        found if found is not None else self._generate(name, prompt, self.seed + index)[0]
                    )
                if not index and self._rated(clips[DENSE], prompts[:1]) is None:
                    return  # before the others are made
                stage.advance()
        scores = {name: self._rated(clips[name], prompts) for name in names}
        for entry in self.entries:
            dense, optimised = scores[DENSE], scores[entry.optimized]
            if dense is not None and optimised is not None:
                entry.attribute_score = {"dense": dense, "optimized": optimised, "prompts": len(prompts)}

    def _rated(self, clips: Sequence[Tensor], captions: Sequence[str]) -> float | None:
        try:
            return float(self.adapter.pipe.attribute_score(torch.cat(list(clips)).numpy(), list(captions)))
        except ValueError as error:
            self.note(f"no attribute score: {error}")
            return None

    def _say_what_was_unfair(self, entry: Entry) -> None:
        optimised = statistics.median(self.seconds[entry.optimized])
        for role in (rival + ending for ending in entry.endings for rival in self.rival_steps(entry, ending)):
            rival = statistics.median(self.seconds.get(entry.roles[role]) or [math.inf])
            if rival < optimised:
                self.note(
                    f"{role} took {rival:.3f} s, less than the optimised loop's {optimised:.3f} s: the comparison at "
                    "equal latency is not in its favour",
                    entry,
                )
        frames, variants = self.recompiled(entry)
        if frames or variants:
            self.note(f"after the warm-up Dynamo compiled {frames} frames and Inductor {variants} variants", entry)


def _cached_graphs() -> int:
    """The number of graphs in Inductor's cache on disk."""
    import getpass

    usual = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or usual
    return sum(1 for path in Path(folder, "fxgraph").glob("*/*/*") if path.is_file())
