"""Sparse heads under a price of error: candidates from a profile, and choices against all there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditopt.cost_models.sparse import TIMED, SparseCost
from ditopt.decisions import Dense, Sparse, pattern_text
from ditopt.measures import Measure, Table
from ditopt.plan import Plan
from ditopt.profile import NetworkProfile
from ditopt.search import SearchProblem
from ditopt.search.heads import SKIP, HeadPattern, heads_error
from ditopt.search.joint import dense, draft_for
from ditopt.search.site_choice import HeadCandidate, SiteCandidates, needs_of, not_worse
from ditopt.search.sparse import (
    choose,
    head_candidates,
    planned_saving,
    site_costs,
    sparse_part,
    sparse_rules,
    totals,
)
from tests.made_profiles import made_plan
from tests.search.toy import Toy

BAND, SPATIAL = '{"pattern": "band", "width": 2.0}', '{"frames": 0, "pattern": "spatial"}'
DRAFT, KEPT = (pattern_text({"pattern": "draft", "keep": 0.5, "by": "mass", **more}) for more in ({}, {"refresh": 4}))
INT8_DENSE, INT8_SPATIAL = INT8_SCORES = (
    '{"pattern": "dense", "qk": "int8"}',
    '{"frames": 0, "pattern": "spatial", "qk": "int8"}',
)
STEPS, HEADS = 8, 3
COST = SparseCost(2.0, 0.1, 0.8, shared={"means": 0.01, "mass": 1.0, "error": 0.03, "pooled": 0.02, "kept": 0.005})
"""What the table of seconds has."""


def with_attention(found: NetworkProfile, dense: float = 2.0, scale: float = 1.0) -> NetworkProfile:
    """A profile of six prompts with an attention site of three heads and three candidates: skip, band, spatial.

    Dense attention takes ``dense`` seconds a step; errors of heads are multiplied by ``scale``. Int8 scores were not
    timed.
    """
    steps = len(found.timesteps)
    error = np.broadcast_to(
        np.array([[0.3, 0.1, 0.05], [0.05, 0.2, 0.1], [0.4, 0.4, 0.4]]), (6, steps, 1, HEADS, 3)
    ).copy()
    along = ("prompt", "step", "branch")
    patterns = Table(
        {
            "error": Measure((*along, "head", "candidate"), scale * error),
            "output": Measure(along, np.full((6, steps, 1), 3.0)),
            "density": Measure(("candidate",), np.array([0.0, 0.25, 0.5])),
        },
        {"candidate": (SKIP, BAND, SPATIAL)},
        {"elements": 16},
    )
    growth = Measure(("anchor", "error"), np.full((2, 2), 2.0))
    found.tables["patterns"] = {"attn": patterns}
    found.tables["sensitivity"] = {
        "attn": Table({"to_output": growth}, {"anchor": (0, 4), "error": ("head", "pattern")})
    }
    densities = (0.125, 0.25, 0.5, 1.0)
    seconds = np.array([[dense * (0.05 + 1.25 * density) for density in densities]])
    latency = {
        "dense": Measure(("form",), np.array([dense])),
        "sparse": Measure(("form", "density"), seconds),
        "shared": Measure(
            ("form", "need"), np.array([[0.01, 1.0, 0.03, 0.02, np.nan, 0.005, np.nan, 0.01, 0.1]]), True
        ),
    }
    facts = {"queries": 1024, "block_queries": 64, "profiled": 64}
    found.tables["latency"] = {"attn": Table(latency, {"form": ("full",), "density": densities, "need": TIMED}, facts)}
    return found


@pytest.fixture(scope="module")
def network() -> NetworkProfile:
    return with_attention(Toy(steps=STEPS).profile())


def candidates(network: NetworkProfile, *ranges: range) -> tuple[SiteCandidates, ...]:
    problem = SearchProblem.from_profile(network)
    return head_candidates(network, problem, dense(problem), {"attn": COST}, ranges)


def test_candidates_have_the_errors_of_heads_and_the_seconds_of_their_density(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network)
    early, late = candidates(network, range(2), range(2, STEPS))
    assert [[each.choice.candidate for each in of_head] for of_head in early.heads] == [
        [SPATIAL, BAND, SKIP],
        [SKIP],
        [SKIP],
    ], "what saves less with a larger error is left out"
    for found, steps in ((early, 2), (late, 6)):
        assert found.lost == pytest.approx((0.1 + 2.0 / 0.8 - 2.0) * steps)
        spatial, _, skip = found.heads[0]
        assert (spatial.saved, skip.saved) == pytest.approx((2.0 / 0.8 / 3 * 0.5 * steps, 2.0 / 0.8 / 3 * steps))
        assert spatial.error == pytest.approx(heads_error(network, problem, dense(problem), [spatial.choice]) ** 2)
    both = [early.heads[0][0].choice, late.heads[1][0].choice]
    together = heads_error(network, problem, dense(problem), both) ** 2
    assert together == pytest.approx(early.heads[0][0].error + late.heads[1][0].error), "squares of heads add"


def test_steps_that_are_predicted_save_nothing_and_err_nothing(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network, ("reuse",))
    draft = draft_for(problem, (0, 1, 4), ["reuse"])
    found = head_candidates(network, problem, draft, {"attn": COST}, [range(2, 4), range(4, STEPS)])
    assert [site.heads[0][0].choice.steps for site in found] == [(4,)]


numbers = st.floats(0.0, 4.0)


shared = st.sampled_from(("means", "error", "pooled"))
every_need = st.frozensets(st.tuples(shared, st.sampled_from((1, 4))), max_size=2)


@st.composite
def sites(draw: st.DrawFn) -> SiteCandidates:
    heads = []
    for head in range(draw(st.integers(1, 3))):
        drawn = draw(st.lists(st.tuples(numbers, numbers, every_need), max_size=3))
        heads.append(
            tuple(HeadCandidate(HeadPattern("a", head, str(at), (0,)), *each) for at, each in enumerate(drawn))
        )
    prices = draw(st.dictionaries(shared, st.floats(0.0, 3.0)))
    return SiteCandidates(tuple(heads), draw(st.floats(-2.0, 4.0)), prices=prices)


def objective(chosen: tuple[HeadCandidate | None, ...], site: SiteCandidates, price: float) -> float:
    """Seconds and priced error of a site, less what it takes dense; what heads need is paid once, however many do."""
    taken = [each for each in chosen if each is not None]
    shared = 0.0
    for name in {name for each in taken for name, _ in each.needs}:
        often = min(every for each in taken for other, every in each.needs if other == name)
        shared += site.prices.get(name, 0.0) / often
    return site.lost + shared - sum(each.saved - price * each.error for each in taken) if taken else 0.0


@given(st.lists(sites(), min_size=1, max_size=2), st.floats(0.0, 5.0))
def test_the_choice_is_the_best_of_all(found: list[SiteCandidates], price: float) -> None:
    pruned = [replace(site, heads=tuple(map(not_worse, site.heads))) for site in found]
    chosen = choose(pruned, price)
    total = 0.0
    at = 0
    for site, kept in zip(found, pruned, strict=True):
        of_site = chosen[at : at + len(kept.chosen(price))]
        at += len(of_site)
        assert len({each.choice.head for each in of_site}) == len(of_site), "one pattern a head"
        total += objective(of_site, site, price)
    best = sum(
        min(objective(combined, site, price) for combined in product(*((None, *of_head) for of_head in site.heads)))
        for site in found
    )
    assert total == pytest.approx(best, abs=1e-9)
    saved, error = totals(pruned, price)
    assert saved - price * error == pytest.approx(-total, abs=1e-9)


def test_a_head_alone_does_not_pay_for_what_two_would() -> None:
    """Finding blocks takes 1.5 seconds: for one head that saves 1 it is not worth it, for two it is."""

    def head(number: int, *candidates: tuple[str, float, frozenset[tuple[str, int]]]) -> tuple[HeadCandidate, ...]:
        found = (
            HeadCandidate(HeadPattern("a", number, name, (0,)), saved, 0.0, needs) for name, saved, needs in candidates
        )
        return tuple(found)

    finds = (DRAFT, 1.0, frozenset({("mass", 1)}))
    one = SiteCandidates((head(0, finds), head(1, (BAND, 0.4, frozenset()))), 0.1, prices={"mass": 1.5})
    assert [each.choice.candidate for each in one.chosen(0.0)] == [BAND]
    two = replace(one, heads=(head(0, finds), head(1, (BAND, 0.4, frozenset()), finds)))
    assert [each.choice.candidate for each in two.chosen(0.0)] == [DRAFT, DRAFT]
    assert two.paid(two.chosen(0.0)) == pytest.approx(1.6)
    seldom = replace(one, heads=(head(0, (KEPT, 1.0, frozenset({("mass", 4)}))), one.heads[1]))
    assert [each.choice.candidate for each in seldom.chosen(0.0)] == [KEPT, BAND], "a quarter of it each step"
    assert [each.choice.candidate for each in replace(seldom, prices={"mass": 2.2}).chosen(0.0)] == [KEPT, BAND]
    short = replace(seldom, prices={"mass": 2.2}, steps=2)
    assert [each.choice.candidate for each in short.chosen(0.0)] == [BAND], "and half of it where there are two"
    (told, _) = sparse_part([seldom], 0.0).explanations
    assert told.chosen == f"head 0 in steps 0: {KEPT}" and '"refresh": 4' in told.chosen
    alike = replace(two, heads=(head(0, finds), head(1, finds)), alike=True)
    assert len(alike.chosen(0.0)) == 2 and not replace(alike, prices={"mass": 2.0}).chosen(0.0)
    (told, _) = sparse_part([one], 0.0).explanations
    (why,) = (rival.reason for rival in told.rivals if rival.name == DRAFT)
    assert why == "saves 1e+03 ms of a generation, but would cost the site 1.5e+03 ms more for mass"


def test_what_heads_need_is_told_by_their_settings() -> None:
    def needs(**settings: object) -> frozenset[tuple[str, int]]:
        return needs_of(Sparse(pattern=pattern_text(settings)))

    assert needs(pattern="band", width=2.0) == needs_of(Dense()) == frozenset()
    assert needs(pattern="draft", keep=0.5) == {("means", 1)}
    assert needs(pattern="draft", keep=0.5, by="mass", refresh=4) == {("mass", 4)}
    assert needs(pattern="skip", rest="pooled") == needs(pattern="skip", rest={"pooled": 16}) == {("pooled", 1)}
    assert needs(pattern="dense", qk="int8") == {("int8", 1)}
    assert needs(pattern="draft", keep=0.5, by="mass", refresh=4, qk="int8") == {("mass", 4), ("int8", 1)}
    assert needs(pattern="draft", mass=0.5, order="clusters") == {("means", 1), ("ordered", 1)}
    assert needs(pattern="band", width=2.0, order="tiles") == {("ordered", 1)}
    both = {("error", 1), ("pooled", 1), ("taylor", 1)}
    assert needs(pattern="draft", keep=0.5, by="error", rest={"taylor": 16}) == both
    assert needs(pattern="skip", rest={"kept": "merge", "refresh": 3}) == {("kept", 1), ("others", 3)}


def test_heads_pay_for_clusters_one_by_one_and_the_site_for_an_order_once(network: NetworkProfile) -> None:
    table = network.tables["patterns"]["attn"]
    clusters = pattern_text({"pattern": "draft", "mass": 0.5, "order": "clusters"})
    plain = pattern_text({"pattern": "draft", "mass": 0.5})
    measures = {**table.measures, "density": Measure(("candidate",), np.array([0.25, 0.25, 0.5]))}
    labels = {"candidate": (plain, clusters, SPATIAL)}
    tables = {**network.tables, "patterns": {"attn": replace(table, measures=measures, labels=labels)}}
    changed = replace(network, tables=tables)
    costs = site_costs(changed, "full").costs
    assert costs["attn"].shared["clusters"] == 0.1 and costs["attn"].shared["ordered"] == 0.01

    def saved(pattern: str, *heads: int) -> float:
        rules = sparse_rules([HeadPattern("attn", head, pattern, tuple(range(STEPS))) for head in heads])
        plan = Plan.model_validate(made_plan({"net": changed.timesteps})).model_copy(update={"rules": rules})
        return planned_saving(plan, "net", changed, costs, range(STEPS))

    for heads in ((0,), (0, 1), (0, 1, 2)):
        dearer = saved(plain, *heads) - saved(clusters, *heads)
        assert dearer == pytest.approx(STEPS * (0.01 + 0.1 * len(heads) / HEADS))
    problem = SearchProblem.from_profile(changed)
    (site,) = head_candidates(changed, problem, dense(problem), costs, [range(STEPS)])
    (offered,) = {each.saved for of_head in site.heads for each in of_head if each.choice.candidate == clusters}
    assert offered - site.paid([]) - site.seconds(needs_of(Sparse(pattern=clusters))) == pytest.approx(
        saved(clusters, 0)
    )


def test_budgets_that_are_not_alike_are_paid_for_and_may_be_worth_nothing(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network)

    def sites(per_spread: float) -> tuple[SiteCandidates, ...]:
        cost = {"attn": replace(COST, per_spread=per_spread)}
        return head_candidates(network, problem, dense(problem), cost, [range(STEPS)])

    price = 4.0
    even, uneven = (sparse_part(sites(per_spread), price) for per_spread in (0.0, 0.3))
    assert even.rules == uneven.rules and even.rules
    plan = Plan.model_validate(made_plan({"net": network.timesteps})).model_copy(update={"rules": uneven.rules})
    told = planned_saving(plan, "net", network, {"attn": replace(COST, per_spread=0.3)}, range(STEPS))
    assert uneven.saved == pytest.approx(told) and uneven.saved < even.saved
    ((dear,),) = (sites(50.0),)
    assert not dear.chosen(price), "what the heads save together is less than what their budgets cost"


def test_heads_that_were_timed_with_budgets_not_alike_have_their_price(network: NetworkProfile) -> None:
    timed = network.tables["latency"]["attn"]
    budgets = np.array([1.0, 0.25, 0.25])
    even = 2.0 * (0.05 + 1.25 * 0.5)
    measures = {
        **timed.measures,
        "uneven": Measure(("form",), np.array([even + 0.2]), True),
        "budget": Measure(("head",), budgets),
    }
    changed = replace(network, tables={**network.tables, "latency": {"attn": replace(timed, measures=measures)}})
    cost = site_costs(changed, "full").costs["attn"]
    assert cost.seconds(0.5) + cost.uneven_seconds(budgets.tolist()) == pytest.approx(even + 0.2)
    measures["uneven"] = Measure(("form",), np.array([np.nan]), True)
    unknown = replace(network, tables={**network.tables, "latency": {"attn": replace(timed, measures=measures)}})
    assert site_costs(unknown, "full").costs["attn"].per_spread == 0.0


def with_int8(network: NetworkProfile, seconds: float, error: float = 0.004) -> NetworkProfile:
    """``with_attention`` and int8 scores: of all blocks and of ``SPATIAL``, which err so much more, in quadrature.

    Heads that all have them take so many ``seconds`` a step at all blocks, and a tenth of a second at none; what is
    done to the keys is 0.02 of it.
    """
    table, timed = network.tables["patterns"]["attn"], network.tables["latency"]["attn"]
    plain = table["error"].values
    errors = np.concatenate([plain, np.full_like(plain[..., :1], error), np.hypot(plain[..., 2:], error)], -1)
    measures = {**table.measures, "error": Measure(table["error"].axes, errors)}
    measures["density"] = Measure(("candidate",), np.append(table["density"].values, [1.0, 0.5]))
    labels = {"candidate": (*table.labels["candidate"], *INT8_SCORES)}
    patterns = replace(table, measures=measures, labels=labels)
    densities = np.array([timed.labels["density"]], dtype=float)
    shared = timed["shared"].values.copy()
    shared[0, TIMED.index("int8")] = 0.02
    eight = Measure(("form", "density"), 0.1 + (seconds - 0.1) * densities)
    latency = replace(
        timed, measures={**timed.measures, "int8": eight, "shared": replace(timed["shared"], values=shared)}
    )
    tables = {**network.tables, "patterns": {"attn": patterns}, "latency": {"attn": latency}}
    return replace(network, tables=tables)


def chosen_patterns(network: NetworkProfile, price: float) -> tuple[set[str], float, float]:
    """What the site's heads do at a price, and the seconds of a generation that this saves; also less its error."""
    problem = SearchProblem.from_profile(network)
    costs, _ = site_costs(network, "full")
    found = head_candidates(network, problem, dense(problem), costs, [range(STEPS)])
    saved, error = totals(found, price)
    return {str(each.choice.candidate) for each in choose(found, price)}, saved, saved - price * error


