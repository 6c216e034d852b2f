"""One profiling run: instrumented rollouts, planted errors and timings, put together as a ``Profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.adapters.base import Sampler
from ditopt.backend import Session
from ditopt.calls import NetworkCalls
from ditopt.console import Reporter
from ditopt.decisions import Reuse
from ditopt.errors import RolloutError, TraceError
from ditopt.measure import Evaluator
from ditopt.plan import Rule
from ditopt.profile import FeatureGram, NetworkProfile, Profile
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.features import FeatureCollector, range_gram
from ditopt.profiler.sensitivity import measure_sensitivity, plant_steps
from ditopt.profiler.timing import measure_seconds
from ditopt.runtime.program import Observation, Program
from ditopt.sites import STEP


@dataclass
class ProfileRun:
    """What a run needs; ``calls`` and ``sessions`` are per network."""

    evaluator: Evaluator
    calls: Mapping[str, NetworkCalls]
    sampler: Sampler
    checkpoints: Checkpoints
    reporter: Reporter
    use_ranges: bool = True

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
        norm = float(np.mean([float(self.evaluator.references[pair].double().norm()) for pair in pairs]))
        planted = {name: plant_steps(len(self.calls[name].timesteps)) for name in sessions}
        extra = sum(len(networks[name].range_weights) for name in networks)
        with self.reporter.stage(
            "profile: planted errors, timing", sum(map(len, planted.values())) + len(sessions) + extra
        ) as stage:
            for name in sessions:
                networks[name] = self._sensitivity(name, networks[name], pairs[0], planted[name], stage)
        return Profile(networks, tuple(prompt for prompt, _ in pairs), norm)

    def _features(self, index: int, pair: tuple[str, int]) -> dict[str, Tensor]:
        """Gram matrices of one rollout, from its checkpoint if there is one."""
        sessions = self.evaluator.sessions
        expected = ["sample", *(f"{name}.{STEP}" for name in sessions)]
        kept = self.checkpoints.load(f"prompt{index}", expected)
        if kept is not None:
            self.evaluator.references[pair] = kept["sample"]
            return kept
        self.evaluator.bind(())
        collectors = {}
        for name, session in sessions.items():
            program = whole_program(session)
            streams = tuple(len(boundary.streams) for boundary in program.variants.trace.boundaries)
            collectors[name] = FeatureCollector(self.calls[name], program.variants.latents, streams)
            program.observer = collectors[name]
        try:
            sample = self.evaluator.adapter.checked_rollout(*pair)
        except IndexError as error:
            raise RolloutError(
                "the rollout calls the model more often than in the recorded generation; it must call it alike "
                "for every prompt"
            ) from error
        finally:
            for session in sessions.values():
                whole_program(session).observer = None
        bundle = {"sample": sample}
        for name, collector in collectors.items():
            if not collector.complete:
                raise RolloutError(
                    f"the rollout of prompt {pair[0]!r} calls {name} less often than that of the first prompt; "
                    "it must call it alike for every prompt"
                )
            bundle[f"{name}.{STEP}"] = torch.from_numpy(collector.step_gram())
            bundle[f"{name}.present"] = torch.from_numpy(collector.present())
            bundle[f"{name}.latents"] = torch.tensor(collector.has_latents)
            if len(collector.streams) > 1:
                edges = collector.edge_gram()
                spans = whole_program(sessions[name]).variants.trace.ranges()
                for site in self._candidate_ranges(name):
                    first, last = spans[site]
                    if collector.comparable(first, last):
                        bundle[f"{name}.range.{site}"] = torch.from_numpy(range_gram(edges, first, last))
        self.evaluator.references[pair] = sample
        self.checkpoints.save(f"prompt{index}", bundle)
        return bundle

    def _candidate_ranges(self, name: str) -> tuple[str, ...]:
        """Ranges worth a candidate: all blocks, all but the outermost two, the middle half."""
        trace = whole_program(self.evaluator.sessions[name]).variants.trace
        count = len(trace.blocks)
        if not self.use_ranges or count < 4 or not trace.boundaries:
            return ()
        wanted = {(0, count - 1), (1, count - 2), (count // 4, count - 1 - count // 4)}
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
        ranges = {site: 1.0 for site in features if site != STEP}
        return NetworkProfile(
            calls.timesteps, sigmas, widths, (1.0,) * total, calls.weights(self.sampler.guidance), features, {}, ranges
        )

    def _sensitivity(
        self, name: str, network: NetworkProfile, pair: tuple[str, int], planted: Sequence[int], stage: Any
    ) -> NetworkProfile:
        """Measure what the Gram matrices do not hold: growth of errors, weight of ranges, seconds."""
        kept = self.checkpoints.load(f"{name}.sensitivity", ["factors"])
        if kept is not None and len(kept["factors"]) == len(network.timesteps):
            factors = tuple(kept["factors"].tolist())
        else:
            factors = measure_sensitivity(self.evaluator, name, network, pair, 0, planted)
            self.checkpoints.save(f"{name}.sensitivity", {"factors": torch.tensor(factors, dtype=torch.float64)})
        for _ in planted:
            stage.advance()
        network = replace(network, sensitivity=factors)
        weights = {}
        for site in network.range_weights:
            weights[site] = self._range_weight(name, network, site, pair)
            stage.advance()
        seconds = self._seconds(name, tuple(weights), pair)
        stage.advance()
        return replace(network, range_weights=weights, seconds=seconds)

    def _range_weight(self, name: str, network: NetworkProfile, site: str, pair: tuple[str, int]) -> float:
        """``||output error|| / ||residual error||`` when the range is reused in the middle of the schedule."""
        kept = self.checkpoints.load(f"{name}.{site}", ["weight"])
        if kept is not None:
            return float(kept["weight"])
        step = len(network.timesteps) // 2
        gram = network.grams[site].effective(network.branch_weights)[0]
        error = float(np.sqrt(max(gram[step, step] - 2 * gram[step, step - 1] + gram[step - 1, step - 1], 1e-30)))
        self.evaluator.bind([Rule(sites=site, steps=(step,), do=Reuse(), network=name)])
        moved = float(
            (self.evaluator.adapter.checked_rollout(*pair).double() - self.evaluator.references[pair].double()).norm()
        )
        weight = max(moved, 1e-12) / max(network.step_widths[step] * network.sensitivity[step] * error, 1e-12)
        self.checkpoints.save(f"{name}.{site}", {"weight": torch.tensor(weight, dtype=torch.float64)})
        return weight

    def _seconds(self, name: str, ranges: Sequence[str], pair: tuple[str, int]) -> dict[str, float]:
        """Timings on the inputs of a real call: a short observed rollout supplies them."""
        program = whole_program(self.evaluator.sessions[name])
        seen: list[Observation] = []

        class Enough(Exception):
            """Raised out of the rollout once the inputs are there."""

        def keep(observation: Observation) -> None:
            seen.append(observation)
            raise Enough

        self.evaluator.bind(())
        program.observer = keep
        try:
            with torch.no_grad():
                self.evaluator.adapter.rollout(*pair)
        except Enough:
            pass
        finally:
            program.observer = None
        calls = self.calls[name]
        per_step = len(calls.calls) / len(calls.timesteps)
        return {key: value * per_step for key, value in measure_seconds(program, seen[0].arguments, ranges).items()}


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
