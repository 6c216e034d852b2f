"""Combine: features of earlier steps enter a graph as inputs (state slots), and are summed with factors, an input too.

Factors are no constants of a graph, so that one graph serves every schedule of the same shape.
"""

from __future__ import annotations

import torch
from torch import fx

from ditopt.passes._infra import add_input, call, converted, in_layout_of, tensor_value, word

aten = torch.ops.aten


def slot_name(site: str, age: int, stream: int) -> str:
    """The input that carries stream ``stream`` of the feature ``age`` computations ago."""
    return f"slot_{word(site)}_age{age}_stream{stream}"


def factors_name(site: str) -> str:
    """The input that carries a prediction's coefficients ``[terms]`` float32."""
    return f"factors_{word(site)}"


def like(node: fx.Node) -> torch.Tensor:
    """What a slot that holds a node's value is described by: shape, dtype and device, in the contiguous layout."""
    value = tensor_value(node)
    return value.new_empty(value.shape)


def factors_input(gm: fx.GraphModule, site: str, terms: int, end: fx.Node) -> fx.Node:
    """The input ``[terms]`` of a site's coefficients, added where the graph has none yet; ``end`` tells the device."""
    name = factors_name(site)
    found: fx.Node | None = next((n for n in gm.graph.find_nodes(op="placeholder") if n.target == name), None)
    return found or add_input(gm, name, tensor_value(end).new_empty((terms,), dtype=torch.float32))


def combine(gm: fx.GraphModule, factors: fx.Node, terms: list[fx.Node], end: fx.Node, start: fx.Node | None) -> fx.Node:
    """``sum_i factors[i] * terms[i] (+ start)``, summed in float32, in the dtype of ``end``."""
    total: fx.Node | None = None
    for i, term in enumerate(terms):
        factor = call(gm, aten.select.int, factors, 0, i)
        wide = converted(gm, term, torch.float32)
        product = call(gm, aten.mul.Tensor, wide, factor)
        total = product if total is None else call(gm, aten.add.Tensor, total, product)
    assert total is not None
    total = converted(gm, total, tensor_value(end).dtype)
    return in_layout_of(gm, total if start is None else call(gm, aten.add.Tensor, start, total), end)
