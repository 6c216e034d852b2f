"""Errors of heads and of given predictions, against sums done by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ditopt.errors import InputError
from ditopt.measures import Measure, Table
from ditopt.profile import NetworkProfile
from ditopt.profiler.site_sensitivity import Planted, compared
from ditopt.search import SearchProblem, solve_kept
from ditopt.search.heads import (
    HeadPattern,
    correction,
    growth_at,
    heads_error,
    output_errors,
    output_growth,
    squared_errors,
)
from ditopt.search.joint import carried, dense, draft_for
from ditopt.search.planned import Planned, planned_error
from ditopt.search.quadratic import COHERENCE
from ditopt.search.table import with_histories
from ditopt.sites import STEP
from tests.search.toy import Toy

LOCAL = '{"pattern": "band"}'


@pytest.fixture(scope="module")
def network() -> NetworkProfile:
    """The toy's profile with one attention site of two heads, of which one candidate costs 10% and 20%."""
    found = Toy(steps=8).profile()
    error = np.broadcast_to(np.array([0.1, 0.2])[None, None, None, :, None], (6, 8, 1, 2, 1)).copy()
    along = ("prompt", "step", "branch")
    patterns = Table(
        {"error": Measure((*along, "head", "candidate"), error), "output": Measure(along, np.full((6, 8, 1), 3.0))},
        {"candidate": (LOCAL,)},
        {"elements": 16},
    )
    growth = Measure(("anchor", "error"), np.array([[2.0, np.nan, np.nan], [8.0, np.nan, np.nan]]), partial=True)
    sensitivity = Table({"to_output": growth}, {"anchor": (0, 4), "error": ("noise", "head", "pattern")})
    found.tables["patterns"] = {"attn": patterns}
    found.tables["sensitivity"] = {"attn": sensitivity}
    return found


def test_a_heads_error_at_the_output_is_its_share_of_the_norm_times_the_sites_growth(network: NetworkProfile) -> None:
    found = output_errors(network, network.tables["sensitivity"], "attn", (2, 7), [1], [0])
    norm = 3.0 * 16**0.5
    assert found.shape == (2, 1, 1)
    assert found[:, 0, 0] == pytest.approx([0.2 * norm * 4.0, 0.2 * norm * 8.0])  # between 2 and 8 in the logarithm


def test_errors_of_heads_add_as_squares_and_those_of_steps_nearly_straight(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network)
    everything = dense(problem)
    alone = [heads_error(network, problem, everything, [HeadPattern("attn", h, LOCAL, (3, 4))]) for h in (0, 1)]
    both = heads_error(network, problem, everything, [HeadPattern("attn", h, LOCAL, (3, 4)) for h in (0, 1)])
    assert both == pytest.approx(math.hypot(*alone))
    steps = [heads_error(network, problem, everything, [HeadPattern("attn", 0, LOCAL, (t,))]) for t in (3, 4)]
    assert alone[0] ** 2 == pytest.approx(
        COHERENCE * sum(steps) ** 2 + (1 - COHERENCE) * (steps[0] ** 2 + steps[1] ** 2)
    )


def test_steps_that_read_a_step_with_an_error_carry_it_on(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network, ("reuse",))
    draft = draft_for(problem, (0, 1, 4), ["reuse"])
    weights = carried(problem, draft)
    assert weights[4] == pytest.approx(problem.weights[4:].sum())
    assert weights[1] == pytest.approx(problem.weights[1:4].sum())
    one = heads_error(network, problem, draft, [HeadPattern("attn", 0, LOCAL, (4,))])
    plain = heads_error(network, problem, dense(problem), [HeadPattern("attn", 0, LOCAL, (4,))])
    assert one / plain == pytest.approx(problem.weights[4:].sum() / problem.weights[4])


def test_a_candidate_that_was_not_measured_is_named(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network)
    with pytest.raises(KeyError, match=r"other.* is none of candidate"):
        heads_error(network, problem, dense(problem), [HeadPattern("attn", 0, "other", (1,))])


