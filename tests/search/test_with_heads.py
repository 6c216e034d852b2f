"""Sparse heads beside a schedule, within an error or for a saving, against all choices; and in a profile alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest

from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.offline import NO_HEADS, OfflineSearch
from ditopt.plan import Plan, Rule, parse_steps
from ditopt.plan_text import write_yaml
from ditopt.predicted import Predicted, predicted_plan
from ditopt.profile import NetworkProfile, Profile
from ditopt.search import SearchProblem, Solution, from_kept, solve_kept
from ditopt.search.site_choice import SiteCandidates
from ditopt.search.solution import SparsePart
from ditopt.search.with_heads import HeadsBeside, count_graphs, further_schedules
from ditopt.target import Target
from tests.made_profiles import toy_profile, with_network
from tests.search.test_sparse import COST, STEPS, with_attention
from tests.search.toy import Toy


@pytest.fixture(scope="module")
def network() -> NetworkProfile:
    return with_attention(Toy(steps=STEPS).profile())


PREDICTORS = ("reuse", "forecast", "fit")


def beside(network: NetworkProfile, kept: Sequence[int] | None = None, most: int = 99) -> tuple[HeadsBeside, Solution]:
    problem = SearchProblem.from_profile(network, ("reuse",))
    base = from_kept(problem, range(STEPS) if kept is None else kept)

    def allowed(plan: Solution) -> bool:
        return count_graphs(problem, plan) <= most

    return HeadsBeside(network, problem, base, {"attn": COST}, allowed), base


def every_choice(candidates: Sequence[SiteCandidates]) -> list[tuple[float, float]]:
    """Seconds saved and squared error of each."""
    found = []
    for picked in product(*(product(*((None, *head) for head in site.heads)) for site in candidates)):
        saved = error = 0.0
        for site, chosen in zip(candidates, picked, strict=True):
            taken = [each for each in chosen if each is not None]
            saved += sum(each.saved for each in taken) - (site.lost if taken else 0.0)
            error += sum(each.error for each in taken)
        found.append((saved, error))
    return found


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 1.0])
def test_within_an_error_nothing_saves_more_on_the_convex_hull(network: NetworkProfile, share: float) -> None:
    heads, _ = beside(network)
    choices = [every_choice(division) for division in heads.divisions[:2]]
    limit = share * max(error for each in choices for _, error in each)
    part = heads.within_error(limit)
    assert part is not None and part.error <= limit * (1 + 1e-9)
    best = max(saved for each in choices for saved, error in each if error <= part.error * (1 + 1e-9))
    assert part.saved >= best - 1e-9, "of what errs as little, nothing saves more"
    assert len(part.explanations) >= 3 and all(each.rivals for each in part.explanations)


def test_for_a_saving_the_choice_saves_that_and_more_cannot_be_saved(network: NetworkProfile) -> None:
    heads, base = beside(network)
    for share in (0.1, 0.5, 0.95):
        part = heads.saving(share * heads.most_saved)
        assert part is not None and part.saved >= share * heads.most_saved
        assert base.with_sparse(part).predicted_seconds == pytest.approx(base.predicted_seconds - part.saved)
    assert heads.saving(1.01 * heads.most_saved) is None
    assert heads.within_error(-1.0) is None


def test_parts_of_a_plan_replace_each_other(network: NetworkProfile) -> None:
    heads, base = beside(network, (0, 2, 4, 6))
    one, two = heads.saving(0.2 * heads.most_saved), heads.saving(0.9 * heads.most_saved)
    assert one is not None and two is not None and one.rules != two.rules
    made = base.with_sparse(one).with_sparse(two)
    assert made.rules == (*base.rules, *two.rules)
    assert made.predicted_error == pytest.approx(math.hypot(base.predicted_error, math.sqrt(two.error)))
    assert made.predicted_seconds == pytest.approx(base.predicted_seconds - two.saved)
    assert made.explanations == (*base.explanations, *two.explanations)
    assert made.with_sparse(SparsePart()).rules == base.rules


def test_heads_need_no_more_graphs_than_are_allowed(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network, ("reuse",))
    for most in (1, 2):
        heads, base = beside(network, most=most)
        part = heads.within_error(0.05 * max(error for _, error in every_choice(heads.divisions[0])))
        assert part is None or count_graphs(problem, base.with_sparse(part)) <= most
    free, base = beside(network)
    whole = free.saving(free.most_saved)
    assert whole is not None and count_graphs(problem, base.with_sparse(whole)) == 1, "sparse in all steps"


def test_steps_that_score_all_pairs_need_a_graph_of_their_own(network: NetworkProfile) -> None:
    """Heads by means and by error share one, whichever of them a step has."""
    problem = SearchProblem.from_profile(network)
    base = from_kept(problem, range(STEPS))

    def graphs(*by: tuple[str, str]) -> int:
        """Of rules for steps, with what their drafts choose blocks by."""
        rules = tuple(
            Rule(sites="attn", heads=(head,), steps=parse_steps(steps),
                 do=Sparse(pattern=pattern_text({"pattern": "draft", "keep": 0.25, "by": each})))
            for head, (steps, each) in enumerate(by)
        )  # fmt: skip
        return count_graphs(problem, base.with_sparse(SparsePart(rules, 1.0, 0.0)))

    assert graphs(("0-7", "means")) == graphs(("0-3", "means"), ("4-7", "error")) == graphs(("0-7", "mass")) == 1
    assert graphs(("0-3", "mass"), ("4-7", "error")) == graphs(("0-3", "mass"), ("0-7", "error")) == 2
    assert graphs(("2-3", "mass"), ("4-7", "error")) == 3, "and dense ones"


def test_steps_that_find_lists_and_steps_that_read_them_are_graphs_of_their_own(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network)

    def graphs(*rules: tuple[str, int | None], kept: Sequence[int] = range(STEPS)) -> int:
        """Of rules for steps, one a head, in which blocks are found in every so many."""
        made = tuple(
            Rule(sites="attn", heads=(head,), steps=parse_steps(steps), do=Sparse(pattern=pattern_text(
                {"pattern": "draft", "keep": 0.25, "by": "mass", **({} if every is None else {"refresh": every})})))
            for head, (steps, every) in enumerate(rules)
        )  # fmt: skip
        return count_graphs(problem, from_kept(problem, kept).with_sparse(SparsePart(made, 1.0, 0.0)))

    assert graphs(("0-7", 4)) == graphs(("0-7", 4), ("0-7", 4)) == 2
    assert graphs(("1-7", 4)) == 3, "and a dense one"
    assert graphs(("0-7", 2), ("0-7", 4)) == 3, "and one that does both"
    assert graphs(("0-7", 4), ("0-7", None)) == 2, "find; read beside what is found in every step"
    predicted = (0, 1, 4, 7)
    assert (
        graphs(("0-7", 4), kept=predicted) == graphs(("0-7", 2), kept=predicted) == graphs(("0-7", 99), kept=predicted)
    )


def test_further_schedules_end_with_the_whole_one() -> None:
    problem = SearchProblem.from_profile(Toy(steps=STEPS).profile())
    first = solve_kept(problem, STEPS - 1)
    found = list(further_schedules(first, STEPS, 3, lambda count: solve_kept(problem, count)))
    assert [len(each.kept) for each in found] == [STEPS - 1, STEPS]
    assert found[0] is first


def attentive(dense: float = 1.0) -> Profile:
    """The toy loop's profile with attention that takes most of a step."""
    part = with_attention(toy_profile().networks["net"], dense, scale=0.02)
    return with_network(toy_profile(), tables=part.tables, geometry=Geometry(4, 16, 16))