def test_int8_scores_are_taken_where_they_save_time_for_their_error(network: NetworkProfile) -> None:
    """Of 2.6 seconds they leave 1.5: a price at which no pattern pays has all heads attend to everything in int8."""
    fast = with_int8(network, 1.5)
    cost = site_costs(fast, "full").costs["attn"]
    assert cost.int8 is not None and cost.int8.overhead == 0.0 and cost.shared["int8"] == 0.02
    prices = np.geomspace(1.0, 1e6, 40)
    plain, eight = ([chosen_patterns(each, price) for price in prices] for each in (network, fast))
    alone = [at for at, (patterns, *_) in enumerate(eight) if patterns == {INT8_DENSE}]
    assert alone and not any(plain[at][0] for at in alone), "no pattern is worth its error there"
    for at in alone:
        assert eight[at][1] == pytest.approx((2.0 - cost.seconds(cost.as_plain(1.0)) - 0.02) * STEPS)
    assert any(INT8_SPATIAL in patterns for patterns, *_ in eight), "beside a pattern, too"
    assert all(ours[2] >= theirs[2] - 1e-9 for ours, theirs in zip(eight, plain, strict=True)), "never the worse for it"
    rules = sparse_rules([HeadPattern("attn", head, INT8_DENSE, tuple(range(STEPS))) for head in range(HEADS)])
    plan = Plan.model_validate(made_plan({"net": network.timesteps})).model_copy(update={"rules": rules})
    told = planned_saving(plan, "net", fast, {"attn": cost}, range(STEPS))
    assert told == pytest.approx(eight[alone[0]][1]), "and a plan with them says the same"


