"""What steps cost: ranges that are not computed, dtypes, and attention to some of the blocks."""

from __future__ import annotations

import numpy as np
import pytest

from ditopt.cost_models.measured import MeasuredCost
from ditopt.cost_models.sparse import INT8, OTHERS, Int8Cost, SparseCost, shared_seconds, spread
from ditopt.errors import InputError
from ditopt.sites import STEP

COST = MeasuredCost(
    {"full": 0.2, "predicted": 0.01, "blocks.0..3": 0.16, "blocks.1..2": 0.08, "bfloat16": 0.1, "simplified": 0.15}
)


def test_what_is_not_computed_is_not_paid_for() -> None:
    assert COST.step_seconds([]) == 0.2
    assert COST.step_seconds([STEP]) == 0.01
    assert COST.step_seconds(["blocks.1..2"]) == pytest.approx(0.12)


def test_in_a_dtype_ranges_save_the_same_share_and_predictions_cost_the_same() -> None:
    assert COST.step_seconds([], "bfloat16") == 0.1
    assert COST.step_seconds(["blocks.1..2"], "bfloat16") == pytest.approx(0.06)
    assert COST.step_seconds([STEP], "bfloat16") == 0.01
    assert COST.in_form("bfloat16") == pytest.approx(
        {"full": 0.1, "predicted": 0.01, "blocks.0..3": 0.08, "blocks.1..2": 0.04}
    )


def test_a_simplified_step_has_a_time_of_its_own() -> None:
    assert COST.step_seconds([], simplify=True) == pytest.approx(0.15)
    assert COST.step_seconds(["blocks.1..2"], simplify=True) == pytest.approx(0.09)
    with pytest.raises(KeyError, match="simplified bfloat16"):
        COST.step_seconds([], "bfloat16", simplify=True)


def test_a_site_or_dtype_that_was_not_timed_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"blocks\.7"):
        COST.step_seconds(["blocks.7"])
    with pytest.raises(KeyError, match="float8"):
        COST.step_seconds([], "float8")


def test_sparse_attention_costs_its_overhead_and_its_share_of_the_pairs() -> None:
    cost = SparseCost(dense=2.0, overhead=0.1, efficiency=0.8)
    assert (cost.seconds(0.0), cost.seconds(0.25), cost.seconds(1.0)) == pytest.approx((0.1, 0.725, 2.6))
    times = {density: cost.seconds(density) for density in (0.05, 0.25, 1.0)}
    found = SparseCost.measured(2.0, times)
    assert (found.overhead, found.efficiency) == pytest.approx((0.1, 0.8))
    assert found.prices == {OTHERS: found.overhead}, "a second call for other blocks"
    assert not found.shared and SparseCost.measured(2.0, times, {"means": 0.2}).shared == {"means": 0.2}


def test_budgets_that_are_not_alike_take_what_was_measured_of_them() -> None:
    cost = SparseCost(dense=2.0, overhead=0.1, efficiency=0.8)
    times = {density: cost.seconds(density) for density in (0.125, 0.5, 1.0)}
    budgets = [1.0, 0.1, 0.1, 0.1]
    assert spread(budgets) == pytest.approx(np.std(budgets) / np.mean(budgets))
    mean = sum(budgets) / 4
    found = SparseCost.measured(2.0, times, uneven=(budgets, 1.2 * (cost.seconds(mean) - 0.1) + 0.1))
    assert found.seconds(mean) + found.uneven_seconds(budgets) == pytest.approx(1.2 * 2.5 * mean + 0.1)
    assert found.uneven_seconds([0.4] * 4) == 0.0 == found.uneven_seconds([0.0] * 4)
    half = [0.65, 0.2, 0.2, 0.2]  # of another mean: in proportion to it and to the spread
    assert found.uneven_seconds(half) == pytest.approx(0.2 * spread(half) / spread(budgets) * 2.5 * np.mean(half))
    for faster in ((budgets, 0.5 * cost.seconds(mean)), ([0.25] * 4, 9.0), None):
        assert SparseCost.measured(2.0, times, uneven=faster).per_spread == 0.0
    with pytest.raises(InputError, match="what else takes time not below"):
        SparseCost(1.0, 0.0, 1.0, per_spread=-0.1)


def test_heads_with_int8_scores_have_a_line_of_their_own() -> None:
    cost = SparseCost(dense=2.0, overhead=0.1, efficiency=0.8)
    times = {density: cost.seconds(density) for density in (0.125, 0.5, 1.0)}
    eight = {density: 0.25 + 1.25 * density for density in times}
    shared = {INT8: 0.05, "means": 0.2}
    found = SparseCost.measured(2.0, times, shared, eight)
    assert found.int8 is not None and found.shared == shared
    assert (found.int8.overhead, found.int8.efficiency) == pytest.approx((0.1, 1.6)), "keys are paid for by themselves"
    for density in (0.0, 0.3, 1.0):
        seconds = found.seconds(found.as_plain(density)) + shared[INT8]
        assert seconds == pytest.approx(0.25 + 1.25 * density), "all heads with int8 scores"
    one_of_four = found.seconds((found.as_plain(0.5) + 3 * 0.5) / 4)
    assert one_of_four == pytest.approx((found.seconds(found.as_plain(0.5)) + 3 * found.seconds(0.5)) / 4)
    for slower in ({density: 2.5 * density for density in times}, dict.fromkeys(times, 1.0)):
        slow = SparseCost.measured(2.0, times, shared, slower)
        assert slow.int8 is None and slow.as_plain(0.5) == 0.5
    with pytest.raises(InputError, match="what else takes time not below"):
        SparseCost(1.0, 0.0, 1.0, int8=Int8Cost(-0.1, 1.0))
    with pytest.raises(InputError, match="have to be above 0"):
        SparseCost(1.0, 0.0, 1.0, int8=Int8Cost(0.1, 0.0))


def test_what_heads_share_is_paid_as_often_as_the_head_that_needs_it_most() -> None:
    prices = {"mass": 6.0, "means": 0.5}
    assert shared_seconds(prices, ()) == 0.0
    assert shared_seconds(prices, {("mass", 3), ("means", 1)}) == pytest.approx(2.5)
    assert shared_seconds(prices, {("mass", 3), ("mass", 2)}) == pytest.approx(4.0), "in 4 of 6 steps"
    assert shared_seconds(prices, {("mass", 3), ("mass", 2)}, 5) == pytest.approx(6.0 * 4 / 5), "0, 2, 3 and 4"
    assert shared_seconds(prices, {("unknown", 1)}) == 0.0, "what was not timed"
    with pytest.raises(InputError, match="what else takes time not below"):
        SparseCost(1.0, 0.0, 1.0, {"means": -0.1})


@pytest.mark.parametrize(
    ("dense", "overhead", "efficiency"), [(0.0, 0.1, 1.0), (1.0, -0.1, 1.0), (1.0, 0.0, 0.0), (float("nan"), 0.1, 1.0)]
)
def test_costs_of_sparse_attention_that_cannot_be_are_refused(dense: float, overhead: float, efficiency: float) -> None:
    with pytest.raises(InputError, match="have to be above 0"):
        SparseCost(dense, overhead, efficiency)


@pytest.mark.parametrize(
    ("times", "message"),
    [({0.5: 1.0}, "timed at 1 densities"), ({0.1: 2.0, 0.9: 1.0}, "no longer at higher densities")],
)
def test_times_that_tell_no_cost_are_refused(times: dict[float, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseCost.measured(1.0, times)
