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

from ditopt._torch import break_reasons, compile_counts
from ditopt.adapters import Adapter, DiffusersAdapter, adapt
from ditopt.adapters.base import CallLog, watch_calls
from ditopt.backend import Session, ditopt_backend
from ditopt.calls import NetworkCalls, call_pattern
from ditopt.console import Reporter
from ditopt.decisions import DTYPES
from ditopt.device import describe_device
from ditopt.errors import InputError, RolloutError, TraceError
from ditopt.guidance import watch_guidance
from ditopt.measure import Evaluator
from ditopt.outcome import (
    Found,
    Result,
    Row,
    check_writable,
    closing_table,
    finished_plan,
    write_outcome,
    write_side,
)
from ditopt.plan import Breaks, DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.profile import Profile
from ditopt.profiler.checkpoint import Checkpoints, run_key
from ditopt.profiler.observe import captured_once
from ditopt.profiler.run import ProfileRun, sigmas_of
from ditopt.profiler.split import SplitProfileRun
from ditopt.quality import relative_l2
from ditopt.runtime.graphs import Graphs, find_graphs
from ditopt.search import TECHNIQUES
from ditopt.search.space import candidates
from ditopt.target import Target
from ditopt.verify import VerifiedSearch, affordable_trials

OTHERS = RANGES, SIMPLIFY, PRECISION, SECOND_ORDER = "ranges", "simplify", "precision", "second_order"
"""Kinds of decision that are no predictors of a step."""
ALL_TECHNIQUES = (*TECHNIQUES, *OTHERS)
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
    budget: int | None = None
    on_mismatch: str = "error"
    resume: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        self.reporter = Reporter(self.quiet)
        self.timings: dict[str, float] = {}
        self.reasons: list[str] = []
        chosen = tuple(self.techniques) if self.techniques is not None else ALL_TECHNIQUES
        self.chosen = tuple(name for name in chosen if name not in OTHERS)
        try:
            candidates(self.chosen)
        except InputError as error:
            raise InputError(str(error).replace("choose from ", f"choose from {', '.join(OTHERS)}, ")) from None
        self.use_ranges = RANGES in chosen
        self.use_second_order = SECOND_ORDER in chosen
        self.dtypes = DTYPES if PRECISION in chosen else ()
        self.simplify = SIMPLIFY in chosen
        self.adapter: Adapter = adapt(self.model, self.rollout, self.pipe_kwargs)
        check_writable(None if self.plan_path is None else Path(self.plan_path))

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
        inputs = Inputs(
            timestep=log.timestep,
            latents=log.latents,
            identity=log.identity,
            forward=log.forward,
            contexts=log.contexts,
        )
        sessions = {name: Session(network=name, inputs=inputs, on_mismatch="dense") for name in calls}
        for name, session in sessions.items():
            self.adapter.networks[name].compile(backend=ditopt_backend, options={"session": session})
        breaks = compile_counts().breaks
        with self._timed("capture and compile"), self.reporter.stage("capture and compile", 1) as stage:
            compiled = self.adapter.checked_rollout(*profiled[0])
            stage.advance()
        try:
            graphs = self._graphs(sessions, calls, compile_counts().breaks > breaks)
        except TraceError as error:
            if compile_counts().breaks == breaks and all(len(session.programs) == 1 for session in sessions.values()):
                raise
            told = [place for session in sessions.values() for place in session.breaks] or break_reasons()
            return self._stay_dense(f"{error}; breaks: {'; '.join(told) or 'none reported'}")
        self._check_deterministic(profiled[0], eager, compiled)
        evaluator = Evaluator(self.adapter, sessions, self._template(calls, graphs, inputs), calls=calls)
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
            profile = self._profile(evaluator, graphs, calls, checkpoints, profiled, compiled)
        with (
            self._timed("held-out references"),
            self.reporter.stage("dense runs of held-out prompts", len(held_out)) as stage,
        ):
            dense_seconds = []
            for index, pair in enumerate(held_out):
                with captured_once(evaluator, pair):
                    seconds = self._reference(evaluator, checkpoints, f"held_out{index}", pair)
                if seconds is not None:
                    dense_seconds.append(seconds)
                stage.advance()
        search = VerifiedSearch(
            evaluator,
            profile,
            self.target,
            profiled,
            held_out,
            self.reporter,
            self.budget or affordable_trials(profile),
            self.max_variants,
            self.chosen,
            self.dtypes,
            self.use_second_order,
            self.reasons,
            statistics.median(dense_seconds or [0.0]),
        )
        with self._timed("search and verify"):
            found = search()
        if found is None:
            evaluator.bind(())
            return self._stay_dense("no plan met the target on the held-out prompts", template=evaluator.template)
        if found.seconds is None:
            with self._timed("final timing"):
                found = search.timed(found)
        return self._finish(search, found, graphs, eager_seconds)

    def _graphs(
        self, sessions: Mapping[str, Session], calls: Mapping[str, NetworkCalls], broken: bool
    ) -> dict[str, Graphs]:
        """The graphs of every network in which decisions can be made; what is left out is told.

        Raises:
            TraceError: a network has none.
        """
        found = {}
        for name, session in sessions.items():
            if not broken and len(session.programs) == 1 and not session.programs[0].variants.trace.blocks:
                raise TraceError(
                    f"no attention inside numbered blocks was found in {name}; ditopt works on transformers made "
                    "of a stack of blocks"
                )
            identified = session.inputs is not None and session.inputs.identity is not None
            graphs = find_graphs(name, session.programs, len(calls[name].calls), session.breaks, identified=identified)
            session.graphs = found[name] = graphs
            if not graphs.whole:
                if not self.use_ranges:
                    raise TraceError(
                        f"graph breaks cut {name} into several graphs, within which only ranges of blocks can be "
                        f"predicted, and techniques leave {RANGES!r} out"
                    )
                told = [f"graph break at {place}" for place in graphs.breaks] + [*graphs.notes]
                told.append("ranges of blocks within each graph can be predicted, whole steps not")
                self.reasons += [f"{name}: {line}" for line in told]
                for line in told:
                    self.reporter.say(f"  {name}: {line}")
        return found

    def _profile(
        self,
        evaluator: Evaluator,
        graphs: Mapping[str, Graphs],
        calls: Mapping[str, NetworkCalls],
        checkpoints: Checkpoints,
        profiled: Pairs,
        compiled: Tensor,
    ) -> Profile:
        """The profile; taken anew where checkpoints turn out to be of another loop than the one just seen."""
        run: ProfileRun | SplitProfileRun
        if all(each.whole for each in graphs.values()):
            sampler, fits = self.adapter.sampler(), "fit" in self.chosen
            run = ProfileRun(
                evaluator, calls, sampler, checkpoints, self.reporter, self.use_ranges, fits, self.dtypes, self.simplify
            )
        else:
            run = SplitProfileRun(evaluator, graphs, calls, self.adapter.sampler(), checkpoints, self.reporter)
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
    def _reference(evaluator: Evaluator, checkpoints: Checkpoints, name: str, pair: tuple[str, int]) -> float | None:
        """Take the dense sample of a held-out prompt; the seconds it took, None where its checkpoint was there."""
        kept = checkpoints.load(name, ["sample"])
        if kept is not None:
            evaluator.references[pair] = kept["sample"]
            return None
        began = time.perf_counter()
        evaluator.dense([pair])
        seconds = time.perf_counter() - began
        checkpoints.save(name, {"sample": evaluator.references[pair]})
        return seconds

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

    def _template(self, calls: Mapping[str, NetworkCalls], graphs: Mapping[str, Graphs], inputs: Inputs) -> Plan:
        """A plan without rules that says what it is for."""
        sampler = self.adapter.sampler()
        network = self.adapter.networks[next(iter(calls))]
        parameter = next(network.parameters())
        geometry = {}
        for name, each in graphs.items():
            trace = each.clock.variants.trace
            position = trace.find_argument(inputs.latents, inputs.forward)
            if position is not None:
                geometry[name] = tuple(int(n) for n in trace.placeholders[position].meta["val"].shape)
        return Plan(
            model=ModelPrint(
                class_name=type(network).__name__,
                structure=" ".join(dict.fromkeys(name for each in graphs.values() for name in each.structures)),
                blocks=sum(len(part.variants.trace.blocks) for each in graphs.values() for part in each.parts),
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
            breaks={
                name: Breaks(clock=each.clock.variants.trace.structure, at=each.breaks, blocks=each.stacks)
                for name, each in graphs.items()
                if not each.whole
            },
            target=self.target.to_data(),
        )

    def _finish(
        self, search: VerifiedSearch, found: Found, graphs: Mapping[str, Graphs], eager_seconds: float
    ) -> Result:
        """Compare the contenders, refuse a plan that is no faster, write what was found."""
        assert found.seconds is not None
        evaluator, profiled, held_out = search.evaluator, search.profiled, search.held_out
        plan_seconds, dense_seconds = found.seconds
        evaluations = self._evaluations(evaluator, ())
        rows = [
            Row("dense, eager (first run)", eager_seconds, dense_seconds / eager_seconds, None, None, evaluations),
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
        rows += search.fewer_steps(found)
        if plan_seconds >= dense_seconds:
            evaluator.bind(())
            self.reporter.table(closing_table(rows))
            return self._stay_dense(
                f"the plan took {plan_seconds:.2f} s a generation, dense {dense_seconds:.2f} s",
                rows,
                evaluator.template,
            )
        plan = finished_plan(evaluator.template, found, rows, graphs, len(held_out), search.state_bytes)
        for session in evaluator.sessions.values():  # what did not apply is told, not dropped
            for program in session.programs:
                self.reasons += [*program.variants.trace.notes, *program.variants.reasons]
        result = Result(plan, rows, self.reasons, found.quality, self.timings)
        prompts = {"profiled": [prompt for prompt, _ in profiled], "held_out": [prompt for prompt, _ in held_out]}
        path = Path(self.plan_path) if self.plan_path is not None else None
        path = write_outcome(path, plan, search.profile, found, result, prompts)
        self.reporter.say(f"plan: {path}  (explained by `ditopt explain {path}`)")
        watch = watch_guidance(self.model, plan) if isinstance(self.adapter, DiffusersAdapter) else None
        for session in evaluator.sessions.values():
            session.settle(self.on_mismatch, watch)
            session.bind(plan)
        self.reporter.table(closing_table(rows))
        return result

    def _evaluations(self, evaluator: Evaluator, rules: Sequence[Rule]) -> int:
        plan = evaluator.template.model_copy(update={"rules": tuple(rules)})
        return sum(len(plan.kept_steps(name)) for name in evaluator.sessions)

    def _stay_dense(self, reason: str, rows: Sequence[Row] = (), template: Plan | None = None) -> Result:
        """Nothing beats the dense compiled model: say so and leave that; the plan file gets no rules."""
        self.reasons.append(reason)
        if template is not None and self.plan_path is not None:
            template.model_copy(update={"measured": {"dense": reason}}).save(self.plan_path)
            write_side(Path(self.plan_path), {"reasons": self.reasons, "table": rows, "timings": self.timings})
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