def test_int8_scores_are_left_where_they_save_none_or_err_too_much(network: NetworkProfile) -> None:
    slow = with_int8(network, 2.7)
    found, (why,) = site_costs(slow, "full")
    assert found["attn"].int8 is None
    assert why == "attn: int8 scores take no less time in full steps, so no head there has them"
    prices = np.geomspace(1e-3, 1e6, 40)
    for price in prices:
        assert chosen_patterns(slow, price) == chosen_patterns(network, price)
    rough = with_int8(network, 1.5, error=3.0)
    assert site_costs(rough, "full").costs["attn"].int8 is not None
    for price in prices:
        assert chosen_patterns(rough, price) == chosen_patterns(network, price), "as little as skipping leaves"


def test_where_a_head_needs_keys_for_int8_alone_the_site_says_so(network: NetworkProfile) -> None:
    """What is done to all keys is for one head too much, for three not."""
    fast = with_int8(network, 1.5)
    costs = {"attn": replace(site_costs(fast, "full").costs["attn"], shared={"int8": 0.5})}
    problem = SearchProblem.from_profile(fast)
    (site,) = head_candidates(fast, problem, dense(problem), costs, [range(STEPS)])
    eight = tuple(tuple(each for each in head if each.choice.candidate == INT8_DENSE) for head in site.heads)
    assert len(replace(site, heads=eight, lost=0.0).chosen(0.0)) == HEADS
    assert not replace(site, heads=eight[:1], lost=0.0).chosen(0.0)
    skip = tuple(each for each in site.heads[1] if each.choice.candidate == SKIP)
    both = replace(site, heads=(eight[0], skip), lost=0.0)
    (told,) = [each for each in sparse_part([both], 0.0).explanations if each.chosen.startswith("head 0")]
    (why,) = (rival.reason for rival in told.rivals if rival.name == INT8_DENSE)
    assert why.endswith("but would cost the site 4e+03 ms more for int8")


