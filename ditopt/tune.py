"""Find the plan: solve on the profile's numbers, let real rollouts decide, until the target holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ditopt.console import Reporter, Stage
from ditopt.cost_models.measured import form_name
from ditopt.errors import NonFiniteError
from ditopt.estimate import estimated_seconds
from ditopt.forms import in_dtype, simplified
from ditopt.measure import Evaluator
from ditopt.plan import Plan, Rule
from ditopt.profile import NetworkProfile, Profile, branch_shares
from ditopt.profiler.moves import pulled
from ditopt.profiler.run import whole_program
from ditopt.quality import Quality, compare
from ditopt.recipes import Recipe
from ditopt.search import (
    Measurement,
    SearchProblem,
    Solution,
    Trial,
    bisect_kept,
    bisect_lambda,
    lambda_range,
    least_kept,
    refine,
    solve,
    solve_kept,
)
from ditopt.search.bisect import Meets
from ditopt.search.joint import from_kept
from ditopt.search.refine import with_further_step
from ditopt.search.restrict import restricted
from ditopt.search.rollouts import rules_key
from ditopt.search.solution import SparsePart, form_rules
from ditopt.search.sparse import AttentionCosts, site_costs
from ditopt.sites import STEP
from ditopt.steer import Steering
from ditopt.target import Target

Pairs = Sequence[tuple[str, int]]

NEAR = 0.1
"""A prompt's own error, relative to the largest, below which it does not weigh more in an aimed fit."""
MOST_TRIALS = 3
"""How many times the budget the trials of cheap plans may be: each refit starts the caller's loop anew."""


@dataclass(frozen=True)
class Tried:
    """One plan tried by real rollouts on the tuning prompts.

    ``share`` is what it took of the budget; ``finer`` how near in dB its samples are to those of a second-order solver
    in place of the loop's own, where these are known. ``seconds`` are the cost model's, ``measured_seconds`` what a
    generation took, where it was not refitted in the loop.
    """

    stage: str
    rules: tuple[Rule, ...]
    quality: Quality
    seconds: float
    met: bool
    share: float = 1.0
    finer: float | None = None
    measured_seconds: float | None = None


