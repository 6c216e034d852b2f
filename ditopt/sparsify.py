"""Sparse heads: beside the schedule that was found, attention that leaves blocks out, under the same target.

What the schedule's search leaves of the target's error, or computed steps more than it found, are spent on heads that
attend to less: the profile tells what each would cost and save, rollouts decide. Predictions are refitted to what
generations with such heads have in their slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ditopt.console import Reporter, Stage
from ditopt.errors import InputError
from ditopt.measure import FAILED, Evaluator
from ditopt.outcome import Found
from ditopt.recipes import Recipe
from ditopt.search import Solution
from ditopt.search.solution import SparsePart
from ditopt.search.sparse import profiled_candidates
from ditopt.search.with_heads import MORE_STEPS, HeadsBeside, further_schedules
from ditopt.target import Target
from ditopt.tune import Tuner

TRIALS = 3
"""So many choices of heads are tried with each schedule."""
WORTH = 0.98
"""A plan with sparse heads has to take less than this share of the time of the plan without."""
MARGIN_DB = 0.1
TURNS = 3
"""Whole generations that are timed with and without sparse heads, each."""
ROUNDS, JUDGED = 2, 2
"""So many searches, of each of which so many plans are tried on the held-out prompts."""


@dataclass(frozen=True)
class Choice:
    """A plan with sparse heads: its seconds as predicted, and by how many dB the tuning prompts miss the target.

    ``error`` is what the search lowers (``Target.error``).
    """

    solution: Solution
    missing: float
    error: float

    @property
    def seconds(self) -> float:
        """Of all evaluations of a generation."""
        return self.solution.predicted_seconds


@dataclass
class Sparsify:
    """Adds sparse heads to the plan of one network, judged on ``held_out``; says why not in ``reasons``.

    A ``recipe`` restricts them. ``all_computed``: the plan computes every step, so that a speed is for heads to reach.
    """

    evaluator: Evaluator
    target: Target
    held_out: Sequence[tuple[str, int]]
    reporter: Reporter
    max_variants: int
    reasons: list[str]
    recipe: Recipe | None = None
    all_computed: bool = False

    def __call__(self, found: Found, tuner: Tuner) -> Found:
        """The plan with sparse heads, not timed against dense yet; or ``found``. The profile has ``NEEDED_TABLES``.

        For quality the fastest plan that meets the target is sought, for speed the one of least error that takes no
        longer than ``found``, or (``all_computed``) than the speed asks for. Either way it has to take less time than
        ``found``, or err less, in generations that are timed in turn, with held-out prompts.
        """
        (solution,) = found.solutions.values()
        if solution.draft.ranges:
            self.reasons.append("sparse: heads are not looked at in plans that predict ranges of blocks")
            return found
        self.reasons += [f"sparse: {reason}" for reason in tuner.attention.reasons]
        if not tuner.attention.costs:
            return found
        if self.recipe is not None:
            self.reasons += self.recipe.told(profiled_candidates(tuner.profile.networks[tuner.network]))
        search = _Search(tuner, self.max_variants, self.target, self.recipe)
        in_hand = self.target.missing_db(found.quality) - tuner.missing_db(solution) + MARGIN_DB
        for _ in range(ROUNDS):
            try:
                with self.reporter.stage("sparse heads", MORE_STEPS + 1) as stage:
                    choices = self._choices(solution, search, in_hand, stage)
            except InputError as error:
                self.reasons.append(f"sparse: {error}")
                return found
            if not choices:
                why = f"no choice of heads is {self._wanted}, by what profile and tuning prompts tell"
                self.reasons.append(f"sparse: {why}")
                return found
            judged, missing = self._judged(found, choices)
            if judged is not None:
                return judged
            if missing <= 0:
                return found
            in_hand += missing + MARGIN_DB  # what the tuning prompts promised too much
            self.reporter.say(f"  sparse heads: short of the target by {missing:.1f} dB: searching again")
        return found

    @property
    def _wanted(self) -> str:
        return "faster at the target" if self.target.speedup is None else "better at that speed"

    def _choices(self, solution: Solution, search: _Search, in_hand: float, stage: Stage) -> list[Choice]:
        """Plans with sparse heads that beat ``solution`` on the tuning prompts, the best first."""
        tuner = search.tuner
        best: list[Choice] = []
        bases = further_schedules(solution, tuner.problem.steps, MORE_STEPS, tuner.with_steps)
        for base in bases:
            if self.target.speedup is None:
                best += search.for_quality(base, in_hand, WORTH * solution.predicted_seconds)
            elif self.all_computed:
                best += search.for_seconds(base, tuner.seconds_allowed(self.target.speedup))
            elif base is not solution:
                wanted = tuner.quality_of(solution)
                made = search.for_seconds(base, solution.predicted_seconds)
                best += [each for each in made if wanted is None or each.error < self.target.error(wanted)]
            told = f"{min(each.seconds for each in best):.2f} s" if best else "none yet"
            stage.advance(f"{len(base.kept)} computed steps: {told}")
        key = (lambda each: each.seconds) if self.target.speedup is None else (lambda each: each.error)
        return sorted(best, key=key)

    def _judged(self, found: Found, choices: Sequence[Choice]) -> tuple[Found | None, float]:
        """The first of the choices that held-out prompts and the clock confirm, and by how many dB others missed."""
        (name,) = found.solutions
        short = 0.0
        for choice in choices[:JUDGED]:
            rules = choice.solution.rules
            quality, _ = self.evaluator.quality(rules, self.held_out)
            missing = self.target.missing_db(quality)
            better = self.all_computed or self.target.error(quality) < self.target.error(found.quality)
            if missing > 0 or (self.target.speedup is not None and not better):
                self.reasons.append(
                    f"sparse: heads that the tuning prompts allow give the held-out ones {quality.psnr:.1f} dB, "
                    f"{found.quality.psnr:.1f} without"
                )
                short = max(short, missing)
                continue
            sparse, plain = self.evaluator.time_in_turn([rules, found.rules], self.held_out, TURNS)
            if sparse > plain:
                self.reasons.append(
                    f"sparse: a generation takes {sparse:.3g} s with these heads, {plain:.3g} s without"
                )
                continue
            self.reporter.say(
                f"  sparse heads: {sparse:.3g} s a generation, {plain:.3g} s without; held-out prompts: "
                f"{quality.psnr:.1f} dB, {found.quality.psnr:.1f} without"
            )
            judged = replace(found, rules=rules, quality=quality, solutions={name: choice.solution}, seconds=None)
            return judged, short
        return None, short


@dataclass
class _Search:
    """Chooses and tries heads beside a schedule."""

    tuner: Tuner
    max_variants: int
    target: Target
    recipe: Recipe | None

    def beside(self, base: Solution) -> HeadsBeside:
        """The choices of heads beside a schedule."""
        tuner = self.tuner
        network = tuner.profile.networks[tuner.network]
        return HeadsBeside(
            network,
            tuner.problem,
            base,
            tuner.attention.costs,
            lambda plan: tuner.variants(plan) <= self.max_variants,
            self.recipe,
        )

    def for_quality(self, base: Solution, in_hand: float, limit: float) -> list[Choice]:
        """Choices that miss the target by no more than ``-in_hand`` dB on the tuning prompts, in under ``limit`` s."""
        quality, heads = self.tuner.quality_of(base), self.beside(base)
        if quality is None or base.predicted_seconds - heads.most_saved >= limit:
            return []
        spare = -(self.target.missing_db(quality) + in_hand)
        if spare <= 0:
            return []
        allowed = self.tuner.allowed_error(self.target.limit(in_hand)) ** 2 - quality.rel_l2**2
        if allowed <= 0:  # the mean PSNR is met, but errors of prompts differ
            allowed = quality.rel_l2**2 * (10 ** (spare / 10) - 1)
        found, ratio = [], 1.0
        for _ in range(TRIALS):
            part = heads.within_error(allowed / ratio)
            choice = None if part is None else self._tried(base, part)
            if part is None or choice is None:
                break
            made = self.tuner.quality_of(choice.solution)
            assert made is not None
            actual = max(made.rel_l2**2 - quality.rel_l2**2, 0.01 * part.error)
            if choice.missing + in_hand <= 0:
                found.append(choice)
                if actual > 0.8 * allowed:
                    break
            ratio = float(np.clip(actual / max(part.error, 1e-30), ratio / 8, 8 * ratio))
        return [each for each in found if each.seconds < limit]

    def for_seconds(self, base: Solution, seconds: float) -> list[Choice]:
        """The choice of least error with which a schedule takes ``seconds`` at most, if there is one."""
        part = self.beside(base).saving(base.predicted_seconds - seconds)
        choice = None if part is None else self._tried(base, part)
        return [] if choice is None else [choice]

    def _tried(self, base: Solution, part: SparsePart) -> Choice | None:
        """The plan with such heads, as rollouts have it; None where a generation fails under it."""
        solution = self.tuner.with_sparse(base, part)
        quality = self.tuner.quality_of(solution)
        if quality is None or quality is FAILED or self.tuner.variants(solution) > self.max_variants:
            return None
        return Choice(solution, self.target.missing_db(quality), self.target.error(quality))