def test_a_higher_price_saves_less_with_a_smaller_error(network: NetworkProfile) -> None:
    found = candidates(network, range(STEPS))
    chosen = [choose(found, price) for price in (0.0, 1.0, 10.0, 100.0, 1e9)]
    saved = [sum(each.saved for each in each_price) for each_price in chosen]
    errors = [sum(each.error for each in each_price) for each_price in chosen]
    assert saved == sorted(saved, reverse=True) and errors == sorted(errors, reverse=True)
    assert len(chosen[0]) == HEADS and not chosen[-1]
    assert {each.choice.candidate for each in chosen[0]} == {SKIP}, "what costs nothing is taken"


def test_choices_are_rules_with_the_heads_that_share_a_pattern() -> None:
    choices = [HeadPattern("a", 2, BAND, (1, 2)), HeadPattern("a", 0, BAND, (1, 2)), HeadPattern("a", 1, SKIP, (1, 2))]
    band, skip = sparse_rules([*choices, HeadPattern("a", 1, BAND, (3,))], "transformer")[:2]
    assert (band.sites, band.heads, band.steps, band.network) == ("a", (0, 2), (1, 2), "transformer")
    assert band.do == Sparse(pattern=BAND) and isinstance(band.do, Sparse) and band.do.pattern == BAND
    assert (skip.heads, skip.do) == ((1,), Sparse(pattern=SKIP))
    assert sparse_rules([]) == ()


