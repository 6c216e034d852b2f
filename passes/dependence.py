"""Dependence: what each value of a functional graph changes with, from its inputs alone.

The graph is functional, so a value is a pure function of the graph's inputs, whatever the model's own code wrote in
place or handed on as a view: a node depends on what its operands depend on. Inputs that a call writes into change
with every call, and so does what an operator draws at random.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from ditopt._torch import is_repeatable
from ditopt.kernels.ops import ATTENTION
from ditopt.passes._infra import GraphIndex

Dependence = frozenset[str] | None
"""The names of the call's arguments that a value depends on; None: it differs from call to call."""

DROPOUT = 4
"""Of attention's arguments."""


def dependences(gm: fx.GraphModule, index: GraphIndex) -> dict[fx.Node, Dependence]:
    """What every value depends on: the arguments of the call by name, parameters and constants not among them.

    None is what depends on the latents, on an input that a pass added (slots, factors, lists), on one that the call
    writes into, or on chance.
    """
    captured = {name: position for position, name in enumerate(gm.meta["ditopt_captured"])}
    found: dict[fx.Node, Dependence] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            found[node] = _of_input(node, captured.get(node.name), index)
        elif node.op == "get_attr":
            found[node] = frozenset()
        elif node.op == "call_function" and _repeatable(node):
            parents = [found[parent] for parent in node.all_input_nodes]
            known = [parent for parent in parents if parent is not None]
            found[node] = frozenset().union(*known) if len(known) == len(parents) else None
        else:
            found[node] = None
    return found


def _of_input(node: fx.Node, position: int | None, index: GraphIndex) -> Dependence:
    if position is None or position == index.latents or position in index.written:
        return None
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    return frozenset({node.name}) if position in index.arguments else frozenset()


def _repeatable(node: fx.Node) -> bool:
    """Whether a call gives the same for the same operands, in shapes that are known, and does nothing else."""
    if node.target is not operator.getitem and not is_repeatable(node.target):
        return False
    if node.target is ATTENTION and len(node.args) > DROPOUT and node.args[DROPOUT]:
        return False
    return all(_sized(value) for value in _values(node))


def _values(node: fx.Node) -> list[object]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, list | tuple) else [value]


def _sized(value: object) -> bool:
    return value is None or (isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape))
