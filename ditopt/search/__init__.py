"""The search: measured numbers in, rules out. Pure numpy; no torch, no model, no graph."""

from ditopt.search.bisect import Found, bisect_kept, bisect_lambda, lambda_range
from ditopt.search.joint import from_kept, least_kept, solve, solve_kept
from ditopt.search.predictors import predictor_coefficients
from ditopt.search.problem import RangeProblem, SearchProblem
from ditopt.search.refine import refine
from ditopt.search.rollouts import Measurement, Rollouts, Trial
from ditopt.search.solution import Explanation, Rival, Solution
from ditopt.search.space import CANDIDATES, TECHNIQUES, Candidate, StepChoice

__all__ = [
    "CANDIDATES", "TECHNIQUES", "Candidate", "Explanation", "Found", "Measurement", "RangeProblem", "Rival", "Rollouts",
    "SearchProblem", "Solution", "StepChoice", "Trial", "bisect_kept", "bisect_lambda", "from_kept", "lambda_range",
    "least_kept", "predictor_coefficients", "refine", "solve", "solve_kept",
]  # fmt: skip
