"""What may be held at once restricts what a search looks at."""

from __future__ import annotations

import numpy as np
import pytest

from ditopt.search.problem import RangeProblem, SearchProblem
from ditopt.sites import STEP


def problem(steps: int = 6) -> SearchProblem:
    ones = np.ones(steps)
    gram = np.eye(steps)[None] + 1.0
    ranges = {
        name: RangeProblem(name, gram, ones, 0.1, (0, first), (0, last))
        for name, first, last in (("blocks.0", 0, 0), ("blocks.0..1", 0, 1))
    }
    times = tuple(np.linspace(1, 0.2, steps))
    return SearchProblem(times, ones, ones, gram, seconds_full=1.0, seconds_predicted=0.1, ranges=ranges)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_predictors_read_no_more_features_than_fit(depth: int) -> None:
    found, told = problem().holding({STEP: depth, "blocks.0": 1, "blocks.0..1": 1})
    assert max(each.history for each in found.candidates) == depth and set(found.ranges) == {"blocks.0", "blocks.0..1"}
    assert told == (
        () if depth == 3 else (f"step: of its features {depth} fit into max_state_bytes, so no more are read",)
    )


def test_what_does_not_fit_is_left_out_and_told() -> None:
    found, told = problem().holding({STEP: 0, "blocks.0": 2, "blocks.0..1": 0})
    assert found.candidates == () and found.seconds_predicted is None and set(found.ranges) == {"blocks.0"}
    assert told == (
        "step: of its features 0 fit into max_state_bytes, so no more are read",
        "blocks.0..1: left out, as a feature takes more than max_state_bytes",
    )
