"""One profiling run: instrumented rollouts, planted errors and timings, put together as a ``Profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.adapters.base import Sampler
from ditopt.backend import Session
from ditopt.calls import NetworkCalls
from ditopt.console import Reporter
from ditopt.errors import NonFiniteError, TraceError
from ditopt.measure import DensePath, Evaluator, SecondOrder
from ditopt.profile import FeatureGram, NetworkProfile, Profile, branch_shares
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.features import FeatureCollector, range_gram
from ditopt.profiler.memory import collect
from ditopt.profiler.moves import sampler_moves, second_order
from ditopt.profiler.observe import collected, inputs_of, observed
from ditopt.profiler.ranges import RangeProbe, candidate_spans
from ditopt.profiler.sensitivity import PLANTED_PROMPTS, Tape, growth_factor, interpolate, plant_steps
from ditopt.profiler.timing import measure_seconds
from ditopt.runtime.program import Observation, Observer, Program
from ditopt.sites import STEP

TUNING_PROMPTS = 4
"""Profiled prompts on which plans are tried and refitted: the first ones."""


ROUNDED = 0.2123
"""Root mean square error of rounding to nearest, relative to numbers of all mantissas, in units of the type's eps."""


@dataclass
class ProfileRun:
    """What a run needs; ``calls`` and ``sessions`` are per network.

    ``for_tuning``: rollouts will follow, that tune a plan to whole generations of the first prompts: these are kept
    step by step, dense and along second-order paths.
    """

    evaluator: Evaluator
    calls: Mapping[str, NetworkCalls]
    sampler: Sampler
    checkpoints: Checkpoints
    reporter: Reporter
    use_ranges: bool = True
    use_fits: bool = True
    dtypes: tuple[str, ...] = ()
    simplify: bool = True
    for_tuning: bool = True

    def __post_init__(self) -> None:
        self._tapes: dict[int, Tape] = {}
        self._weights: dict[str, tuple[float, ...]] = {}

    def __call__(self, pairs: Sequence[tuple[str, int]]) -> Profile:
        """Profile over (prompt, seed) pairs; fills the evaluator's references for them.

        Raises:
            RolloutError: the rollout called the model in another pattern than the recorded one.
        """
        sessions = self.evaluator.sessions
        grams: list[dict[str, Tensor]] = []
        with self.reporter.stage("profile: features", len(pairs)) as stage:
            for index, pair in enumerate(pairs):
                grams.append(self._features(index, pair))
                stage.advance()
        networks = {name: self._network(name, grams) for name in sessions}
        if self.for_tuning and self.use_fits and len(networks) == 1:
            ((name, network),) = networks.items()
            self._second_order(name, network, pairs[:TUNING_PROMPTS])
        norm = float(np.mean([float(self.evaluator.references[pair].double().norm()) for pair in pairs]))
        chosen = pairs[:PLANTED_PROMPTS]
        planted = {name: plant_steps(len(self.calls[name].timesteps)) for name in sessions}
        total = len(chosen) * sum(map(len, planted.values())) + 2 * len(sessions)
        with self.reporter.stage("profile: planted errors, timing", total) as stage:
            factors = [self._planted(index, pair, networks, planted, stage) for index, pair in enumerate(chosen)]
            collect()  # before graphs are compiled and timed
            for name in sessions:
                found = interpolate(
                    len(self.calls[name].timesteps), planted[name], [each[name].tolist() for each in factors]
                )
                networks[name] = self._weigh(name, replace(networks[name], sensitivity=found), pairs[0], stage)
        self._tapes.clear()
        return Profile(networks, tuple(prompt for prompt, _ in pairs), norm)

    def _planted(
        self,
        index: int,
        pair: tuple[str, int],
        networks: Mapping[str, NetworkProfile],
        planted: Mapping[str, Sequence[int]],
        stage: Any,
    ) -> dict[str, Tensor]:
        """Growth factors of one prompt, per network ``[planted steps]``, from its checkpoint if there is one."""
        kept = self.checkpoints.load(f"planted{index}", [*planted, *(f"{name}.steps" for name in planted)])
        if kept is not None and all(kept[f"{name}.steps"].tolist() == list(steps) for name, steps in planted.items()):
            for _ in range(sum(map(len, planted.values()))):
                stage.advance()
            return kept
        programs = {name: whole_program(session) for name, session in self.evaluator.sessions.items()}
        tape = self._tapes.get(index) or self._record(pair, programs)
        reference = self.evaluator.references[pair].double()
        found: dict[str, Tensor] = {}
        self.evaluator.bind(())
        try:
            for name, steps in planted.items():
                gram = networks[name].grams[STEP].effective(networks[name].branch_weights)[index]
                factors = []
                for step in steps:
                    tape.plant(programs, name, step)
                    moved = float((self.evaluator.adapter.checked_rollout(*pair).double() - reference).norm())
                    factors.append(growth_factor(gram, step, networks[name].step_widths[step], moved))
                    stage.advance()
                found[name] = torch.tensor(factors, dtype=torch.float64)
                found[f"{name}.steps"] = torch.tensor(steps)
        finally:
            tape.eject(programs)
        self.checkpoints.save(f"planted{index}", found)
        return found

    def _record(self, pair: tuple[str, int], programs: Mapping[str, Program]) -> Tape:
        """The tape of a dense generation whose features came from a checkpoint."""
        tape = Tape(self.calls)
        observed(self.evaluator, pair, [(program, partial(tape.record, name)) for name, program in programs.items()])
        return tape

    def _features(self, index: int, pair: tuple[str, int]) -> dict[str, Tensor]:
        """Gram matrices of one rollout, from its checkpoint if there is one."""
        sessions = self.evaluator.sessions
        tuned = self.for_tuning and index < TUNING_PROMPTS
        expected = ["sample", *(f"{name}.{STEP}" for name in sessions)]
        expected += [f"{name}.weights" for name in sessions if not index]
        expected += [f"{name}.path.{kind}" for name in sessions if tuned for kind in ("outputs", "latents")]
        kept = self.checkpoints.load(f"prompt{index}", expected)
        if kept is not None:
            self._keep(pair, kept, tuned)
            return kept
        collectors: dict[str, FeatureCollector] = {}
        observers: list[tuple[Program, Observer]] = []
        tape = Tape(self.calls) if index < PLANTED_PROMPTS else None
        for name, session in sessions.items():
            program = whole_program(session)
            streams = tuple(len(boundary.streams) for boundary in program.variants.trace.boundaries)
            collectors[name] = FeatureCollector(self.calls[name], program.variants.latents, streams)
            observer = _both(collectors[name], partial(tape.record, name)) if tape else collectors[name]
            observers.append((program, observer))
        sample = collected(self.evaluator, pair, observers, collectors.values())
        if tape is not None:
            self._tapes[index] = tape
        bundle = {"sample": sample}
        for name, collector in collectors.items():
            bundle[f"{name}.{STEP}"] = torch.from_numpy(collector.step_gram())
            bundle[f"{name}.present"] = torch.from_numpy(collector.present())
            bundle[f"{name}.latents"] = torch.tensor(collector.has_latents)
            if not index:
                weights = collector.branch_weights() or self.calls[name].weights(self.sampler.guidance)
                bundle[f"{name}.weights"] = torch.tensor(weights, dtype=torch.float64)
                self._weights[name] = weights
            if tuned:
                weights = self._weights[name]
                path = collector.path(branch_shares(collector.present(), weights))
                bundle |= {f"{name}.path.outputs": path.outputs, f"{name}.path.latents": path.latents}
            if len(collector.streams) > 1:
                edges = collector.edge_gram()
                spans = whole_program(sessions[name]).variants.trace.ranges()
                for site in self._candidate_ranges(name):
                    first, last = spans[site]
                    if collector.comparable(first, last):
                        bundle[f"{name}.range.{site}"] = torch.from_numpy(range_gram(edges, first, last))
        self.checkpoints.save(f"prompt{index}", bundle)
        self._keep(pair, bundle, tuned)
        return bundle

    def _keep(self, pair: tuple[str, int], bundle: dict[str, Tensor], tuned: bool) -> None:
        """Hand the dense sample, and of a tuning prompt the dense paths, to the evaluator."""
        self.evaluator.references[pair] = bundle["sample"]
        for name in self.evaluator.sessions:
            if f"{name}.weights" in bundle:
                self._weights[name] = tuple(bundle[f"{name}.weights"].tolist())
        if tuned:
            for name in self.evaluator.sessions:
                path = DensePath(bundle.pop(f"{name}.path.outputs"), bundle.pop(f"{name}.path.latents"))
                self.evaluator.paths.setdefault(name, {})[pair] = path

    def _second_order(self, name: str, network: NetworkProfile, pairs: Sequence[tuple[str, int]]) -> None:
        """If the loop is Euler's method on a flow, see what a formula of second order does in its place."""
        self.evaluator.finer.clear()
        paths = self.evaluator.paths[name]
        program = whole_program(self.evaluator.sessions[name])
        moves = sampler_moves([paths[pair] for pair in pairs], network.step_widths, _rounding(program))
        if moves is None or not moves.is_euler:
            self.reporter.say("  no second-order paths: the loop is not Euler's method on a flow")
            return
        shares = branch_shares(network.grams[STEP].present, network.branch_weights)
        with self.reporter.stage("profile: second-order paths", len(pairs)) as stage:
            for index, pair in enumerate(pairs):
                kept = self.checkpoints.load(f"second_order{index}", ["outputs", "latents", "sample"])
                if kept is None:
                    try:
                        found = second_order(self.evaluator, program, self.calls[name], shares, moves, pair)
                    except NonFiniteError:
                        self.reporter.say("  no second-order paths: one has NaN or infinite values")
                        return
                    kept = {"outputs": found.path.outputs, "latents": found.path.latents, "sample": found.sample}
                    self.checkpoints.save(f"second_order{index}", kept)
                path = DensePath(kept["outputs"], kept["latents"])
                self.evaluator.finer[pair] = SecondOrder(path, kept["sample"])
                stage.advance()

    def _candidate_ranges(self, name: str) -> tuple[str, ...]:
        """Ranges worth a candidate, by site name."""
        trace = whole_program(self.evaluator.sessions[name]).variants.trace
        if not self.use_ranges or not trace.boundaries:
            return ()
        wanted = candidate_spans(len(trace.blocks))
        return tuple(site for site, span in trace.ranges().items() if span in wanted)

    def _network(self, name: str, grams: Sequence[Mapping[str, Tensor]]) -> NetworkProfile:
        calls = self.calls[name]
        total = len(calls.timesteps)
        present = grams[0][f"{name}.present"].numpy()
        prefix = f"{name}.range."
        sites = {
            STEP: f"{name}.{STEP}",
            **{key.removeprefix(prefix): key for key in grams[0] if key.startswith(prefix)},
        }
        features = {
            site: FeatureGram(
                site,
                total,
                calls.branch_names,
                np.stack([g[key].numpy() for g in grams]),
                present,
                site == STEP and bool(grams[0][f"{name}.latents"]),
            )
            for site, key in sites.items()
        }
        sigmas = sigmas_of(calls.timesteps, self.sampler)
        widths = step_widths(self.calls, self.sampler)[name]
        ranges = {site: (1.0,) * total for site in features if site != STEP}
        return NetworkProfile(
            calls.timesteps, sigmas, widths, (1.0,) * total, self._weights[name], features, {}, ranges
        )

    def _weigh(self, name: str, network: NetworkProfile, pair: tuple[str, int], stage: Any) -> NetworkProfile:
        """Measure what the Gram matrices do not hold: weights of ranges, seconds."""
        weights = self._range_weights(name, network, pair)
        stage.advance()
        seconds = self._seconds(name, tuple(weights), pair)
        stage.advance()
        return replace(network, range_weights=weights, seconds=seconds)

    def _range_weights(self, name: str, network: NetworkProfile, pair: tuple[str, int]) -> dict[str, tuple[float, ...]]:
        """What an error in each range's residual does to the output in every step, from one dense rollout."""
        sites = tuple(network.range_weights)
        if not sites:
            return {}
        kept = self.checkpoints.load(f"{name}.ranges", list(sites))
        if kept is None:
            program = whole_program(self.evaluator.sessions[name])
            probe = RangeProbe(program, self.calls[name], network.branch_weights, sites)
            observed(self.evaluator, pair, [(program, probe)])
            kept = {site: torch.tensor(weights, dtype=torch.float64) for site, weights in probe.weights().items()}
            self.checkpoints.save(f"{name}.ranges", kept)
        return {site: tuple(kept[site].tolist()) for site in sites}

    def _seconds(self, name: str, ranges: Sequence[str], pair: tuple[str, int]) -> dict[str, float]:
        """Timings on the inputs of a real call: a short observed rollout supplies them."""
        program = whole_program(self.evaluator.sessions[name])
        (arguments,) = inputs_of(self.evaluator, pair, [program])
        calls = self.calls[name]
        per_step = len(calls.calls) / len(calls.timesteps)
        found = measure_seconds(program, arguments, ranges, self.dtypes, self.simplify)
        return {key: value * per_step for key, value in found.items()}