def test_costs_are_those_that_were_timed_and_others_are_told(network: NetworkProfile) -> None:
    found, told = site_costs(network, "full")
    assert not told
    assert found["attn"].shared == {**COST.shared, "ordered": 0.01, "clusters": 0.1}, "what is not there has no price"
    assert found["attn"].seconds(0.3) == pytest.approx(COST.seconds(0.3)) and found["attn"].dense == COST.dense
    older = {name: each for name, each in network.tables["latency"]["attn"].measures.items() if name != "shared"}
    before = replace(network.tables["latency"]["attn"], measures=older)
    found, told = site_costs(replace(network, tables={**network.tables, "latency": {"attn": before}}), "full")
    assert not told and not found["attn"].shared, "a profile of before"
    found, told = site_costs(network, "bfloat16")
    assert not found and told == ("attn: its attention was not timed in bfloat16 steps",)
    table = network.tables["latency"]["attn"]
    short = replace(table, facts={"queries": 512, "block_queries": 64, "profiled": 16})
    found, (why,) = site_costs(replace(network, tables={"latency": {"attn": short}}), "full")
    assert not found and why.startswith("attn: 512 tokens are too few: kernels take blocks of 64 queries")
    level = Measure(("form", "density"), np.array([[1.0, 1.0, 1.0, 0.9]]))
    flat = replace(table, measures={**table.measures, "sparse": level})
    found, (why,) = site_costs(replace(network, tables={"latency": {"attn": flat}}), "full")
    assert not found and "takes no longer at higher densities" in why


