"""How much an error at a module or in heads moves the final sample: predicted, and measured in real rollouts.

What is predicted follows from errors planted in single calls (``call_plants``) and the growth of an output's error
(``sensitivity``); errors planted in rollouts (``rollout_plants``) say how far that holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.components import modules
from ditopt.console import Reporter, Stage
from ditopt.errors import InputError
from ditopt.measure import Evaluator
from ditopt.measures import PROMPT, Measure, Table
from ditopt.profile import NetworkProfile, Profile, branch_shares
from ditopt.profiler.call_plants import CallPlants, anchor_steps_of, chosen_modules, plantable
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.kept_tables import HEADER, from_tensors, to_tensors
from ditopt.profiler.observe import Pair, answered, observed
from ditopt.profiler.places import attentions
from ditopt.profiler.rollout_plants import STARTS, HeadsPlant, Plant, RolloutPlant, masks_of, plants, third_of_heads
from ditopt.profiler.run import whole_program
from ditopt.profiler.sensitivity import Tape
from ditopt.runtime.program import Program
from ditopt.search.heads import HEADS, PATTERN, heads_error, output_growth
from ditopt.search.joint import dense
from ditopt.search.problem import SearchProblem

ROLLOUTS = "rollouts"
"""The site under which the table of rollouts planted at modules stands; that of heads stands under ``HEADS``."""


@dataclass(frozen=True)
class Planted:
    """What was planted in a rollout, what kind of error that is, and how far it moved the sample."""

    name: str
    error: str
    measured: float
    predicted: float


@dataclass
class SiteSensitivity:
    """Measures one generation's sensitivities for every network.

    ``attention_only``: what the choice of sparse heads needs; no errors are planted in other modules.
    """

    evaluator: Evaluator
    calls: Mapping[str, NetworkCalls]
    checkpoints: Checkpoints
    reporter: Reporter
    attention_only: bool = False
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tape: Tape | None = None

    def __call__(self, profile: Profile, pair: Pair) -> dict[str, dict[str, Table]]:
        """Per network the tables by site, where its modules have one output each."""
        programs = {name: whole_program(session) for name, session in self.evaluator.sessions.items()}
        usable = {
            name: chosen_modules(program.variants.trace, self.calls[name], self.attention_only)
            for name, program in programs.items()
        }
        found: dict[str, dict[str, Table]] = {}
        for name in [name for name in programs if not usable[name]]:
            self.reasons.append(f"{name}: no module with one output was found in its blocks, so no error was planted")
        for name, program in programs.items():
            all_modules = modules(program.variants.trace)
            left = len(set(all_modules) - set(plantable(program.variants.trace, self.calls[name])))
            if left:
                told = "have a batch that guidance branches cannot share: no error was planted there"
                self.reasons.append(f"{name}: {left} of {len(all_modules)} modules {told}")
        of_calls = {
            name: len(usable[name]) * len(anchor_steps_of(len(self.calls[name].timesteps))) for name in programs
        }
        every = {
            name: () if self.attention_only else plants(usable[name], len(self.calls[name].timesteps))
            for name in programs
            if usable[name]
        }
        total = sum(of_calls[name] + len(every[name]) + len(STARTS) for name in every)
        with self.reporter.stage("profile: errors planted at sites", total) as stage:
            for name, of_network in every.items():
                network = profile.networks[name]
                found[name] = sites = self._single_calls(name, network, programs, pair, stage)
                rows = []
                for number, plant in enumerate(of_network):
                    rows.append((plant, *self._rollout(name, programs, number, plant, pair)))
                    stage.advance()
                if rows:
                    sites[ROLLOUTS] = self._compare(name, network, sites, rows)
                network.tables["sensitivity"] = sites
                heads = self._heads(name, profile, programs, pair, stage)
                if heads is not None:
                    sites[HEADS] = heads
        return found

    def _single_calls(
        self, name: str, network: NetworkProfile, programs: Mapping[str, Program], pair: Pair, stage: Stage
    ) -> dict[str, Table]:
        key = f"{name}.attention_sites" if self.attention_only else f"{name}.sites"
        kept = self.checkpoints.load(key, [HEADER])
        if kept is not None:
            tables = from_tensors(kept)["sensitivity"]
            stage.advance(units=sum(len(table.labels["anchor"]) for table in tables.values()))
            return tables
        trace = programs[name].variants.trace
        planting = CallPlants(trace, self.calls[name], stage, network.geometry, network.prompts, self.attention_only)
        answered(self.evaluator, pair, programs, {name: planting})
        tables = planting.tables()
        self.checkpoints.save(key, to_tensors({"sensitivity": tables}))
        return tables

    def _compare(
        self,
        name: str,
        network: NetworkProfile,
        sites: Mapping[str, Table],
        rows: Sequence[tuple[Plant, float, Sequence[float]]],
    ) -> Table:
        table = rollouts_table(network, sites, rows)
        unknown = int(np.isnan(table["predicted"].values[0]).sum())
        if unknown:
            told = "not predicted: single errors planted at these modules moved nothing"
            self.reasons.append(f"{name}: what {unknown} of {len(rows)} errors planted in rollouts do is {told}")
        return table

    def _rollout(
        self, name: str, programs: Mapping[str, Program], number: int, plant: Plant, pair: Pair
    ) -> tuple[float, list[float]]:
        """How far a plant moved the sample, and the norm of its error per branch."""
        kept = self.checkpoints.load(f"{name}.plant{number}", ["moved", "errors"])
        if kept is None:
            trace = programs[name].variants.trace
            planting = RolloutPlant(trace, self.calls[name], self._outputs(name, programs, pair), plant)
            moved = self._moved(answered(self.evaluator, pair, programs, {name: planting}), pair)
            errors = [planting.errors.get(branch, 0.0) for branch in range(self.calls[name].branches)]
            kept = {"moved": moved, "errors": torch.tensor(errors, dtype=torch.float64)}
            self.checkpoints.save(f"{name}.plant{number}", kept)
        return float(kept["moved"]), kept["errors"].tolist()

    def _heads(
        self, name: str, profile: Profile, programs: Mapping[str, Program], pair: Pair, stage: Stage
    ) -> Table | None:
        """A third of all heads under a pattern from some step on, in a rollout each; None: no pattern was measured."""
        network, trace = profile.networks[name], programs[name].variants.trace
        if "patterns" not in network.tables or network.geometry is None:
            self.reasons.append(f"{name}: no pattern was planted in rollouts, as none was measured")
            return None
        problem = SearchProblem.from_profile(network, ("reuse",), sample_norm=profile.sample_norm)
        nodes = {entry.site.name: entry.node.name for entry in attentions(trace)}
        planted = []
        for which, share in enumerate(STARTS):
            heads = third_of_heads(trace, network, which, max(1, round(share * problem.steps)))
            stage.advance()
            if not heads:
                continue
            try:
                predicted = heads_error(network, problem, dense(problem), heads) * problem.sample_norm
            except InputError as error:
                self.reasons.append(f"{name}: no pattern was planted in rollouts: {error}")
                return None
            kept = self.checkpoints.load(f"{name}.heads{which}", ["moved"])
            if kept is None:
                masks = masks_of(heads, network, nodes)
                outputs = self._outputs(name, programs, pair)
                planting = HeadsPlant(trace, self.calls[name], outputs, heads[0].steps[0], masks)
                kept = {"moved": self._moved(answered(self.evaluator, pair, programs, {name: planting}), pair)}
                self.checkpoints.save(f"{name}.heads{which}", kept)
            told = f"{len(heads)} heads from step {heads[0].steps[0]} on"
            planted.append(Planted(told, PATTERN, float(kept["moved"]), predicted))
        return compared(planted, network.prompts) if planted else None

    def _moved(self, sample: Tensor, pair: Pair) -> Tensor:
        moved: Tensor = torch.linalg.vector_norm(sample.double() - self.evaluator.references[pair].double())
        return moved

    def _outputs(self, name: str, programs: Mapping[str, Program], pair: Pair) -> list[tuple[object, ...]]:
        """What a network gave in a dense generation, call by call."""
        if self._tape is None:
            self._tape = tape = Tape(self.calls)
            each = [(program, partial(tape.record, network)) for network, program in programs.items()]
            observed(self.evaluator, pair, each)
        return [out for network, _, _, out in self._tape.recorded if network == name]


def rollouts_table(
    network: NetworkProfile, sites: Mapping[str, Table], rows: Sequence[tuple[Plant, float, Sequence[float]]]
) -> Table:
    """How far errors planted at modules moved the final sample.

    Predicted is the error times ``to_output``, the step's width and its sensitivity.
    """
    weights = branch_shares(network.present, network.branch_weights)
    predicted = [
        guided_norm(weights[:, plant.step] * np.asarray(errors), alike=plant.error == "reuse")
        * _growth(sites[plant.module.site], plant.step)
        * network.step_widths[plant.step]
        * network.sensitivity[plant.step]
        for plant, _, errors in rows
    ]
    each = zip(rows, predicted, strict=True)
    made = [Planted(str(plant), plant.error, moved, float(of)) for (plant, moved, _), of in each]
    return compared(made, network.prompts)


def _growth(table: Table, step: int) -> float:
    """How much noise at a module changes the output; NaN where nothing that was planted there moved anything."""
    try:
        return output_growth(table, step, "noise")
    except InputError:
        return math.nan


def guided_norm(errors: npt.NDArray[np.float64], *, alike: bool) -> float:
    """The norm of the guided output's error from those of its branches, weighted ``[branches]``.

    ``alike``: errors of the branches point the same way, so they add (or cancel) as numbers; else as squares.
    """
    return float(abs(errors.sum())) if alike else float(np.linalg.norm(errors))


def compared(plants: Sequence[Planted], prompts: int = 1) -> Table:
    """``measured`` and ``predicted`` movement of the sample ``[prompt, plant]`` (L2 norms) under the first prompt.

    Under the others of ``prompts`` nothing is planted. How far the one is off the other: ``search.heads.correction``.
    """
    measures = {}
    for name in ("measured", "predicted"):
        values = np.full((prompts, len(plants)), np.nan)
        values[0] = [getattr(each, name) for each in plants]
        measures[name] = Measure((PROMPT, "plant"), values, partial=True)
    errors = [each.error for each in plants]
    return Table(measures, {"plant": tuple(each.name for each in plants)}, {"errors": errors})