def _both(one: Observer, two: Observer) -> Observer:
    def observe(seen: Observation) -> None:
        one(seen)
        two(seen)

    return observe


def _rounding(program: Program) -> float:
    """The error, relative and root mean square, of latents that enter a program: 0 where they are no 16-bit floats."""
    position = program.variants.latents
    if position is None:
        return 0.0
    dtype = program.variants.trace.placeholders[position].meta["val"].dtype
    return ROUNDED * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0


def whole_program(session: Session) -> Program:
    """The one program of a network.

    Raises:
        TraceError: the network has not been compiled as one graph.
    """
    if len(session.programs) != 1:
        raise TraceError(
            f"{session.network} was captured as {len(session.programs)} graphs, so no decision can be made for "
            "it as a whole; "
            "remove the graph breaks (TORCH_LOGS=graph_breaks shows them) or call it with the same shapes throughout"
        )
    return session.programs[0]


def sigmas_of(timesteps: Sequence[float], sampler: Sampler) -> tuple[float, ...]:
    """The noise level of every evaluation where the scheduler tells it, else the timesteps themselves, scaled to 1."""
    if all(t in sampler.sigmas for t in timesteps):
        return tuple(sampler.sigmas[t] for t in timesteps)
    largest = max(abs(t) for t in timesteps) or 1.0
    return tuple(t / largest for t in timesteps)


def step_widths(calls: Mapping[str, NetworkCalls], sampler: Sampler) -> dict[str, tuple[float, ...]]:
    """|difference of sigma| to the next evaluation of the generation (to 0 after the last), per network."""
    order = sorted(
        (
            (sigma, name, step)
            for name, part in calls.items()
            for step, sigma in enumerate(sigmas_of(part.timesteps, sampler))
        ),
        key=lambda entry: -entry[0],
    )
    widths: dict[str, dict[int, float]] = {name: {} for name in calls}
    for (sigma, name, step), after in zip(order, [*(entry[0] for entry in order[1:]), 0.0], strict=True):
        widths[name][step] = max(abs(sigma - after), 1e-6)
    return {name: tuple(widths[name][step] for step in range(len(part.timesteps))) for name, part in calls.items()}
