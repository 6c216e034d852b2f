"""The components of blocks: attention, cross-attention and feed-forward modules whose one output is a feature."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from ditopt._torch import module_stack
from ditopt.passes._infra import Component
from ditopt.passes.flops import PRODUCTS
from ditopt.sites import AttentionSite
from ditopt.trace import Trace, block_of

SELF, CROSS, MLP = "self", "cross", "mlp"
"""Kinds of components."""


@dataclass(frozen=True)
class Module:
    """A module inside a block whose one output is a feature: ``node`` is that output."""

    site: str
    kind: str
    node: fx.Node


def modules(trace: Trace) -> tuple[Module, ...]:
    """The attention modules and MLPs of the blocks, by module path.

    An MLP is a block's direct child with two products or more and no attention in it. A module that hands on more than
    one value has no feature here.
    """
    changing = trace.changing()
    attention = _attention(trace)
    owners: dict[str, str] = {}
    products: dict[str, int] = {}
    for node in trace.gm.graph.nodes:
        block = block_of(node)
        if block not in trace.blocks or node not in changing:
            continue
        child = _child(node, block)
        if child is None:
            continue
        if node in attention:
            owners[child] = SELF if node.args[1] in changing else CROSS
        elif node.target in PRODUCTS:
            products[child] = products.get(child, 0) + 1
    kinds = {child: owners.get(child, MLP) for child in {**owners, **products}}
    kinds = {child: kind for child, kind in kinds.items() if child in owners or products[child] > 1}
    order = [child for child in _in_order(trace) if child in kinds]
    found = []
    for child in order:
        handed_on = _outputs(trace, child, changing)
        if len(handed_on) == 1:
            found.append(Module(child, kinds[child], handed_on[0]))
    return tuple(found)


def components(trace: Trace) -> dict[str, Component]:
    """What plans may name of a graph's modules, by site."""
    blocks = {block: position for position, block in enumerate(trace.blocks)}
    found = {}
    for module in modules(trace) if trace.boundaries else ():
        block = block_of(module.node)
        assert block is not None, "modules are children of blocks"
        found[module.site] = Component(module.node.name, blocks[block])
    return found


def _attention(trace: Trace) -> set[fx.Node]:
    """The attention calls of the graph."""
    nodes = {node.name: node for node in trace.gm.graph.nodes}
    return {nodes[trace.site_nodes[site.name]] for site in trace.sites if isinstance(site, AttentionSite)}


def _child(node: fx.Node, block: str) -> str | None:
    """The direct child of a block that a node belongs to: ``blocks.3.ffn`` for ``blocks.3.ffn.net.0.proj``."""
    deepest = module_stack(node)[-1]
    if not deepest.startswith(f"{block}."):
        return None
    return f"{block}.{deepest.removeprefix(f'{block}.').split('.')[0]}"


def _in_order(trace: Trace) -> list[str]:
    seen: dict[str, None] = {}
    for node in trace.gm.graph.nodes:
        block = block_of(node) if node.op == "call_function" else None
        child = _child(node, block) if block is not None else None
        if child is not None:
            seen[child] = None
    return list(seen)


def _outputs(trace: Trace, child: str, changing: set[fx.Node]) -> list[fx.Node]:
    """The values, changing with the latents, that a module's nodes hand to nodes outside of it."""
    inside = {
        node
        for node in trace.gm.graph.nodes
        if node.op == "call_function" and node in changing and _belongs(node, child)
    }
    return [
        node
        for node in inside
        if isinstance(node.meta.get("val"), Tensor) and any(user not in inside for user in node.users)
    ]


def _belongs(node: fx.Node, child: str) -> bool:
    return any(path == child or path.startswith(f"{child}.") for path in module_stack(node))
