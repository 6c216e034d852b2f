"""How much an error at a module's output moves the final sample: errors planted in real rollouts.

What is predicted for them follows from ``call_plants``, errors in single calls, and the growth of an output's error
(``sensitivity``); modules of every kind, depth and phase of the schedule say how far that holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.console import Reporter, Stage
from ditopt.measure import Evaluator
from ditopt.measures import Measure, Table
from ditopt.profile import NetworkProfile
from ditopt.profiler.call_plants import CallPlants, Keeper, anchor_steps_of, chosen_modules, noisy
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.interpret import Watched, moment_of, of_branches
from ditopt.profiler.kept_tables import HEADER, from_tensors, to_tensors
from ditopt.profiler.observe import Pair, intercepted, observed
from ditopt.profiler.places import Module
from ditopt.profiler.run import whole_program
from ditopt.profiler.sensitivity import Tape
from ditopt.runtime.program import Compute, Program, copied
from ditopt.search.heads import output_growth
from ditopt.trace import Trace

ROLLOUT_ERRORS = ("noise", "reuse")
ROLLOUTS = "rollouts"
"""The site under which the planted rollouts' table stands."""
THIRDS = (1 / 6, 1 / 2, 5 / 6)


@dataclass(frozen=True)
class Plant:
    """An error planted in a rollout: where, in which step, and of what kind."""

    module: Module
    step: int
    error: str

    def __str__(self) -> str:
        return f"{self.module.site}, step {self.step}, {self.error}"


def plants(found: Sequence[Module], steps: int) -> tuple[Plant, ...]:
    """Nine plants: each third of the depth in each third of the schedule, kinds and errors in turn (a Latin square)."""
    kinds = list(dict.fromkeys(module.kind for module in found))
    chosen = []
    for number, (depth, phase) in enumerate(product(range(3), range(3))):
        of_kind = [module for module in found if module.kind == kinds[(depth + phase) % len(kinds)]]
        module = of_kind[min(int(THIRDS[depth] * len(of_kind)), len(of_kind) - 1)]
        step = min(max(round(THIRDS[phase] * steps), 1), steps - 1)
        chosen.append(Plant(module, step, ROLLOUT_ERRORS[number % 2]))
    return tuple(dict.fromkeys(chosen))


