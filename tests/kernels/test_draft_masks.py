"""Lists that are found in a call under a mask: what it hides from a block of queries is in none of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.draft import block_bias, draft_lists
from ditopt.kernels.block_sparse_attention.lists import BlockLists

QUERY_BLOCK, KEY_BLOCK, QUERIES, KEYS = 64, 16, 150, 100


def drafted(mask: Tensor | None, keep: tuple[int, int] = (3, 0), keys: int = KEYS) -> Tensor:
    """``[2, 2, 3, Kb]``: blocks of two samples and heads, of which the first is always given; the second finds none."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, QUERIES, 8, generator=generator), torch.randn(2, 2, KEYS, 8, generator=generator)
    count = -(-keys // KEY_BLOCK)
    always = torch.zeros(1, 2, 3, count, dtype=torch.bool)
    always[..., 0] = True
    lists = BlockLists.from_map(always, QUERY_BLOCK, KEY_BLOCK, count)
    limits = (torch.tensor(keep, dtype=torch.int32), torch.full((2,), math.inf))
    given = (lists.indices, lists.counts, *limits, QUERY_BLOCK, KEY_BLOCK, 1.0)
    indices, counts = draft_lists(query, key[:, :, :keys], *given, mask=mask)
    return BlockLists(indices, counts, QUERY_BLOCK, KEY_BLOCK).to_map(count)


@pytest.mark.parametrize("added", [False, True])
def test_hidden_blocks_are_not_chosen_and_others_in_their_place(added: bool) -> None:
    shown = torch.arange(KEYS) < 48
    mask = torch.zeros(KEYS).masked_fill(~shown, -math.inf) if added else shown
    found = drafted(mask)
    assert not found[:, 0, :, 3:].any() and (found[:, 0].sum(-1) == 3).all(), "all that is left"
    assert drafted(None)[:, 0, :, 3:].any(), "without the mask they are"
    assert torch.equal(drafted(mask, keep=(2, 0))[..., :3], drafted(None, keep=(2, 0), keys=48))


def test_masks_of_samples_heads_and_queries_hide_from_their_own() -> None:
    mask = torch.ones(2, 2, QUERIES, KEYS, dtype=torch.bool)
    mask[1, 0, 64:128, 16:] = False
    mask[1, 0, 100, 40] = True  # one query still sees one key of block 2
    found = drafted(mask)
    assert found[1, 0, 1].nonzero().flatten().tolist() == [0, 2]
    plain = drafted(None)
    others = [(0, 0, 1), (1, 0, 0), (1, 0, 2)]
    assert all(torch.equal(found[at], plain[at]) for at in others)


def test_what_is_given_is_left_out_where_it_is_hidden_but_of_heads_that_find_nothing() -> None:
    found = drafted(torch.zeros(1, 1, 1, KEYS, dtype=torch.bool))
    assert not found[:, 0].any() and found[:, 1, :, 0].all()


def test_a_bias_counts_in_the_choice() -> None:
    mask = torch.full((KEYS,), -1e9)
    mask[64:] = 0.0
    found = drafted(mask, keep=(4, 0))
    assert found[:, 0, :, 4:].all() and (found[:, 0].sum(-1) == 4).all(), "the own block and the three without it"


def test_the_bias_of_a_block_is_the_most_of_its_tokens() -> None:
    mask = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(0))
    found = block_bias(mask, QUERY_BLOCK, KEY_BLOCK, QUERIES, KEYS)
    assert found.shape == (1, 1, 3, 7)
    for row in range(3):
        for column in range(7):
            part = mask[64 * row : 64 * (row + 1), 16 * column : 16 * (column + 1)]
            assert found[0, 0, row, column] == part.max()


def test_a_mask_of_other_tokens_is_told() -> None:
    with pytest.raises(ValueError, match=r"ditopt::draft_lists: a mask of shape \[99\] does not broadcast"):
        drafted(torch.ones(99, dtype=torch.bool))
