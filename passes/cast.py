"""Cast: matrix products and attention run in the 16-bit dtype that a step's plan names, all between them as before.

Operands are rounded on the way in and results widened on the way out, so the residual stream, norms and softmax
statistics keep the model's dtype, and Inductor fuses the casts into what stands beside them. Products of few rows
(``MIN_ROWS``) stay: they carry the timestep or the text, and their time is that of reading weights.
"""

from __future__ import annotations

import torch
from torch import fx

from ditopt.kernels.ops import ATTENTION
from ditopt.passes._infra import GraphIndex, PassResult, StepPlan, call, converted, tensor_value

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
VIEWS = (aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.unsqueeze.default)
"""What a cast is put before, so that a weight is cast once and a narrow result is not widened on its way."""
DTYPES = {"bfloat16": torch.bfloat16}
WIDE = torch.float32
MIN_ROWS = 64


def cast(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Put every product of ``castable`` into ``plan.dtype``; each tensor is cast once."""
    if plan.dtype is None:
        return PassResult(gm, False)
    dtype = DTYPES[plan.dtype]
    nodes = castable(gm)
    narrowed: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        value = tensor_value(node)
        with gm.graph.inserting_before(node):
            args = [_narrow(gm, arg, dtype, narrowed) if isinstance(arg, fx.Node) else arg for arg in node.args]
        node.args = tuple(args)
        with gm.graph.inserting_after(node):
            node.meta["val"] = value.to(dtype)
            wide = converted(gm, node, value.dtype)
        for user in [user for user in node.users if user is not wide]:
            user.replace_input_with(node, wide)
        narrowed[wide] = node
    reasons = () if nodes else (f"cast to {plan.dtype}: no product of {WIDE} tensors is left",)
    return PassResult(gm, bool(nodes), reasons)


def castable(gm: fx.GraphModule) -> list[fx.Node]:
    """Products and attention calls on float32 tensors with at least ``MIN_ROWS`` rows, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in (*PRODUCTS, ATTENTION):
            continue
        value = tensor_value(node)
        if value.dtype == WIDE and value.shape[-2] >= MIN_ROWS:
            found.append(node)
    return found


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
            with gm.graph.inserting_after(_last_placeholder(gm) if node.op == "placeholder" else node):
                narrowed[node] = converted(gm, node, dtype)
    return narrowed[node]


def _last_placeholder(gm: fx.GraphModule) -> fx.Node:
    """Behind which the calls begin."""
    found: fx.Node = gm.graph.find_nodes(op="placeholder")[-1]
    return found
