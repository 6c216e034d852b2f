"""``magcache``: which steps are skipped, against the rule of arXiv 2506.09045 as its code has it, step by step.

Where ours departs:

- Magnitudes are norms of the whole residual of the guided combination, averaged over prompts; the paper averages the
  ratios of token norms of one prompt, of each branch by itself (the same for one token and one branch, as here).
- Threshold and K are chosen by the search.
- As in the code the kept residual is added as it is: ratios decide when, they do not scale it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ditopt.decisions import Reuse
from ditopt.recipes import RECIPES
from ditopt.step_rules import THRESHOLDS, accumulated, magnitude_ratios
from tests.recipes.loops import carried_out, gram_of, walk

RETENTION = 0.2


def calibrated(residuals: np.ndarray) -> list[float]:
    """The ratio of every step's magnitude to that of the step before, of residuals ``[T, tokens, channels]``."""
    ratios = [1.0]
    for before, now in pairwise(residuals):
        ratios.append(float((np.linalg.norm(now, axis=-1) / np.linalg.norm(before, axis=-1)).mean()))
    return ratios


def magcache(residuals: np.ndarray, ratios: list[float], threshold: float, k: int) -> tuple[np.ndarray, list[int]]:
    """What is added to the stream in every step, and the steps that are computed."""
    accumulated_ratio, accumulated_err, accumulated_steps = 1.0, 0.0, 0
    cache, found, computed = residuals[0], [], []
    for step, residual in enumerate(residuals):
        skip = False
        if step >= int(RETENTION * len(residuals)):
            accumulated_ratio = accumulated_ratio * ratios[step]
            accumulated_steps += 1
            accumulated_err += np.abs(1 - accumulated_ratio)
            if accumulated_err <= threshold and accumulated_steps <= k:
                skip = True
            else:
                accumulated_ratio, accumulated_err, accumulated_steps = 1.0, 0.0, 0
        if not skip:
            cache = residual
            computed.append(step)
        found.append(cache)
    return np.array(found), computed


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("threshold", [0.01, 0.04, 0.12, 0.24])
def test_the_steps_that_are_skipped_are_the_systems(threshold: float, k: int) -> None:
    (features,) = walk(25, prompts=1)
    residuals = features[:, None]  # one token
    ratios = calibrated(residuals)
    np.testing.assert_allclose(magnitude_ratios(gram_of(features[None])), ratios, rtol=1e-9)
    expected, computed = magcache(residuals, ratios, threshold, k)
    kept = accumulated(ratios, int(RETENTION * 25), threshold, k)
    assert list(kept) == computed
    np.testing.assert_allclose(carried_out(Reuse(), kept, features), expected[:, 0])


def test_a_feature_that_keeps_its_magnitude_is_skipped_up_to_k_times() -> None:
    assert accumulated([1.0] * 12, 2, 0.01, 3) == (0, 1, 5, 9)
    falling = [1.0] * 6 + [0.8] * 6
    assert accumulated(falling, 2, 0.3, 6) == (0, 1, 7, 9, 11), "0.2, and 0.2 + 0.36 is too much"


def test_the_recipes_schedules_are_those_of_its_thresholds_and_k() -> None:
    loop, features = RECIPES["magcache"].loop, walk(25)
    assert loop is not None and loop.predictors == ("reuse",)
    found = {*loop.steps.schedules(gram_of(features))}
    ratios = [float(each) for each in np.mean([calibrated(each[:, None]) for each in features], axis=0)]
    expected = {
        tuple(magcache(features[0][:, None], ratios, float(threshold), k)[1])
        for threshold in THRESHOLDS
        for k in (2, 3, 4, 5, 6)
    }
    assert found == expected and len(found) > 8 and all(kept[:5] == tuple(range(5)) for kept in found)
