"""Flash: attention that our own kernels take runs in them, where a step is simplified.

The same formula with sums in float32, as torch's attention has it: SDPA runs bfloat16 at the speed of float32 on
processors that have dot products of bfloat16 pairs and no AMX. It stands behind ``cast``, which makes such operands.
"""

from __future__ import annotations

import torch
from torch import fx

from ditopt.kernels.ops import ATTENTION, FLASH_ATTENTION, refusal
from ditopt.passes._infra import GraphIndex, PassResult, StepPlan, call, in_memory_order, replace_each, tensor_value
from ditopt.passes.attention import scale_of, special


def flash(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Replace every attention call that a kernel takes; the reasons say why others stay."""
    if not plan.simplify:
        return PassResult(gm, False)
    reasons: dict[str, None] = {}  # a set in order

    def write(node: fx.Node) -> fx.Node | None:
        if node.target is not ATTENTION:
            return None
        refused = flash_refusal(node)
        if refused is not None:
            reasons[f"flash: attention stays as torch has it: {refused}"] = None
            return None
        query, key, value = node.args[:3]
        new = call(gm, FLASH_ATTENTION, query, key, value, scale_of(node))
        return in_memory_order(gm, new, tensor_value(node))

    return PassResult(gm, replace_each(gm, write), tuple(reasons))


def flash_refusal(node: fx.Node, dtype: str | None = None) -> str | None:
    """Why no kernel takes an attention call, were its operands of ``dtype`` (None: as they are); None if one does."""
    query, key, value = (tensor_value(operand) for operand in node.args[:3])  # type: ignore[arg-type]  # nodes
    return special(node) or refusal(query, key, value, scale_of(node), getattr(torch, dtype) if dtype else query.dtype)
