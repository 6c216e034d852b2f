"""Recipes: what they allow, what a search does under one, and what it says; no model is run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ditopt import recipes
from ditopt.cli import app
from ditopt.decisions import Sparse
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import candidates
from ditopt.kernels.patterns.registry import DYNAMIC, PATTERNS, pattern_to_data
from ditopt.offline import OfflineSearch
from ditopt.plan import Plan
from ditopt.plan_diff import diff_plans
from ditopt.profile import NetworkProfile
from ditopt.recipes import ANY, RECIPES, Recipe, find_recipe, fits, form_text
from ditopt.report.explained import Explained, side_path
from ditopt.search import CANDIDATES, SearchProblem
from ditopt.search.joint import dense
from ditopt.search.site_choice import SiteCandidates
from ditopt.search.sparse import choose, head_candidates, sparse_part
from ditopt.target import Target
from ditopt.techniques import Techniques
from tests.search.test_sparse import BAND, COST, HEADS, SPATIAL, STEPS, with_attention
from tests.search.test_with_heads import attentive
from tests.search.toy import Toy

BANDS = Recipe("bands", "Bands", "0000.00000", ({"pattern": "band"},))
WITH_OTHERS = replace(BANDS, forms=({"pattern": "band"}, {"pattern": "radial"}))
FIRST_DENSE = replace(BANDS, dense_first=0.5)
BOTH = ({"pattern": "band"}, {"pattern": "spatial"})
ALIKE = replace(BANDS, forms=BOTH, alike=True)


@pytest.fixture(scope="module")
def network() -> NetworkProfile:
    return with_attention(Toy(steps=STEPS).profile())


def found(network: NetworkProfile, recipe: Recipe | None, *ranges: range) -> tuple[SiteCandidates, ...]:
    problem = SearchProblem.from_profile(network)
    return head_candidates(network, problem, dense(problem), {"attn": COST}, ranges, recipe)


DRAFT = {"pattern": "draft", "keep": ANY}


@pytest.mark.parametrize(
    ("form", "settings", "is_one"),
    [
        ({"pattern": "band"}, {"pattern": "band", "width": 3}, True),
        ({"pattern": "band"}, {"pattern": "radial", "width": 3}, False),
        (DRAFT, {"pattern": "draft", "keep": 0.25}, True),
        (DRAFT, {"pattern": "draft", "mass": 0.9}, False),
        (DRAFT, {"pattern": "draft", "keep": 0.25, "rest": "pooled"}, False),
        (DRAFT, {"pattern": "draft", "keep": 0.25, "order": "hilbert"}, False),
        (DRAFT, {"pattern": "draft", "keep": 0.25, "refresh": 4}, False),
        (DRAFT, {"pattern": "draft", "keep": 0.25, "by": "mass"}, False),
        ({**DRAFT, "by": "mass", "refresh": ANY}, {"pattern": "draft", "keep": 0.5, "by": "mass", "refresh": 4}, True),
        ({**DRAFT, "by": "mass", "refresh": ANY}, {"pattern": "draft", "keep": 0.5, "by": "mass"}, False),
        ({**DRAFT, "rest": {"pooled": ANY}}, {"pattern": "draft", "keep": 0.5, "rest": {"pooled": 16}}, True),
        ({**DRAFT, "rest": {"pooled": ANY}}, {"pattern": "draft", "keep": 0.5, "rest": "pooled"}, True),
        ({**DRAFT, "rest": {"pooled": ANY}}, {"pattern": "draft", "keep": 0.5, "rest": {"taylor": 16}}, False),
        ({**DRAFT, "rest": {"pooled": ANY}}, {"pattern": "draft", "keep": 0.5}, False),
        (
            {"pattern": "union", "of": ({"pattern": "band"}, {"pattern": "sink"})},
            {"pattern": "union", "of": [{"pattern": "band", "width": 1}, {"pattern": "sink", "frames": 1}]},
            True,
        ),
        (
            {"pattern": "union", "of": ({"pattern": "band"}, {"pattern": "sink"})},
            {"pattern": "union", "of": [{"pattern": "spatial"}, {"pattern": "sink", "frames": 1}]},
            False,
        ),
    ],
)
def test_a_candidate_is_of_a_form_by_all_that_the_form_says(
    form: dict[str, Any], settings: dict[str, Any], is_one: bool
) -> None:
    assert fits(form, settings) is is_one
    recipe = replace(BANDS, forms=(form,))
    assert recipe.allows(json.dumps(settings, sort_keys=True)) is is_one
    assert recipe.missing([json.dumps(settings)]) == (() if is_one else (form,))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_recipe_says_where_it_is_from_and_names_patterns_that_there_are(recipe: Recipe) -> None:
    assert RECIPES[recipe.name] is recipe
    assert len(recipe.arxiv) == 10 and recipe.arxiv in recipe.source and recipe.departs
    assert {form["pattern"] for form in recipe.forms} <= {*PATTERNS, *DYNAMIC}
    chosen = Techniques.choose(None, recipe.name)
    assert 0 <= recipe.dense_first < 1 and chosen.sparse is (recipe.of_heads is not None) is (recipe.loop is None)
    assert all(form_text(form) in recipe.restriction for form in recipe.forms)
    if recipe.loop is not None:
        assert chosen.ranges and chosen.predictors == recipe.loop.predictors and not chosen.all_computed
        assert set(recipe.loop.predictors) <= {each.name for each in CANDIDATES}
        assert recipe.loop.steps.text in recipe.restriction


@pytest.mark.parametrize("name", ["sparse-vdit", "radial"])
def test_static_recipes_are_profiled_whole(name: str) -> None:
    tried = [json.dumps(pattern_to_data(each), sort_keys=True) for each in candidates(Geometry(6, 28, 28))]
    recipe = RECIPES[name]
    assert not recipe.missing(tried)
    assert 1 < sum(map(recipe.allows, tried)) < len(tried)


def test_an_unknown_recipe_is_told_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"recipe 'sparse-dit' is unknown; choose from sparse-vdit, radial"):
        find_recipe("sparse-dit")
    with pytest.raises(InputError, match="recipe 'sparse-dit' is unknown"):
        OfflineSearch(attentive(), Target(max_rel_error=0.03), recipe="sparse-dit")


def test_a_recipe_beside_techniques_that_leave_it_out_is_an_error() -> None:
    with pytest.raises(InputError, match="recipe radial uses sparse, which techniques reuse, fit leave out"):
        Techniques.choose(("reuse", "fit"), "radial")
    alone = Techniques.choose(None, "radial")
    assert alone.all_computed and alone.sparse and not (alone.ranges or alone.simplify or alone.dtypes)
    more = Techniques.choose(("reuse", "sparse", "simplify"), "radial")
    assert not more.all_computed and more.predictors == ("reuse",) and more.simplify
    with pytest.raises(InputError, match="leave no predictor"):
        Techniques.choose(("simplify",))


def test_what_a_recipe_does_not_allow_is_no_candidate(network: NetworkProfile) -> None:
    (free,), (own,) = found(network, None, range(STEPS)), found(network, BANDS, range(STEPS))
    assert {each.choice.candidate for of_head in own.heads for each in of_head} == {BAND}
    assert own.lost == free.lost and not own.alike
    of_free = {(each.choice.head, each.choice.candidate): each for of_head in free.heads for each in of_head}
    assert own.heads[0][0] == of_free[0, BAND], "its price is that of the free search"


def test_steps_that_a_recipe_keeps_dense_have_no_candidates(network: NetworkProfile) -> None:
    ranges = (range(2), range(2, 6), range(6, STEPS))
    steps = [each.heads[0][0].choice.steps for each in found(network, FIRST_DENSE, *ranges)]
    assert steps == [(4, 5), (6, 7)], "half of eight"


def test_heads_that_do_alike_have_what_is_best_of_all_choices_for_all(network: NetworkProfile) -> None:
    (site,) = found(network, ALIKE, range(STEPS))
    for price in (0.0, 1.0, 10.0, 30.0, 100.0, 1e3, 1e9):
        made = site.chosen(price)
        labels = {each.choice.candidate for each in made}
        assert len(labels) <= 1 and len(made) in (0, HEADS)
        gained = sum(each.gain(price) for each in made) - (site.lost if made else 0.0)
        rivals = [
            [each for of_head in site.heads for each in of_head if each.choice.candidate == name]
            for name in (BAND, SPATIAL)
        ]
        best = max(sum(each.gain(price) for each in rival) - site.lost for rival in rivals)
        assert gained == pytest.approx(max(best, 0.0))
    told = sparse_part([site], 10.0).explanations
    assert len(told) == HEADS and all(one.rivals for one in told)


def test_heads_that_do_alike_gain_no_more_than_each_by_itself(network: NetworkProfile) -> None:
    free, alike = (found(network, replace(ALIKE, alike=tied), range(STEPS)) for tied in (False, True))
    for price in (0.1, 1.0, 10.0, 100.0):
        gains = [sum(each.gain(price) for each in choose(made, price)) for made in (free, alike)]
        assert gains[0] >= gains[1] - 1e-9
    every = product(*alike[0].heads)
    assert all(len({each.choice.candidate for each in one}) <= 2 for one in every)


def test_a_search_under_a_recipe_says_what_it_left_out_and_what_it_lacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "bands", WITH_OTHERS)
    profile, target = attentive(), Target(max_rel_error=0.03)
    searching = OfflineSearch(profile, target, recipe="bands")
    plan = searching()
    rules = [rule for rule in plan.rules if isinstance(rule.do, Sparse)]
    assert rules and len(rules) == len(plan.rules), "every step is computed"
    assert {rule.do.settings["pattern"] for rule in rules if isinstance(rule.do, Sparse)} == {"band"}
    assert any(
        "2 of 3 profiled candidates are outside of it and were not considered" in reason for reason in searching.reasons
    )
    assert "recipe bands: not among the profiled candidates, so not considered: {pattern: radial}" in searching.missed
    free = OfflineSearch(profile, target, techniques=("sparse",))
    assert free().seconds <= plan.seconds, "a restriction finds nothing faster"
    assert not any("recipe" in reason for reason in free.reasons)

    source, path = tmp_path / "a.profile", tmp_path / "plan.yaml"
    profile.save(source)
    ran = CliRunner().invoke(
        app, ["search", str(source), "-o", str(path), "--max-rel-error", "0.03", "--recipe", "bands"]
    )
    assert ran.exit_code == 0, ran.output
    made = Plan.load(path)
    assert made.recipe == "bands" and made.rules == plan.rules
    assert "recipe" in CliRunner().invoke(app, ["show", str(path)]).output
    told = " ".join(CliRunner().invoke(app, ["explain", str(path)]).output.split())
    assert "2 of 3 profiled candidates are outside of it and were not considered" in told
    assert any("recipe bands (Bands, arXiv 0000.00000)" in each for each in Explained.load(side_path(path)).reasons)
    assert diff_plans(made.model_copy(update={"recipe": None}), made) == ["~ recipe: None -> bands"]


def test_under_a_recipe_a_speed_is_reached_by_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.RECIPES, "bands", replace(BANDS, forms=({"pattern": "skip"}, {"pattern": "band"})))
    searching = OfflineSearch(attentive(), Target(speedup=1.5), recipe="bands")
    found = searching()
    assert not searching.missed and found.speedup >= 1.5 and found.evaluations == 12
    assert all(isinstance(rule.do, Sparse) for rule in found.rules)
    far = OfflineSearch(attentive(), Target(speedup=50.0), recipe="bands")
    assert not far().rules and any("asked for 50x" in reason for reason in far.missed)


def test_the_command_lists_recipes_and_refuses_unknown_ones(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["recipes"]).output
    for recipe in RECIPES.values():
        assert f"{recipe.name}: {recipe.source}" in listed and recipe.restriction in listed
    attentive().save(tmp_path / "a.profile")
    ran = CliRunner().invoke(
        app, ["search", str(tmp_path / "a.profile"), "-o", str(tmp_path / "plan.yaml"), "--recipe", "none"]
    )
    assert ran.exit_code == 2 and "recipe 'none' is unknown" in ran.output
