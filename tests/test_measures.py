"""Arrays with named axes, and tables put together."""

from __future__ import annotations

import numpy as np
import pytest

from ditopt.errors import InputError
from ditopt.measures import Measure, Table, joined


def measure(values: list[list[float]]) -> Measure:
    return Measure(("prompt", "head"), np.array(values))


def test_statistics_are_of_what_was_measured() -> None:
    found = Measure(("prompt", "head"), np.array([[1.0, np.nan], [3.0, np.nan]]), partial=True)
    assert found.mean("prompt").values[0] == 2
    assert np.isnan(found.mean("prompt").values[1])
    assert measure([[0.0, 1.0], [10.0, 1.0]]).upper(0.9, "prompt").values.tolist() == [9.0, 1.0]
    assert measure([[1.0, 2.0]]).ordered("head", "prompt").shape == (2, 1)


def test_axes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"axes prompt do not name the axes of shape \[1, 2\]"):
        Measure(("prompt",), np.zeros((1, 2)))
    with pytest.raises(InputError, match="has no axis step"):
        measure([[1.0]]).mean("step")
    with pytest.raises(InputError, match="has not the axes head, step"):
        measure([[1.0]]).ordered("head", "step")


def test_prompts_are_put_behind_each_other_and_the_rest_is_weighed_by_their_number() -> None:
    tables = [
        Table(
            {"error": measure(rows), "range": Measure(("channel",), np.array([level]))}, {"head": ("a", "b")}, {"n": 1}
        )
        for rows, level in (([[1.0, 2.0]], 0.0), ([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], 4.0))
    ]
    found = joined(tables)
    assert found["error"].values[:, 0].tolist() == [1, 3, 5, 7]
    assert found["range"].values.tolist() == [3.0]
    assert found.prompts == 4
    assert found.position("head", "b") == 1
    with pytest.raises(KeyError, match="'c' is none of head: a, b"):
        found.position("head", "c")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Table({"error": measure([[1.0]])}), "other axes or sizes"),
        (Table({"error": measure([[1.0, 2.0]])}, {"head": ("x", "y")}), "axis 'head' is None in one"),
        (Table({"error": measure([[1.0, 2.0]])}, {}, {"kind": "self"}), "fact 'kind' is None in one and 'self'"),
        (Table({"other": measure([[1.0, 2.0]])}), "measures error, other"),
    ],
)
def test_tables_that_differ_say_where(other: Table, told: str) -> None:
    with pytest.raises(InputError, match=told):
        joined([Table({"error": measure([[1.0, 2.0]])}), other])


def test_a_quantile_of_nothing_is_nan_without_a_warning() -> None:
    found = Measure(("prompt", "head"), np.array([[1.0, np.nan]]), True).upper(0.9, "prompt")
    assert found.values[0] == 1.0 and np.isnan(found.values[1])


def test_geometric_means_are_of_what_was_measured() -> None:
    found = Measure(("prompt", "head"), np.array([[1.0, np.nan], [100.0, 7.0]]), True).geometric_mean("prompt")
    assert found.values == pytest.approx([10.0, 7.0])


def test_what_one_run_did_not_measure_is_what_the_other_did() -> None:
    tables = [
        Table({"a": Measure(("head",), np.array(values), True)})
        for values in ([2.0, 4.0, np.nan], [np.nan, 8.0, np.nan])
    ]
    found = joined(tables, [1, 3])["a"].values
    assert found[:2] == pytest.approx([2.0, 7.0]) and np.isnan(found[2])