@dataclass
class RolloutPlant:
    """An interceptor: plays a dense generation back up to a plant, answers that step with the error, then computes."""

    trace: Trace
    calls: NetworkCalls
    outputs: Sequence[Sequence[Any]]
    plant: Plant
    errors: dict[int, float] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self._before: dict[int, Tensor] = {}

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call."""
        number, node = self.count, self.plant.module.node.name
        self.count += 1
        moment = moment_of(self.calls, number)
        if moment.step > self.plant.step:
            return compute(arguments)
        if moment.step < self.plant.step:
            if moment.step == self.plant.step - 1 and self.plant.error == "reuse":
                keeper = Keeper(node)
                Watched(self.trace, [keeper]).run(*arguments)
                self._before |= {branch: part.clone() for branch, part in of_branches(moment, keeper.kept[node])}
            return copied(self.outputs[number])
        whole = [self._before[branch] for branch in moment.branches if branch in self._before]

        def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
            known = self.plant.error == "reuse" and len(whole) == len(moment.branches)
            planted = torch.cat(whole) if known else noisy(number)(given, value)
            for (branch, mine), (_, theirs) in zip(
                of_branches(moment, value), of_branches(moment, planted), strict=True
            ):
                self.errors[branch] = float((theirs.double() - mine.double()).norm())
            return planted

        result: Sequence[Any] = Watched(self.trace, (), {node: edit}).run(*arguments)
        return result


@dataclass
class SiteSensitivity:
    """Measures one generation's sensitivities for every network."""

    evaluator: Evaluator
    calls: Mapping[str, NetworkCalls]
    checkpoints: Checkpoints
    reporter: Reporter
    reasons: list[str] = field(default_factory=list)

    def __call__(self, networks: Mapping[str, NetworkProfile], pair: Pair) -> dict[str, dict[str, Table]]:
        """Per network the tables by site; those of planted rollouts stand under ``ROLLOUTS``."""
        programs = {name: whole_program(session) for name, session in self.evaluator.sessions.items()}
        usable = {name: chosen_modules(program.variants.trace) for name, program in programs.items()}
        found: dict[str, dict[str, Table]] = {name: {} for name in networks}
        for name in [name for name in networks if not usable[name]]:
            self.reasons.append(f"{name}: no module with one output was found in its blocks, so no error was planted")
        total = sum(len(usable[name]) * len(anchor_steps_of(len(self.calls[name].timesteps))) + 9 for name in networks)
        with self.reporter.stage("profile: errors planted at sites", total) as stage:
            tape: Tape | None = None
            for name in [name for name in networks if usable[name]]:
                found[name] = self._single_calls(name, programs, pair, stage)
                every = plants(usable[name], len(self.calls[name].timesteps))
                rows = []
                for number, plant in enumerate(every):
                    kept = self.checkpoints.load(f"{name}.plant{number}", ["moved", "errors"])
                    if kept is None:
                        tape = tape or self._tape(pair, programs)
                        kept = self._rollout(name, programs, tape, plant, pair)
                        self.checkpoints.save(f"{name}.plant{number}", kept)
                    rows.append((plant, float(kept["moved"]), kept["errors"].tolist()))
                    stage.advance()
                found[name][ROLLOUTS] = rollouts_table(networks[name], found[name], rows)
        return found

    def _single_calls(self, name: str, programs: Mapping[str, Program], pair: Pair, stage: Stage) -> dict[str, Table]:
        kept = self.checkpoints.load(f"{name}.sites", [HEADER])
        if kept is not None:
            return from_tensors(kept)["sensitivity"]
        planting = CallPlants(programs[name].variants.trace, self.calls[name], stage)
        with intercepted(self.evaluator, programs, {name: planting}):
            self.evaluator.adapter.checked_rollout(*pair)
        tables = planting.tables()
        self.checkpoints.save(f"{name}.sites", to_tensors({"sensitivity": tables}))
        return tables

    def _tape(self, pair: Pair, programs: Mapping[str, Program]) -> Tape:
        tape = Tape(self.calls)
        observed(self.evaluator, pair, [(program, partial(tape.record, name)) for name, program in programs.items()])
        return tape

    def _rollout(
        self, name: str, programs: Mapping[str, Program], tape: Tape, plant: Plant, pair: Pair
    ) -> dict[str, Tensor]:
        outputs = [out for network, _, _, out in tape.recorded if network == name]
        planting = RolloutPlant(programs[name].variants.trace, self.calls[name], outputs, plant)
        with intercepted(self.evaluator, programs, {name: planting}):
            sample = self.evaluator.adapter.checked_rollout(*pair)
        moved = float((sample.double() - self.evaluator.references[pair].double()).norm())
        errors = [planting.errors.get(branch, 0.0) for branch in range(self.calls[name].branches)]
        return {"moved": torch.tensor(moved, dtype=torch.float64), "errors": torch.tensor(errors, dtype=torch.float64)}


def rollouts_table(
    network: NetworkProfile, sites: Mapping[str, Table], rows: Sequence[tuple[Plant, float, Sequence[float]]]
) -> Table:
    """``measured`` and ``predicted`` ``[plant]``: how far planted errors moved the final sample (L2 norm).

    Predicted is the error times ``to_output``, the step's width and its sensitivity. ``scale`` is the mean ratio of
    measured to predicted in the logarithm, ``spread`` the standard deviation of that logarithm: an error that the
    profile predicts is off by a factor of ``exp(spread)`` in two of three cases.
    """
    measured = np.array([moved for _, moved, _ in rows])
    weights = np.asarray(network.branch_weights)
    predicted = np.array(
        [
            float(np.linalg.norm(weights * np.asarray(errors)))
            * output_growth(sites[plant.module.site], plant.step)
            * network.step_widths[plant.step]
            * network.sensitivity[plant.step]
            for plant, _, errors in rows
        ]
    )
    logs = np.log(np.maximum(measured, 1e-30) / np.maximum(predicted, 1e-30))
    spread = logs.std(ddof=1) if logs.size > 1 else 0.0
    measures = {
        "measured": Measure(("plant",), measured),
        "predicted": Measure(("plant",), predicted),
        "scale": Measure((), np.asarray(np.exp(logs.mean()))),
        "spread": Measure((), np.asarray(spread)),
    }
    return Table(measures, {"plant": tuple(str(plant) for plant, _, _ in rows)})
