"""Cast: matrix products and attention run in the 16-bit dtype that a step's plan names, all between them as before.

Operands are rounded on the way in and results widened on the way out, so the residual stream, norms and softmax
statistics keep the model's dtype, and Inductor fuses the casts into what stands beside them. Products of few rows
(``MIN_ROWS``: the timestep, a pooled text) or of few terms (``MIN_TERMS``: rotary angles, patches of few channels)
stay, and so does the last one, which makes the output; they are sensitive, and take no time.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from ditopt.kernels.ops import ATTENTION, BLOCK_SPARSE_ATTENTION
from ditopt.passes._infra import (
    OF_THE_CALL,
    GraphIndex,
    PassResult,
    StepPlan,
    call,
    converted,
    in_memory_order,
    last_input,
    tensor_value,
)
from ditopt.passes.attention import list_maker
from ditopt.passes.flops import LEFT

aten = torch.ops.aten

PRODUCTS = {**LEFT, ATTENTION: 0, BLOCK_SPARSE_ATTENTION: 0}
"""What is cast, and which of its arguments has the terms that are summed over as its last dimension."""
MASK = 3  # of attention's arguments
VIEWS = (aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.unsqueeze.default)
"""What a cast is put before, so that a weight is cast once and a narrow result is not widened on its way."""
WIDE = torch.float32
MIN_ROWS = 64
MIN_TERMS = 16


def cast(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Put every product of ``castable`` into ``plan.dtype``; each tensor is cast once."""
    if plan.dtype is None:
        return PassResult(gm, False)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    nodes = castable(gm)
    narrowed: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        result = _result(node)
        value = tensor_value(result)
        if node.target is ATTENTION:
            _narrow_mask(gm, node, dtype, narrowed)
        args = [_narrow(gm, arg, dtype, narrowed) if isinstance(arg, fx.Node) else arg for arg in node.args]
        maker = list_maker(node) if node.target is BLOCK_SPARSE_ATTENTION else None
        if maker is not None:  # it has to read the operands as attention does
            values = () if len(maker.args) < 10 else (maker.args[9] and args[2], *maker.args[10:])
            maker.args = (*args[:2], *maker.args[2:9], *values)
        with gm.graph.inserting_before(node):
            product = call(gm, node.target, *args, **node.kwargs)  # type: ignore[arg-type]  # an operator
            narrow = product if result is node else call(gm, operator.getitem, product, 0)
            narrow = in_memory_order(gm, narrow, value)
            wide = converted(gm, narrow, value.dtype)
        product.meta.update({key: found for key, found in node.meta.items() if key not in OF_THE_CALL})
        result.replace_all_uses_with(wide)
        for further in [use for use in node.users if use is not result]:  # the logarithms of sums
            with gm.graph.inserting_before(further):
                further.replace_all_uses_with(call(gm, operator.getitem, product, *further.args[1:]))
            gm.graph.erase_node(further)
        for old in dict.fromkeys((result, node)):
            gm.graph.erase_node(old)
        narrowed[wide] = narrow
    reasons = () if nodes else (f"cast to {plan.dtype}: no product of {WIDE} tensors is left",)
    return PassResult(gm, bool(nodes), reasons)


def castable(gm: fx.GraphModule) -> list[fx.Node]:
    """Products and attention calls on float32 tensors with at least ``MIN_ROWS`` rows of ``MIN_TERMS``, in order.

    One that no other product follows is left out: its rounding is in the output as it is, while that of the others
    passes norms and joins a stream. (Alone it made 0.24% of the 0.31% of the example model's 81 products.)
    """
    found, leading = [], set()  # leading: products, and what a later product depends on
    for node in reversed(gm.graph.nodes):
        followed = any(user in leading for user in node.users)
        product = node.op == "call_function" and node.target in PRODUCTS
        if followed or product:
            leading.add(node)
        if followed and product:
            value, left = tensor_value(_result(node)), tensor_value(node.args[PRODUCTS[node.target]])
            if value.dtype == WIDE and value.shape[-2] >= MIN_ROWS and left.shape[-1] >= MIN_TERMS:
                found.append(node)
    return found[::-1]


def _result(product: fx.Node) -> fx.Node:
    """The node that is a product's value: block-sparse attention has it as the first of two."""
    return next(iter(product.users)) if product.target is BLOCK_SPARSE_ATTENTION else product


def source(node: object) -> object:
    """What a value is a conversion or a view of."""
    while isinstance(node, fx.Node) and node.target in (torch.ops.prims.convert_element_type.default, *VIEWS):
        node = node.args[0]
    return node


def readers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """What reads values, behind conversions and views of them."""
    found: list[fx.Node] = []
    waiting = list(nodes)
    while waiting:
        for user in waiting.pop().users:
            (waiting if source(user) is not user else found).append(user)
    return found


def _narrow_mask(gm: fx.GraphModule, attention: fx.Node, dtype: torch.dtype, narrowed: dict[fx.Node, fx.Node]) -> None:
    """Put an additive mask into the range of ``dtype`` first: a row of float32's least values must not become -inf."""
    for mask in attention.args[MASK : MASK + 1]:
        if isinstance(mask, fx.Node) and tensor_value(mask).dtype.is_floating_point and mask not in narrowed:
            with gm.graph.inserting_before(attention):
                bounded = call(gm, aten.clamp_min.default, mask, torch.finfo(dtype).min)
                bounded = call(gm, aten.clamp_max.default, bounded, torch.finfo(dtype).max)
                narrowed[mask] = converted(gm, bounded, dtype)


def _narrow(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, narrowed: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` in ``dtype``, cast before it is permuted; masks that are no floats stay."""
    if not tensor_value(node).dtype.is_floating_point:
        return node
    if node not in narrowed:
        if node.target in VIEWS and isinstance(node.args[0], fx.Node):
            base = _narrow(gm, node.args[0], dtype, narrowed)
            with gm.graph.inserting_after(max(node, base)):
                narrowed[node] = call(gm, node.target, base, *node.args[1:])
        else:
            with gm.graph.inserting_after(last_input(gm) if node.op == "placeholder" else node):
                narrowed[node] = converted(gm, node, dtype)
    return narrowed[node]
