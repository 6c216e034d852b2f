"""Where in a captured graph the values are that collectors look at: outputs of modules, products behind attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from ditopt._torch import module_stack
from ditopt.kernels.ops import ATTENTION
from ditopt.sites import AttentionSite, LinearSite
from ditopt.trace import PRODUCTS, Trace, block_of, seen_through

SELF, CROSS, MLP, BLOCK, RANGE, STEP_KIND = "self", "cross", "mlp", "block", "range", "step"
"""Kinds of features."""


@dataclass(frozen=True)
class Attention:
    """An attention site in a graph: its node, what kind it is, and the weight that mixes its heads.

    ``cross``: its keys do not depend on the latents. ``projection`` is the node of the product that its output goes
    into, ``weight`` the position of that product's weight among the node's arguments; None where there is none.
    """

    site: AttentionSite
    node: fx.Node
    cross: bool
    projection: fx.Node | None
    weight: int | None


@dataclass(frozen=True)
class Module:
    """A module inside a block whose one output is a feature: ``node`` is that output."""

    site: str
    kind: str
    node: fx.Node


def attentions(trace: Trace) -> tuple[Attention, ...]:
    """The attention sites of the stack of blocks, in order of execution."""
    changing = trace.changing()
    nodes = {node.name: node for node in trace.gm.graph.nodes}
    found = []
    for site in trace.sites:
        if not isinstance(site, AttentionSite):
            continue
        node = nodes[trace.site_nodes[site.name]]
        if block_of(node) not in trace.blocks or node not in changing:
            continue
        cross = node.args[1] not in changing
        projection = _product_behind(node)
        found.append(Attention(site, node, cross, *(projection or (None, None))))
    return tuple(found)


def modules(trace: Trace) -> tuple[Module, ...]:
    """The attention modules and MLPs of the blocks, by module path.

    An MLP is a block's direct child with two products or more and no attention in it. A module that hands on more than
    one value has no feature here.
    """
    attention = {entry.node: entry.cross for entry in attentions(trace)}
    owners: dict[str, str] = {}
    products: dict[str, int] = {}
    changing = trace.changing()
    for node in trace.gm.graph.nodes:
        block = block_of(node)
        if block not in trace.blocks or node not in changing:
            continue
        child = _child(node, block)
        if child is None:
            continue
        if node in attention:
            owners[child] = CROSS if attention[node] else SELF
        elif node.target in PRODUCTS:
            products[child] = products.get(child, 0) + 1
    kinds = {child: owners.get(child, MLP) for child in {**owners, **products}}
    kinds = {child: kind for child, kind in kinds.items() if child in owners or products[child] > 1}
    order = [child for child in _in_order(trace) if child in kinds]
    found = []
    for child in order:
        handed_on = _outputs(trace, child)
        if len(handed_on) == 1:
            found.append(Module(child, kinds[child], handed_on[0]))
    return tuple(found)


def linears(trace: Trace) -> tuple[tuple[LinearSite, fx.Node], ...]:
    """The products with weights inside the blocks, in order of execution."""
    nodes = {node.name: node for node in trace.gm.graph.nodes}
    changing = trace.changing()
    return tuple(
        (site, nodes[trace.site_nodes[site.name]])
        for site in trace.sites
        if isinstance(site, LinearSite)
        and block_of(nodes[trace.site_nodes[site.name]]) in trace.blocks
        and nodes[trace.site_nodes[site.name]] in changing
    )


def _product_behind(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The first product that a value goes into, with its weight's place among the arguments.

    Only views, casts and copies may lie between.
    """
    at = node
    while True:
        users = [user for user in at.users if user.op == "call_function"]
        if len(users) != 1:
            return None
        (user,) = users
        if user.target in PRODUCTS:
            left, right = PRODUCTS[user.target]
            weight = user.args[right]
            known = isinstance(weight, fx.Node) and seen_through(weight).op == "placeholder"
            return (user, right) if user.args[left] is at and known else None
        if user.target is ATTENTION or len(user.all_input_nodes) != 1:
            return None
        at = user


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


def _outputs(trace: Trace, child: str) -> list[fx.Node]:
    """The values, changing with the latents, that a module's nodes hand to nodes outside of it."""
    changing = trace.changing()
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