@pytest.mark.parametrize("target", [Target(max_rel_error=0.03), Target(speedup=2.0)])
def test_a_search_in_a_profile_alone_takes_heads_where_they_pay(target: Target) -> None:
    profile = attentive()
    searching = OfflineSearch(profile, target, techniques=(*PREDICTORS, "sparse"))
    found = searching()
    without = OfflineSearch(profile, target, techniques=PREDICTORS)()
    heads = [rule for rule in found.rules if isinstance(rule.do, Sparse)]
    assert heads, searching.reasons
    if target.speedup is None:
        assert found.seconds < without.seconds and found.error <= 0.03
    else:
        assert found.error < without.error and found.speedup >= 2.0
    plan: Plan = predicted_plan(searching.template, profile, target, found)
    assert plan.tokens == {"net": Geometry(4, 16, 16)}
    assert Plan.parse(write_yaml(plan.to_data())).rules == plan.rules


def test_a_profile_without_tables_of_heads_says_so() -> None:
    searching = OfflineSearch(toy_profile(), Target(max_rel_error=0.05))
    found: Predicted = searching()
    assert NO_HEADS in searching.reasons
    assert not any(isinstance(rule.do, Sparse) for rule in found.rules)
    quiet = OfflineSearch(toy_profile(), Target(max_rel_error=0.05), techniques=("reuse",))
    quiet()
    assert NO_HEADS not in quiet.reasons
