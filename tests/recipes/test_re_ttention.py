"""``re-ttention``: attention scaled by a kept ratio, with a kept residual, against arXiv 2505.22918, equations 5 to 10.

Where ours departs:

- A window is of whole blocks of tokens, not of tokens.
- rho stays as it was kept: the paper adds a ramp-up lambda after each step (0.04 in its code for PixArt); a lambda of 0
  is the first row of its ablation (table 3).
- Full attention comes back in every second or every fourth computed step, in the paper in every fifth.
"""

from __future__ import annotations

import pytest
import torch

from ditopt.kernels.patterns.band import Band
from ditopt.recipes import RECIPES
from tests.recipes.kept_rests import SCALE, generation, profiled, run, tokens_of

WINDOW = Band(width=1.0)


def test_scaled_attention_and_residual_are_the_papers() -> None:
    steps, mask = generation(6), tokens_of(WINDOW)
    rho = residual = torch.empty(0)
    for number, (found, (query, key, value)) in enumerate(zip(run(WINDOW, "ratio", 3, steps), steps, strict=True)):
        a_pre = SCALE * query @ key.T
        largest = a_pre.max(1, keepdim=True).values
        exponentials = torch.exp(a_pre - largest)
        full = exponentials / exponentials.sum(1, keepdim=True)  # equation 4
        inside = exponentials * mask
        sparse = inside / inside.sum(1, keepdim=True)  # equation 5
        if number % 3 == 0:
            rho = inside.sum(1, keepdim=True) / exponentials.sum(1, keepdim=True)  # equation 8
            residual = full @ value - rho * sparse @ value  # equation 10
            torch.testing.assert_close(residual, (full * ~mask) @ value, atol=1e-12, rtol=0)
            torch.testing.assert_close(found, full @ value, atol=1e-12, rtol=0)
        reshaped = rho * sparse  # equation 9
        assert (reshaped.sum(1) < 1).all(), "what is missing of a distribution is what the residual stands for"
        torch.testing.assert_close(found, reshaped @ value + residual, atol=1e-12, rtol=0)


def test_where_nothing_moves_it_is_full_attention() -> None:
    steps = generation(1) * 4
    found = run(WINDOW, "ratio", 4, steps)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], atol=1e-12, rtol=0)


def test_profiles_measure_it_and_the_first_steps_are_dense() -> None:
    choices = profiled("re-ttention")
    assert {type(each.pattern) for each in choices} == {Band}
    assert {(each.kept.form, each.kept.refresh) for each in choices if each.kept} == {("ratio", 2), ("ratio", 4)}
    recipe = RECIPES["re-ttention"]
    assert recipe.alike and recipe.dense_first == pytest.approx(15 / 50), "CogVideoX: 15 of 50 steps"
