"""``flashblock``: outputs of tokens inside and outside merged by their log-normalisers, against arXiv 2602.05305.

Where ours departs:

- The paper's models denoise a video block by block, so that keys outside a block do not change within its steps: only
  queries move. Here all tokens are denoised together; a query's block is its own frame, and keys outside move, too.
- What is outside is computed in every second or every fourth computed step; in the paper once for a block's steps, or
  again where the inside has changed by more than a threshold.
"""

from __future__ import annotations

import torch

from ditopt.kernels.patterns.spatial import Spatial
from ditopt.recipes import RECIPES
from tests.recipes.kept_rests import GEOMETRY, SCALE, Step, generation, profiled, run, tokens_of

FRAME = Spatial()


def with_normaliser(step: Step, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and L of some tokens: what attention to them alone gives, and the logarithm of the softmax's sum."""
    query, key, value = step
    scores = (SCALE * query @ key.T).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1, keepdim=True)


def merged(inside: tuple[torch.Tensor, torch.Tensor], outside: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(exp(L_in) A_in + exp(L_out) A_out) / (exp(L_in) + exp(L_out)), with the larger L taken out."""
    largest = torch.maximum(inside[1], outside[1])
    of_inside, of_outside = (torch.exp(each[1] - largest) for each in (inside, outside))
    return (of_inside * inside[0] + of_outside * outside[0]) / (of_inside + of_outside)


def test_inside_and_kept_outside_are_merged_as_the_paper_has_it() -> None:
    steps, mask = generation(6), tokens_of(FRAME)
    for number, found in enumerate(run(FRAME, "merge", 3, steps)):
        outside = with_normaliser(steps[number // 3 * 3], ~mask)
        torch.testing.assert_close(found, merged(with_normaliser(steps[number], mask), outside), atol=1e-12, rtol=0)
        dense, _ = with_normaliser(steps[number], torch.ones_like(mask))
        apart = float((found - dense).abs().max())
        assert apart < 1e-12 if number % 3 == 0 else apart > 1e-3


def test_it_is_exact_where_the_outside_does_not_move() -> None:
    """As between blocks that are done: queries of one frame and its keys move, other frames' keys and values stay."""
    (query, key, value), (_, later_key, later_value) = generation(2)
    frame = slice(0, GEOMETRY.rows * GEOMETRY.columns)
    moved_key, moved_value = key.clone(), value.clone()
    moved_key[frame], moved_value[frame] = later_key[frame], later_value[frame]
    found = run(FRAME, "merge", 2, [(query, key, value), (query, moved_key, moved_value)])[1]
    dense, _ = with_normaliser((query, moved_key, moved_value), torch.ones(GEOMETRY.tokens, GEOMETRY.tokens) > 0)
    torch.testing.assert_close(found[frame], dense[frame], atol=1e-12, rtol=0)


def test_profiles_measure_it() -> None:
    choices = profiled("flashblock")
    assert {type(each.pattern) for each in choices} == {Spatial} and RECIPES["flashblock"].alike
    assert {(each.kept.form, each.kept.refresh) for each in choices if each.kept} == {("merge", 2), ("merge", 4)}
