"""Sparse: attention sites that a step's plan names attend to listed blocks of keys.

Lists are inputs of the graph, of the same shape in all steps, so that one graph serves steps with other patterns. Where
heads find blocks in the call itself, how many is an input too, and ``ditopt::draft_lists`` makes the lists; these may
be handed on to later steps, which read them in place of finding some (``passes.kept``). The numbers are those of
attention under the blocks' mask; where heads have a rest, the graph takes means of keys and values, and a further input
says which heads read them. Where tokens have another order, operands are gathered into it right before all that, and
the result back, by inputs too, or by ``ditopt::cluster_order`` of the queries and keys. A mask of the model's own holds
within the blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ditopt.kernels.ops import (
    ATTENTION,
    BLOCK_SPARSE_ATTENTION,
    CLUSTER_ORDER,
    DRAFT_LISTS,
    LINEAR_REST,
    MASK_AND_REST,
    BlockLists,
    PooledRest,
    block_sparse_refusal,
    linear_refusal,
)
from ditopt.passes._infra import (
    SITE,
    GraphIndex,
    Ordered,
    PassResult,
    SparseAttention,
    StepPlan,
    add_input,
    call,
    contiguous,
    in_memory_order,
    outputs,
    replace_each,
    tensor_value,
    word,
)
from ditopt.passes.attention import mask_of, scale_of, special_but_mask
from ditopt.passes.kept import LISTS, REST, hand_on, slot_of, take
from ditopt.passes.kept_rest import has_rest, with_rest

aten = torch.ops.aten

ROUNDS = 3
"""Of k-means, in every call anew."""
MEANS = (aten.mean.dim, aten.view.default, aten.slice.Tensor, aten.cat.default)
"""What means of tokens are made of."""


def list_names(site: str) -> tuple[str, str]:
    """The inputs that carry a site's lists: ``indices`` ``[1, H, Qb, W]`` and ``counts`` ``[1, H, Qb]``, int32."""
    return f"indices_{word(site)}", f"counts_{word(site)}"


def rest_name(site: str) -> str:
    """The input that says which heads of a site have a rest: ``[H]`` int32."""
    return f"rest_{word(site)}"


def draft_names(site: str) -> tuple[str, str]:
    """The inputs that say what a site's heads find in a call: ``keep`` ``[H]`` int32 and ``mass`` ``[H]`` float32."""
    return f"keep_{word(site)}", f"mass_{word(site)}"


def order_names(site: str) -> tuple[str, str]:
    """The inputs that say which token stands at each place, and what undoes it: ``[S]`` or ``[H, S]``, int64."""
    return f"order_{word(site)}", f"back_{word(site)}"


def selector_name(site: str) -> str:
    """The input that says by what each head of a site chooses its blocks: ``[H]`` int32, places in ``SELECTORS``."""
    return f"by_{word(site)}"


def draft_inputs(wanted: SparseAttention) -> tuple[str, ...]:
    """The inputs beside its lists that a site reads whose heads find blocks in a call; none where they do not."""
    if not wanted.draft:
        return ()
    return (*draft_names(wanted.site), *([selector_name(wanted.site)] if len(wanted.by) > 1 else []))


def clusters_name(site: str) -> str:
    """The input that says which heads have their tokens in the order of clusters: ``[H]`` int32."""
    return f"clusters_{word(site)}"


def int8_name(site: str) -> str:
    """The input that says which heads of a site have int8 scores: ``[H]`` int32."""
    return f"int8_{word(site)}"


def projection_name(site: str) -> str:
    """The input with what linear attention to the blocks that heads skip is multiplied by: ``[H, E, E]`` float32."""
    return f"projection_{word(site)}"


