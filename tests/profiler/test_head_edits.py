"""Heads left out and under blocks, against attention with the whole mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ditopt.profiler.head_edits import BlockMask, under_blocks, without_head

TOKENS, BLOCK = 50, 16


@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize("masked", [None, "boolean", "bias", "causal"])
def test_heads_under_blocks_are_attention_with_their_mask(grouped: int, masked: str | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, TOKENS, 8)
    key, values = torch.randn(2, 2, 4 // grouped, TOKENS, 8)
    kept = np.random.default_rng(0).random((4, 4)) < 0.5
    kept[1] = False  # these queries see nothing
    kept[2] = True
    own = None
    if masked == "boolean":
        own = torch.rand(2, 1, 1, TOKENS) < 0.8
    elif masked == "bias":
        own = torch.randn(2, 4, TOKENS, TOKENS)
    causal = masked == "causal"
    given = (query, key, values, own, 0.0, causal, 0.4, grouped > 1)
    dense = F.scaled_dot_product_attention(query, key, values, own, 0.0, causal, scale=0.4, enable_gqa=grouped > 1)
    found = under_blocks({3: BlockMask(kept, BLOCK, BLOCK)})(given, dense)
    wide = torch.from_numpy(kept).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:TOKENS, :TOKENS]
    scores = query[:, 3] @ key[:, 3 // grouped].transpose(1, 2) * 0.4
    if own is not None:
        mine = own[:, 0] if own.shape[1] == 1 else own[:, 3]
        scores = scores.masked_fill(~mine, -torch.inf) if own.dtype == torch.bool else scores + mine
    wide = wide.tril() if causal else wide
    weights = scores.masked_fill(~wide, -torch.inf).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(found[:, 3], weights @ values[:, 3 // grouped], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[:, :3], dense[:, :3])
    assert not found[:, 3, BLOCK : 2 * BLOCK].any()


def test_a_head_left_out_is_zero_and_others_stay() -> None:
    value = torch.randn(1, 3, 5, 2)
    found = without_head(1)((), value)
    assert not found[:, 1].any()
    assert torch.equal(found[:, [0, 2]], value[:, [0, 2]])
