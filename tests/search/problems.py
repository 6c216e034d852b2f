"""Random search problems for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ditopt.search import RangeProblem, SearchProblem

SEEDS = st.integers(0, 2**31)


def random_problem(
    seed: int, steps: int, additive: str = "squares", techniques: tuple[str, ...] = ("reuse", "forecast", "fit"),
    ranges: int = 0, ridge: float = 0.0, prompts: int = 2, size: int = 9,
) -> SearchProblem:  # fmt: skip
    """Features on a random walk, so that neighbours resemble each other; non-uniform falling times."""
    rng = np.random.default_rng(seed)
    times = tuple(np.cumsum(rng.uniform(0.2, 1.0, steps))[::-1].tolist())
    gram = np.array([_gram(rng, steps, size) for _ in range(prompts)])
    sites = {}
    for i in range(ranges):
        first, last = 2 * i, 2 * i + 1 + (i % 2)
        name = f"blocks.{first}..{last}"
        values = np.array([_gram(rng, steps, size)[:steps, :steps] for _ in range(prompts)])
        saved = float(rng.uniform(0.1, 0.4))
        sites[name] = RangeProblem(name, values, rng.uniform(0.05, 0.5, steps), saved, (0, first), (0, last))
    return SearchProblem(
        times, rng.uniform(0.5, 1.5, steps), rng.uniform(0.5, 2.0, steps), gram, 1.0, 0.1, sites, techniques,
        "norms" if additive == "norms" else "squares", ridge,
    )  # fmt: skip


def _gram(rng: np.random.Generator, steps: int, size: int) -> np.ndarray:
    features = rng.normal(size=size) + np.cumsum(rng.normal(size=(steps, size)), axis=0) * rng.uniform(0.1, 0.6)
    latents = rng.normal(size=(steps, size))
    rows = np.concatenate([features, latents])
    return np.asarray(rows @ rows.T)
