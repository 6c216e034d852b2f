"""The search in a profile alone: what it predicts meets the target, and it is the search's own plan at that price."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditopt.decisions import Dense, Fit
from ditopt.errors import InputError, ProfileError
from ditopt.offline import NO_DTYPE, NO_HEADS, NO_SECOND_ORDER, NOT_REFITTED, UNVERIFIED, OfflineSearch
from ditopt.plan import Plan
from ditopt.predicted import (
    Predicted,
    predicted_plan,
    psnr_of,
    psnr_to_relative_error,
    relative_error_to_psnr,
    write_predicted,
)
from ditopt.profile import FeatureGram, Profile
from ditopt.quality import CAP_DB, psnr, relative_l2
from ditopt.report.explained import Explained
from ditopt.search import solve, solve_kept
from ditopt.search.brute import brute_schedule
from ditopt.sites import STEP
from ditopt.target import Target
from tests.made_profiles import made_plan, toy_profile, with_network


def search(profile: Profile, target: Target, **settings: Any) -> tuple[OfflineSearch, Predicted]:
    searching = OfflineSearch(profile, target, **settings)
    return searching, searching()


@cache
def with_ranges() -> Profile:
    """The toy's profile with two block ranges that change slowly, one inside the other."""
    part = toy_profile().networks["net"]
    rng = np.random.default_rng(3)
    grams, seconds = dict(part.grams), dict(part.seconds)
    for name, saved in (("blocks.1..4", 0.4), ("blocks.2..3", 0.2)):
        rows = rng.normal(size=(6, 1, 24)) + 0.02 * np.cumsum(rng.normal(size=(6, 12, 24)), axis=1)
        grams[name] = FeatureGram(name, 12, ("cond",), rows @ rows.transpose(0, 2, 1), part.grams[STEP].present)
        seconds[name] = saved
    weights = dict.fromkeys(("blocks.1..4", "blocks.2..3"), (0.01,) * 12)
    return with_network(toy_profile(), grams=grams, seconds=seconds, range_weights=weights)


@cache
def cut() -> Profile:
    """As a profile of a network with graph breaks: whole steps cannot be predicted."""
    part = with_ranges().networks["net"]
    seconds = {key: value for key, value in part.seconds.items() if key == "full" or key.startswith("blocks")}
    return with_network(with_ranges(), seconds=seconds)


def test_relative_error_and_psnr_are_those_of_samples() -> None:
    torch = pytest.importorskip("torch")
    reference = torch.linspace(-2, 3, 1000, dtype=torch.float64).reshape(10, 100)
    sample = reference + 0.01 * torch.sin(torch.arange(1000.0).reshape(10, 100))
    norm, error = float(torch.linalg.vector_norm(reference)), relative_l2(sample, reference)
    assert relative_error_to_psnr(error, norm, 5.0, 1000) == pytest.approx(psnr(sample, reference))
    assert relative_error_to_psnr(0.0, norm, 5.0, 1000) == CAP_DB
    assert relative_error_to_psnr(1e-30, norm, 5.0, 1000) == CAP_DB
    assert psnr_of(replace(toy_profile(), sample={}), 0.1) is None


@given(st.floats(1.0, 100.0), st.floats(0.1, 1e4), st.floats(0.1, 10.0), st.integers(1, 10**8))
def test_psnr_turns_back_into_the_relative_error(decibels: float, norm: float, peak: float, numel: int) -> None:
    error = psnr_to_relative_error(decibels, norm, peak, numel)
    assert relative_error_to_psnr(error, norm, peak, numel) == pytest.approx(decibels)


TARGETS = (
    Target(max_rel_error=0.02),
    Target(max_rel_error=0.002),
    Target(min_psnr=36.0),
    Target(min_psnr=55.0),
    Target(speedup=2.5),
    Target(speedup=1.5),
    Target(min_psnr=30.0, speedup=2.0),
)


@pytest.mark.parametrize("profile", [toy_profile, with_ranges, cut], ids=["steps", "ranges", "cut"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.to_data()))
def test_the_plan_is_the_searchs_own_and_meets_the_target(profile: Any, target: Target) -> None:
    searching, found = search(profile(), target)
    assert found.rules
    (solution,) = found.solutions.values()
    (problem,) = searching.problems.values()
    if solution.lam is not None:
        assert solution.rules == solve(problem, solution.lam, 8).rules
    elif len(solution.kept) < problem.steps:
        assert solution.rules == solve_kept(problem, len(solution.kept), 8).rules
    assert solution.variants <= 8
    if target.max_rel_error is not None:
        assert found.error <= target.max_rel_error
    if target.min_psnr is not None:
        reached = psnr_of(profile(), found.error)
        assert reached is not None and reached >= target.min_psnr - 1e-9
    if target.speedup is not None and not searching.missed:
        assert found.speedup >= target.speedup * (1 - 1e-9)
    assert found.seconds < found.dense_seconds == pytest.approx(12.0)


