"""FLOPs of matrix products and attention, from the shapes that a graph's nodes tell."""

from __future__ import annotations

import torch
from torch import fx

from ditopt.passes._infra import tensor_value

aten = torch.ops.aten

PRODUCTS = {aten.addmm.default: (1, 2), aten.mm.default: (0, 1), aten.bmm.default: (0, 1)}
"""Matrix products, and which of their arguments are the left and the right one."""
LEFT = {**{target: left for target, (left, _) in PRODUCTS.items()}, aten.baddbmm.default: 1}
"""Every matrix product, and which of its arguments has the terms that are summed over as its last dimension."""


def product_flops(node: fx.Node) -> int:
    """FLOPs (two a multiply-add) of a product among ``LEFT``."""
    left = tensor_value(node.args[LEFT[node.target]])  # type: ignore[arg-type,index]  # it is one of them
    return 2 * int(left.numel()) * int(tensor_value(node).shape[-1])


def attention_flops(node: fx.Node) -> int:
    """FLOPs of an attention: queries with keys, and the result with values."""
    query, key, value = (tensor_value(node.args[i]) for i in range(3))  # type: ignore[arg-type]  # they are nodes
    rows, keys = int(query.numel() // query.shape[-1]), int(key.shape[-2])
    return 2 * rows * keys * (int(query.shape[-1]) + int(value.shape[-1]))
