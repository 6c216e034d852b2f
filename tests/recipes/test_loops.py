"""Recipes of the loop, whole: ``optimize(recipe=...)`` writes a plan that generates what the system does."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ditopt.cli import app
from ditopt.decisions import Fit, Forecast, Reuse
from ditopt.errors import InputError
from ditopt.offline import OfflineSearch
from ditopt.optimizer import Optimizer
from ditopt.plan import Plan
from ditopt.profile import Profile
from ditopt.recipes import RECIPES
from ditopt.runtime.schedule import adapted_factors
from ditopt.search import SearchProblem, lambda_range, least_kept, solve, solve_kept
from ditopt.search.explain import COMPUTE
from ditopt.search.refine import proposals
from ditopt.search.restrict import restricted
from ditopt.target import Target
from ditopt.verify import VerifiedSearch
from tests.made_profiles import toy_profile
from tests.recipes.loops import Blocks, System, WithSystem
from tests.search.problems import random_problem
from tests.tiny import euler, make_model

STEPS = 12
STACK = "blocks.0..3"
LOOPS = [recipe for recipe in RECIPES.values() if recipe.loop is not None]


def taylorseer(kept: tuple[int, ...], do: Forecast) -> System:
    cache: dict[int, Tensor] = {}
    activated: list[int] = []

    def system(step: int, stream: Tensor, blocks: Blocks) -> Tensor:
        if step in kept:
            activated.append(step)
            updated = {0: blocks(stream)}
            for i in range(do.order):
                if i in cache:
                    updated[i + 1] = (updated[i] - cache[i]) / (activated[-1] - activated[-2])
            cache.update(updated)
            return updated[0]
        x = step - activated[-1]
        return torch.stack([value * x**i / math.factorial(i) for i, value in cache.items()]).sum(0)

    return system


def scaled(kept: tuple[int, ...], factors: dict[int, float]) -> System:
    """MagCache (no factors) and CacheQuant: what the last computed step added, as it is or times a factor."""
    cache: list[Tensor] = []

    def system(step: int, stream: Tensor, blocks: Blocks) -> Tensor:
        if step in kept:
            cache[:] = [blocks(stream)]
        return cache[0] * (1.0 if step in kept else factors.get(step, 1.0))

    return system


@pytest.mark.parametrize("recipe", LOOPS, ids=[recipe.name for recipe in LOOPS])
def test_the_plan_generates_what_the_system_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Any) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: (1.0, 2.0))
    torch._dynamo.reset()
    path, model = tmp_path / "plan.yaml", make_model()
    made = Optimizer(model, ("a", "b", "c", "d"), Target(max_rel_error=0.2), euler, path, budget=4, resume=False,
                     quiet=True, recipe=recipe.name)  # fmt: skip
    made.run()
    plan = Plan.load(path)
    assert plan.recipe == recipe.name and plan.rules, made.reasons
    (rule,) = plan.rules
    kept = tuple(step for step in range(STEPS) if step not in rule.steps)
    assert rule.sites == STACK and 0 in kept
    assert rule.do.kind == {"taylorseer": "forecast", "magcache": "reuse", "cachequant-schedule": "fit"}[recipe.name]
    told = [reason for reason in made.reasons if reason.startswith(f"recipe {recipe.name}: ")]
    assert len(told) == 1 and "other predictors, sites and schedules were left out" in told[0]
    shown = CliRunner().invoke(app, ["explain", str(path)]).output
    assert f"recipe {recipe.name}: " in " ".join(shown.split())

    if isinstance(rule.do, Forecast):
        assert rule.do.formula == "taylor" or rule.do.order == 1
        system = taylorseer(kept, rule.do)
    else:
        factors = {step: c[0] for step, c in rule.do.coefficients.items()} if isinstance(rule.do, Fit) else {}
        system = scaled(kept, factors)
    with torch.no_grad():
        sample, dense = euler(model, "e", 9), euler(make_model(), "e", 9)
        expected = euler(WithSystem(make_model(), system), "e", 9)
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, dense, atol=1e-4), "the plan does something"
    torch._dynamo.reset()


def restriction(name: str, steps: int = 12) -> SearchProblem:
    loop = RECIPES[name].loop
    assert loop is not None
    return restricted(random_problem(3, steps, "norms", ranges=2), loop, name)


@pytest.mark.parametrize("name", [recipe.name for recipe in LOOPS])
def test_a_search_chooses_among_the_recipes_schedules_the_best(name: str) -> None:
    problem = restriction(name)
    assert problem.schedules is not None and len(problem.allowed) > 3
    low, high = lambda_range(problem)
    costs = [(len(kept), error) for kept, _, error in problem.allowed] + [(problem.steps, 0.0)]
    each = problem.seconds_full, problem.seconds_predicted or 0.0
    for lam in np.geomspace(low, high, 7):
        found = solve(problem, float(lam))
        assert found.kept in problem.schedules or not found.rules
        assert all(rule.sites == problem.site for rule in found.rules) and len(found.rules) <= 1
        best = min(n * each[0] + (problem.steps - n) * each[1] + lam * error for n, error in costs)
        assert found.objective == pytest.approx(best, rel=1e-9)
    for count in range(least_kept(problem), problem.steps):
        found = solve_kept(problem, count)
        least = min(error for n, error in costs if n <= count)
        assert len(found.kept) <= count and found.additive_error == pytest.approx(least)
        assert not [*proposals(problem, found)], "no rollout moves a step away from the recipe's schedules"
    if least_kept(problem) > 1:
        with pytest.raises(InputError, match="no schedule of the recipe computes only"):
            solve_kept(problem, least_kept(problem) - 1)


def test_what_explains_a_plan_names_the_range_and_all_rivals() -> None:
    problem = restriction("taylorseer")
    found = solve_kept(problem, 6)
    told = {one.step: one for one in found.explanations if one.site == problem.site}
    assert told.keys() == {*range(12)}
    for step, one in told.items():
        assert (one.chosen == COMPUTE) is (step in found.kept)
        assert {"fit2", "reuse"} <= {rival.name for rival in one.rivals} and all(rival.reason for rival in one.rivals)


def with_stack(seconds_saved: float) -> Profile:
    """The toy's profile, and a range of blocks whose feature is the step's."""
    profile = toy_profile()
    ((name, network),) = profile.networks.items()
    step = network.grams["step"]
    values = step.values[:, : step.steps, : step.steps]
    site = replace(step, site=STACK, values=values, has_latents=False)
    seconds = {**network.seconds, STACK: seconds_saved}
    made = replace(network, grams={**network.grams, STACK: site}, seconds=seconds)
    return replace(profile, networks={name: made})


def test_a_profile_alone_is_searched_under_a_recipe(tmp_path: Path) -> None:
    profile = with_stack(0.8)
    searching = OfflineSearch(profile, Target(max_rel_error=0.05), recipe="taylorseer")
    found = searching()
    assert found.rules and {rule.sites for rule in found.rules} == {STACK} and found.error <= 0.05
    assert any(reason.startswith("recipe taylorseer: ") for reason in searching.reasons)
    fast = OfflineSearch(profile, Target(speedup=1.5), recipe="magcache")()
    assert fast.speedup >= 1.5 and {type(rule.do) for rule in fast.rules} == {Reuse}
    profile.save(tmp_path / "a.profile")
    arguments = ["search", str(tmp_path / "a.profile"), "-o", str(tmp_path / "plan.yaml"), "--max-rel-error", "0.05"]
    ran = CliRunner().invoke(app, [*arguments, "--recipe", "taylorseer"])
    assert ran.exit_code == 0 and Plan.load(tmp_path / "plan.yaml").rules == found.rules, ran.output
    free = OfflineSearch(profile, Target(max_rel_error=0.05), techniques=("forecast", "taylor2", "ranges"))()
    assert free.seconds <= found.seconds, "a restriction finds nothing faster"


def test_a_recipe_of_blocks_needs_a_range_that_saves_time() -> None:
    loop = RECIPES["magcache"].loop
    assert loop is not None
    with pytest.raises(InputError, match="recipe magcache predicts what a range of blocks adds, of which the profile"):
        restricted(random_problem(0, 8), loop, "magcache")
    with pytest.raises(InputError, match="which saves no time here"):
        OfflineSearch(with_stack(0.0), Target(max_rel_error=0.05), recipe="magcache")


def test_distances_in_steps_are_told_where_a_schedule_has_another_length() -> None:
    planned = (1.0, 0.7, 0.5, 0.1)
    do = Forecast(distances="steps")
    assert adapted_factors(do, 0.5, (0.7, 1.0), planned, refit=False) == pytest.approx((2, -1))
    halfway = adapted_factors(do, 0.6, (0.7, 1.0), planned, refit=False)  # half a step behind the first
    assert halfway == pytest.approx((1.5, -0.5))
    beyond = adapted_factors(do, -0.1, (0.1, 0.5), planned, refit=False)  # on the last line: half a step
    assert beyond == pytest.approx((1.5, -0.5))
    in_sigma = adapted_factors(Forecast(), 0.6, (0.7, 1.0), planned, refit=False)
    assert in_sigma == pytest.approx((4 / 3, -1 / 3))
    assert all(one > two for one, two in pairwise(planned))