def test_the_exact_level_is_measured_and_not_searched() -> None:
    with pytest.raises(InputError, match="use `ditopt optimize --quality exact`"):
        search(toy_profile(), Target(exact=True))


def test_ranges_are_used_where_whole_steps_cannot_be_predicted() -> None:
    _, found = search(cut(), Target(max_rel_error=0.02))
    assert {rule.sites for rule in found.rules} <= {"blocks.1..4", "blocks.2..3"} and found.evaluations == 12
    _, plain = search(cut(), Target(max_rel_error=0.02), techniques=("reuse", "forecast", "fit"))
    assert not plain.rules and plain.error == 0


@pytest.mark.parametrize("profile", [toy_profile, with_ranges, cut], ids=["steps", "ranges", "cut"])
def test_a_stricter_target_gets_no_cheaper_plan(profile: Any) -> None:
    limits = np.geomspace(0.3, 1e-6, 25)
    found = [search(profile(), Target(max_rel_error=float(limit)))[1] for limit in limits]
    assert all(one.error <= limit for one, limit in zip(found, limits, strict=True))
    seconds = [one.seconds for one in found]
    assert all(strict >= loose - 1e-9 for loose, strict in pairwise(seconds)), seconds
    assert seconds[-1] > seconds[0]


def test_more_speed_costs_no_less_error() -> None:
    found = [search(toy_profile(), Target(speedup=speed))[1] for speed in (1.2, 1.5, 2.0, 3.0, 5.0)]
    assert all(fast.error >= slow.error for slow, fast in pairwise(found))
    assert all(fast.seconds < slow.seconds for slow, fast in pairwise(found))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [0.1, 0.02, 0.004, 0.0008])
def test_no_short_schedule_that_meets_the_target_computes_less(seed: int, limit: float) -> None:
    """All schedules of six steps are tried."""
    profile = toy_profile(steps=6, seed=seed)
    searching, found = search(profile, Target(max_rel_error=limit), techniques=("reuse", "forecast"))
    (problem,) = searching.problems.values()
    sums = {count: brute_schedule(problem, count=count)[0] for count in range(1, 7)}
    fewest = min(count for count, error in sums.items() if error <= limit)
    assert found.evaluations <= fewest, "the sum of the steps' errors bounds what they add up to"


def test_simplified_steps_are_taken_and_other_dtypes_are_not() -> None:
    searching, found = search(toy_profile(), Target(max_rel_error=0.01))
    assert found.rules[0].do == Dense(simplify=True)
    assert not any(isinstance(rule.do, Dense) and (rule.do.dtype or rule.do.second_order) for rule in found.rules)
    assert searching.reasons == [UNVERIFIED, NOT_REFITTED, NO_DTYPE, NO_SECOND_ORDER, NO_HEADS]
    searching, found = search(toy_profile(), Target(max_rel_error=0.01), techniques=("reuse", "forecast"))
    assert not any(isinstance(rule.do, Dense | Fit) for rule in found.rules)
    assert searching.reasons == [UNVERIFIED]


def test_where_nothing_is_good_enough_the_plan_has_no_rules_but_the_form() -> None:
    target = Target(max_rel_error=1e-12)
    searching, found = search(toy_profile(), target)
    assert [rule.do for rule in found.rules] == [Dense(simplify=True)] and not searching.missed
    searching, found = search(toy_profile(), target, techniques=("reuse",))
    assert not found.rules and found.error == 0 and found.speedup == pytest.approx(1.0)
    assert searching.missed == ["no plan is predicted to be faster at the target: this one has no rules"]
    assert searching.missed[0] in searching.reasons


