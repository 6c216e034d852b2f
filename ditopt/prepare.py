"""What comes before a profile: one eager generation to see who is called when; the networks captured and compiled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditopt._torch import break_reasons, compile_counts
from ditopt.adapters import Adapter, DiffusersAdapter
from ditopt.adapters.base import CallLog, watch_calls
from ditopt.backend import Session, ditopt_backend
from ditopt.calls import NetworkCalls, call_pattern
from ditopt.console import Reporter
from ditopt.device import describe_device
from ditopt.errors import RolloutError, TraceError
from ditopt.measure import Evaluator
from ditopt.plan import Breaks, DevicePrint, Inputs, ModelPrint, Plan, SamplerPrint
from ditopt.profile import Profile
from ditopt.profiler.checkpoint import Checkpoints, run_key
from ditopt.profiler.observe import Pair
from ditopt.profiler.run import sigmas_of
from ditopt.quality import relative_l2
from ditopt.runtime.graphs import Graphs, find_graphs

SAME_RUN = 1e-3
"""Relative L2 between two compiled runs of one prompt and seed, by differently fused kernels."""

Timed = Callable[[str], AbstractContextManager[None]]


class CannotDecideError(TraceError):
    """A network is cut by graph breaks so that nothing can be decided for it; dense it runs as before."""


@dataclass(frozen=True)
class Prepared:
    """A model whose networks are compiled and observed, ready to be profiled.

    ``compiled`` is the sample of the pair that was generated, ``eager_seconds`` what it took before.
    """

    adapter: Adapter
    evaluator: Evaluator
    graphs: Mapping[str, Graphs]
    calls: Mapping[str, NetworkCalls]
    pair: Pair
    compiled: Tensor
    eager_seconds: float

    @property
    def whole(self) -> bool:
        """Whether every network is one graph."""
        return all(each.whole for each in self.graphs.values())

    def checkpoints(self, facts: Mapping[str, Any], settings: Mapping[str, Any] | None, resume: bool) -> Checkpoints:
        """Those of a run of this model and loop with further ``facts``."""
        known: dict[str, Any] = {
            "calls": {name: part.timesteps for name, part in self.calls.items()},
            "settings": dict(settings or {}),
            "sampler": self.adapter.describe(),
            "plan": self.evaluator.template.model_dump(mode="json", exclude={"target"}),
        }
        return Checkpoints(
            run_key({name: self.adapter.networks[name] for name in self.calls}, {**known, **facts}), resume
        )

    def profile(self, run: Callable[[], Profile], checkpoints: Checkpoints, reporter: Reporter) -> Profile:
        """The profile that ``run`` takes; anew where checkpoints turn out to be of another loop than the one just seen.

        Raises:
            RolloutError: two generations of one prompt and seed differ.
        """
        profile, apart = run(), self._apart()
        if apart > SAME_RUN and checkpoints.loaded:
            reporter.say("  checkpoints are of another loop: profiling anew")
            checkpoints.resume = False
            profile, apart = run(), self._apart()
        if apart > SAME_RUN:
            raise not_deterministic(self.pair, apart)
        return profile

    def _apart(self) -> float:
        return relative_l2(self.evaluator.references[self.pair], self.compiled)


@dataclass
class Preparation:
    """Prepares one model; what is left out or odd is added to ``reasons``.

    ``settings`` are the arguments of the pipeline's call, ``use_ranges`` whether ranges of blocks may be predicted.
    """

    adapter: Adapter
    reporter: Reporter
    reasons: list[str]
    timed: Timed
    settings: Mapping[str, Any] | None = None
    use_ranges: bool = True
    target: Mapping[str, float | str] | None = None

    def __call__(self, pair: Pair) -> Prepared:
        """Probe, capture and compile with the generation of ``pair``.

        Raises:
            RolloutError: the sampling loop does not call the model, gives NaN or is not deterministic.
            CannotDecideError: graph breaks leave nothing to decide.
            TraceError: no step, block or attention was found to decide on.
        """
        with self.timed("probe"):
            eager, eager_seconds, calls, log = self._probe(pair)
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
        with self.timed("capture and compile"), self.reporter.stage("capture and compile", 1) as stage:
            compiled = self.adapter.checked_rollout(*pair)
            stage.advance()
        try:
            graphs = self._graphs(sessions, calls, compile_counts().breaks > breaks)
        except TraceError as error:
            if compile_counts().breaks == breaks and all(len(session.programs) == 1 for session in sessions.values()):
                raise
            told = [place for session in sessions.values() for place in session.breaks] or break_reasons()
            raise CannotDecideError(f"{error}; breaks: {'; '.join(told) or 'none reported'}") from error
        self._check_deterministic(pair, eager, compiled)
        evaluator = Evaluator(self.adapter, sessions, self._template(calls, graphs, inputs), calls=calls)
        return Prepared(self.adapter, evaluator, graphs, calls, pair, compiled, eager_seconds)

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
                        "predicted, and techniques leave 'ranges' out"
                    )
                told = [f"graph break at {place}" for place in graphs.breaks] + [*graphs.notes]
                told.append("ranges of blocks within each graph can be predicted, whole steps not")
                self.reasons += [f"{name}: {line}" for line in told]
                for line in told:
                    self.reporter.say(f"  {name}: {line}")
        return found

    def _probe(self, pair: Pair) -> tuple[Tensor, float, dict[str, NetworkCalls], CallLog]:
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

    def _check_deterministic(self, pair: Pair, eager: Tensor, compiled: Tensor) -> None:
        if eager.shape == compiled.shape and relative_l2(compiled, eager) < 1e-2:
            return
        again = self.adapter.checked_rollout(*pair)
        if again.shape != compiled.shape or relative_l2(again, compiled) > 1e-4:
            apart = relative_l2(again, compiled) if again.shape == compiled.shape else math.nan
            raise not_deterministic(pair, apart)
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
                for name, value in (self.settings or {}).items()
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
            target=dict(self.target or {}),
        )


@contextmanager
def as_it_was(adapter: Adapter, *, always: bool = False) -> Iterator[None]:
    """The networks without what they were compiled with before; an exception (Ctrl-C included) gives it back.

    So does the end of the context where ``always`` says so. A pipeline has its progress bar back in any case.
    """
    before = {name: network._compiled_call_impl for name, network in adapter.networks.items()}
    for network in adapter.networks.values():  # an earlier plan must not take part in the probe
        network._compiled_call_impl = None
    restore = True
    try:
        yield
        restore = always
    finally:
        if restore:
            for name, network in adapter.networks.items():
                network._compiled_call_impl = before[name]
        if isinstance(adapter, DiffusersAdapter):
            adapter.restore()


def not_deterministic(pair: Pair, apart: float) -> RolloutError:
    """The error for two rollouts of one (prompt, seed) that differ by the relative L2 ``apart``."""
    return RolloutError(
        f"two rollouts of prompt {pair[0]!r} with seed {pair[1]} differ by {apart:.1%}: the loop is not deterministic. "
        "Draw all noise from a generator seeded with the seed that rollout is given"
    )


def seeded(prompts: Sequence[str], seed: int) -> list[Pair]:
    """The prompts with their seeds, counted from ``seed``."""
    return [(prompt, seed + index) for index, prompt in enumerate(prompts)]
