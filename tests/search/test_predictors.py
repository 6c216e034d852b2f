"""Forecasts are exact on polynomials, fits are least squares, repeated times are safe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.decisions import Fit, Forecast, Reuse
from ditopt.search import CANDIDATES, predictor_coefficients
from ditopt.search.brute import prediction_error
from ditopt.search.predictors import regressors, squared_errors
from tests.search.problems import SEEDS, random_problem

QUICK = settings(deadline=None, max_examples=20)


@QUICK
@given(SEEDS, st.sampled_from([0, 1, 2]))
def test_a_forecast_is_exact_on_polynomials_of_its_order(seed: int, order: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.2, 1.0, 6))[::-1]
    features = np.polynomial.polynomial.polyval(times, rng.normal(size=order + 1))
    decision = Forecast(order=order) if order else Reuse()
    sources = (4, 2, 1)[: decision.history]
    factors = predictor_coefficients(decision, times.tolist(), 5, sources)
    assert np.dot(factors, features[list(sources)]) == pytest.approx(features[5], abs=1e-9)


@pytest.mark.parametrize(
    ("times", "expected"),
    [((3, 2, 2, 1), (2, 0, -1)), ((2, 2, 2, 1), (1, 0, 0)), ((3, 2, 1, 1), (1, 0, 0))],
)
def test_repeated_times_lower_the_order(times: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert predictor_coefficients(Forecast(order=2), times, 3, (2, 1, 0)) == pytest.approx(expected)


def test_the_order_falls_with_fewer_sources() -> None:
    assert predictor_coefficients(Forecast(order=2), (3.0, 2.0, 1.0), 2, (1, 0)) == pytest.approx((2, -1))
    with pytest.raises(ValueError, match="step 2 cannot be predicted"):
        predictor_coefficients(Reuse(), (3.0, 2.0, 1.0), 2, ())


def test_a_fit_returns_its_factors_only_for_its_sources() -> None:
    fit = Fit(history=2, coefficients={3: (1.5, -0.5)}, sources={3: (2, 0)})
    assert predictor_coefficients(fit, (), 3, (2, 0)) == (1.5, -0.5)
    with pytest.raises(ValueError, match=r"made for sources \(2, 0\), found \(1, 0\)"):
        predictor_coefficients(fit, (), 3, (1, 0))


@QUICK
@given(SEEDS)
def test_squared_errors_are_those_of_the_vectors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, 10, 7))
    grams = rows @ rows.transpose(0, 2, 1)
    steps, sources, factors = np.array([4, 3]), np.array([[3, 1], [2, 0]]), rng.normal(size=(2, 3))
    read = regressors(steps, sources, 5, latents=True)
    made = list(zip(steps, read, factors, strict=True))
    direct = [[np.sum((run[s] - c @ run[r]) ** 2) for s, r, c in made] for run in rows]
    assert squared_errors(grams, steps, read, factors) == pytest.approx(np.array(direct), rel=1e-8, abs=1e-8)


@QUICK
@given(SEEDS)
def test_a_fit_beats_what_reads_the_same(seed: int) -> None:
    problem = random_problem(seed, 6)
    errors = {c.name: prediction_error(problem, problem.gram, c, 5, (4, 2, 1)) for c in CANDIDATES}
    slack = 1e-6 * float(problem.gram[:, 5, 5].mean())
    assert errors["fit2+latents"] <= errors["fit2"] + slack
    assert errors["fit3"] <= errors["fit2"] + slack
    assert errors["fit3"] <= errors["forecast2"] + slack
    assert errors["fit2"] <= min(errors["forecast1"], errors["reuse"]) + slack
    assert errors["fit1+latents"] <= errors["reuse"] + slack


def test_a_strong_ridge_falls_back_to_extrapolation() -> None:
    problem = random_problem(3, 6)
    fit = next(candidate for candidate in CANDIDATES if candidate.name == "fit2")
    times, total = np.array(problem.times), problem.gram.sum(axis=0)
    factors = fit.coefficients(times, total, np.array([5]), np.array([[4, 2]]), 1e9)
    straight = predictor_coefficients(Forecast(order=1), problem.times, 5, (4, 2))
    assert tuple(factors[0]) == pytest.approx(straight, rel=1e-4)