@dataclass
class Tuner:
    """Searches the plan of one network while the others run by ``fixed`` rules.

    ``seconds`` of a plan are the cost model's (measured per variant, summed over the schedule), so that the
    choice between plans does not hang on the noise of one wall clock. ``refused`` is the least tuning error of a plan
    that held-out prompts refused: only better plans are good enough.
    """

    network: str
    profile: Profile
    evaluator: Evaluator
    target: Target
    pairs: Pairs
    reporter: Reporter
    budget: int
    max_variants: int = 8
    techniques: tuple[str, ...] = ("reuse", "forecast", "fit")
    dtypes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    fixed: tuple[Rule, ...] = ()
    refused: float = math.inf
    tried: dict[tuple[str, ...], Tried] = field(default_factory=dict)
    stage_name: str = "search"

    def __post_init__(self) -> None:
        part = self.profile.networks[self.network]
        plain = SearchProblem.from_profile(
            part,
            self.techniques,
            range_weights=part.range_weights,
            sample_norm=self.profile.sample_norm,
            network=self.network if len(self.profile.networks) > 1 else "*",
        )
        fitting = self.evaluator.features_that_fit(self.network, [plain.site, *plain.ranges])
        if fitting is not None:
            plain, told = plain.holding(fitting)
            self.evaluator.reasons += [f"{self.network}: {each}" for each in told]
        self.problem = simplified(plain, part.seconds)
        if self.recipe is not None and self.recipe.loop is not None:
            self.problem = restricted(self.problem, self.recipe.loop, self.recipe.name)
        self._bar: Stage | None = None
        self._refits: dict[tuple[str, ...], Solution] = {}
        self._steering = self._make_steering(part)

    def _choose_dtype(self) -> None:
        """Compute in the first of ``dtypes`` that is faster here and good enough by itself; asked once."""
        if self.problem.dtype_tried is not None or not self.dtypes:
            return
        self.stage_name = "dtype"
        part = self.profile.networks[self.network]
        for dtype in self.dtypes:
            self.problem = in_dtype(self.problem, part.seconds, dtype, self.target, self._alone)
            if self.problem.dtype is not None:
                break
        self._steering = self._make_steering(part)

    def _alone(self, rules: Sequence[Rule]) -> Quality:
        """What ``rules`` measure on the tuning prompts while the other networks are dense."""
        samples, seconds = self.evaluator.samples(rules, self.pairs)
        quality = self.evaluator.compare(samples, self.pairs)
        if not self.fixed:
            self._note(rules, quality, self._to_finer(samples), seconds)
        return quality

    def _make_steering(self, part: NetworkProfile) -> Steering | None:
        """What refits plans in closed loop, where fits are allowed and there are dense paths to stay on."""
        paths = self.evaluator.paths.get(self.network, {})
        fits = [candidate for candidate in self.problem.candidates if candidate.order is None]
        if self.problem.site != STEP or not fits or not all(pair in paths for pair in self.pairs):
            return None
        shares = branch_shares(part.grams[STEP].present, part.branch_weights)
        return Steering(
            self.evaluator, self.network, self.evaluator.calls[self.network], self.problem, shares, self.pairs, paths
        )

    @property
    def finer_psnr(self) -> float | None:
        """How near, in dB, the dense samples are to those of a second-order solver; None where these are not known."""
        return self._to_finer([self.evaluator.references[pair] for pair in self.pairs])

    def _to_finer(self, samples: Sequence[Tensor] | None) -> float | None:
        finer = self.evaluator.finer
        if samples is None or not all(pair in finer for pair in self.pairs):
            return None
        return compare(samples, [finer[pair].sample for pair in self.pairs]).psnr

    def obstacle(self, solution: Solution) -> str | None:
        """Why the plan cannot be aimed; None if it can."""
        if self._steering is None:
            return "fits are left out of the techniques, a recipe has its own, or there are no dense paths"
        if solution.draft.ranges:
            return "it predicts ranges of blocks, by the profile's own factors"
        return "the tuning prompts' samples under it are not known" if self.finer_of(solution) is None else None

    @staticmethod
    def predicts(solution: Solution) -> bool:
        """Whether some step is predicted, so that there are factors to fit."""
        return bool(solution.draft.families)

    def aim(self, solution: Solution, share: float, second_order: float | None = None) -> Solution | None:
        """``solution`` refitted to paths a ``share`` of the way from the dense ones to the second-order ones.

        Its computed steps have the share ``second_order`` of that formula themselves.

        A sampler of first order has an error of its own, and that of a plan which hugs the dense path adds to it.
        Prompts weigh by the inverse square of theirs: where it is largest the two paths are farthest apart, and fits
        would follow that prompt alone. None where plans cannot be refitted (nor so, within ``max_variants``), or no
        second-order paths are known.
        """
        finer = self.evaluator.finer
        if self._steering is None or solution.draft.ranges or not all(pair in finer for pair in self.pairs):
            return None
        self.stage_name = "aim"
        paths = self.evaluator.paths[self.network]
        aimed = {pair: pulled(paths[pair], finer[pair].path, share) for pair in self.pairs}
        apart = {pair: float(torch.dist(self.evaluator.references[pair], finer[pair].sample)) for pair in self.pairs}
        farthest = max(*apart.values(), 1e-12)
        weights = {pair: max(distance / farthest, NEAR) ** -2 for pair, distance in apart.items()}
        problem = replace(self.problem, second_order=second_order)
        refit = self._refit(replace(self._steering, problem=problem, paths=aimed, weights=weights), solution)
        return None if refit is solution or self.variants(refit) > self.max_variants else refit

    def finer_of(self, solution: Solution | None) -> float | None:
        """How near, in dB, the tuning prompts' samples under a tried plan are to the second-order ones."""
        known = self._tried(solution)
        return None if known is None else known.finer

    def with_steps(self, count: int) -> Solution:
        """The best known start for a plan with so many computed steps, refitted and tried."""
        self.stage_name = "sparse"
        made = self._improve(self._start(count))
        self._measure(made.rules)
        return made

    def with_sparse(self, solution: Solution, part: SparsePart) -> Solution:
        """The plan with sparse heads, refitted with these where plans are, and tried."""
        self.stage_name = "sparse"
        made = self._improve(solution.with_sparse(part))
        self._measure(made.rules)
        return made

    def quality_of(self, solution: Solution) -> Quality | None:
        """What a plan measured on the tuning prompts; None where it was not tried."""
        known = self._tried(solution)
        return None if known is None else known.quality

    def variants(self, solution: Solution) -> int:
        """How many graphs a plan needs, with its sparse heads."""
        self.evaluator.bind([*self.fixed, *solution.rules])
        bound = whole_program(self.evaluator.sessions[self.network]).bound
        return 1 if bound is None else len(bound.variants)

    def every_step(self) -> Solution:
        """The plan that computes every step, in the problem's form, tried."""
        self._choose_dtype()
        self.stage_name = "dense"
        made = from_kept(self.problem, range(self.problem.steps), max_variants=self.max_variants)
        self._measure(made.rules)
        return made

    def seconds_allowed(self, speedup: float) -> float:
        """Of all evaluations of a generation, at so many times the speed of dense ones."""
        return self.problem.steps * self.profile.networks[self.network].seconds["full"] / speedup

    def find(self, margin_db: float) -> Solution | None:
        """The fastest plan found that meets the target with a margin, on the tuning prompts; None if none does."""
        with self.reporter.stage(f"search: {self.network}", self.budget) as self._bar:
            try:
                self._choose_dtype()
                if self.target.speedup is not None:
                    return self._for_speed(self.target.speedup)
                return self._for_quality(self.target.limit(margin_db))
            finally:
                self._bar = None

    def missing_db(self, solution: Solution | None) -> float:
        """By how many dB a tried plan misses the target on the tuning prompts; negative where it exceeds it."""
        known = self._tried(solution)
        return 0.0 if known is None else self.target.missing_db(known.quality)

    def refuse(self, solution: Solution | None) -> None:
        """Held-out prompts missed the target under this plan."""
        known = self._tried(solution)
        if known is not None:
            self.refused = min(self.refused, self.target.error(known.quality))

    def _for_quality(self, limit: float) -> Solution | None:
        def meets(measurement: Measurement) -> bool:
            return measurement.error <= limit and measurement.error < self.refused

        self.stage_name = "bisect"
        if self.problem.seconds_predicted is None:
            found = bisect_lambda(self.problem, self._measure, meets, math.ceil(self._left), self.max_variants)
            return None if found.best is None else found.best.solution
        by_count = bisect_kept(
            self.problem,
            self._measure,
            meets,
            max(4, self.budget // 3),
            self.max_variants,
            start=self._guess(limit),
            improve=self._improve,
        )
        best = by_count.best
        by_price = bisect_lambda(
            self.problem,
            self._measure,
            meets,
            max(2, self.budget // 5),
            self.max_variants,
            start=self._price_of(best),
            improve=self._improve,
        )
        best = _faster(_faster(best, by_price.best), self._form_alone(meets))
        self.stage_name = "refine"
        while best is not None and self._left > 1 and len(best.solution.kept) > max(2, self._least_kept):
            smaller = self._start(len(best.solution.kept) - 1)
            improved = self._refine(smaller, self._left / 2)
            if improved is None or not meets(improved.measurement):
                break
            faster = _faster(best, improved)
            if faster is best:  # fewer whole steps, but no ranges: slower than what is there
                break
            best = faster
        if best is not None and self._left > 0:
            polished = self._refine(best.solution, self._left)
            if polished is not None and polished.measurement.seconds <= best.measurement.seconds * 1.001:
                best = polished
        return None if best is None else self._or_plain(best)

    def _form_alone(self, meets: Meets) -> Trial | None:
        """The plan that computes every step, in the problem's form, if it meets the target."""
        if not form_rules(self.problem):
            return None
        solution = from_kept(self.problem, range(self.problem.steps), max_variants=self.max_variants)
        trial = Trial(solution, self._measure(solution.rules))
        return trial if meets(trial.measurement) else None

    def _start(self, count: int) -> Solution:
        """Where to refine plans with ``count`` kept steps from.

        The closed-form plan, or the best known one of a step fewer with its most useful further step: what measures
        better.
        """
        plain = solve_kept(self.problem, count, self.max_variants)
        refits = [refit for refit in self._refits.values() if len(refit.kept) == count - 1]
        known = [refit for refit in refits if self._key(refit.rules) in self.tried]
        if not known:
            return plain
        fewer = min(known, key=lambda refit: self._measure(refit.rules).error)
        starts = [self._improve(plain), self._improve(with_further_step(self.problem, fewer))]
        return min(starts, key=lambda solution: self._measure(solution.rules).error)

    def _or_plain(self, best: Trial) -> Solution:
        """The plan, or the same schedule with the profile's own predictors where these measure better."""
        if best.solution.draft.ranges or self._steering is None:
            return best.solution
        plain = from_kept(self.problem, best.solution.kept, max_variants=self.max_variants)
        measured = self._measure(plain.rules)
        better = measured.error < best.measurement.error and measured.seconds <= best.measurement.seconds * 1.001
        return plain if better else best.solution

    def _for_speed(self, speedup: float) -> Solution | None:
        full, predicted = self.problem.seconds_full, self.problem.seconds_predicted
        allowed = self.seconds_allowed(speedup)
        if predicted is None:
            return self._ranges_for_speed(allowed)
        count = int((allowed - self.problem.steps * predicted) / max(full - predicted, 1e-9))
        if count < self._least_kept:
            return None
        self.stage_name = "refine"
        best = self._refine(solve_kept(self.problem, min(count, self.problem.steps), self.max_variants), self.budget)
        return None if best is None else best.solution

    def _ranges_for_speed(self, allowed: float) -> Solution | None:
        """Where only ranges can be predicted: the plan of least error that is predicted to take ``allowed`` seconds."""
        low, high = lambda_range(self.problem)
        best = solve(self.problem, low, self.max_variants)
        if best.predicted_seconds > allowed:
            return None
        for _ in range(12):
            middle = math.sqrt(low * high)
            found = solve(self.problem, middle, self.max_variants)
            if found.predicted_seconds <= allowed:
                best, low = found, middle
            else:
                high = middle
        self.stage_name = "price"
        self._measure(best.rules)
        return best

    def _guess(self, limit: float) -> int | None:
        """A first number of kept steps: the least whose predicted error meets the limit."""
        allowed = self.allowed_error(limit)
        for count in range(max(2, self._least_kept), self.problem.steps):
            if solve_kept(self.problem, count, self.max_variants).predicted_error <= allowed:
                return count
        return None

    def allowed_error(self, limit: float) -> float:
        """The relative error of samples at a limit of the target's error (``Target.limit``)."""
        return limit if self.target.max_rel_error is not None else 10 ** (limit / 20) * self._peak_to_norm()

    def _peak_to_norm(self) -> float:
        """Turns an RMSE relative to a peak of 1 into an error relative to the sample's norm."""
        entries = next(iter(self.evaluator.references.values())).numel()
        return float(entries**0.5 / max(self.profile.sample_norm, 1e-12))

    def _price_of(self, trial: Trial | None) -> float | None:
        """A lambda at which the price-driven search keeps about as many steps as ``trial``."""
        if trial is None:
            return None
        low, high = lambda_range(self.problem)
        for _ in range(12):
            middle = math.sqrt(low * high)
            low, high = (
                (middle, high)
                if len(solve(self.problem, middle, self.max_variants).kept) < len(trial.solution.kept)
                else (low, middle)
            )
        return math.sqrt(low * high)

    def _refine(self, solution: Solution, budget: float) -> Trial | None:
        trials = max(2, int(budget / self._share(len(solution.kept))))
        found = refine(self.problem, solution, self._measure, trials, improve=self._improve if self._steering else None)
        known = self._tried(found)
        return None if known is None else Trial(found, Measurement(self.target.error(known.quality), known.seconds))

    def _improve(self, solution: Solution) -> Solution:
        """The plan refitted in closed loop, which measures it on the tuning prompts as well; plans with ranges stay."""
        if self._steering is None or solution.draft.ranges or len(solution.kept) == self.problem.steps:
            return solution
        key = self._key(solution.rules)
        if key not in self._refits:
            self._refits[key] = refit = self._refit(self._steering, solution)
            self._refits[self._key(refit.rules)] = refit
        return self._refits[key]

    def _refit(self, steering: Steering, solution: Solution) -> Solution:
        if steering.variants(solution) > self.max_variants or not self.evaluator.fits(solution.rules):
            return solution
        try:
            refit, samples = steering(solution, self.fixed)
        except NonFiniteError:
            return solution
        self._note(refit.rules, self.evaluator.compare(samples, self.pairs), self._to_finer(samples))
        return refit

    def _tried(self, solution: Solution | None) -> Tried | None:
        """What a plan measured on the tuning prompts, if it has been tried."""
        return None if solution is None else self.tried.get(self._key(solution.rules))

    def _key(self, rules: Sequence[Rule]) -> tuple[str, ...]:
        """What was measured: these rules beside those of the other networks."""
        return rules_key([*self.fixed, *rules])

    @cached_property
    def _least_kept(self) -> int:
        return least_kept(self.problem)

    @property
    def _left(self) -> float:
        return self.budget - sum(tried.share for tried in self.tried.values())

    def _share(self, kept: int) -> float:
        """What a trial of ``kept`` computed steps takes of the budget: 1 where that is half of them or more."""
        return min(1.0, max(2 * kept, self.problem.steps / MOST_TRIALS) / self.problem.steps)

    def _measure(self, rules: Sequence[Rule]) -> Measurement:
        if self._key(rules) not in self.tried:
            samples, seconds = self.evaluator.samples([*self.fixed, *rules], self.pairs)
            self._note(rules, self.evaluator.compare(samples, self.pairs), self._to_finer(samples), seconds)
        found = self.tried[self._key(rules)]
        return Measurement(self.target.error(found.quality), found.seconds)

    def _note(
        self, rules: Sequence[Rule], quality: Quality, finer: float | None = None, measured: float | None = None
    ) -> None:
        plan = self.evaluator.bind([*self.fixed, *rules])
        seconds, share = self.estimate(plan), self._share(len(plan.kept_steps(self.network)))
        met = self.target.missing_db(quality) <= 0
        self.tried[self._key(rules)] = Tried(
            self.stage_name, tuple(rules), quality, seconds, met, share, finer, measured
        )
        if self._bar is not None:
            self._bar.advance(f"{seconds:.2f} s, {quality.psnr:.1f} dB", share)

    def estimate(self, plan: Plan) -> float:
        """Seconds of this network in one generation under a plan, by the measured times of its variants."""
        network, ranges = self.profile.networks[self.network], self.evaluator.sessions[self.network].ranges()
        return estimated_seconds(plan, self.network, network, ranges, lambda: self.attention.costs)

    @cached_property
    def attention(self) -> AttentionCosts:
        """What attention takes at the sites where it was timed, in the problem's form when this is first asked."""
        form = form_name(self.problem.dtype, self.problem.simplify)
        return site_costs(self.profile.networks[self.network], form)


def _faster(one: Trial | None, two: Trial | None) -> Trial | None:
    """The faster of two trials; of equally fast ones (to a millisecond) the better."""
    if one is None or two is None:
        return one or two
    return min(one, two, key=lambda trial: (round(trial.measurement.seconds, 3), trial.measurement.error))
