"""The profile of networks that graph breaks cut into several graphs: ranges of blocks only, no whole steps.

A whole step of such a network cannot be predicted by rewriting one graph. So features are those of block
ranges, errors are planted by reusing ranges, and the profile says no seconds for a ``predicted`` step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ditopt.adapters.base import Sampler
from ditopt.calls import NetworkCalls
from ditopt.console import Reporter
from ditopt.decisions import Reuse
from ditopt.measure import Evaluator
from ditopt.passes._infra import Prediction, StepPlan
from ditopt.plan import Rule
from ditopt.profile import FeatureGram, NetworkProfile, Profile
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.features import FeatureCollector
from ditopt.profiler.observe import collected, inputs_of
from ditopt.profiler.ranges import candidate_spans, residual_ends, residuals
from ditopt.profiler.run import sigmas_of, step_widths
from ditopt.profiler.sensitivity import growth_factor, interpolate, plant_steps
from ditopt.profiler.timing import prepared, shared_by_flops, time_in_turn
from ditopt.runtime.graphs import Graphs
from ditopt.runtime.program import Observation, Observer, Program
from ditopt.sites import STEP


@dataclass
class SplitProfileRun:
    """What a run needs; ``calls`` and ``graphs`` are per network."""

    evaluator: Evaluator
    graphs: Mapping[str, Graphs]
    calls: Mapping[str, NetworkCalls]
    sampler: Sampler
    checkpoints: Checkpoints
    reporter: Reporter

    def __call__(self, pairs: Sequence[tuple[str, int]]) -> Profile:
        """Profile over (prompt, seed) pairs; fills the evaluator's references for them.

        Raises:
            RolloutError: the rollout called the model in another pattern than the recorded one.
        """
        grams: list[dict[str, Tensor]] = []
        with self.reporter.stage("profile: features", len(pairs)) as stage:
            for index, pair in enumerate(pairs):
                grams.append(self._features(index, pair))
                stage.advance()
        networks = {name: self._network(name, grams) for name in self.graphs}
        norm = float(np.mean([float(self.evaluator.references[pair].double().norm()) for pair in pairs]))
        with self.reporter.stage("profile: planted errors, timing", len(networks)) as stage:
            for name, network in networks.items():
                weights = self._weights(name, network, pairs[0])
                seconds = self._seconds(name, tuple(weights), pairs[0])
                networks[name] = replace(network, range_weights=weights, seconds=seconds)
                stage.advance()
        return Profile(networks, tuple(prompt for prompt, _ in pairs), norm)

    def sites(self, name: str) -> dict[str, Program]:
        """The ranges worth a candidate, each with its program."""
        graphs = self.graphs[name]
        found: dict[str, Program] = {}
        for part in graphs.parts:
            count = len(part.variants.trace.blocks)
            spans = candidate_spans(count) or ((0, count - 1),)
            usable = graphs.sites(part)
            chosen = [site for site, span in usable.items() if span in spans]
            found |= dict.fromkeys(chosen or [_widest(usable)], part)
        return {
            site: part
            for site, part in found.items()
            if all(start is not None for _, start in residual_ends(part, site))
        }

    def _features(self, index: int, pair: tuple[str, int]) -> dict[str, Tensor]:
        """Gram matrices of one rollout, from its checkpoint if there is one."""
        sites = {name: self.sites(name) for name in self.graphs}
        keys = [f"{name}.{site}" for name, own in sites.items() for site in own]
        kept = self.checkpoints.load(f"split{index}", ["sample", *keys])
        if kept is not None:
            self.evaluator.references[pair] = kept["sample"]
            return kept
        collectors: dict[str, FeatureCollector] = {}
        observers: list[tuple[Program, Observer]] = []
        for name, own in sites.items():
            last = self.graphs[name].parts[-1]
            for part in self.graphs[name].parts:
                of_part = {f"{name}.{site}": _residual_of(part, site) for site, holder in own.items() if holder is part}
                if part is last:
                    of_part[f"{name}.{STEP}"] = _handed_on(part)
                for key in of_part:
                    collectors[key] = FeatureCollector(self.calls[name], None, ())
                observers.append((part, _each([(collectors[key], values) for key, values in of_part.items()])))
        sample = collected(self.evaluator, pair, observers, collectors.values())
        bundle = {"sample": sample}
        bundle |= {key: torch.from_numpy(collector.step_gram()) for key, collector in collectors.items()}
        for name in self.graphs:
            bundle[f"{name}.present"] = torch.from_numpy(collectors[f"{name}.{STEP}"].present())
        self.evaluator.references[pair] = sample
        self.checkpoints.save(f"split{index}", bundle)
        return bundle

    def _network(self, name: str, grams: Sequence[Mapping[str, Tensor]]) -> NetworkProfile:
        """The features; that of the step is what the last graph's blocks hand on, for reports only."""
        calls = self.calls[name]
        total = len(calls.timesteps)
        present = grams[0][f"{name}.present"].numpy()
        features = {
            site: FeatureGram(
                site, total, calls.branch_names, np.stack([g[f"{name}.{site}"].numpy() for g in grams]), present
            )
            for site in (STEP, *self.sites(name))
        }
        widths = step_widths(self.calls, self.sampler)[name]
        ones = (1.0,) * total
        return NetworkProfile(
            calls.timesteps,
            sigmas_of(calls.timesteps, self.sampler),
            widths,
            ones,
            calls.weights(self.sampler.guidance),
            features,
        )

    def _weights(self, name: str, network: NetworkProfile, pair: tuple[str, int]) -> dict[str, tuple[float, ...]]:
        """How an error in a range's residual grows up to the final sample, per step width and step.

        The widest range of a graph is reused in several steps; the curves of others are scaled to one plant.
        """
        total = len(network.timesteps)
        planted = plant_steps(total)
        found: dict[str, tuple[float, ...]] = {}
        sites = self.sites(name)
        for part in self.graphs[name].parts:
            spans = {site: part.variants.trace.ranges()[site] for site, holder in sites.items() if holder is part}
            if not spans:
                continue
            widest = _widest(spans)
            factors = [self._growth(name, network, widest, step, pair) for step in planted]
            found[widest] = interpolate(total, planted, [factors])
            middle = planted[len(planted) // 2]
            for site in spans:
                if site != widest:
                    ratio = self._growth(name, network, site, middle, pair) / found[widest][middle]
                    found[site] = tuple(ratio * factor for factor in found[widest])
        return found

    def _growth(self, name: str, network: NetworkProfile, site: str, step: int, pair: tuple[str, int]) -> float:
        """``growth_factor`` of a range that is reused in ``step``, from its checkpoint if there is one."""
        kept = self.checkpoints.load(f"{name}.{site}.{step}", ["factor"])
        if kept is not None:
            return float(kept["factor"])
        self.evaluator.bind([Rule(sites=site, steps=(step,), do=Reuse(), network=name)])
        sample = self.evaluator.adapter.checked_rollout(*pair)
        moved = float((sample.double() - self.evaluator.references[pair].double()).norm())
        gram = network.grams[site].effective(network.branch_weights)[0]
        factor = growth_factor(gram, step, network.step_widths[step], moved)
        self.checkpoints.save(f"{name}.{site}.{step}", {"factor": torch.tensor(factor, dtype=torch.float64)})
        return factor

    def _seconds(self, name: str, sites: Sequence[str], pair: tuple[str, int]) -> dict[str, float]:
        """Seconds of a ``full`` step (its graphs with blocks) and what predicting each range saves of it.

        The widest range of each graph is timed, on the inputs of a real call; others get the share of it that
        their FLOPs have.
        """
        parts = self.graphs[name].parts
        seen = inputs_of(self.evaluator, pair, parts)
        per_step = len(self.calls[name].calls) / len(self.calls[name].timesteps)
        seconds = {"full": 0.0}
        for number, part in enumerate(parts):
            trace = part.variants.trace
            spans = {site: trace.ranges()[site] for site in sites if site in trace.ranges()}
            if not spans:
                timed = time_in_turn({"full": prepared(part, StepPlan(), seen[number])})
                seconds["full"] += per_step * timed["full"]
                continue
            widest = _widest(spans)
            plans = {"full": StepPlan((), (widest,)), "rest": StepPlan((Prediction(widest, 2),))}
            timed = time_in_turn({key: prepared(part, plan, seen[number]) for key, plan in plans.items()})
            saved = timed["full"] - timed["rest"]
            seconds["full"] += per_step * timed["full"]
            seconds |= shared_by_flops(per_step * saved, part, widest, tuple(spans))
        return seconds


def _widest(spans: Mapping[str, tuple[int, int]]) -> str:
    return max(spans, key=lambda site: spans[site][1] - spans[site][0])


Values = Callable[[Sequence[Tensor]], list[Tensor]]


def _residual_of(part: Program, site: str) -> Values:
    pairs = residual_ends(part, site)
    return lambda edges: residuals(edges, pairs)


def _handed_on(part: Program) -> Values:
    count = len(part.variants.trace.boundaries[-1].streams)
    return lambda edges: list(edges[len(edges) - count :])


def _each(collectors: Sequence[tuple[FeatureCollector, Values]]) -> Observer:
    def observe(seen: Observation) -> None:
        for collector, values in collectors:
            collector(Observation(seen.arguments, values(seen.boundaries), ()))

    return observe