def sparse(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Replace the attention of every site of ``plan.sparse``; the reasons say why one stays, which no audit passes."""
    wanted = {each.site: each for each in plan.sparse}
    reasons: list[str] = []
    kept: dict[str, Sequence[fx.Node]] = {}
    returned = len(outputs(gm))

    def write(node: fx.Node) -> fx.Node | None:
        found = wanted.get(node.meta.get(SITE, "")) if node.target is ATTENTION else None
        if found is None:
            return None
        refused = sparse_refusal(node, found)
        if refused is not None:
            reasons.append(f"sparse {found.site}: {refused}")
            return None
        lists, rest = _lists(node, found), _rest(node, found)
        names = list_names(found.site)
        inputs = [add_input(gm, *each) for each in zip(names, (lists.indices, lists.counts), strict=True)]
        settings = (found.query_block, found.key_block, scale_of(node))
        operands: list[fx.Node] = list(node.args[:3])  # type: ignore[arg-type]  # nodes
        order = [add_input(gm, *each) for each in zip(order_names(found.site), _order(node, found), strict=False)]
        if order:
            there, order[1] = _orders(gm, operands, found, order)
            heads = tensor_value(operands[0]).shape[1]
            operands = [gathered(gm, each, by, heads) for each, by in zip(operands, there, strict=True)]
        if LISTS in found.reads:
            inputs = take(gm, LISTS, found.site, inputs, tensor_value(node).shape[0])
        mask = mask_of(node)
        if mask is not None and order:
            mask = ordered_mask(gm, mask, there[0], there[1], tuple(tensor_value(node).shape[:2]))
        named = {"mask": mask} if mask else {}
        if found.draft:
            inputs = _draft_lists(gm, operands, found, inputs, scale_of(node), named)
        if LISTS in found.keeps:
            kept[slot_of(LISTS, found.site)] = inputs
            hand_on(gm, plan, returned, kept)
        pooled: tuple[object, ...] = ()
        if rest is not None:
            means = [pooled_tokens(gm, each, found.pool) for each in operands[1:]]
            pooled = (*means, add_input(gm, rest_name(found.site), rest.heads), found.pool)
        if found.int8:
            named["int8"] = add_input(gm, int8_name(found.site), _int8(node))
        both = call(gm, BLOCK_SPARSE_ATTENTION, *operands, *inputs, *settings, *pooled, **named)
        result = call(gm, operator.getitem, both, 0)
        if has_rest(found):

            def others(lists: Sequence[fx.Node]) -> fx.Node:
                return call(gm, BLOCK_SPARSE_ATTENTION, *operands, *lists, *settings, **named)

            result, kept[slot_of(REST, found.site)] = with_rest(gm, found, both, result, others)
            hand_on(gm, plan, returned, kept)
        if found.linear:
            projection = add_input(gm, projection_name(found.site), _projection(node))
            further = call(gm, LINEAR_REST, *operands, *inputs, projection, *settings[:2])
            result = call(gm, aten.add.Tensor, result, further)
        if order:
            result = gathered(gm, result, order[1], tensor_value(result).shape[1])
        return in_memory_order(gm, result, tensor_value(node))

    return PassResult(gm, bool(wanted) and replace_each(gm, write), tuple(reasons))


def _orders(
    gm: fx.GraphModule, operands: list[fx.Node], wanted: SparseAttention, order: list[fx.Node]
) -> tuple[list[fx.Node], fx.Node]:
    """In which order queries, keys and values are, and what undoes that of queries; ``order`` are the inputs."""
    if wanted.clusters is None:
        return [order[0]] * 3, order[1]
    query = tensor_value(operands[0])
    heads = add_input(gm, clusters_name(wanted.site), query.new_empty(query.shape[1:2], dtype=torch.int32))
    settings = (*wanted.clusters, *cluster_sizes(wanted))
    three = call(gm, CLUSTER_ORDER, *operands[:2], order[0], heads, *settings)
    of_queries, of_keys, back = (call(gm, operator.getitem, three, place) for place in range(3))
    return [of_queries, of_keys, of_keys], back


def cluster_sizes(wanted: SparseAttention) -> tuple[int, int]:
    """How many clusters there are, one for every block of the tokens that are ordered, and rounds to find them in."""
    assert wanted.clusters is not None
    first, last = wanted.clusters
    return -(-(last - first) // wanted.key_block), ROUNDS


def gathered(gm: fx.GraphModule, tokens: fx.Node, order: fx.Node, heads: int) -> fx.Node:
    """``[B, Hkv, S, D]`` with its tokens in an order: ``[S]`` of all heads, or one of each of so many ``heads``.

    The latter are ``[heads, S]`` or ``[B, heads, S]``, and give as many.
    """
    batch, own, _, depth = tensor_value(tokens).shape
    if tensor_value(order).ndim == 1:
        return _gathered_alike(gm, tokens, 2, order)
    if own != heads:  # heads of queries that share one have it in orders of their own
        shared = call(
            gm, aten.expand.default, call(gm, aten.unsqueeze.default, tokens, 2), [-1, -1, heads // own, -1, -1]
        )
        tokens = call(gm, aten.view.default, contiguous(gm, shared), [batch, heads, -1, depth])
    return _gathered_by_head(gm, tokens, 2, order)


def _gathered_alike(gm: fx.GraphModule, values: fx.Node, dim: int, order: fx.Node) -> fx.Node:
    """Values with one dimension in the order ``[S]``."""
    return call(gm, aten.index.Tensor, values, [*[None] * dim, order])


def _gathered_by_head(gm: fx.GraphModule, values: fx.Node, dim: int, order: fx.Node) -> fx.Node:
    """``[B, H, M, N]`` with dimension 2 or 3 in an order of each head, ``[H, S]`` or ``[B, H, S]``."""
    shape = tensor_value(values).shape
    of_samples = order if tensor_value(order).ndim == 3 else call(gm, aten.unsqueeze.default, order, 0)
    index = call(gm, aten.unsqueeze.default, of_samples, 5 - dim)
    return call(gm, aten.gather.default, values, dim, call(gm, aten.expand.default, index, [*shape]))


def ordered_mask(gm: fx.GraphModule, mask: fx.Node, queries: fx.Node, keys: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
    """A mask of operands whose tokens are in the orders ``queries`` and ``keys``; ``sizes``: batch and heads."""
    while tensor_value(mask).ndim < 4:
        mask = call(gm, aten.unsqueeze.default, mask, 0)
    for dim, order in ((2, queries), (3, keys)):
        shape = tensor_value(mask).shape
        if shape[dim] == 1:
            continue
        if tensor_value(order).ndim == 1:
            mask = _gathered_alike(gm, mask, dim, order)
        else:
            mask = _gathered_by_head(gm, call(gm, aten.expand.default, mask, [*sizes, *shape[2:]]), dim, order)
    return mask


def _order(node: fx.Node, wanted: SparseAttention) -> tuple[Tensor, ...]:
    """What describes the inputs of ``order_names``; nothing where tokens stay."""
    if wanted.order is Ordered.NOT:
        return ()
    query = tensor_value(node.args[0])  # type: ignore[arg-type]  # a node
    sizes = query.shape[2:3] if wanted.order is Ordered.SITE else query.shape[1:3]
    return query.new_empty(sizes, dtype=torch.int64), query.new_empty(sizes, dtype=torch.int64)


def _draft_lists(
    gm: fx.GraphModule,
    operands: list[fx.Node],
    wanted: SparseAttention,
    lists: list[fx.Node],
    scale: float,
    named: dict[str, fx.Node],
) -> list[fx.Node]:
    """The lists that an attention call finds for itself: those that are given, and more; ``named`` has its mask."""
    keep = tensor_value(lists[0]).new_empty(tensor_value(lists[0]).shape[1:2])
    described = (keep, keep.new_empty(keep.shape, dtype=torch.float32), keep)
    keep_node, mass, *codes = (add_input(gm, *each) for each in zip(draft_inputs(wanted), described, strict=False))
    chosen: tuple[object, ...] = ()
    if wanted.by != ("means",):
        chosen = (operands[2] if "error" in wanted.by else None, codes[0] if codes else None, ",".join(wanted.by))
    settings = (wanted.query_block, wanted.key_block, scale)
    both = call(gm, DRAFT_LISTS, *operands[:2], *lists, keep_node, mass, *settings, *chosen, **named)
    return [call(gm, operator.getitem, both, place) for place in range(2)]


def sparse_refusal(node: fx.Node, wanted: SparseAttention) -> str | None:
    """Why no kernel takes an attention call as ``wanted``; None if one does."""
    query, key, value = (tensor_value(operand) for operand in node.args[:3])  # type: ignore[arg-type]  # nodes
    lists, rest, mask = _lists(node, wanted), _rest(node, wanted), mask_of(node)
    of_mask = None if mask is None else tensor_value(mask)
    int8 = _int8(node) if wanted.int8 else None
    refused = special_but_mask(node) or block_sparse_refusal(
        query, key, value, lists, scale_of(node), rest, of_mask, int8
    )
    of_pairs = of_mask is not None and of_mask.ndim > 1 and of_mask.shape[-2] > 1
    if refused is None and wanted.linear:
        refused = MASK_AND_REST if mask is not None else linear_refusal(query, key, value, lists, _projection(node))
    if refused is None and of_pairs and wanted.order not in (Ordered.NOT, Ordered.SITE):
        return "there is a mask of queries and keys, which heads with orders of their own would need one each of"
    return refused


def pooled_tokens(gm: fx.GraphModule, tokens: fx.Node, pool: int) -> fx.Node:
    """``[B, H, L, D]`` -> ``[B, H, G, D]``, as ``block_sparse_attention.pooled.pool_tokens`` has it."""
    batch, heads, length, depth = tensor_value(tokens).shape
    whole = length // pool * pool
    parts = []
    if whole:
        full = call(gm, aten.slice.Tensor, tokens, 2, 0, whole) if whole < length else tokens
        groups = call(gm, aten.view.default, full, [batch, heads, whole // pool, pool, depth])
        parts.append(call(gm, aten.mean.dim, groups, [3]))
    if whole < length:
        parts.append(call(gm, aten.mean.dim, call(gm, aten.slice.Tensor, tokens, 2, whole, length), [2], True))
    return call(gm, aten.cat.default, parts, 2) if len(parts) > 1 else parts[0]


def _lists(node: fx.Node, wanted: SparseAttention) -> BlockLists:
    """What describes the lists of an attention call."""
    query = tensor_value(node.args[0])  # type: ignore[arg-type]  # a node
    rows = (1, query.shape[1], -(-query.shape[2] // wanted.query_block))
    indices = query.new_empty((*rows, wanted.width), dtype=torch.int32)
    return BlockLists(indices, query.new_empty(rows, dtype=torch.int32), wanted.query_block, wanted.key_block)


def _projection(node: fx.Node) -> Tensor:
    """What describes the projections of an attention call."""
    query, _, value = (tensor_value(operand) for operand in node.args[:3])  # type: ignore[arg-type]  # nodes
    return query.new_empty((query.shape[1], value.shape[3], value.shape[3]), dtype=torch.float32)


def _rest(node: fx.Node, wanted: SparseAttention) -> PooledRest | None:
    """What describes the pooled operands of an attention call; None where it has none."""
    if not wanted.pool:
        return None
    query, *others = (tensor_value(operand) for operand in node.args[:3])  # type: ignore[arg-type]  # nodes
    keys, values = (
        part.new_empty((*part.shape[:2], -(-part.shape[2] // wanted.pool), part.shape[3])) for part in others
    )
    return PooledRest(keys, values, query.new_empty(query.shape[1], dtype=torch.int32), wanted.pool)


def _int8(node: fx.Node) -> Tensor:
    """What describes the input that says which heads of an attention call have int8 scores."""
    query = tensor_value(node.args[0])  # type: ignore[arg-type]  # a node
    return query.new_empty(query.shape[1], dtype=torch.int32)
