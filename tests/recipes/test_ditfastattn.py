"""``ditfastattn``: windows with the residual of a full step against DiTFastAttn (arXiv 2406.08552, section 3.2).

Where ours departs:

- A window is of whole blocks of tokens, not of tokens; it holds every pair of the paper's window of its width.
- Full attention comes back in every second or every fourth computed step; in the paper a greedy search under a bound of
  the output's error tells layer by layer which of full attention, window with residual and sharing each step has.
- Attention sharing across timesteps is the form ``skip``: all of the output is kept, behind the heads' projection in
  the paper and before it here, which is the same. Nothing is shared between guidance branches.
"""

from __future__ import annotations

import torch

from ditopt.kernels.patterns.band import Band
from ditopt.kernels.patterns.whole import Nothing
from ditopt.recipes import RECIPES
from tests.recipes.kept_rests import GEOMETRY, SCALE, Step, generation, profiled, run, tokens_of

WINDOW = Band(width=1.0)


def window(step: Step, mask: torch.Tensor) -> torch.Tensor:
    query, key, value = step
    scores = (SCALE * query @ key.T).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def test_windows_with_the_residual_are_the_papers() -> None:
    """R_r = O_r - W_r in a full step r; O_k = W_k + R_r in those behind it."""
    steps, mask = generation(6), tokens_of(WINDOW)
    everything = torch.ones_like(mask)
    for step, found in enumerate(run(WINDOW, "residual", 3, steps)):
        full = step // 3 * 3
        residual = window(steps[full], everything) - window(steps[full], mask)
        torch.testing.assert_close(found, window(steps[step], mask) + residual, atol=1e-12, rtol=0)
        apart = float((found - window(steps[step], everything)).abs().max())
        assert apart < 1e-12 if step == full else apart > 1e-3
        assert (found - window(steps[step], mask)).abs().max() > 0.1, "the residual matters"


def test_the_papers_window_is_within_the_blocks() -> None:
    place = torch.arange(GEOMETRY.tokens)
    near = (place[:, None] - place).abs() <= WINDOW.width * GEOMETRY.columns
    assert (tokens_of(WINDOW) | near == tokens_of(WINDOW)).all()


def test_a_skipped_head_shares_its_output_across_steps() -> None:
    steps = generation(4)
    found = run(Nothing(), "residual", 2, steps)
    assert torch.equal(found[1], found[0]) and torch.equal(found[3], found[2])
    torch.testing.assert_close(found[2], window(steps[2], torch.ones(GEOMETRY.tokens, GEOMETRY.tokens) > 0))


def test_profiles_measure_it() -> None:
    choices = profiled("ditfastattn")
    assert {type(each.pattern) for each in choices} == {Band, Nothing}
    assert {each.kept.refresh for each in choices if each.kept} == {2, 4} and RECIPES["ditfastattn"].alike
    assert {each.kept.form for each in choices if each.kept} == {"residual"}
