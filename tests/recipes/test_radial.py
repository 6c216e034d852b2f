"""``radial``: our mask against the paper's (arXiv 2506.19852, equation 4 and the sink), pair by pair of tokens.

Where ours departs:

- ``|k - l| <= s / 2^m`` in place of ``|k - l| + 1 <= s / 2^m``: diagonals are one token wider on either side.
- Where a diagonal would be narrower than one token (``2^m > s``) the paper keeps it in every ``2^m / s``-th frame only;
  ours in all frames. No video has as many frames as a frame has tokens.
- Blocks are of 64 tokens, the paper's of 128, and hold every pair of the mask; the paper's code drops blocks of which
  the mask fills little.
- A share ``width`` scales all diagonals (the code's ``decay_factor``); the paper's mask is that of width 1, with the
  first frame as a sink.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.reference import block_sparse_attention
from ditopt.kernels.patterns.candidates import candidates
from ditopt.kernels.patterns.radial import Radial
from ditopt.kernels.patterns.registry import pattern_to_data
from ditopt.kernels.patterns.sink import Sink
from ditopt.kernels.patterns.union import Union
from ditopt.recipes import RECIPES

PAPERS = Union(of=(Radial(width=1.0), Sink(frames=1)))


def equation_4(frames: int, s: int, sink: bool = True) -> np.ndarray:
    """``[f s, f s]``: true where the paper's mask is 0, and for keys of the first frame."""
    mask = np.zeros((frames * s, frames * s), dtype=bool)
    for i, j in itertools.product(range(frames), repeat=2):
        power = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
        for k, l in itertools.product(range(s), repeat=2):  # noqa: E741  # the paper's name
            wide = power <= s and abs(k - l) + 1 <= s / power
            thinned = abs(i - j) % math.ceil(power / s) == 0 and k == l
            mask[i * s + k, j * s + l] = wide or thinned or (sink and j == 0)
    return mask


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 3, 5), (2, 4, 4), (6, 4, 7), (9, 2, 6), (17, 3, 3)])
def test_the_mask_is_the_papers_but_for_a_token_on_either_side(frames: int, rows: int, columns: int) -> None:
    geometry, s = Geometry(frames, rows, columns), rows * columns
    ours, papers = PAPERS.block_map(geometry, 1), equation_4(frames, s)
    assert (ours | papers == ours).all(), "nothing that the paper computes is left out"
    places = np.argwhere(ours & ~papers)
    for one, two in places:
        power = 2 ** math.floor(math.log2(max(abs(one // s - two // s), 1)))
        assert abs(one % s - two % s) == s // power or power > s, "one token more, or a diagonal that is thinned there"
    if frames == 6:
        assert len(places) > 0


def test_diagonals_shrink_with_the_distance_of_frames() -> None:
    s = 24
    kept = Radial(width=1.0).block_map(Geometry(9, 4, 6), 1)
    reach = [max(l for l in range(s) if kept[0, j * s + l]) for j in range(9)]  # noqa: E741  # the paper's name
    assert reach == [23, 23, 12, 12, 6, 6, 6, 6, 3]


def test_attention_under_its_blocks_is_that_of_the_mask_where_blocks_are_tokens_apart() -> None:
    """Lists of blocks against a softmax over the paper's mask, widened to whole blocks pair by pair."""
    geometry, block = Geometry(6, 4, 8), 16
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, geometry.tokens, 16, generator=generator)
    ours = torch.from_numpy(PAPERS.block_map(geometry, block))
    lists = BlockLists.from_map(ours[None, None].repeat(1, 2, 1, 1), block, block)
    found, _ = block_sparse_attention(query, key, value, lists, 0.25)
    papers = torch.from_numpy(equation_4(6, 32))
    blocks = papers.view(12, block, 12, block).any(3).any(1)
    wider = ours & ~blocks
    assert (ours | blocks == ours).all() and wider.float().mean() < 0.1
    mask = (blocks | wider).repeat_interleave(block, 0).repeat_interleave(block, 1)
    scores = (query.double() @ key.double().transpose(-2, -1) * 0.25).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(found.double(), scores.softmax(-1) @ value.double(), atol=1e-5, rtol=1e-5)


def test_the_papers_mask_is_among_the_candidates_of_the_recipe() -> None:
    tried = candidates(Geometry(6, 28, 28))
    assert PAPERS in tried
    allowed = [each for each in tried if RECIPES["radial"].allows(str(pattern_to_data(each)).replace("'", '"'))]
    assert PAPERS in allowed and Radial(width=0.25) in allowed and len(allowed) == 4
    assert RECIPES["radial"].alike and RECIPES["radial"].dense_first == pytest.approx(12 / 50)