def test_a_speed_that_is_not_to_be_had_is_told() -> None:
    searching, found = search(toy_profile(), Target(speedup=1000.0))
    assert found.evaluations == 1 and f"asked for 1000x, predicted are {found.speedup:.2f}x" in searching.missed
    searching, found = search(toy_profile(), Target(speedup=6.0, min_psnr=60.0))
    assert "short of 60 dB: the fastest plan that is predicted to have it was taken" in searching.missed[0]
    assert "asked for 6x" in searching.missed[1]
    reached = psnr_of(toy_profile(), found.error)
    assert reached is not None and reached >= 60


def test_networks_share_one_price_of_error() -> None:
    profile = toy_profile(networks=("high", "low"))
    searching, found = search(profile, Target(max_rel_error=0.01))
    assert found.error <= 0.01 and found.dense_seconds == pytest.approx(24.0)
    assert found.error == pytest.approx(math.hypot(*(each.predicted_error for each in found.solutions.values())))
    assert {rule.network for rule in found.rules} == {"high", "low"}
    (lam,) = {each.lam for each in found.solutions.values()}
    assert lam is not None
    for name, solution in found.solutions.items():
        assert solution.rules == solve(searching.problems[name], lam, 8).rules
    plan = predicted_plan(searching.template, profile, searching.target, found)
    assert {name: len(plan.kept_steps(name)) for name in ("high", "low")} == {
        name: len(solution.kept) for name, solution in found.solutions.items()
    }


def test_the_most_graphs_are_held() -> None:
    for limit in (1, 2, 3):
        _, found = search(with_ranges(), Target(max_rel_error=0.05), max_variants=limit)
        assert found.solutions["net"].variants <= limit


def test_one_step_has_nothing_to_predict_from() -> None:
    part = toy_profile().networks["net"]
    gram = part.grams[STEP]
    one = replace(gram, steps=1, values=gram.values[:, [0, 12]][:, :, [0, 12]], present=gram.present[:, :1])
    short = {key: getattr(part, key)[:1] for key in ("timesteps", "sigmas", "step_widths", "sensitivity")}
    profile = with_network(toy_profile(), grams={STEP: one}, seconds={"full": 1.0, "predicted": 0.1}, **short)
    profile = replace(profile, plan=made_plan({"net": profile.networks["net"].timesteps}))
    for target in (Target(max_rel_error=0.1), Target(speedup=2.0)):
        searching, found = search(profile, target)
        assert not found.rules and any("no rules" in reason for reason in searching.missed)


def test_what_a_profile_must_have_is_told() -> None:
    target = Target(min_psnr=36.0)
    with pytest.raises(ProfileError, match="does not say what was profiled"):
        OfflineSearch(replace(toy_profile(), plan={}), target)
    with pytest.raises(ProfileError, match=r"sample\.peak.*give max_rel_error instead"):
        OfflineSearch(replace(toy_profile(), sample={}), target)
    with pytest.raises(ProfileError, match="network net: the profile's seconds have no entry 'full'"):
        OfflineSearch(with_network(toy_profile(), seconds={}), target)
    with pytest.raises(ProfileError, match="network net: the profile's grams have no entry 'step'"):
        OfflineSearch(with_network(toy_profile(), grams={}), target)
    with pytest.raises(InputError, match="magic"):
        OfflineSearch(toy_profile(), target, ("magic",))
    with pytest.raises(InputError, match="max_variants is 0"):
        OfflineSearch(toy_profile(), target, max_variants=0)


def test_the_files_say_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    searching, found = search(with_ranges(), Target(min_psnr=50.0))
    plan = predicted_plan(searching.template, with_ranges(), searching.target, found)
    write_predicted(tmp_path / "plan.yaml", plan, with_ranges(), found, searching.reasons)
    read = Plan.load(tmp_path / "plan.yaml")
    assert read.rules == found.rules and not read.measured and read.target == {"min_psnr": 50.0}
    assert read.predicted["relative_error"] == pytest.approx(found.error, abs=1e-5)
    assert read.predicted["seconds"] == pytest.approx(found.seconds, abs=1e-3)
    assert read.predicted["psnr"] >= 50 and read.predicted["speedup"] == pytest.approx(found.speedup, abs=0.01)
    explained = Explained.load(tmp_path / "plan.explain.json")
    assert explained.reasons[0] == UNVERIFIED and explained.reasons[-1] == "attention: not measured"
    assert not explained.trials and not explained.table
    steps = [one.step for one in explained.explanations["net"] if one.site == STEP and one.step is not None]
    assert steps == list(range(12))
    assert len(explained.profile["net"].similarity) == 12
    assert not (tmp_path / "cache").exists(), "what is not verified is not kept for later compilations"
