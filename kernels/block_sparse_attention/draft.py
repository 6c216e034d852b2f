"""``ditopt::draft_lists``: lists of blocks that are found in the call itself, from its queries, keys and values.

The draft of an attention map is a score for each of its blocks (``selectors``): those that score highest are attended
to. Plain torch, for any device; nothing waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, check_entries
from ditopt.kernels.block_sparse_attention.selectors import draft_scores
from ditopt.kernels.ops import LIBRARY, draft_refusal, selectors_of
from ditopt.kernels.patterns.draft import SELECTORS


def draft_map(scores: Tensor, always: Tensor, keep: Tensor, mass: Tensor) -> Tensor:
    """``[B, H, Qb, Kb]`` boolean: the blocks that every head attends to, given ``scores`` (of all heads, or of one).

    They are those of ``always`` (broadcast to the scores), and behind them the highest scores, of equal ones the first,
    up to ``keep`` ``[H]`` blocks in all, and no more than it takes for a share of ``mass`` ``[H]`` of the softmax of
    the row's scores; a mass of infinity sets no such limit. With ``keep`` 0 they are ``always``. A score of -inf is
    that of a block which has nothing: but for ``always`` it is not attended to.
    """
    first = scores.masked_fill(always, torch.inf)
    order = first.sort(dim=-1, descending=True, stable=True).indices
    shares = scores.softmax(-1).gather(-1, order)
    before = shares.cumsum(-1) - shares
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    taken = (ranks < keep[:, None, None]) & (before < mass[:, None, None]) & (first.gather(-1, order) != -torch.inf)
    return torch.zeros_like(taken).scatter(-1, order.expand_as(taken), taken) | always


def block_bias(mask: Tensor, query_block: int, key_block: int, queries: int, keys: int) -> Tensor:
    """``[B or 1, H or 1, Qb or 1, Kb or 1]`` float32: the most that a mask adds to a score of each block.

    ``mask`` is as ``ditopt::block_sparse_attention`` takes it; it is -inf where it hides a block from all its queries.
    """
    found = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        found = torch.zeros(found.shape, device=mask.device).masked_fill(~found, -torch.inf)
    for dim, block, tokens in ((2, query_block, queries), (3, key_block, keys)):
        if found.shape[dim] > 1:
            missing = blocks(tokens, block) * block - tokens
            behind = (0, 0, 0, missing) if dim == 2 else (0, missing)
            found = F.pad(found, behind, value=-torch.inf).unflatten(dim, (-1, block)).amax(dim + 1)
    return found.float()


def draft_lists(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    counts: Tensor,
    keep: Tensor,
    mass: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    value: Tensor | None = None,
    by: Tensor | None = None,
    selectors: str = "means",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists for ``ditopt::block_sparse_attention``: those that are given, and of each head what ``draft_map`` adds.

    ``[B, H, S, D]`` and ``[B, Hkv, L, D]``; ``indices`` ``[B or 1, H, Qb, W]`` and ``counts`` ``[B or 1, H, Qb]`` int32
    name what is attended to whatever the scores; ``keep`` ``[H]`` int32 and ``mass`` ``[H]`` float32 are as in
    ``draft_map``, with at most W blocks, or all. A head with ``keep`` 0 has the lists that are given. The result is
    ``[B, H, Qb, W]`` and ``[B, H, Qb]`` int32, in ascending order; behind a list's count there is 0.

    ``selectors`` are all that some head's blocks are chosen by, with commas between them; no other is computed. Where
    there are several, ``by`` ``[H]`` int32 is every head's place in ``patterns.draft.SELECTORS``. ``error`` reads
    ``value`` ``[B, Hkv, L, E]``. A ``mask`` of the attention that follows adds to the scores what it adds to a block at
    most; a block that it hides from all of its queries is in no list of a head that finds its own.

    Raises:
        ValueError: shapes or dtypes do not fit; on processors also: an entry of a list is wrong.
    """
    lists = BlockLists(indices, counts, query_block, key_block)
    width, key_blocks = indices.shape[-1], blocks(key.shape[-2], key_block)
    refused = draft_refusal(query, key, lists, keep, mass, scale, value, by, selectors, mask)
    if refused is None and indices.device.type == "cpu":
        refused = check_entries(lists, key.shape[-2]) or _check_codes(by, selectors)
    if refused is not None:
        raise ValueError(f"ditopt::draft_lists: {refused}")
    scores = draft_scores(query, key, query_block, key_block, scale, value, by, selectors_of(selectors))
    always = lists.to_map(key_blocks)
    if mask is not None:
        bias = block_bias(mask, query_block, key_block, query.shape[-2], key.shape[-2])
        scores = scores + bias
        always = always & ((bias != -torch.inf) | (keep == 0)[:, None, None])
    attended = draft_map(scores, always, keep.clamp(max=width), mass)
    places = attended.cumsum(-1, dtype=torch.int32)
    # what is not attended to goes behind the lists, and off; so does what is not read of lists of all blocks
    to = torch.where(attended, places - 1, width).clamp(max=width).long()
    numbers = torch.arange(key_blocks, dtype=torch.int32, device=indices.device).expand(attended.shape)
    found = indices.new_zeros((*attended.shape[:-1], width + 1)).scatter(-1, to, numbers)
    return found[..., :width].contiguous(), places[..., -1].contiguous()


def _check_codes(by: Tensor | None, selectors: str) -> str | None:
    """What is wrong with heads' codes; None if nothing is, or they are not read."""
    known = [SELECTORS.index(each) for each in selectors_of(selectors)]
    wrong = (
        [] if by is None or len(known) == 1 else [head for head, code in enumerate(by.tolist()) if code not in known]
    )
    if not wrong:
        return None
    told = ", ".join(f"{SELECTORS[code]} ({code})" for code in known)
    return f"head {wrong[0]} is to choose by {int(by[wrong[0]])}; what is computed is {told}"  # type: ignore[index]


LIBRARY.impl("draft_lists", draft_lists, "CompositeExplicitAutograd")
