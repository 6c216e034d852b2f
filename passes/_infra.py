"""What a pass is: a function from a graph and a step's plan to a rewritten graph, with reasons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Boundary:
    """Names of the nodes that carry the residual stream across an edge between blocks."""

    after: str
    streams: tuple[str, ...]


@dataclass(frozen=True)
class Component:
    """A module of a block whose output is a feature: the name of the node that is it, and the block's position."""

    node: str
    block: int


@dataclass(frozen=True)
class GraphIndex:
    """Where the features of a captured graph are: edges between blocks, ``components`` by site, positions of arguments.

    ``masks`` are names of nodes by attention site: what the model lets its queries attend to. ``timestep`` is the
    position of that input, ``arguments`` are those of all arguments of the call (others are parameters and buffers),
    ``written`` those of inputs that the call writes into.
    """

    boundaries: tuple[Boundary, ...]
    ranges: dict[str, tuple[int, int]]
    latents: int | None
    masks: Mapping[str, str] = field(default_factory=dict)
    timestep: int | None = None
    arguments: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    components: Mapping[str, Component] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """``site`` is read from ``history`` earlier features (newest first), plus the latents where asked."""

    site: str
    history: int
    latents: bool = False

    @property
    def terms(self) -> int:
        """Number of coefficients."""
        return self.history + int(self.latents)


class Ordered(Enum):
    """Whether a site's tokens are put into another order around attention: not, in one, or in one for each head."""

    NOT, SITE, HEADS = range(3)


@dataclass(frozen=True)
class SparseAttention:
    """The attention ``site`` attends to listed blocks of keys; lists have room for ``width`` of them.

    Where ``pool`` is not 0, an input says which heads attend to the other blocks, too, by means of so many tokens.
    ``draft``: the lists that are given are only what is always kept; the graph finds more blocks in every call, ``by``
    these selectors (``patterns.draft.SELECTORS``); where there are several, an input says which head's by which.
    ``order``: whether blocks are of tokens in an order that is an input. ``clusters``: an input says of which heads the
    call finds it, by clusters of the tokens from the first up to the last of these; others have that which is given.
    ``int8``: an input says which heads have int8 scores. ``linear``: linear attention to the other blocks is added to
    the result, behind projections that are an input.
    ``keeps`` and ``reads`` are kinds of tensors (``passes.kept``): those that the graph hands on to later steps, and
    those that it has from an earlier one, for the heads that an input names. Where it keeps rests, lists of the blocks
    that are left out have room for ``others``; slots are of so many ``resting`` heads that an input names, 0: of all.
    """

    site: str
    query_block: int
    key_block: int
    width: int
    pool: int = 0
    draft: bool = False
    order: Ordered = Ordered.NOT
    by: tuple[str, ...] = ("means",)
    clusters: tuple[int, int] | None = None
    int8: bool = False
    linear: bool = False
    keeps: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    others: int = 0
    resting: int = 0


@dataclass(frozen=True)
class StepPlan:
    """What one straight-line graph does: which sites it predicts, and which features it hands on.

    ``boundaries`` asks for the residual stream at every edge between blocks (for profiling); ``dtype`` names the one
    that products are computed in, where that is not the model's. ``second_order``: what is returned of a computed step
    is combined with the computed step before. ``simplify``: the rewrites of ``passes.simplify``. ``sparse``: the
    attention sites that run block-sparse; which blocks they attend to is an input. ``hoist``: what is the same in many
    steps is computed ahead, and what the timestep decides for this many steps at once; 0: nothing is.
    """

    predicted: tuple[Prediction, ...] = ()
    recorded: tuple[str, ...] = ()
    boundaries: bool = False
    dtype: str | None = None
    second_order: bool = False
    simplify: bool = False
    sparse: tuple[SparseAttention, ...] = ()
    hoist: int = 0


@dataclass(frozen=True)
class PassResult:
    """A rewritten graph, whether anything changed, and why what was asked for did not apply."""

    gm: fx.GraphModule
    modified: bool
    reasons: tuple[str, ...] = ()


Tracer = Callable[[Callable[..., object], list[Tensor]], fx.GraphModule]
"""Traces a function on fake tensors into ATen."""
SITE = "ditopt_site"
"""Of the ``meta`` of attention nodes: the name of their site, through all rewrites."""
OF_THE_CALL = ("val", "eager_input_vals")
"""Of a node's ``meta``, what belongs to the very call: Inductor reads its operands' strides from the latter."""

Pass = Callable[[fx.GraphModule, StepPlan, GraphIndex], PassResult]


