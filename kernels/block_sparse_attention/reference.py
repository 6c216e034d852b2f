"""What the kernels of ``ditopt::block_sparse_attention`` have to give, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.int8 import check_int8, int8_scores
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, check, check_entries
from ditopt.kernels.block_sparse_attention.masks import biased
from ditopt.kernels.block_sparse_attention.pooled import FIRST_ORDER, PooledRest, check_pooled, moments


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    scale: float,
    rest: PooledRest | None = None,
    mask: Tensor | None = None,
    int8: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the listed keys of ``scale * query key^T``, times ``value``; and the log of the softmax's sum.

    ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]`` -> ``[B, H, S, E]`` and ``[B, H, S]``, in the operands'
    dtype (float64 for an oracle, and of the log under a mask). A query without any listed key has a result of zero and
    a log of -inf. What is not listed does not matter, NaN included, but by its means where ``rest`` gives them to the
    head: these are further keys of the softmax, each as often as it has tokens, and to first order where it says so
    (``moments``). A ``mask`` that broadcasts to ``[B, H, S, L]``, without a rest, is true for keys that a query may
    attend to, or is added to scores (``masks.biased``). ``int8`` ``[H]`` is not 0 for heads whose scores of keys are
    ``int8_scores``.

    Raises:
        ValueError: lists do not fit the operands, or an entry is wrong.
    """
    batch, heads, queries, _ = query.shape
    wrong = check(lists, batch, heads, queries) or check_entries(lists, key.shape[2])
    if wrong is None and rest is not None:
        wrong = check_pooled(rest, key, value, lists, heads)
    if wrong is None and int8 is not None:
        wrong = check_int8(int8, heads)
    if wrong is None and (key.shape[1] == 0 or heads % key.shape[1]):
        wrong = f"heads do not match: {heads} of queries, {key.shape[1]} of keys"
    if wrong is not None:
        raise ValueError(wrong)
    group = query.shape[1] // key.shape[1]
    linear = None
    if rest is not None:
        of_heads = moments(key, value, rest.pool, key.dtype).repeat_interleave(group, dim=1)
        linear = scale * query @ of_heads * (rest.heads == FIRST_ORDER)[:, None, None]
    own = key
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    keys = key.shape[2]
    listed = lists.to_map(blocks(keys, lists.key_block)).repeat_interleave(lists.query_block, dim=-2)[..., :queries, :]
    attended = listed.repeat_interleave(lists.key_block, dim=-1)[..., :keys]
    scores = scale * query @ key.transpose(-2, -1)
    if int8 is not None:
        found = scale * int8_scores(query, own, lists.key_block)
        scores = torch.where((int8 != 0)[:, None, None], found, scores)
    if mask is not None and mask.dtype == torch.bool:
        attended = attended & mask
    elif mask is not None:
        attended = attended & (mask != -torch.inf)
        scores = biased(scores, mask, scale)
    if rest is not None:
        means, values = (part.repeat_interleave(group, dim=1) for part in (rest.key, rest.value))
        counts = (keys - rest.pool * torch.arange(means.shape[2])).clamp(max=rest.pool).to(scores)
        scores = torch.cat([scores, scale * query @ means.transpose(-2, -1) + counts.log()], -1)
        groups = listed.repeat_interleave(lists.key_block // rest.pool, dim=-1)[..., : means.shape[2]]
        attended = torch.cat([attended, ~groups & (rest.heads != 0)[:, None, None]], -1)
        value = torch.cat([value, values], 2)
    scores = scores.masked_fill(~attended, -torch.inf)
    logs = torch.logsumexp(scores if mask is None else scores.double(), dim=-1)
    shares = torch.softmax(scores, dim=-1).masked_fill(~attended, 0.0)  # a row of -inf alone gives NaN
    if value.isfinite().all():
        out = shares @ value
    else:  # zero times what is not finite would be NaN where it is not listed
        products = (shares[..., None] * value[:, :, None]).masked_fill(~attended[..., None], 0.0)
        out = products.sum(-2)
    return (out if linear is None else out + shares[..., keys:].sum(-1, keepdim=True) * linear), logs
