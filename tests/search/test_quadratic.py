"""The closed form of a whole schedule's error equals a simulation with explicit vectors; its search only improves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from ditopt.decisions import Predictor
from ditopt.search import predictor_coefficients, solve_kept
from ditopt.search.quadratic import Quadratic, descend
from ditopt.search.table import with_histories
from tests.search.problems import SEEDS, random_problem

QUICK = settings(deadline=None, max_examples=20)


@QUICK
@given(SEEDS)
def test_the_quadratic_form_is_the_simulated_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, 14, 20))
    grams = rows @ rows.transpose(0, 2, 1)
    problem = dataclasses.replace(random_problem(seed, 7), gram=grams, ridge=1e-3, sample_norm=2.0)
    solution = solve_kept(problem, 3)
    finals = np.zeros((3, 20))
    for rule in solution.rules:
        assert isinstance(rule.do, Predictor)
        for step in rule.steps:
            history = with_histories(solution.kept, 7)[step]
            factors = predictor_coefficients(rule.do, problem.times, step, history)
            read = [*history[: rule.do.history], 7 + step]
            predicted = sum(c * rows[:, r] for c, r in zip(factors, read, strict=False))
            finals += problem.widths[step] * problem.sensitivity[step] * (rows[:, step] - predicted)
    families = {step: problem.candidates.index(c) for step, c in solution.draft.families.items()}
    coherent = Quadratic(problem, problem.table, coherence=1.0).error(solution.kept, families)
    assert coherent == pytest.approx(np.sqrt(np.mean(np.sum(finals**2, axis=1))) / 2.0, rel=1e-6)


@QUICK
@given(SEEDS)
def test_the_local_search_never_worsens_its_start(seed: int) -> None:
    problem = random_problem(seed, 8)
    quadratic = Quadratic(problem, problem.table)
    start = (0, 1, 2, 3)
    families = {step: problem.table.best(step, past)[1] for step, past in with_histories(start, 8).items()}
    kept, _, error = descend(quadratic, start)
    assert len(kept) == 4 and kept[0] == 0
    assert error <= quadratic.error(start, families) * (1 + 1e-9)