def test_what_a_plan_saves_is_that_of_its_heads_in_the_steps_it_computes(network: NetworkProfile) -> None:
    choices = [HeadPattern("attn", 0, BAND, (1, 2)), HeadPattern("attn", 1, SKIP, (2,))]
    times = network.timesteps
    plan = Plan.model_validate(made_plan({"net": times})).model_copy(update={"rules": sparse_rules(choices)})
    saved = planned_saving(plan, "net", network, {"attn": COST}, range(STEPS))
    dense_but = 2.0 - COST.seconds((0.25 + 2) / 3), 2.0 - COST.seconds((0.25 + 0 + 1) / 3)
    assert saved == pytest.approx(sum(dense_but))
    assert planned_saving(plan, "net", network, {"attn": COST}, (1,)) == pytest.approx(dense_but[0])
    finding = pattern_text({"pattern": "draft", "keep": 0.5, "rest": {"pooled": 16}})
    both = sparse_rules([HeadPattern("attn", 0, finding, (1, 2)), HeadPattern("attn", 1, finding, (2,))])
    shared = plan.model_copy(update={"rules": both})
    assert planned_saving(shared, "net", network, {"attn": COST}, (1, 2)) == pytest.approx(
        2 * (2.0 - COST.seconds(1.0)) - 2 * (0.01 + 0.02)
    ), "once a step, however many heads"
    steps = (1, 2, 3, 4, 6, 7)
    kept = plan.model_copy(update={"rules": sparse_rules([HeadPattern("attn", 0, KEPT, steps)])})
    saving = planned_saving(kept, "net", network, {"attn": COST}, steps)
    assert saving == pytest.approx(len(steps) * (2.0 - COST.seconds(1.0)) - 2 * 1.0), "paid in the first and the fifth"
    unknown = sparse_rules([HeadPattern("attn", 0, '{"pattern": "sink"}', (1,))])
    plan = plan.model_copy(update={"rules": unknown})
    assert planned_saving(plan, "net", network, {"attn": COST}, (1,)) == pytest.approx(2.0 - COST.seconds(1.0))


def test_sites_without_patterns_are_left_out_and_told(network: NetworkProfile) -> None:
    timed = {"attn": network.tables["latency"]["attn"], "elsewhere": network.tables["latency"]["attn"]}
    found, (why,) = site_costs(replace(network, tables={**network.tables, "latency": timed}), "full")
    assert list(found) == ["attn"] and why == "elsewhere: no pattern was measured there"
    untried = replace(network.tables["patterns"]["attn"], facts={"elements": 16, "tried": False})
    found, (why,) = site_costs(replace(network, tables={**network.tables, "patterns": {"attn": untried}}), "full")
    assert not found and why == "attn: no pattern was measured there"


def test_an_attention_inside_a_module_has_the_growth_that_was_planted_at_the_module(network: NetworkProfile) -> None:
    inner = {"patterns": {"block.attn.core": network.tables["patterns"]["attn"]}}
    sensitivity = {"block.attn": network.tables["sensitivity"]["attn"]}
    nested = replace(network, tables={**inner, "sensitivity": sensitivity})
    problem = SearchProblem.from_profile(network)
    choice = HeadPattern("attn", 1, BAND, (1, 2))
    there = replace(choice, site="block.attn.core")
    assert heads_error(nested, problem, dense(problem), [there]) == pytest.approx(
        heads_error(network, problem, dense(problem), [choice])
    )
