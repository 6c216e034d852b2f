"""``taylorseer``: schedule and forecast against the rule as arXiv 2503.06923 and its code have it.

Where ours departs:

- What all blocks add to the stream is forecast as one; the paper forecasts the output of every attention and
  feed-forward layer by itself.
- N and the order are chosen by the search, one order throughout; the paper sets them by hand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from ditopt.decisions import Forecast
from ditopt.recipes import RECIPES
from ditopt.search.space import CANDIDATES
from ditopt.search.table import ErrorTable
from tests.recipes.loops import carried_out, gram_of, walk

FIRST_ENHANCE = 3


def taylorseer(features: np.ndarray, interval: int, max_order: int) -> tuple[np.ndarray, list[int]]:
    """What the system makes of one layer's features ``[T, size]``, and the steps in which it computes."""
    cache: dict[int, np.ndarray] = {}
    activated: list[int] = []
    found, counter = [], 0
    for step, feature in enumerate(features):
        if step < FIRST_ENHANCE or counter == interval - 1:
            counter = 0
            activated.append(step)
            updated = {0: feature}
            for i in range(max_order):
                if i in cache and len(activated) > 1:
                    distance = activated[-1] - activated[-2]
                    updated[i + 1] = (updated[i] - cache[i]) / distance
            cache = updated
            found.append(feature)
        else:
            counter += 1
            x = step - activated[-1]
            found.append(sum(value * x**i / math.factorial(i) for i, value in cache.items()))
    return np.array(found), activated


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_schedule_and_forecast_are_the_systems(interval: int, order: int) -> None:
    (features,) = walk(20, prompts=1)
    expected, activated = taylorseer(features, interval, order)
    loop = RECIPES["taylorseer"].loop
    assert loop is not None
    (kept,) = {each for each in loop.steps.schedules(gram_of(features[None])) if each == tuple(activated)}
    ours = carried_out(Forecast(order=order, distances="steps", formula="taylor"), kept, features)
    np.testing.assert_allclose(ours, expected, atol=1e-10)
    if order == 2:
        other = carried_out(Forecast(order=2, distances="steps"), kept, features)
        assert np.abs(other - expected).max() > 1e-3, "the parabola through three computed steps is another forecast"


def test_every_interval_is_among_the_schedules() -> None:
    loop = RECIPES["taylorseer"].loop
    assert loop is not None
    found = [*loop.steps.schedules(np.ones((1, 9, 9)))]
    assert found[:3] == [(0, 1, 2, 4, 6, 8), (0, 1, 2, 5, 8), (0, 1, 2, 6)] and found[-1] == (0, 1, 2)
    for interval, kept in enumerate(found, 2):
        assert list(kept) == taylorseer(np.zeros((9, 2)), interval, 1)[1]


def test_the_search_prices_the_systems_own_error() -> None:
    """The candidates' tables hold the distance between what the system makes and what was computed."""
    features, names = walk(12), RECIPES["taylorseer"].loop.predictors  # type: ignore[union-attr]  # it has one
    candidates = tuple(each for each in CANDIDATES if each.name in names)
    table = ErrorTable.build(np.linspace(1, 0.1, 12).tolist(), gram_of(features), candidates, "norms")
    for index, order in enumerate((1, 2)):
        made = [taylorseer(each, 4, order) for each in features]
        for step in (3, 4, 5, 7, 9, 11):
            history = [each for each in reversed(made[0][1]) if each < step]
            expected = np.mean([np.linalg.norm(m[step] - f[step]) for (m, _), f in zip(made, features, strict=True)])
            assert table.error(index, step, history) == pytest.approx(expected, rel=1e-6)
