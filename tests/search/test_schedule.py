"""The dynamic programme against brute force, for errors that add as squares and as norms, with and without a count."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.search import TECHNIQUES as ALL
from ditopt.search import solve, solve_kept
from ditopt.search.brute import brute_schedule
from ditopt.search.joint import account, draft_for
from ditopt.search.schedule import cheapest, cheapest_of_each_size, prediction_costs
from tests.search.problems import SEEDS, random_problem

QUICK = settings(deadline=None, max_examples=20)
ADDITIVE = st.sampled_from(["squares", "norms"])
TECHNIQUES = st.sampled_from([("reuse",), ("reuse", "forecast1"), ("reuse", "forecast"), ALL, ("fit1+latents",)])


@QUICK
@given(SEEDS, st.integers(1, 6), ADDITIVE, TECHNIQUES, st.floats(0.0, 3.0))
def test_the_programme_finds_the_optimum(
    seed: int, steps: int, additive: str, techniques: tuple[str, ...], lam: float
) -> None:
    problem = random_problem(seed, steps, additive, techniques)
    solution = solve(problem, lam, max_variants=99)
    assert solution.objective == pytest.approx(brute_schedule(problem, lam)[0], rel=1e-7)
    seconds, error = account(problem, solution.draft)
    assert solution.objective == pytest.approx(seconds + lam * error)


@QUICK
@given(SEEDS, st.integers(1, 6), ADDITIVE, TECHNIQUES)
def test_the_front_is_optimal_at_every_size(seed: int, steps: int, additive: str, techniques: tuple[str, ...]) -> None:
    problem = random_problem(seed, steps, additive, techniques)
    costs = prediction_costs(problem.table.least, np.zeros(steps), problem.price(problem.weights))
    front = cheapest_of_each_size(costs, np.zeros(steps))
    for count, schedule in enumerate(front, start=1):
        error = brute_schedule(problem, count=count)[0]
        assert schedule.objective == pytest.approx(error, rel=1e-7, abs=1e-9)
        assert len(schedule.kept) == count
        assert account(problem, draft_for(problem, schedule.kept))[1] == pytest.approx(error, rel=1e-7, abs=1e-9)


@QUICK
@given(SEEDS, ADDITIVE)
def test_a_higher_price_never_gives_more_error(seed: int, additive: str) -> None:
    problem = random_problem(seed, 9, additive)
    errors = [solve(problem, lam, max_variants=99).additive_error for lam in (0.0, 0.01, 0.1, 1.0, 10.0, 1e6)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))


def test_steps_that_ran_other_branches_do_not_predict_each_other() -> None:
    problem = dataclasses.replace(random_problem(0, 8), groups=(0, 0, 0, 0, 1, 1, 1, 1))
    solution = solve(problem, 1e-6)
    assert set(solution.kept) >= {0, 4}
    assert all(source >= 4 for choice in solution.choices["step"][4:] for source in choice.sources)
    assert solve_kept(problem, 2).kept == (0, 4)


def test_repeated_sigmas_are_safe() -> None:
    times = (1.0, 0.7, 0.7, 0.4, 0.4, 0.1, 0.1)
    problem = dataclasses.replace(random_problem(0, 7), times=times)
    assert np.isfinite(solve(problem, 0.1).predicted_error)
    assert len(solve_kept(problem, 3).kept) == 3


def test_a_schedule_of_unequal_step_costs() -> None:
    problem = random_problem(5, 7)
    kept_costs = np.array([1.0, 1, 0, 1, 1, 0, 1])
    costs = prediction_costs(problem.table.least, np.full(7, 0.2), 0.3 * problem.price(problem.weights))
    assert {2, 5} <= set(cheapest(costs, kept_costs).kept)
