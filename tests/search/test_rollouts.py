"""Bisection and refinement by rollouts: synthetic measures, and a toy sampler that is really run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ditopt.plan import Rule
from ditopt.search import Measurement, SearchProblem, bisect_kept, bisect_lambda, refine, solve_kept
from ditopt.search.rollouts import Measure, Rollouts
from tests.search.problems import random_problem
from tests.search.toy import Toy


def monotone(steps: int, calls: list[int]) -> Measure:
    """The more steps are predicted, the faster and the worse."""

    def measure(rules: Sequence[Rule]) -> Measurement:
        predicted = len({step for rule in rules for step in rule.steps})
        calls.append(predicted)
        return Measurement(predicted / steps, steps - 0.9 * predicted)

    return measure


@pytest.mark.parametrize("start", [None, 2, 9])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.62, 1.0])
def test_the_fewest_steps_that_meet_the_target(target: float, start: int | None) -> None:
    calls: list[int] = []
    found = bisect_kept(random_problem(0, 12), monotone(12, calls), lambda m: m.error <= target, start=start)
    assert len(calls) == len(found.trials) <= 10 and len(set(calls)) == len(calls)
    wanted = min(int(12 * target), 11)
    assert 12 - (len(found.best.solution.kept) if found.best else 12) == wanted


@pytest.mark.parametrize("start", [None, 1.0, 1e3])
def test_bisecting_lambda_meets_the_target_within_its_budget(start: float | None) -> None:
    calls: list[int] = []
    seen: list[tuple[int, int]] = []
    found = bisect_lambda(
        random_problem(0, 12, ranges=2), monotone(12, calls), lambda m: m.error <= 0.6, 7,
        progress=lambda trial, done, budget: seen.append((done, budget)), start=start,
    )  # fmt: skip
    assert found.best is not None and found.best.measurement.error <= 0.6
    assert len(calls) <= 7 and seen == [(i + 1, 7) for i in range(len(calls))]
    good = [trial.measurement.seconds for trial in found.trials if trial.measurement.error <= 0.6]
    assert found.best.measurement.seconds == min(good)


def test_a_budget_of_one_is_one_rollout() -> None:
    calls: list[int] = []
    bisect_kept(random_problem(0, 12), monotone(12, calls), lambda m: m.error <= 0.5, budget=1)
    assert len(calls) == 1


def test_equal_rules_are_measured_once() -> None:
    problem = random_problem(0, 8)
    calls: list[int] = []
    rollouts = Rollouts(monotone(8, calls), 5)
    assert rollouts.trial(solve_kept(problem, 3)) is rollouts.trial(solve_kept(problem, 3))
    assert len(calls) == 1 and rollouts.left == 4


def test_refining_lowers_the_measured_error_and_keeps_the_number_of_steps(toy: Toy) -> None:
    problem = SearchProblem.from_profile(toy.profile(), sample_norm=toy.norm())
    start = solve_kept(problem, 6)
    calls: list[Sequence[Rule]] = []

    def measure(rules: Sequence[Rule]) -> Measurement:
        calls.append(rules)
        return toy.measure(rules)

    better = refine(problem, start, measure, 20)
    assert len(calls) <= 20 and len(better.kept) == 6
    assert toy.measure(better.rules).error < toy.measure(start.rules).error
    assert refine(problem, start, toy.measure, 20).rules == better.rules


def test_the_search_beats_even_spacing_on_a_real_sampler(toy: Toy) -> None:
    problem = SearchProblem.from_profile(toy.profile(), sample_norm=toy.norm())
    found = bisect_kept(problem, toy.measure, lambda m: m.error <= 0.01)
    assert found.best is not None and found.best.measurement.error <= 0.01
    assert len(found.best.solution.kept) <= 14
