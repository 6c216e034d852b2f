"""Refit a schedule's predictors in closed loop, so that generations under the plan stay on the dense path.

A fit on features of dense generations does not know the latents that its own errors lead to. Here the
tuning prompts go through the schedule in lockstep: at every predicted step the factors are the least
squares solution, over prompts and from what a generation under the plan has in its slots, for the output
that leads back to the dense latents. With a sampler that moves by ``x' = a x + b F`` that is
``F + a / b * (x_dense - x)``; a and b are measured from the paths. These are the dense ones, or such
as lie between them and those of a second-order formula (``profiler.moves``, ``Tuner.aim``). (Training a solver's
coefficients against a teacher's path: S4S, Frankel et al., ICML 2025. Here the sampler stays the caller's, and the
coefficients are those of the predicted outputs.)

Prompts wait for each other although the loop is the caller's: a generation is stopped at the step that has
no factors yet, and started again with the outputs so far played back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.measure import DensePath, Evaluator
from ditopt.plan import Rule
from ditopt.profile import Array
from ditopt.profiler.features import matching_latents, reduced_branches
from ditopt.profiler.moves import sampler_moves
from ditopt.profiler.run import whole_program
from ditopt.runtime.program import Compute, copied
from ditopt.search.joint import refitted
from ditopt.search.predictors import lagrange
from ditopt.search.problem import SearchProblem
from ditopt.search.solution import Solution, combined_steps, count_variants, form_rules
from ditopt.search.space import Candidate
from ditopt.search.table import with_histories

RIDGE = 1e-6
"""Of the fits, relative, about the straight line through the last two computed steps."""


class _Pause(BaseException):
    """Raised out of a rollout at a step whose factors are not known yet; no error, so loops do not catch it."""


@dataclass
class Steering:
    """Refits plans of whole steps for one network; ``pairs`` are the prompts and ``paths`` what to stay on.

    ``shares`` ``[branches, T]`` is how branches' outputs are combined in every step; ``weights`` are of prompts in the
    fits, 1 where not given. All outputs of all prompts are held at once. Networks that are called in turn with this one
    are played back too, so their own plans start cold.
    """

    evaluator: Evaluator
    network: str
    calls: NetworkCalls
    problem: SearchProblem
    shares: Array
    pairs: Sequence[tuple[str, int]]
    paths: Mapping[tuple[str, int], DensePath]
    weights: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        moves = sampler_moves([self.paths[pair] for pair in self.pairs], self.problem.widths)
        self._back = np.zeros(self.problem.steps) if moves is None else moves.back
        self.latents_position = whole_program(self.evaluator.sessions[self.network]).variants.latents

    def __call__(self, solution: Solution, fixed: Sequence[Rule] = ()) -> tuple[Solution, list[Tensor]]:
        """The plan with refitted factors, and the samples of the tuning prompts under it.

        ``fixed`` are the rules of the other networks; sparse heads are as the plan has them. Costs one generation under
        the plan a prompt, and the caller's loop without the network as often as there are predicted steps.
        """
        runs = [_Run(self, pair) for pair in self.pairs]
        self.evaluator.bind([*fixed, *form_rules(self.problem), *solution.sparse.rules])
        factors: dict[int, Array] = {}
        families, sources = self._families(solution)
        combined = combined_steps(self.problem, solution.kept)
        for step, candidate in sorted(families.items()):
            for run in runs:
                run.until(step, sources, factors, combined)
            factors[step] = self._fit(runs, step, candidate, sources[step])
        samples = [run.until(None, sources, factors, combined) for run in runs]
        refit = refitted(self.problem, solution, families, {step: tuple(row) for step, row in factors.items()})
        return refit, [sample for sample in samples if sample is not None]

    def variants(self, solution: Solution) -> int:
        """How many graphs the refitted plan would need."""
        families, _ = self._families(solution)
        return count_variants(self.problem, replace(solution.draft, families=families))

    def _families(self, solution: Solution) -> tuple[dict[int, Candidate], dict[int, tuple[int, ...]]]:
        """Of every predicted step, its predictor and the computed steps that it reads, newest first."""
        histories = with_histories(solution.kept, self.problem.steps)
        families = {step: self._candidate(solution, step, past) for step, past in histories.items()}
        return families, {step: tuple(past[: families[step].history]) for step, past in histories.items()}

    def _candidate(self, solution: Solution, step: int, past: Sequence[int]) -> Candidate:
        """The fit that reads all the history there is (of the same branches), and the latents if they fit."""
        groups = self.problem.groups or (0,) * self.problem.steps
        usable = 0
        while usable < len(past) and groups[past[usable]] == groups[step]:
            usable += 1
        fits = (c for c in reversed(self.problem.candidates) if c.order is None and c.history <= usable)
        return next(fits, solution.draft.families[step])

    def _fit(self, runs: Sequence[_Run], step: int, candidate: Candidate, sources: Sequence[int]) -> Array:
        """Factors ``[history (+ 1)]`` towards the outputs that lead back to the paths."""
        if candidate.order is not None:
            index = self.problem.candidates.index(candidate)
            return np.asarray(self.problem.table.coefficients(index, step, sources))
        terms = candidate.history + candidate.latents
        inner, cross = np.zeros((terms, terms)), np.zeros(terms)
        for run in runs:
            path = self.paths[run.pair]
            rows = [run.rows[source] for source in sources]
            wanted = path.outputs[step]
            if run.latents is not None:
                wanted = wanted + self._back[step] * (path.latents[step] - run.latents)
                rows = [*rows, run.latents] if candidate.latents else rows
            read, weight = torch.stack(rows).double(), self.weights.get(run.pair, 1.0)
            inner += weight * (read @ read.T).numpy()
            cross += weight * (read @ wanted.double()).numpy()
        times = np.asarray(self.problem.times)
        prior = np.zeros(terms)
        near = np.asarray(sources[:2], dtype=np.intp)
        prior[: len(near)] = lagrange(times[near][None], times[[step]])[0]
        strength = RIDGE * np.trace(inner) / terms
        step_away = np.linalg.solve(inner + strength * np.eye(terms), cross - inner @ prior)
        return np.asarray(prior + step_away)


@dataclass
class _Run:
    """One prompt on its way through the schedule: the outputs so far, to be played back."""

    steering: Steering
    pair: tuple[str, int]
    played: list[tuple[Any, ...]] = field(default_factory=list)
    full: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None

    def until(
        self,
        stop: int | None,
        sources: Mapping[int, Sequence[int]],
        factors: Mapping[int, Array],
        combined: Mapping[int, tuple[int, tuple[float, float]]],
    ) -> Tensor | None:
        """Go on to step ``stop`` and note its latents there; None: to the end, whose sample is returned."""
        steering = self.steering
        at = own = 0

        def intercept(name: str, arguments: list[Any], compute: Compute) -> Sequence[Any]:
            nonlocal at, own
            here, number = at, own
            at, own = at + 1, own + (name == steering.network)
            if here < len(self.played):
                return copied(self.played[here])
            if name != steering.network:
                outputs = tuple(compute(arguments))
            else:
                step, branch = steering.calls.calls[number]
                if step == stop:
                    self.latents = self._reduced_latents(arguments)
                    raise _Pause
                if step in sources:
                    outputs = self._predict(branch, sources[step], factors[step], arguments)
                else:
                    outputs = self.full[step, branch] = tuple(compute(arguments))
                    self._note(step)
                    if step in combined:
                        outputs = self._combine(branch, step, *combined[step], arguments)
            self.played.append(outputs)
            return copied(outputs)

        programs = {name: whole_program(session) for name, session in steering.evaluator.sessions.items()}
        for name, program in programs.items():
            program.interceptor = partial(intercept, name)
        try:
            return steering.evaluator.adapter.checked_rollout(*self.pair)
        except _Pause:
            return None
        finally:
            for program in programs.values():
                program.interceptor = None

    def _predict(
        self, branch: int, sources: Sequence[int], factors: Array | Sequence[float], arguments: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The outputs of a call as the compiled plan will form them."""
        held = [self.full[source, branch] for source in sources]
        found: list[Any] = []
        for parts in zip(*held, strict=True):
            if not isinstance(parts[0], Tensor):
                found.append(parts[0])
                continue
            total = sum(float(factor) * part.float() for factor, part in zip(factors, parts, strict=False))
            if len(factors) > len(parts):
                position = self.steering.latents_position
                assert position is not None
                total = total + float(factors[-1]) * matching_latents(arguments[position], parts).float()
            assert isinstance(total, Tensor)
            found.append(total.to(parts[0].dtype))
        return tuple(found)

    def _combine(
        self, branch: int, step: int, before: int, factors: tuple[float, float], arguments: Sequence[Any]
    ) -> tuple[Any, ...]:
        """What a computed step hands the sampler: with a share of second order, where the branch ran before."""
        outputs = self.full[step, branch]
        if (before, branch) not in self.full:
            return outputs
        combined = self._predict(branch, (step, before), factors, arguments)
        pairs = zip(outputs, combined, strict=True)
        return tuple(new if isinstance(old, Tensor) and old.is_floating_point() else old for old, new in pairs)

    def _note(self, step: int) -> None:
        """Combine a computed step's branches once all of them are there."""
        steering = self.steering
        calls = steering.calls
        branches = [0] if calls.batched else [b for t, b in calls.calls if t == step]
        if any((step, branch) not in self.full for branch in branches):
            return
        total: Tensor | None = None
        for branch in branches:
            tensors = [out for out in self.full[step, branch] if isinstance(out, Tensor)]
            for offset, row in enumerate(reduced_branches(tensors, calls.batched)):
                share = float(steering.shares[branch + offset, step]) * row
                total = share if total is None else total + share
        assert total is not None
        self.rows[step] = total

    def _reduced_latents(self, arguments: Sequence[Any]) -> Tensor | None:
        position = self.steering.latents_position
        if position is None or not self.steering.paths[self.pair].latents.numel():
            return None
        latents = matching_latents(arguments[position], next(iter(self.full.values())))
        return reduced_branches([latents], self.steering.calls.batched)[0]
