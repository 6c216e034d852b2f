"""Searches a plan in a profile alone, on a machine that need not have the model. Predicted, never measured.

What the search of ``optimize`` leaves to rollouts is left out here, and the reasons say so: the last word on quality,
fits made in closed loop, computing in another dtype, shares of a second-order formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ditopt.cost_models.measured import form_name
from ditopt.cost_models.sparse import SparseCost
from ditopt.errors import InputError, ProfileError
from ditopt.forms import simplified
from ditopt.geometry import Geometry
from ditopt.plan import Rule
from ditopt.predicted import Predicted, can_tell_psnr, psnr_of, psnr_to_relative_error
from ditopt.profile import NetworkProfile, Profile
from ditopt.profiled_tensors import profiled_tensors
from ditopt.recipes import Recipe, find_recipe
from ditopt.search import Measurement, SearchProblem, Solution, bisect_kept, lambda_range, least_kept, solve, solve_kept
from ditopt.search.joint import from_kept
from ditopt.search.restrict import restricted, told
from ditopt.search.rollouts import rules_key
from ditopt.search.sparse import profiled_candidates, site_costs
from ditopt.search.with_heads import MORE_STEPS, NEEDED_TABLES, HeadsBeside, count_graphs, further_schedules
from ditopt.target import Target
from ditopt.techniques import Techniques

GRID = 4096
"""Prices of error that are looked at: points of a logarithmic grid, so that a bisection takes 12 solves a network."""
UNVERIFIED = "not verified: no rollout has been made; measure it with `ditopt bench`"
NOT_REFITTED = "fits have the profile's own factors: refitting them in closed loop takes rollouts"
NO_DTYPE = "precision: another dtype is not considered, as its error is told by rollouts alone"
NO_SECOND_ORDER = "second_order: not considered, as what it gains is told by rollouts alone"
ONE_NETWORK = "sparse: not considered, as that is for one network whose whole steps can be predicted"
NO_HEADS = (
    "sparse: not considered, as the profile has no tables of what heads cost and save (patterns, sensitivity, latency)"
)


@dataclass
class OfflineSearch:
    """The search for one target; ``reasons`` say what was left out, and ``missed`` of them what is short of the target.

    Raises:
        InputError: a technique or the recipe is unknown, or they contradict each other.
        ProfileError: the profile does not say what was profiled, lacks seconds, or what a PSNR is told from.
    """

    profile: Profile
    target: Target
    techniques: Sequence[str] | None = None
    max_variants: int = 8
    recipe: str | None = None
    reasons: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_variants < 1:
            raise InputError(f"max_variants is {self.max_variants}; it must be at least 1")
        if self.target.exact:
            raise InputError(
                "quality exact: whether generations are faster with what is computed ahead is measured on the model; "
                "use `ditopt optimize --quality exact`"
            )
        self.chosen = Techniques.choose(self.techniques, self.recipe)
        template = self.profile.template()
        if template is None:
            raise ProfileError("the profile does not say what was profiled (field plan is empty), so no plan fits it")
        self.template = template.model_copy(update={"recipe": self.recipe})
        self.problems = {name: self._problem(name, part) for name, part in self.profile.networks.items()}
        seconds = [len(part.timesteps) * part.seconds["full"] for part in self.profile.networks.values()]
        self.dense_seconds = sum(seconds)
        self._at: dict[int, Predicted] = {}
        self._allowed = self._allowed_error()

    def __call__(self) -> Predicted:
        """What is predicted to meet the target (for speed alone or beside a PSNR: to come nearest to it)."""
        self.reasons += self._left_out()
        found = self._for_quality() if self.target.speedup is None else self._for_both(self.target.speedup)
        if not found.rules:
            self.missed.append("no plan is predicted to be faster at the target: this one has no rules")
        self.reasons += self.missed
        return found

    def _for_both(self, speedup: float) -> Predicted:
        """For speed, and where the PSNR asked for beside it is missed, for that."""
        found = self._for_speed(self.dense_seconds / speedup)
        if found.error > self._allowed:
            self.missed.append(
                f"at {speedup:g}x the predicted PSNR is {psnr_of(self.profile, found.error):.1f} dB, short of "
                f"{self.target.min_psnr:g} dB: the fastest plan that is predicted to have it was taken"
            )
            found = self._for_quality()
        if found.speedup < speedup * (1 - 1e-9):
            self.missed.append(f"asked for {speedup:g}x, predicted are {found.speedup:.2f}x")
        return found

    def _problem(self, name: str, part: NetworkProfile) -> SearchProblem:
        network = name if len(self.profile.networks) > 1 else "*"
        try:
            problem = SearchProblem.from_profile(
                part,
                self.chosen.predictors,
                range_weights=part.range_weights,
                sample_norm=self.profile.sample_norm,
                network=network,
            )
        except ProfileError:
            raise
        except InputError as error:
            raise ProfileError(f"network {name}: {error}") from None
        if not self.chosen.ranges:
            problem = replace(problem, ranges={})
        if self.chosen.simplify:
            problem = simplified(problem, part.seconds)
        recipe = find_recipe(self.recipe)
        if recipe is not None and recipe.loop is not None:
            problem = restricted(problem, recipe.loop, recipe.name)
            self.reasons.append(told(problem, recipe.loop, recipe.name))
        return problem

    def _left_out(self) -> list[str]:
        found = [UNVERIFIED]
        if "fit" in {candidate.technique for each in self.problems.values() for candidate in each.candidates}:
            found.append(NOT_REFITTED)
        if self.chosen.dtypes:
            found.append(NO_DTYPE)
        if self.chosen.second_order:
            found.append(NO_SECOND_ORDER)
        return found

    def _allowed_error(self) -> float:
        """The largest predicted relative error that is good enough."""
        if self.target.max_rel_error is not None:
            return self.target.max_rel_error
        if self.target.min_psnr is None:
            return math.inf
        sample = self.profile.sample
        if not can_tell_psnr(self.profile):
            raise ProfileError(
                "the profile does not say how large its samples are (fields sample.peak and sample.numel), which a "
                "PSNR is told from; give max_rel_error instead"
            )
        return psnr_to_relative_error(self.target.min_psnr, self.profile.sample_norm, sample["peak"], sample["numel"])

    def _for_quality(self) -> Predicted:
        """The fastest of what bisections over the price of error and over the computed steps end at.

        Bisections from the middle, whatever the target: of two targets the stricter one then never ends at a smaller
        price or at fewer computed steps.
        """
        if self.chosen.all_computed:
            return self._with_heads(self._dense)
        found = [self._dense, self._cheapest_price(lambda at: at.error <= self._allowed)]
        if self._alone is not None:
            found += self._fewest_steps(*self._alone)
        good = [each for each in found if each.error <= self._allowed]
        return self._with_heads(min(good, key=lambda each: (each.seconds, each.error)))

    def _for_speed(self, seconds: float) -> Predicted:
        """The best of what takes ``seconds`` at most; the fastest where nothing does."""
        if self.chosen.all_computed:
            return self._with_heads(self._dense, seconds)
        slower = self._index(lambda at: at.seconds > seconds)
        found = [self._dense, self._price(max(slower - 1, 0))]
        if self._alone is not None:
            name, problem = self._alone
            spent = problem.steps * (problem.seconds_predicted or 0.0)
            each = max(problem.seconds_full - (problem.seconds_predicted or 0.0), 1e-12)
            count = min(int((seconds - spent) / each + 1e-9), problem.steps)
            if count >= least_kept(problem):
                found.append(self._of({name: solve_kept(problem, count, self.max_variants)}))
        quick = [each for each in found if each.seconds <= seconds * (1 + 1e-9)]
        if quick:
            return self._with_heads(min(quick, key=lambda each: (each.error, each.seconds)), seconds)
        return min(found, key=lambda each: (each.seconds, each.error))

    def _with_heads(self, found: Predicted, seconds: float | None = None) -> Predicted:
        """Where that is better, with sparse heads: faster within the error allowed, or better within ``seconds``."""
        if not self._attention_costs or self._alone is None:
            return found
        name, problem = self._alone
        ((_, solution),) = found.solutions.items()
        if solution.draft.ranges:
            self.reasons.append("sparse: heads are not looked at in plans that predict ranges of blocks")
            return found
        best, network = found, self.profile.networks[name]

        def is_better(made: Predicted) -> bool:
            if seconds is None:
                return made.seconds < best.seconds
            return made.error < best.error or best.seconds > seconds

        def allowed(plan: Solution) -> bool:
            return count_graphs(problem, plan) <= self.max_variants

        def start(count: int) -> Solution:
            return solve_kept(problem, count, self.max_variants)

        try:
            for base in further_schedules(solution, problem.steps, MORE_STEPS, start):
                heads = HeadsBeside(network, problem, base, self._attention_costs, allowed, self._recipe_of_heads)
                if seconds is None:
                    part = heads.within_error(self._allowed**2 - base.predicted_error**2)
                else:
                    part = heads.saving(base.predicted_seconds - seconds)
                if part is None:
                    continue
                plan = base.with_sparse(part)
                made = self._of({name: replace(plan, variants=count_graphs(problem, plan))})
                if made.error <= self._allowed and is_better(made):
                    best = made
        except InputError as error:
            self.reasons.append(f"sparse: {error}")
        if best is not found:
            template = self.template.model_copy(update={"tokens": self._tokens})
            self.template = template.with_beside(profiled_tensors(name, network))
        return best

    @cached_property
    def _attention_costs(self) -> dict[str, SparseCost]:
        """What attention takes at the sites whose heads may be sparse; none where the profile cannot tell."""
        if not self.chosen.sparse:
            return {}
        if self._alone is None:
            self.reasons.append(ONE_NETWORK)
            return {}
        name, problem = self._alone
        network = self.profile.networks[name]
        if not network.tables.keys() >= NEEDED_TABLES or name not in self._tokens:
            self.reasons.append(NO_HEADS)
            return {}
        found, told = site_costs(network, form_name(problem.dtype, problem.simplify))
        self.reasons += [f"sparse: {reason}" for reason in told]
        recipe = self._recipe_of_heads
        if recipe is not None:
            within, *lacking = recipe.told(profiled_candidates(network))
            self.reasons.append(within)
            self.missed += lacking
        return found

    @property
    def _recipe_of_heads(self) -> Recipe | None:
        """The recipe, if it speaks of heads."""
        recipe = find_recipe(self.recipe)
        return None if recipe is None else recipe.of_heads

    @property
    def _tokens(self) -> dict[str, Geometry]:
        """How tokens lie, of the networks of which that is known."""
        parts = self.profile.networks.items()
        return {name: part.geometry for name, part in parts if part.geometry is not None}

    @cached_property
    def _alone(self) -> tuple[str, SearchProblem] | None:
        """The one network whose whole steps can be predicted; None where there are several, or none."""
        ((name, problem), *others) = self.problems.items()
        return None if others or problem.seconds_predicted is None else (name, problem)

    @cached_property
    def _dense(self) -> Predicted:
        """The plan that computes every step, in the problems' form."""
        made = {
            name: from_kept(problem, range(problem.steps), max_variants=self.max_variants)
            for name, problem in self.problems.items()
        }
        return self._of(made)

    @cached_property
    def _range(self) -> tuple[float, float]:
        ends = [lambda_range(problem) for problem in self.problems.values()]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def _price(self, index: int) -> Predicted:
        """The plan under a price of error, the same for all networks."""
        if index not in self._at:
            low, high = self._range
            lam = low * (high / low) ** (index / (GRID - 1))
            made = {name: solve(problem, lam, self.max_variants) for name, problem in self.problems.items()}
            self._at[index] = self._of(made)
        return self._at[index]

    def _index(self, meets: Callable[[Predicted], bool]) -> int:
        """The least price, as an index of the grid, whose plan meets; ``GRID`` if the dearest does not."""
        low, high = 0, GRID
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(self._price(middle)) else (middle + 1, high)
        return low

    def _cheapest_price(self, meets: Callable[[Predicted], bool]) -> Predicted:
        index = self._index(meets)
        return self._dense if index == GRID else self._price(index)

    def _fewest_steps(self, name: str, problem: SearchProblem) -> list[Predicted]:
        """The plan of whole steps alone with the fewest computed ones that is good enough, if there is one."""
        known: dict[tuple[str, ...], Solution] = {}

        def note(solution: Solution) -> Solution:
            known[rules_key(solution.rules)] = solution
            return solution

        def predicted(rules: Sequence[Rule]) -> Measurement:
            solution = known[rules_key(rules)]
            return Measurement(solution.predicted_error, solution.predicted_seconds)

        def meets(measurement: Measurement) -> bool:
            return measurement.error <= self._allowed

        found = bisect_kept(problem, predicted, meets, problem.steps, self.max_variants, improve=note)
        return [] if found.best is None else [self._of({name: found.best.solution})]

    def _of(self, solutions: Mapping[str, Solution]) -> Predicted:
        return Predicted(solutions, self.dense_seconds)
