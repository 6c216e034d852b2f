"""``cachequant-schedule``: segments against every segmentation there is, by the objective of arXiv 2503.01323.

Where ours departs:

- Distances of features are L2 norms (of the guided combination, averaged over prompts), not L1.
- The correction is one factor for all channels, without an offset; the paper has both for every channel.
- The paper's quantisation is no part of it.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ditopt.recipes import RECIPES
from ditopt.search.space import CANDIDATES
from ditopt.step_rules import cut_into, distances
from tests.recipes.loops import gram_of, walk


def best_segments(features: np.ndarray, count: int) -> tuple[float, tuple[int, ...] | None]:
    """The least sum over segments of ``|F_t - F_first|``, and their first steps, by trying all of them."""
    steps = features.shape[1]
    best: tuple[float, tuple[int, ...] | None] = (np.inf, None)
    for rest in combinations(range(1, steps), count - 1):
        firsts = (0, *rest)
        ends = (*rest, steps)
        lengths = [end - first for first, end in zip(firsts, ends, strict=True)]
        if not all(steps / count / 2 <= length <= 2 * steps / count for length in lengths):
            continue
        cost = 0.0
        for first, end in zip(firsts, ends, strict=True):
            for step in range(first, end):
                cost += float(np.mean([np.linalg.norm(each[step] - each[first]) for each in features]))
        if cost < best[0] - 1e-12:
            best = cost, firsts
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_programme_finds_the_best_segments(seed: int) -> None:
    features = walk(11, seed=seed)
    loop = RECIPES["cachequant-schedule"].loop
    assert loop is not None
    by_size = {len(kept): kept for kept in loop.steps.schedules(gram_of(features))}
    for count in range(1, 11):
        cost, firsts = best_segments(features, count)
        assert by_size.get(count) == firsts, (count, cost)
    assert {2, 3, 5} <= by_size.keys()


def test_distances_are_those_of_the_features() -> None:
    features = walk(6)
    found = distances(gram_of(features))
    for one in range(6):
        for two in range(6):
            expected = np.mean([np.linalg.norm(each[one] - each[two]) for each in features])
            assert found[one, two] == pytest.approx(expected, abs=1e-6)


def test_lengths_bind_the_segments() -> None:
    costs = np.zeros((10, 10))
    costs[:6, :] = 5.0
    np.fill_diagonal(costs, 0.0)
    assert cut_into(costs, 3, 1, 10) != cut_into(costs, 3, 3, 4)
    assert cut_into(costs, 3, 4, 4) is None, "three segments of four steps are not ten"


def test_the_correction_is_the_least_squares_factor() -> None:
    """``a = <F_t, F_s> / <F_s, F_s>`` over all prompts: CacheQuant's with one channel that has no mean."""
    (fit,) = (each for each in CANDIDATES if each.name in RECIPES["cachequant-schedule"].loop.predictors)  # type: ignore[union-attr]
    features = walk(8)
    gram = gram_of(features).sum(axis=0)
    found = fit.coefficients(np.linspace(1, 0, 8), gram, np.array([5]), np.array([[3]]), 0.0)
    factor = float((features[:, 5] * features[:, 3]).sum() / (features[:, 3] ** 2).sum())
    assert found[0] == pytest.approx([factor], rel=1e-6) and fit.history == 1 and not fit.latents