@dataclass
class PassManager:
    """Runs passes in order on a copy of a graph and keeps their reasons."""

    passes: Sequence[Pass]
    check: Callable[[fx.GraphModule], None] | None = None
    reasons: list[str] = field(default_factory=list)

    def run(self, gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> fx.GraphModule:
        """The rewritten graph; ``gm`` itself is left as it is."""
        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        gm.meta["ditopt_captured"] = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        gm.meta["ditopt_returned_inputs"] = [
            node.name for node in outputs(gm) if node is not None and node.op == "placeholder"
        ]
        for rewrite in self.passes:
            result = rewrite(gm, plan, index)
            gm = result.gm
            self.reasons += result.reasons
            if self.check is not None:
                self.check(gm)
        gm.graph.lint()
        gm.recompile()
        return gm


def find(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node called ``name``.

    Raises:
        KeyError: there is none.
    """
    found: fx.Node | None = next((node for node in gm.graph.nodes if node.name == name), None)
    if found is None:
        raise KeyError(name)
    return found


def outputs(gm: fx.GraphModule) -> list[fx.Node | None]:
    """What a graph returns, in order."""
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def set_outputs(gm: fx.GraphModule, values: Sequence[fx.Node | None]) -> None:
    """Make a graph return ``values``."""
    gm.graph.output_node().args = (tuple(values),)


def tensor_value(node: fx.Node) -> Tensor:
    """The fake tensor that describes a node's value."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node.name} carries {type(value).__name__}, not a tensor"
    return value


def call(gm: fx.GraphModule, target: Callable[..., object], *args: object, **settings: object) -> fx.Node:
    """Insert a call at the current place and give it its ``meta["val"]``; arguments are nodes and constants."""
    node = gm.graph.call_function(target, args, settings)  # type: ignore[arg-type]  # what a graph may hold is not spelt out
    values: Any = fx.map_arg((args, settings), lambda arg: arg.meta["val"])  # type: ignore[type-var]  # the same
    node.meta["val"] = target(*values[0], **values[1])
    return node


def replace_each(gm: fx.GraphModule, write: Callable[[fx.Node], fx.Node | None]) -> bool:
    """Put what ``write`` inserts for a node in its place, None leaves it; returns whether there was one.

    Nodes are visited in order, each after those before it were replaced.
    """
    modified = False
    for node in list(gm.graph.nodes):
        before = node.prev
        with gm.graph.inserting_before(node):
            new = write(node)
        if new is not None:
            hand_on_meta(node, before)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            modified = True
    gm.graph.eliminate_dead_code()
    return modified


def hand_on_meta(node: fx.Node, before: fx.Node) -> None:
    """Give what was inserted between ``before`` and ``node`` the node's ``meta``, but for what belongs to its call."""
    kept = {key: value for key, value in node.meta.items() if key not in OF_THE_CALL}
    inserted = before.next
    while inserted is not node:
        inserted.meta.update(kept)
        inserted = inserted.next


def converted(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A value in another dtype, by the operator that Inductor has for it at this level."""
    return (
        node
        if tensor_value(node).dtype == dtype
        else call(gm, torch.ops.prims.convert_element_type.default, node, dtype)
    )


def latents_part(latents: Tensor, output: Tensor) -> int | None:
    """How many leading channels (dimension 1) of ``latents`` have the shape of ``output``; None if no number has.

    Image-to-video models take their condition as further channels behind the noisy latents.
    """
    here, there = list(latents.shape), list(output.shape)
    if len(here) != len(there) or here[:1] + here[2:] != there[:1] + there[2:]:
        return None
    if len(here) < 3:
        return there[-1] if here == there else None
    return there[1] if there[1] <= here[1] else None


def contiguous(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A contiguous copy of a value: the layout in which features live across steps."""
    return call(gm, torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)


def in_layout_of(gm: fx.GraphModule, value: fx.Node, model: fx.Node) -> fx.Node:
    """``value`` with its dimensions in the memory order of ``model``'s, so that views made for that one hold."""
    return in_memory_order(gm, value, tensor_value(model))


def in_memory_order(gm: fx.GraphModule, value: fx.Node, model: Tensor) -> fx.Node:
    """``value`` with its dimensions in the memory order of the tensor ``model``."""
    order = memory_order(model)
    if memory_order(tensor_value(value)) == order:
        return value
    dense = contiguous(gm, call(gm, torch.ops.aten.permute.default, value, order))
    return call(gm, torch.ops.aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])


def memory_order(value: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest; those of one element stay where they are."""
    strides = [int(stride) for stride in value.stride()]
    long = [dim for dim in range(value.ndim) if value.shape[dim] > 1]
    ranked = iter(sorted(long, key=lambda dim: strides[dim], reverse=True))
    return [next(ranked) if dim in long else dim for dim in range(value.ndim)]


def word(site: str) -> str:
    """A site's name as a part of that of an input."""
    return "".join(c if c.isalnum() else "_" for c in site)


def last_input(gm: fx.GraphModule) -> fx.Node:
    """The last placeholder, behind which the calls begin."""
    found: fx.Node = gm.graph.find_nodes(op="placeholder")[-1]
    return found


def add_input(gm: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Append a graph input described by the fake tensor ``value``."""
    with gm.graph.inserting_after(last_input(gm)):
        node = gm.graph.placeholder(name)
    node.meta["val"] = value
    return node