def test_given_predictions_have_the_error_that_the_search_gave_them(network: NetworkProfile) -> None:
    problem = SearchProblem.from_profile(network)
    solution = solve_kept(problem, 4)
    given = {
        choice.step: Planned(choice.sources, choice.coefficients)
        for choice in solution.choices[STEP]
        if choice.candidate is not None
    }
    assert sorted(given) == sorted(with_histories(solution.kept, problem.steps))
    assert planned_error(problem, given) == pytest.approx(solution.predicted_error)


def test_growth_is_that_of_the_kind_and_the_head_where_it_was_planted() -> None:
    along = ("anchor", "head", "error")
    heads = np.full((2, 2, 3), np.nan)
    heads[:, 0, 2] = 5.0
    heads[1, 1, 1] = 3.0
    table = Table(
        {
            "to_output": Measure(("anchor", "error"), np.array([[2.0, 1.0, np.nan], [2.0, 1.0, np.nan]]), True),
            "head_to_output": Measure(along, heads, True),
        },
        {"anchor": (0, 4), "error": ("noise", "head", "pattern")},
    )
    assert output_growth(table, 2, "pattern", 0) == pytest.approx(5.0)
    assert output_growth(table, 2, "pattern", 1) == pytest.approx(3.0), "another kind at the head"
    assert output_growth(table, 2, "noise") == pytest.approx(2.0)
    empty = Table({"to_output": Measure(("anchor", "error"), np.full((2, 3), np.nan), True)}, table.labels)
    with pytest.raises(InputError, match="moved anything"):
        output_growth(empty, 1, "noise")


def test_a_site_that_was_not_measured_is_no_free_one(network: NetworkProfile) -> None:
    table = network.tables["patterns"]["attn"]
    values = table["error"].values.copy()
    values[:, 3] = np.nan
    table = Table({**table.measures, "error": Measure(table["error"].axes, values, True)}, table.labels, table.facts)
    unmeasured = replace(network, tables={**network.tables, "patterns": {"attn": table}})
    problem = SearchProblem.from_profile(network)
    assert heads_error(unmeasured, problem, dense(problem), [HeadPattern("attn", 0, LOCAL, (2, 4))]) > 0
    with pytest.raises(InputError, match=r"attn: what .* costs head 0 was not measured"):
        heads_error(unmeasured, problem, dense(problem), [HeadPattern("attn", 0, LOCAL, (2, 3))])
    assert np.isnan(squared_errors(unmeasured, problem, dense(problem), "attn", (2, 3), [0, 1], [0])).all()


def test_between_sites_that_were_planted_growth_is_interpolated_over_depth(network: NetworkProfile) -> None:
    patterns = network.tables["patterns"]["attn"]
    own = network.tables["sensitivity"]["attn"]
    last = Table({"to_output": Measure(("anchor", "error"), np.full((2, 3), 32.0))}, own.labels)
    silent = Table({"to_output": Measure(("anchor", "error"), np.full((2, 3), np.nan), True)}, own.labels)
    order = ("attn", "second", "third", "fourth")
    deeper = replace(network, tables={**network.tables, "patterns": dict.fromkeys(order, patterns)})
    planted = {"attn": own, "second": silent, "third": last, "ffn": last}
    found = [growth_at(deeper, planted, site, [0], "pattern", 0)[0] for site in order]
    assert found == pytest.approx([2.0, 8.0, 32.0, 32.0]), "beyond the last it is the last one's"
    with pytest.raises(InputError, match="no error planted at an attention site moved anything"):
        growth_at(deeper, {"second": silent}, "attn", [0], "pattern", 0)


def test_growth_of_several_prompts_is_their_geometric_mean() -> None:
    values = np.array([[[2.0, 2.0]], [[8.0, 8.0]], [[np.nan, np.nan]]])
    table = Table(
        {"to_output": Measure(("prompt", "anchor", "error"), values, True)},
        {"anchor": (0,), "error": ("noise", "head")},
    )
    assert output_growth(table, 3, "noise") == pytest.approx(4.0)


def test_plants_that_moved_nothing_do_not_count() -> None:
    rows = [Planted("a", "noise", 0.0, 1.0), Planted("b", "noise", 2.0, 1.0), Planted("c", "noise", 2.0, np.nan)]
    assert correction(compared(rows))[0] == pytest.approx(2.0)
    assert np.isnan(correction(compared(rows[:1]))[0])
