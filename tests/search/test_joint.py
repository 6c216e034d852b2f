"""Nested ranges under one lambda, the limit on variants, readable rules and reasons."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.decisions import Dense
from ditopt.errors import InputError
from ditopt.plan import Rule
from ditopt.profile import FeatureGram, NetworkProfile
from ditopt.search import CANDIDATES, SearchProblem, least_kept, solve, solve_kept
from ditopt.search.brute import brute_joint
from ditopt.search.joint import best_disjoint
from ditopt.search.solution import combined_steps
from ditopt.sites import STEP
from tests.search.problems import SEEDS, random_problem

QUICK = settings(deadline=None, max_examples=20)


@QUICK
@given(SEEDS, st.sampled_from(["squares", "norms"]), st.sampled_from([0.03, 0.3, 3.0]))
def test_the_joint_search_stays_close_to_brute_force(seed: int, additive: str, lam: float) -> None:
    problem = random_problem(seed, 5, additive, ranges=2)
    best, _ = brute_joint(problem, lam)
    joint = solve(problem, lam, max_variants=99)
    whole_steps = solve(dataclasses.replace(problem, ranges={}), lam, max_variants=99)
    assert joint.objective >= best - 1e-9
    assert joint.objective <= whole_steps.objective + 1e-9
    assert joint.objective <= 1.15 * best + 1e-9


@QUICK
@given(SEEDS, st.integers(1, 9), st.sampled_from([0.03, 0.3, 3.0]))
def test_the_limit_on_variants_is_honoured(seed: int, limit: int, lam: float) -> None:
    problem = random_problem(seed, 9, ranges=3)
    solution = solve(problem, lam, max_variants=limit)
    assert solution.variants <= limit
    assert solution.objective >= solve(problem, lam, max_variants=99).objective - 1e-9


def test_ranges_in_use_never_overlap() -> None:
    problem = random_problem(0, 6, ranges=4)
    assert [(r.first[1], r.last[1]) for r in problem.ranges.values()] == [(0, 1), (2, 4), (4, 5), (6, 8)]
    gains = dict(zip(problem.ranges, (1.0, 2.0, 1.5, 1.0), strict=True))
    assert best_disjoint(problem, gains) == ["blocks.0..1", "blocks.2..4", "blocks.6..8"]


def test_rules_cover_what_is_predicted_and_reasons_cover_the_rest() -> None:
    problem = random_problem(1, 9, ranges=2)
    solution = solve(problem, 0.1)
    steps = [step for rule in solution.rules if rule.sites == "step" for step in rule.steps]
    assert sorted([*steps, *solution.kept]) == list(range(9))
    assert len({(rule.sites, str(rule.do)) for rule in solution.rules}) == len(solution.rules)
    for explanation in solution.explanations:
        names = {explanation.chosen, *(rival.name for rival in explanation.rivals)}
        assert all(rival.reason for rival in explanation.rivals)
        if explanation.step is not None:
            assert names == {"compute", *(candidate.name for candidate in CANDIDATES)}
    by_step = {e.step: e for e in solution.explanations if e.site == "step"}
    assert set(by_step) == set(range(9))
    assert any("needs 1 computed step before it" in rival.reason for rival in by_step[0].rivals)


@QUICK
@given(SEEDS)
def test_no_rival_of_the_optimum_has_a_better_objective(seed: int) -> None:
    solution = solve(random_problem(seed, 8), 0.1, max_variants=99)
    for explanation in solution.explanations:
        assert all(rival.objective >= explanation.objective - 1e-9 for rival in explanation.rivals)


def test_a_share_of_second_order_is_a_rule_a_reason_and_a_graph_more() -> None:
    problem = random_problem(1, 9)
    plain = solve_kept(problem, 4)
    finer = solve_kept(dataclasses.replace(problem, second_order=0.25), 4)
    assert (finer.kept, finer.rules[1:]) == (plain.kept, plain.rules)
    led = tuple(step for step in finer.kept[1:] if step < 8)
    assert finer.rules[0] == Rule(sites=STEP, steps=led, do=Dense(second_order=0.25))
    assert plain.variants < finer.variants <= plain.variants + 2
    for limit in (4, 5):  # computing every step takes up to four
        assert solve_kept(dataclasses.replace(problem, second_order=0.25), 4, limit).variants <= limit
    (told,) = (each for each in finer.explanations if each.step is None)
    assert told.chosen == "0.25 of second order" and told.rivals[0].name == "outputs as computed"


def test_steps_of_other_branches_than_the_computed_step_before_have_no_share() -> None:
    problem = dataclasses.replace(random_problem(1, 6), second_order=0.5, groups=(0, 0, 1, 1, 0, 0))
    assert set(combined_steps(problem, range(6))) == {1, 3}
    assert set(combined_steps(problem, (0, 1, 3, 4))) == {1}
    assert not combined_steps(dataclasses.replace(problem, second_order=None), range(6))


@pytest.mark.parametrize("count", [1, 4, 9])
def test_exactly_so_many_steps_are_kept(count: int) -> None:
    solution = solve_kept(random_problem(2, 9), count)
    assert len(solution.kept) == count and solution.variants <= 8
    assert solution.predicted_seconds == pytest.approx(count + 0.1 * (9 - count))
    reasons = [rival.reason for explanation in solution.explanations for rival in explanation.rivals]
    assert any("let all steps be computed" in reason for reason in reasons) == (count == 9)
    assert any("better spent here" in reason for reason in reasons) == (count == 4)


def test_what_cannot_be_solved_is_named() -> None:
    problem = random_problem(0, 5)
    with pytest.raises(InputError, match="6 kept steps are asked for; choose 1 to 5"):
        solve_kept(problem, 6)
    with pytest.raises(InputError, match="lam is -1"):
        solve(problem, -1.0)
    with pytest.raises(InputError, match="'fancy'"):
        solve(random_problem(0, 5, techniques=("fancy",)), 1.0)


def test_a_profile_becomes_a_problem() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 12, 30))
    present = np.array([[True] * 4, [True, True, False, False]])
    rows[:, 6:8] = 0
    values, branches = rows @ rows.transpose(0, 2, 1), ("cond", "uncond")
    grams = {name: FeatureGram(name, 4, branches, values[:, :8, :8], present) for name in ("blocks.0..1", "blocks.2")}
    grams["step"] = FeatureGram("step", 4, branches, values, present, has_latents=True)
    seconds = {"full": 1.0, "predicted": 0.1, "blocks.0..1": 0.3}
    profile = NetworkProfile((9, 8, 7, 6), (0.9, 0.8, 0.7, 0.6), (0.1,) * 4, (1.0,) * 4, (4.0, -3.0), grams, seconds)
    problem = SearchProblem.from_profile(profile, ("reuse",))
    assert list(problem.ranges) == ["blocks.0..1"]
    assert problem.groups == (0, 0, 1, 1)
    guided = 4 * rows[0, 0] - 3 * rows[0, 4]
    assert problem.gram[0, 0, 2] == pytest.approx(guided @ rows[0, 2])
    with pytest.raises(InputError, match="no entry 'full'"):
        SearchProblem.from_profile(NetworkProfile((9,), (0.9,), (0.1,), (1.0,), (1.0,), grams, {}))


@pytest.mark.parametrize(
    ("techniques", "least"), [(("reuse",), 1), (("forecast",), 2), (("fit2",), 2), (("forecast2",), 3), (("fit3",), 3)]
)
def test_the_fewest_steps_are_as_many_as_the_shortest_history(techniques: tuple[str, ...], least: int) -> None:
    problem = random_problem(4, 9, techniques=techniques)
    assert least_kept(problem) == least == len(solve_kept(problem, least).kept)
    if least > 1:
        with pytest.raises(InputError, match="no schedule computes only"):
            solve_kept(problem, least - 1)
