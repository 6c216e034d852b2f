"""Sparse: attention sites that a step's plan names attend to listed blocks of keys.

Lists are inputs of the graph, of the same shape in all steps, so that one graph serves steps with other patterns. Where
heads find blocks in the call itself, how many is an input too, and ``ditopt::draft_lists`` makes the lists. The numbers
are those of attention under the blocks' mask.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ditopt.kernels.ops import ATTENTION, BLOCK_SPARSE_ATTENTION, DRAFT_LISTS, BlockLists, block_sparse_refusal
from ditopt.passes._infra import (
    SITE,
    GraphIndex,
    PassResult,
    SparseAttention,
    StepPlan,
    add_input,
    call,
    in_memory_order,
    replace_each,
    tensor_value,
    word,
)
from ditopt.passes.attention import scale_of, special


def list_names(site: str) -> tuple[str, str]:
    """The inputs that carry a site's lists: ``indices`` ``[1, H, Qb, W]`` and ``counts`` ``[1, H, Qb]``, int32."""
    return f"indices_{word(site)}", f"counts_{word(site)}"


def draft_names(site: str) -> tuple[str, str]:
    """The inputs that say what a site's heads find in a call: ``keep`` ``[H]`` int32 and ``mass`` ``[H]`` float32."""
    return f"keep_{word(site)}", f"mass_{word(site)}"


def sparse(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Replace the attention of every site of ``plan.sparse``; the reasons say why one stays, which no audit passes."""
    wanted = {each.site: each for each in plan.sparse}
    reasons: list[str] = []

    def write(node: fx.Node) -> fx.Node | None:
        found = wanted.get(node.meta.get(SITE, "")) if node.target is ATTENTION else None
        if found is None:
            return None
        refused = sparse_refusal(node, found)
        if refused is not None:
            reasons.append(f"sparse {found.site}: {refused}")
            return None
        lists = _lists(node, found)
        names = list_names(found.site)
        inputs = [add_input(gm, *each) for each in zip(names, (lists.indices, lists.counts), strict=True)]
        settings = (found.query_block, found.key_block, scale_of(node))
        if found.draft:
            inputs = _draft_lists(gm, node, found, inputs)
        both = call(gm, BLOCK_SPARSE_ATTENTION, *node.args[:3], *inputs, *settings)
        return in_memory_order(gm, call(gm, operator.getitem, both, 0), tensor_value(node))

    return PassResult(gm, bool(wanted) and replace_each(gm, write), tuple(reasons))


def _draft_lists(gm: fx.GraphModule, node: fx.Node, wanted: SparseAttention, lists: list[fx.Node]) -> list[fx.Node]:
    """The lists that an attention call finds for itself: those that are given, and more."""
    keep = tensor_value(lists[0]).new_empty(tensor_value(lists[0]).shape[1:2])
    limits = zip(draft_names(wanted.site), (keep, keep.new_empty(keep.shape, dtype=torch.float32)), strict=True)
    inputs = [*lists, *(add_input(gm, *each) for each in limits)]
    settings = (wanted.query_block, wanted.key_block, scale_of(node))
    both = call(gm, DRAFT_LISTS, *node.args[:2], *inputs, *settings)
    return [call(gm, operator.getitem, both, place) for place in range(2)]


def sparse_refusal(node: fx.Node, wanted: SparseAttention) -> str | None:
    """Why no kernel takes an attention call as ``wanted``; None if one does."""
    query, key, value = (tensor_value(operand) for operand in node.args[:3])  # type: ignore[arg-type]  # nodes
    return special(node) or block_sparse_refusal(query, key, value, _lists(node, wanted), scale_of(node))


def _lists(node: fx.Node, wanted: SparseAttention) -> BlockLists:
    """What describes the lists of an attention call."""
    query = tensor_value(node.args[0])  # type: ignore[arg-type]  # a node
    rows = (1, query.shape[1], -(-query.shape[2] // wanted.query_block))
    indices = query.new_empty((*rows, wanted.width), dtype=torch.int32)
    return BlockLists(indices, query.new_empty(rows, dtype=torch.int32), wanted.query_block, wanted.key_block)
