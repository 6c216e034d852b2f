"""Times self-attention by itself, dense and block-sparse at several densities, and what heads share: ``latency``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import ditopt.kernels.block_sparse_attention.draft
import ditopt.kernels.flash_attention.cpu  # noqa: F401  # both register what is timed
from ditopt.cost_models.measured import FORMS
from ditopt.cost_models.sparse import CLUSTERS, INT8, ORDERED, TIMED
from ditopt.kernels.block_sparse_attention.clusters import cluster_order
from ditopt.kernels.block_sparse_attention.cpu import add_first_order
from ditopt.kernels.block_sparse_attention.int8 import mean_of
from ditopt.kernels.block_sparse_attention.kept import MERGE
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, kernel_blocks
from ditopt.kernels.block_sparse_attention.pooled import pool_tokens
from ditopt.kernels.ops import (
    ADD_REST,
    BLOCK_SPARSE_ATTENTION,
    DRAFT_LISTS,
    FLASH_ATTENTION,
    block_sparse_refusal,
    int8_refusal,
)
from ditopt.kernels.patterns.candidates import block_for
from ditopt.kernels.patterns.draft import SELECTORS
from ditopt.measures import Measure, Table
from ditopt.passes._infra import tensor_value
from ditopt.passes.attention import mask_of, scale_of, special_but_mask
from ditopt.passes.flash import flash_refusal
from ditopt.passes.sparse import ROUNDS
from ditopt.profiler.rows import pool_size
from ditopt.profiler.timing import time_in_turn, timed, warmed
from ditopt.runtime.sparse import attention_nodes, places_of
from ditopt.sites import AttentionSite
from ditopt.trace import Trace

DENSITIES = (0.125, 0.25, 0.5, 1.0)
UNEVEN = "uneven"


def attention_latency(trace: Trace, forms: Sequence[str], per_step: float) -> tuple[dict[str, Table], list[str]]:
    """By self-attention site its seconds in a step, and why sites or forms have none.

    ``dense`` ``[form]`` is what attention takes in a step of each of ``forms`` (``form_name``; those that are none are
    passed over); ``sparse`` ``[form, density]`` what block-sparse attention takes whose heads attend to the same share
    of blocks, ``uneven`` ``[form]`` what it takes with one dense head among others (NaN: of fewer than three), whose
    densities are ``budget`` ``[head]``; ``int8`` the same as ``sparse`` with int8 scores (NaN: no kernel has them);
    ``shared`` ``[form, need]`` what finding blocks by each selector, means of what is skipped, their first-order term,
    merging with a rest that was kept, readying keys for int8 scores, an order of tokens for each head, and finding
    clusters take by themselves, for all heads (NaN: not there). Operands are drawn: what attention takes does not
    depend on their values. ``per_step``: calls of the network in a step. Sites of equal shapes are timed once.
    """
    known: dict[object, dict[str, dict[str, float]]] = {}
    found: dict[str, Table] = {}
    reasons: dict[str, None] = {}  # a set in order
    nodes = attention_nodes(trace)
    wanted = {form: settings for form, settings in FORMS.items() if form in forms}
    for name, place in places_of(trace).items():
        if not place.own:
            continue
        refused = special_but_mask(nodes[name])
        if refused is not None:
            reasons[f"{name}: {refused}, which block-sparse attention does not take"] = None
            continue
        seconds: dict[str, dict[str, float]] = {}
        for form, (dtype, simplify) in wanted.items():
            told = (*_operands(nodes[name]), *filter(None, [mask_of(nodes[name])]))
            key = (form, *((tensor_value(each).shape, tensor_value(each).stride()) for each in told))
            if key not in known:
                try:
                    known[key] = {form: _seconds(nodes[name], dtype, simplify)}
                except Exception as error:  # no kernel for dtype or device, or one that does not compile
                    reasons[f"{name}: block-sparse attention in {form} steps was not timed: {error}"] = None
                    known[key] = {}
            seconds |= known[key]
        if seconds:
            found[name] = _table(seconds, per_step, place.site)
    return found, list(reasons)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    query, key, value = node.args[:3]
    return query, key, value  # type: ignore[return-value]  # nodes


def _seconds(node: fx.Node, dtype: str | None, simplify: bool) -> dict[str, float]:
    """Seconds of one call: ``dense``, and by the density of block-sparse attention."""
    query, key, value = (_drawn(tensor_value(each), dtype) for each in _operands(node))
    scale, mask = scale_of(node), _hides_nothing(mask_of(node), query.dtype)
    dense: Callable[[], Tensor]
    if simplify and flash_refusal(node, dtype) is None:
        dense = partial(FLASH_ATTENTION, query, key, value, scale)
    else:
        grouped = query.shape[1] != key.shape[1]
        dense = partial(
            F.scaled_dot_product_attention, query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    contenders: dict[str, Callable[[], Tensor]] = {"dense": dense}
    for share in DENSITIES:
        lists = even_lists(query.shape[1], query.shape[2], key.shape[2], share).to(query.device)
        refused = block_sparse_refusal(query, key, value, lists, scale, mask=mask)
        if refused is not None:
            raise ValueError(refused)
        contenders[f"{share:g}"] = partial(_sparse, query, key, value, lists, scale, mask)
    budgets = uneven_budgets(query.shape[1], query.shape[2], key.shape[2])
    if budgets is not None:
        lists = listed(budgets, query.shape[2], key.shape[2]).to(query.device)
        contenders[UNEVEN] = partial(_sparse, query, key, value, lists, scale, mask)
    contenders |= _shared(query, key, value, scale)
    eight = torch.ones(query.shape[1], dtype=torch.int32, device=query.device)
    for share in DENSITIES if int8_refusal(query.device) is None else ():
        lists = even_lists(query.shape[1], query.shape[2], key.shape[2], share).to(query.device)
        contenders[f"{INT8} {share:g}"] = partial(_sparse, query, key, value, lists, scale, mask, eight)
    with torch.no_grad():
        return time_in_turn({name: warmed(timed(run)) for name, run in contenders.items()})


def _shared(query: Tensor, key: Tensor, value: Tensor, scale: float) -> dict[str, Callable[[], Tensor]]:
    """What heads share, by name: of ``TIMED`` all that there is for these operands."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    width = blocks(keys, kernel_blocks(queries, keys)[1])
    own = even_lists(heads, queries, keys, 1 / width)
    lists = BlockLists.from_map(own.to_map(width), own.query_block, own.key_block, width).to(query.device)
    keep = torch.full((heads,), max(1, width // 4), dtype=torch.int32, device=query.device)
    limits = (keep, torch.full((heads,), torch.inf, device=query.device))
    settings = (lists.query_block, lists.key_block, scale)
    pool = pool_size(lists.key_block)

    def find(by: str) -> Tensor:
        found: Tensor = DRAFT_LISTS(query, key, lists.indices, lists.counts, *limits, *settings, value, None, by)[0]
        return found

    def means() -> Tensor:
        pool_tokens(key, pool)
        return pool_tokens(value, pool)

    def first_order() -> Tensor:
        add_first_order(out, (query, key, value), shares, [*range(heads)], pool, scale)
        return out

    result = query.new_zeros(query.shape[0], queries, heads, value.shape[3]).transpose(1, 2)
    lse = torch.zeros(query.shape[:3], device=query.device)
    merging = torch.full((heads,), MERGE, dtype=torch.int32, device=query.device)
    found: dict[str, Callable[[], Tensor]] = {by: partial(find, by) for by in SELECTORS}
    found["pooled"] = means
    if query.device.type == "cpu":
        out, shares = torch.zeros_like(result), torch.zeros_like(lse)
        found["taylor"] = first_order
    found["kept"] = partial(ADD_REST, result, lse, merging, torch.zeros_like(result), lse)
    if queries == keys:
        order = torch.arange(queries, device=query.device).flip(0).expand(heads, -1).contiguous()
        every = torch.ones(heads, dtype=torch.int32, device=query.device)
        clusters = blocks(queries, lists.key_block)
        found[ORDERED] = partial(_reordered, (query, key, value, result), order)
        found[CLUSTERS] = partial(_clusters, query, key, order, every, clusters)
    if int8_refusal(query.device) is None:
        found[INT8] = partial(_keys_for_int8, key, lists.key_block)
    return found


def _reordered(operands: Sequence[Tensor], order: Tensor) -> Tensor:
    """Queries, keys, values and results, each head's tokens in an order of its own ``[H, S]``; the last of them."""
    for tokens in operands:
        every = tokens.repeat_interleave(len(order) // tokens.shape[1], 1)
        found = every.gather(2, order[None, :, :, None].expand(every.shape))
    return found


def _clusters(query: Tensor, key: Tensor, order: Tensor, clustered: Tensor, clusters: int) -> Tensor:
    """The tokens of all heads by cluster, the whole sequence through."""
    return cluster_order(query, key, order, clustered, 0, query.shape[2], clusters, ROUNDS)[0]


def _keys_for_int8(key: Tensor, key_block: int) -> Tensor:
    """What is done to the keys of all heads where some have int8 scores: on processors the mean alone."""
    if not key.is_cuda:
        return mean_of(key)
    from ditopt.kernels.block_sparse_attention.triton import quantised_keys, readable

    return quantised_keys(readable(key), key_block).numbers


def _drawn(like: Tensor, dtype: str | None) -> Tensor:
    """A tensor of normal numbers that lies as ``like`` does."""
    kind = getattr(torch, dtype) if dtype else like.dtype
    shape, strides = tuple(map(int, like.shape)), tuple(map(int, like.stride()))
    found = torch.empty_strided(shape, strides, dtype=kind, device=like.device)
    return found.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def _hides_nothing(mask: fx.Node | None, dtype: torch.dtype) -> Tensor | None:
    """A mask like that of an attention call in ``dtype``, which hides no key."""
    if mask is None:
        return None
    like = tensor_value(mask)
    shape, strides = tuple(map(int, like.shape)), tuple(map(int, like.stride()))
    hidden = like.dtype != torch.bool
    found = torch.empty_strided(shape, strides, dtype=dtype if hidden else torch.bool, device=like.device)
    return found.fill_(0 if hidden else True)


def _sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    scale: float,
    mask: Tensor | None = None,
    int8: Tensor | None = None,
) -> Tensor:
    sizes = (lists.query_block, lists.key_block, scale)
    named = {"mask": mask, "int8": int8}
    result: Tensor = BLOCK_SPARSE_ATTENTION(query, key, value, lists.indices, lists.counts, *sizes, **named)[0]
    return result


def even_lists(heads: int, queries: int, keys: int, share: float) -> BlockLists:
    """Lists for all heads alike, of the ``share`` of blocks that lie next to each block of queries."""
    columns = blocks(keys, kernel_blocks(queries, keys)[1])
    return listed([max(1, round(share * columns))] * heads, queries, keys)


def uneven_budgets(heads: int, queries: int, keys: int) -> list[int] | None:
    """Blocks of keys of each head, one of which is dense and the others alike: about a quarter of all, or half of few.

    None: of fewer than three heads, or where there are too few blocks to be unlike.
    """
    columns = blocks(keys, kernel_blocks(queries, keys)[1])
    others = round(columns * ((0.25 if heads >= 6 else 0.5) * heads - 1) / max(heads - 1, 1))
    return [columns, *[others] * (heads - 1)] if heads >= 3 and 0 < others < columns else None


def listed(counts: Sequence[int], queries: int, keys: int) -> BlockLists:
    """Lists of so many blocks of keys for each head, those that lie next to each block of queries."""
    query_block, key_block = kernel_blocks(queries, keys)
    rows, columns = blocks(queries, query_block), blocks(keys, key_block)
    maps = {}
    for count in dict.fromkeys(counts):
        firsts = torch.linspace(0, columns - count, rows).round().long()
        attended = torch.zeros(rows, columns, dtype=torch.bool)
        maps[count] = attended.scatter_(1, firsts[:, None] + torch.arange(count), True)
    return BlockLists.from_map(torch.stack([maps[count] for count in counts])[None], query_block, key_block)


def _table(seconds: dict[str, dict[str, float]], per_step: float, site: AttentionSite) -> Table:
    queries = site.queries
    dense = np.array([of_form["dense"] for of_form in seconds.values()]) * per_step
    sparse = np.array([[of_form[f"{share:g}"] for share in DENSITIES] for of_form in seconds.values()]) * per_step
    int8 = [[of_form.get(f"{INT8} {share:g}", np.nan) for share in DENSITIES] for of_form in seconds.values()]
    shared = np.array([[of_form.get(need, np.nan) for need in TIMED] for of_form in seconds.values()]) * per_step
    uneven = np.array([of_form.get(UNEVEN, np.nan) for of_form in seconds.values()]) * per_step
    budgets = uneven_budgets(site.heads, queries, queries) or [0] * site.heads
    measures = {
        "dense": Measure(("form",), dense),
        "sparse": Measure(("form", "density"), sparse),
        "int8": Measure(("form", "density"), np.array(int8) * per_step, True),
        "shared": Measure(("form", "need"), shared, True),
        UNEVEN: Measure(("form",), uneven, True),
        "budget": Measure(
            ("head",), np.array(budgets, dtype=float) / blocks(queries, kernel_blocks(queries, queries)[1])
        ),
    }
    facts = {"queries": queries, "block_queries": kernel_blocks(queries, queries)[0], "profiled": block_for(queries)}
    return Table(measures, {"form": tuple(seconds), "density": DENSITIES, "need": TIMED}, facts)
