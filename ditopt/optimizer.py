"""The flow behind ``optimize()``: probe, capture, profile, search, verify, and the table at the end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditopt._torch import break_reasons
from ditopt.adapters import Adapter, DiffusersAdapter, adapt
from ditopt.adapters.base import CallLog, watch_calls
from ditopt.backend import Session, ditopt_backend
from ditopt.calls import NetworkCalls, call_pattern
from ditopt.console import Reporter
from ditopt.device import describe_device
from ditopt.errors import InputError, RolloutError, TraceError
from ditopt.measure import Evaluator
from ditopt.outcome import Found, Result, Row, check_writable, closing_table, finished_plan, write_outcome
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.profile import Profile
from ditopt.profiler.checkpoint import Checkpoints, run_key
from ditopt.profiler.run import ProfileRun, sigmas_of, whole_program
from ditopt.quality import compare, relative_l2
from ditopt.search import TECHNIQUES, Solution
from ditopt.search.space import candidates
from ditopt.target import Target
from ditopt.trace import Trace
from ditopt.tune import Tuner

RANGES = "ranges"
ALL_TECHNIQUES = (*TECHNIQUES, RANGES)
TUNING_PROMPTS = 4
VERIFY_ROUNDS = 3
TIMED_GENERATIONS = 3
SAME_RUN = 1e-3  # relative L2 between two compiled runs of one prompt and seed, by differently fused kernels


Pairs = Sequence[tuple[str, int]]


@dataclass
class Optimizer:
    """One run of the flow for one model."""

    model: Any
    prompts: Sequence[str]
    target: Target
    rollout: Any = None
    plan_path: str | Path | None = None
    pipe_kwargs: Mapping[str, Any] | None = None
    seed: int = 0
    techniques: Sequence[str] | None = None
    max_variants: int = 8
    budget: int = 16
    on_mismatch: str = "error"
    resume: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        self.reporter = Reporter(self.quiet)
        self.timings: dict[str, float] = {}
        self.reasons: list[str] = []
        self.state_bytes = 0
        chosen = tuple(self.techniques) if self.techniques is not None else ALL_TECHNIQUES
        try:
            candidates(name for name in chosen if name != RANGES)
        except InputError as error:
            raise InputError(str(error).replace("choose from ", f"choose from {RANGES}, ")) from None
        self.use_ranges = RANGES in chosen
        self.chosen = tuple(name for name in chosen if name != RANGES)
        self.adapter: Adapter = adapt(self.model, self.rollout, self.pipe_kwargs)
        if self.plan_path is not None:
            check_writable(Path(self.plan_path))

    def run(self) -> Result:
        """Run the flow; the model's networks are left compiled, under the plan that was found or dense.

        An exception (Ctrl-C included) gives the model back as it was; checkpoints are kept.
        """
        pairs = [(prompt, self.seed + i) for i, prompt in enumerate(self.prompts)]
        half = len(pairs) // 2
        profiled, held_out = pairs[:half], pairs[half:]
        before = {name: network._compiled_call_impl for name, network in self.adapter.networks.items()}
        for network in self.adapter.networks.values():  # an earlier plan must not take part in the probe
            network._compiled_call_impl = None
        try:
            return self._run(profiled, held_out)
        except BaseException:
            for name, network in self.adapter.networks.items():
                network._compiled_call_impl = before[name]
            raise
        finally:
            if isinstance(self.adapter, DiffusersAdapter):
                self.adapter.restore()

    def _run(self, profiled: list[tuple[str, int]], held_out: list[tuple[str, int]]) -> Result:
        self.reporter.say(
            f"ditopt: {len(profiled)} prompts to profile, {len(held_out)} held out to verify; target "
            f"{self.target.to_data()}"
        )
        with self._timed("probe"):
            eager, eager_seconds, calls, log = self._probe(profiled[0])
        inputs = Inputs(timestep=log.timestep, latents=log.latents, identity=log.identity, forward=log.forward)
        sessions = {name: Session(network=name, inputs=inputs, on_mismatch="dense") for name in calls}
        for name, session in sessions.items():
            self.adapter.networks[name].compile(backend=ditopt_backend, options={"session": session})
        with self._timed("capture and compile"), self.reporter.stage("capture and compile", 1) as stage:
            compiled = self.adapter.checked_rollout(*profiled[0])
            stage.advance()
        self._check_deterministic(profiled[0], eager, compiled)
        try:
            traces = {name: whole_program(session).variants.trace for name, session in sessions.items()}
        except TraceError as error:
            return self._stay_dense(f"{error}; breaks: {'; '.join(break_reasons()) or 'none reported'}")
        for name, trace in traces.items():
            if not trace.blocks:
                raise TraceError(
                    f"no attention inside numbered blocks was found in {name}; ditopt works on transformers made "
                    "of a stack of blocks"
                )
        evaluator = Evaluator(self.adapter, sessions, self._template(calls, traces, inputs))
        facts = {
            "calls": {name: part.timesteps for name, part in calls.items()},
            "settings": dict(self.pipe_kwargs or {}),
            "sampler": self.adapter.describe(),
            "plan": evaluator.template.model_dump(mode="json", exclude={"target"}),
            "ranges": self.use_ranges,
            "pairs": [*profiled, *held_out],
        }
        checkpoints = Checkpoints(run_key({name: self.adapter.networks[name] for name in calls}, facts), self.resume)
        if min(len(part.timesteps) for part in calls.values()) < 2:
            return self._stay_dense(
                "a network runs for one step only, so there is no earlier one to predict from",
                template=evaluator.template,
            )
        with self._timed("profile"):
            profile = self._profile(evaluator, calls, checkpoints, profiled, compiled)
        with (
            self._timed("held-out references"),
            self.reporter.stage("dense runs of held-out prompts", len(held_out)) as stage,
        ):
            for index, pair in enumerate(held_out):
                self._reference(evaluator, checkpoints, f"held_out{index}", pair)
                stage.advance()
        with self._timed("search and verify"):
            found = self._search(evaluator, profile, profiled, held_out)
        if found is None:
            evaluator.bind(())
            return self._stay_dense("no plan met the target on the held-out prompts", template=evaluator.template)
        return self._finish(evaluator, profile, found, profiled, held_out, eager_seconds)

    def _profile(
        self,
        evaluator: Evaluator,
        calls: Mapping[str, NetworkCalls],
        checkpoints: Checkpoints,
        profiled: Pairs,
        compiled: Tensor,
    ) -> Profile:
        """The profile; taken anew where checkpoints turn out to be of another loop than the one just seen."""
        run = ProfileRun(evaluator, calls, self.adapter.sampler(), checkpoints, self.reporter, self.use_ranges)
        profile = run(profiled)
        apart = relative_l2(evaluator.references[profiled[0]], compiled)
        if apart > SAME_RUN and checkpoints.loaded:
            self.reporter.say("  checkpoints are of another loop: profiling anew")
            checkpoints.resume = False
            profile = run(profiled)
            apart = relative_l2(evaluator.references[profiled[0]], compiled)
        if apart > SAME_RUN:
            raise _not_deterministic(profiled[0], apart)
        return profile

    @staticmethod
    def _reference(evaluator: Evaluator, checkpoints: Checkpoints, name: str, pair: tuple[str, int]) -> None:
        """The dense sample of a held-out prompt, from its checkpoint if there is one."""
        kept = checkpoints.load(name, ["sample"])
        if kept is not None:
            evaluator.references[pair] = kept["sample"]
            return
        evaluator.dense([pair])
        checkpoints.save(name, {"sample": evaluator.references[pair]})

    def _probe(self, pair: tuple[str, int]) -> tuple[Tensor, float, dict[str, NetworkCalls], CallLog]:
        """One eager generation: who is called when, with what, and how long it takes."""
        with self.reporter.stage("probe: one eager generation", 1) as stage:
            began = time.perf_counter()
            with watch_calls(self.adapter.networks) as log:
                sample = self.adapter.checked_rollout(*pair)
            seconds = time.perf_counter() - began
            stage.advance()
        calls = call_pattern(log, self.adapter.sampler().guidance)
        for name, part in calls.items():
            guided = (
                f", {part.branches} guidance branches" + (" in one batch" if part.batched else "")
                if part.branches > 1
                else ""
            )
            self.reporter.say(
                f"  {name}: {len(part.timesteps)} steps{guided}; timestep in {log.timestep!r}, latents in "
                f"{log.latents!r}"
            )
        return sample, seconds, calls, log

    def _check_deterministic(self, pair: tuple[str, int], eager: Tensor, compiled: Tensor) -> None:
        if eager.shape == compiled.shape and relative_l2(compiled, eager) < 1e-2:
            return
        again = self.adapter.checked_rollout(*pair)
        if again.shape != compiled.shape or relative_l2(again, compiled) > 1e-4:
            apart = relative_l2(again, compiled) if again.shape == compiled.shape else math.nan
            raise _not_deterministic(pair, apart)
        self.reasons.append(
            f"eager and compiled runs differ by {relative_l2(compiled, eager):.1%} (rounding grows along this "
            "sampler); quality is judged against the compiled one"
        )

    def _template(self, calls: Mapping[str, NetworkCalls], traces: Mapping[str, Trace], inputs: Inputs) -> Plan:
        """A plan without rules that says what it is for."""
        sampler = self.adapter.sampler()
        network = self.adapter.networks[next(iter(calls))]
        parameter = next(network.parameters())
        geometry = {}
        for name, trace in traces.items():
            position = trace.find_argument(inputs.latents, inputs.forward)
            if position is not None:
                geometry[name] = tuple(int(n) for n in trace.placeholders[position].meta["val"].shape)
        return Plan(
            model=ModelPrint(
                class_name=type(network).__name__,
                structure=" ".join(dict.fromkeys(trace.structure for trace in traces.values())),
                blocks=sum(len(trace.blocks) for trace in traces.values()),
            ),
            sampler=SamplerPrint(
                class_name=sampler.class_name,
                steps=sum(len(part.timesteps) for part in calls.values()),
                guidance=sampler.guidance,
                timesteps={name: part.timesteps for name, part in calls.items()},
                sigmas={name: sigmas_of(part.timesteps, sampler) for name, part in calls.items()},
            ),
            settings={
                name: value
                for name, value in (self.pipe_kwargs or {}).items()
                if isinstance(value, bool | int | float | str)
            },
            geometry=geometry,
            device=DevicePrint(
                device=describe_device(parameter.device),
                torch=torch.__version__,
                dtype=str(parameter.dtype).removeprefix("torch."),
            ),
            inputs=inputs,
            target=self.target.to_data(),
        )

    def _search(self, evaluator: Evaluator, profile: Profile, profiled: Pairs, held_out: Pairs) -> Found | None:
        """Search network after network; where the held-out prompts miss the target, aim higher and search again."""
        tuning = profiled[:TUNING_PROMPTS]
        tuners: dict[str, Tuner] = {}
        margin = 0.0
        names = list(evaluator.sessions)
        for _ in range(VERIFY_ROUNDS):
            solutions: dict[str, Solution] = {}
            rules: tuple[Rule, ...] = ()
            for position, name in enumerate(names):
                tuner = tuners.get(name) or Tuner(
                    name,
                    profile,
                    evaluator,
                    self.target,
                    tuning,
                    self.reporter,
                    self.budget,
                    self.max_variants,
                    self.chosen,
                )
                tuners[name] = tuner
                tuner.fixed = rules
                later = len(names) - 1 - position  # what is left to spend is shared with the networks still to come
                solution = tuner.find(margin + 3.0 * later)
                if solution is not None:
                    solutions[name] = solution
                    rules += solution.rules
            if not rules:
                return None
            quality, _ = evaluator.quality(rules, held_out)
            missing = self.target.missing_db(quality)
            self.reporter.say(
                f"  held-out prompts: {quality.psnr:.1f} dB (worst {quality.worst_psnr:.1f}), relative L2 "
                f"{quality.rel_l2:.4f}"
            )
            if missing <= 0:
                return Found(rules, quality, solutions, tuners)
            gap = missing - tuners[names[-1]].missing_db(solutions.get(names[-1]))
            margin = max(margin + 0.3, gap + 0.3)  # what the tuning prompts promised too much
            self.reporter.say(
                f"  short of the target by {missing:.1f} dB: searching again with {margin:.1f} dB in hand"
            )
            for tuner in tuners.values():
                tuner.budget += max(3, self.budget // 3)
        self.reasons.append(
            f"after {VERIFY_ROUNDS} searches the held-out prompts still miss the target by {missing:.1f} dB"
        )
        return None

    def _finish(
        self,
        evaluator: Evaluator,
        profile: Profile,
        found: Found,
        profiled: Pairs,
        held_out: Pairs,
        eager_seconds: float,
    ) -> Result:
        """Time the contenders in turn, refuse a plan that is no faster, write what was found."""
        with self._timed("final timing"):
            plan_seconds, dense_seconds = self._time_in_turn(evaluator, found.rules, held_out)
        evaluations = self._evaluations(evaluator, ())
        rows = [
            Row("dense, eager (one run)", eager_seconds, dense_seconds / eager_seconds, None, None, evaluations),
            Row("dense, compiled", dense_seconds, 1.0, None, None, evaluations),
            Row(
                "ditopt",
                plan_seconds,
                dense_seconds / plan_seconds,
                found.quality.psnr,
                found.quality.worst_psnr,
                self._evaluations(evaluator, found.rules),
            ),
        ]
        rows += self._fewer_steps(evaluator, plan_seconds, dense_seconds, held_out)
        if self.target.speedup is not None and dense_seconds / plan_seconds < self.target.speedup:
            measured = f"{dense_seconds / plan_seconds:.2f}x"
            short = f"asked for {self.target.speedup:g}x, measured {measured} over whole generations"
            self.reasons.append(short)
            self.reporter.say(f"  {short}")
        if plan_seconds >= dense_seconds:
            evaluator.bind(())
            self.reporter.table(closing_table(rows))
            return self._stay_dense(
                f"the plan took {plan_seconds:.2f} s a generation, dense {dense_seconds:.2f} s",
                rows,
                evaluator.template,
            )
        programs = {name: whole_program(session) for name, session in evaluator.sessions.items()}
        plan = finished_plan(evaluator.template, found, rows, programs, len(held_out), self.state_bytes)
        for program in programs.values():  # what did not apply is told, not dropped
            self.reasons += [*program.variants.trace.notes, *program.variants.reasons]
        result = Result(plan, rows, self.reasons, found.quality, self.timings)
        prompts = {"profiled": [prompt for prompt, _ in profiled], "held_out": [prompt for prompt, _ in held_out]}
        path = Path(self.plan_path) if self.plan_path is not None else None
        path = write_outcome(path, plan, profile, found, result, prompts)
        self.reporter.say(f"plan: {path}  (explained by `ditopt explain {path}`)")
        for session in evaluator.sessions.values():
            session.on_mismatch = self.on_mismatch
            for program in session.programs:
                program.on_mismatch = self.on_mismatch
            session.bind(plan)
        self.reporter.table(closing_table(rows))
        return result

    def _time_in_turn(self, evaluator: Evaluator, rules: Sequence[Rule], held_out: Pairs) -> tuple[float, float]:
        """Median seconds of a generation under ``rules`` and dense, measured alternately."""
        spent: dict[bool, list[float]] = {True: [], False: []}
        with self.reporter.stage("timing dense and plan in turn", 2 * TIMED_GENERATIONS) as stage:
            for turn in range(TIMED_GENERATIONS):
                pair = held_out[turn % len(held_out)]
                for planned in (True, False):
                    evaluator.bind(rules if planned else ())
                    began = time.perf_counter()
                    self.adapter.checked_rollout(*pair)
                    spent[planned].append(time.perf_counter() - began)
                    self._note_state(evaluator)
                    stage.advance()
        return statistics.median(spent[True]), statistics.median(spent[False])

    def _note_state(self, evaluator: Evaluator) -> None:
        """Keep the most memory that slots have taken under the plan that is bound."""
        held = sum(whole_program(session).statistics.peak_slot_bytes for session in evaluator.sessions.values())
        self.state_bytes = max(self.state_bytes, held)

    def _fewer_steps(
        self, evaluator: Evaluator, plan_seconds: float, dense_seconds: float, held_out: Pairs
    ) -> list[Row]:
        """The honest rival: the same sampler with as many steps as the plan's time pays for (rounded up)."""
        if not isinstance(self.adapter, DiffusersAdapter) or "num_inference_steps" not in self.adapter.accepted:
            self.reasons.append(
                "fewer steps: not measured, a bare rollout does not say how to change its number of steps"
            )
            return []
        steps = math.ceil(self.adapter.steps * plan_seconds / dense_seconds)
        evaluator.bind(())
        with self.reporter.stage(f"rival: {steps} steps", len(held_out)) as stage:
            samples = []
            began = time.perf_counter()
            for prompt, seed in held_out:
                samples.append(self.adapter.checked_rollout(prompt, seed, num_inference_steps=steps))
                stage.advance()
            seconds = (time.perf_counter() - began) / len(held_out)
        quality = compare(samples, [evaluator.references[pair] for pair in held_out])
        return [Row(f"dense, {steps} steps", seconds, dense_seconds / seconds, quality.psnr, quality.worst_psnr, steps)]

    def _evaluations(self, evaluator: Evaluator, rules: Sequence[Rule]) -> int:
        plan = evaluator.template.model_copy(update={"rules": tuple(rules)})
        return sum(len(plan.kept_steps(name)) for name in evaluator.sessions)

    def _stay_dense(self, reason: str, rows: Sequence[Row] = (), template: Plan | None = None) -> Result:
        """Nothing beats the dense compiled model: say so and leave that; the plan file gets no rules."""
        self.reasons.append(reason)
        if template is not None and self.plan_path is not None:
            template.model_copy(update={"measured": {"dense": reason}}).save(self.plan_path)
        self.reporter.say(f"the dense compiled model stays: {reason}")
        return Result(None, list(rows), self.reasons, None, self.timings)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(time.perf_counter() - began, 2)


def _not_deterministic(pair: tuple[str, int], apart: float) -> RolloutError:
    """The error for two rollouts of one (prompt, seed) that differ by the relative L2 ``apart``."""
    return RolloutError(
        f"two rollouts of prompt {pair[0]!r} with seed {pair[1]} differ by {apart:.1%}: the loop is not deterministic. "
        "Draw all noise from a generator seeded with the seed that rollout is given"
    )
