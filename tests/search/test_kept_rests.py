"""Rests that are kept, in the search: what they save with their dense steps, what they share, graphs that they need."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ditopt.decisions import pattern_text
from ditopt.measures import Measure, Table
from ditopt.plan import Plan
from ditopt.profile import NetworkProfile
from ditopt.recipes import find_recipe
from ditopt.search import SearchProblem, Solution, from_kept
from ditopt.search.heads import HeadPattern
from ditopt.search.joint import dense, draft_for
from ditopt.search.site_choice import HeadCandidate
from ditopt.search.solution import SparsePart
from ditopt.search.sparse import head_candidates, planned_saving, sparse_rules
from ditopt.search.with_heads import HeadsBeside, count_graphs
from tests.made_profiles import made_plan
from tests.search.test_sparse import BAND, COST, HEADS, SPATIAL, STEPS, with_attention
from tests.search.toy import Toy

SHARE = 0.25
"""Of the blocks, what the band keeps."""


def kept(every: int, form: str = "merge", pattern: dict[str, Any] | None = None) -> str:
    return pattern_text({**(pattern or {"pattern": "band", "width": 2.0}), "rest": {"kept": form, "refresh": every}})


def with_kept(found: NetworkProfile, error: float = 0.01) -> NetworkProfile:
    """The candidates of ``with_attention``, and the band with a rest kept in every second or fourth step."""
    table = found.tables["patterns"]["attn"]
    further = (kept(2), kept(4), kept(4, "residual", {"pattern": "skip"}))
    errors = np.broadcast_to(np.array([error, 2 * error, 8 * error]), (*table["error"].values.shape[:-1], 3))
    shares = [(1 + SHARE) / 2, (1 + 3 * SHARE) / 4, 1 / 4]
    measures = {
        **table.measures,
        "error": Measure(table["error"].axes, np.concatenate([table["error"].values, errors], -1)),
        "density": Measure(("candidate",), np.append(table["density"].values, shares)),
    }
    labels = {"candidate": (*table.labels["candidate"], *further)}
    return replace(found, tables={**found.tables, "patterns": {"attn": Table(measures, labels, table.facts)}})


@pytest.fixture(scope="module")
def network() -> NetworkProfile:
    return with_kept(with_attention(Toy(steps=STEPS).profile()))


def candidates(network: NetworkProfile, *ranges: range, **settings: Any) -> list[dict[str, HeadCandidate]]:
    """Of the first head, by name, in every range."""
    problem = SearchProblem.from_profile(network)
    found = head_candidates(network, problem, dense(problem), {"attn": COST}, ranges, **settings)
    return [{str(each.choice.candidate): each for each in site.heads[0]} for site in found]


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 8])
def test_a_candidate_saves_what_its_dense_steps_leave(network: NetworkProfile, steps: int) -> None:
    (found,) = candidates(network, range(steps))
    whole = COST.dense / COST.efficiency / HEADS
    for every in (2, 4):
        refreshes = math.ceil(steps / every)
        saved = whole * (steps - refreshes) * (1 - SHARE)
        if kept(every) in found:
            assert found[kept(every)].saved == pytest.approx(saved)
            assert found[kept(every)].needs == {("kept", 1), ("others", every)}
    assert kept(2) in found or kept(4) in found


def test_a_single_step_is_dense_and_saves_nothing(network: NetworkProfile) -> None:
    (found,) = candidates(network, range(1))
    assert not any("kept" in name for name in found) and BAND in found


def test_steps_that_a_schedule_predicts_do_not_count(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network, ("reuse",))
    draft = draft_for(problem, (0, 1, 4, 6), ["reuse"])
    (found,) = head_candidates(network, problem, draft, {"attn": COST}, [range(1, STEPS)])
    by_name = {str(each.choice.candidate): each for each in found.heads[0]}
    assert by_name[kept(4)].choice.steps == (1, 4, 6)
    assert by_name[kept(4)].saved == pytest.approx(COST.dense / COST.efficiency / HEADS * 2 * (1 - SHARE))


def test_without_them_none_is_a_candidate(network: NetworkProfile) -> None:
    with_them, without = (candidates(network, range(STEPS), kept=each)[0] for each in (True, False))
    assert any("kept" in name for name in with_them) and not any("kept" in name for name in without)
    assert SPATIAL in without and SPATIAL in with_them, "it needs less of the site than a kept rest that errs less"


def test_a_recipe_allows_its_own(network: NetworkProfile) -> None:
    (found,) = candidates(network, range(STEPS), recipe=find_recipe("ditfastattn"))
    assert set(found) == {kept(4, "residual", {"pattern": "skip"})}
    (found,) = candidates(network, range(STEPS), recipe=find_recipe("flashblock"))
    assert not found, "it has frames, of which none was measured"


def test_a_plan_saves_between_the_steps_that_are_dense(network: NetworkProfile) -> None:
    plan = Plan.model_validate(made_plan({"net": network.timesteps}))
    rules = sparse_rules([HeadPattern("attn", 0, kept(4), tuple(range(1, 7)))])
    plan = plan.model_copy(update={"rules": rules})
    anew = 2.0 - COST.seconds(1.0) - COST.shared["kept"] - COST.overhead
    read = 2.0 - COST.seconds((SHARE + 2) / 3) - COST.shared["kept"]
    saved = planned_saving(plan, "net", network, {"attn": COST}, range(STEPS))
    assert saved == pytest.approx(2 * anew + 4 * read), "steps 1 and 5 are dense"
    assert planned_saving(plan, "net", network, {"attn": COST}, (2, 3)) == pytest.approx(anew + read), "2 is the first"


def planned(network: NetworkProfile, *choices: HeadPattern) -> tuple[SearchProblem, Solution]:
    problem = SearchProblem.from_profile(network, ("reuse",))
    base = from_kept(problem, range(STEPS))
    return problem, base.with_sparse(SparsePart(sparse_rules(choices), 1.0, 0.0, ()))


def test_graphs_are_counted_by_what_they_keep_and_read(network: NetworkProfile) -> None:
    everywhere = tuple(range(STEPS))
    for choices, count in (
        ([HeadPattern("attn", 0, BAND, everywhere)], 1),
        ([HeadPattern("attn", 0, kept(4), everywhere)], 2),
        ([HeadPattern("attn", 0, kept(4), everywhere), HeadPattern("attn", 1, kept(2), everywhere)], 3),
        ([HeadPattern("attn", 0, kept(4), everywhere), HeadPattern("attn", 1, BAND, everywhere)], 2),
        ([HeadPattern("attn", 0, kept(4), everywhere[4:])], 3),
        ([HeadPattern("attn", 0, kept(2), everywhere), HeadPattern("b", 0, kept(2), everywhere[1:])], 3),
    ):
        assert count_graphs(*planned(network, *choices)) == count, choices


def test_with_few_graphs_the_choice_is_without_kept_rests(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network, ("reuse",))
    base = from_kept(problem, range(STEPS))

    def part(most: int) -> SparsePart:
        def allowed(plan: Solution) -> bool:
            return count_graphs(problem, plan) <= most

        found = HeadsBeside(network, problem, base, {"attn": COST}, allowed).within_error(1.0)
        assert found is not None
        return found

    many, few = part(9), part(1)
    assert any("kept" in str(rule.do) for rule in many.rules) and not any("kept" in str(rule.do) for rule in few.rules)
    assert many.saved > few.saved > 0
