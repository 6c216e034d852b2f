"""Cut: which of a step's repeated values to carry into it, and which to compute in it from these.

Of the values that are the same in many steps some are worth being computed ahead and read in each step, others are
made faster than they are read: an expansion of a short vector, a view. Every value that steps need is either read, at
the price of its bytes, or computed, at the price of its operations, from others that are read or computed; the
cheapest choice is a minimum cut (networkx).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from ditopt.kernels.ops import ATTENTION, FLASH_ATTENTION
from ditopt.passes._infra import tensor_value
from ditopt.passes.flops import LEFT, attention_flops, product_flops

aten = torch.ops.aten

FREE = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.t.default),
    *(aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.squeeze.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.alias.default, aten.as_strided.default, operator.getitem),
}
"""What moves no data."""
ATTENTIONS = (ATTENTION, FLASH_ATTENTION)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, roughly: the cut needs the ratios. ``overhead`` is seconds a call or a read."""

    bytes: float = 2e10
    flops: float = 2e11
    elements: float = 2e9
    overhead: float = 1e-6


PICOSECONDS = 1e12
"""Capacities are whole numbers, so that sums of them are exact."""


def cheapest_cut(wanted: Iterable[fx.Node], repeated: Mapping[fx.Node, object], rates: Rates) -> set[fx.Node]:
    """Which of the ``repeated`` values to read in a step, so that all ``wanted`` of them can be had at the least cost.

    Inputs of the graph are there in any case.
    """
    network = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    waiting, seen = [node for node in wanted if node.op == "call_function"], set()
    for node in waiting:
        network.add_edge((node, "there"), "sink")
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        network.add_edge("source", (node, "made"), capacity=_whole(seconds_to_make(node, rates)))
        read = seconds_to_read(node, rates)
        if read < math.inf:
            network.add_edge((node, "made"), (node, "there"), capacity=_whole(read))
        else:
            network.add_edge((node, "made"), (node, "there"))
        for parent in node.all_input_nodes:
            if parent.op == "call_function" and parent in repeated:
                network.add_edge((parent, "there"), (node, "made"))
                waiting.append(parent)
    if not seen:
        return set()
    _, (before, _) = nx.minimum_cut(network, "source", "sink")
    return {node for node in seen if (node, "made") in before and (node, "there") not in before}


def _whole(seconds: float) -> int:
    return max(1, round(seconds * PICOSECONDS))


def seconds_to_read(node: fx.Node, rates: Rates) -> float:
    """What reading a value costs in a step; without end where it is no tensor."""
    value = node.meta.get("val")
    return rates.overhead + bytes_of(value) / rates.bytes if isinstance(value, Tensor) else math.inf


def seconds_to_make(node: fx.Node, rates: Rates) -> float:
    """What computing a value costs in a step, with the reading of what it takes of the graph's inputs."""
    if node.target in FREE:
        return 0.0
    inputs = [parent.meta.get("val") for parent in node.all_input_nodes if _is_input(parent)]
    taken = rates.overhead + sum(map(bytes_of, inputs)) / rates.bytes
    flops = _flops(node)
    return taken + (flops / rates.flops if flops else _elements(node) / rates.elements)


def _is_input(node: fx.Node) -> bool:
    """Whether a value is an input of the graph, or a view of one."""
    while node.target in FREE and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")


def bytes_of(value: object) -> int:
    """Bytes of a tensor's elements; 0 of what is none."""
    return value.nbytes if isinstance(value, Tensor) else 0


def _elements(node: fx.Node) -> int:
    values = [node.meta.get("val"), *(parent.meta.get("val") for parent in node.all_input_nodes)]
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=0)


def is_product(node: fx.Node) -> bool:
    """Whether a call multiplies matrices."""
    return node.target in (*LEFT, *ATTENTIONS, aten.convolution.default)


def _flops(node: fx.Node) -> int:
    """FLOPs of a product (two a multiply-add); 0 of other calls."""
    if node.target in ATTENTIONS:
        return attention_flops(node)
    if node.target in LEFT:
        return product_flops(node)
    if node.target is aten.convolution.default:
        weight = tensor_value(node.args[1])  # type: ignore[arg-type]  # a node
        return 2 * tensor_value(node).numel() * weight.numel() // int(weight.shape[0])
    return 0
