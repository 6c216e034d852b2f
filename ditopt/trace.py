"""The trace: one captured, functional ATen graph with the sites found in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.nn import functional as F

from ditopt._torch import CompileContext, is_model_state, module_path, module_stack, source_name, written_inputs
from ditopt.kernels.ops import ATTENTION, SETTINGS
from ditopt.passes._infra import SITE, Boundary, GraphIndex
from ditopt.passes.attention import mask_of
from ditopt.passes.flops import PRODUCTS, attention_flops, product_flops
from ditopt.sites import AttentionSite, BlockSite, LinearSite, Site, StepSite, range_names

SDPA_ARGUMENTS = ("query", "key", "value", *SETTINGS)


@dataclass
class Trace:
    """One captured graph. ``boundaries[i]`` is the edge before block i; the last one ends the last block.

    ``roots`` are the positions of the inputs that carry what changes with the latents; ``site_nodes`` the names of the
    nodes that are the attention and linear sites, by site name.
    """

    index: int
    gm: fx.GraphModule
    context: CompileContext
    arguments: dict[str, int]
    state_names: dict[str, int]
    blocks: tuple[str, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    sites: tuple[Site, ...] = ()
    site_nodes: dict[str, str] = field(default_factory=dict)
    roots: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The graph's inputs in call order: parameters, buffers and arguments alike."""
        return list(self.gm.graph.find_nodes(op="placeholder"))

    @property
    def structure(self) -> str:
        """A hash of names, shapes and dtypes of the parameters and buffers that the graph reads."""
        nodes = self.placeholders
        lines = sorted(
            f"{name} {tuple(nodes[i].meta['val'].shape)} {nodes[i].meta['val'].dtype}"
            for name, i in self.state_names.items()
        )
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def find_argument(self, name: str, order: Sequence[str] = ()) -> int | None:
        """The position among the inputs of the forward's argument ``name``; ``order`` names positional ones."""
        if name in self.arguments:
            return self.arguments[name]
        if name in order:
            return self.arguments.get(f"*{list(order).index(name)}")
        return None

    def ranges(self) -> dict[str, tuple[int, int]]:
        """All contiguous block ranges by site name, as (first, last) positions."""
        return range_names(self.blocks) if self.boundaries else {}

    def changing(self) -> set[fx.Node]:
        """The nodes whose value changes with the latents."""
        placeholders = self.placeholders
        return dependents(self.gm, *(placeholders[position] for position in self.roots))

    def graph_index(self, latents: int | None, timestep: int | None = None) -> GraphIndex:
        """What passes need to know of this graph; ``latents`` is the position of the input that changes."""
        calls = (node for node in self.gm.graph.nodes if node.target is ATTENTION and SITE in node.meta)
        masks = {node.meta[SITE]: mask.name for node in calls if (mask := mask_of(node)) is not None}
        arguments, written = frozenset(self.arguments.values()), written_inputs(self.context)
        return GraphIndex(self.boundaries, self.ranges(), latents, masks, timestep, arguments, written)


def mark_attention(gm: fx.GraphModule) -> int:
    """Turn every attention call of a Dynamo graph into the opaque site operator; returns how many there were."""
    found = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            given = SETTINGS | dict(zip(SDPA_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
            node.target = ATTENTION
            node.args = tuple(given[name] for name in SDPA_ARGUMENTS)
            node.kwargs = {}
            found += 1
    gm.recompile()
    return found


def name_inputs(gm: fx.GraphModule) -> tuple[dict[str, int], dict[str, int]]:
    """Positions of a Dynamo graph's inputs: (arguments by name, ``*0`` for positional ones; parameters by path)."""
    arguments: dict[str, int] = {}
    state: dict[str, int] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        source = source_name(node)
        if source is None or isinstance(node.meta.get("example_value"), torch.SymInt):  # a size says no argument's name
            arguments[node.name] = position
        elif is_model_state(source):
            state[module_path(source)] = position
        else:
            path = module_path(source)  # "timestep", "kwargs.timestep" or "args.1"
            root = source.split("'")[1]
            name = path or root
            if root in ("args", "kwargs"):
                name = f"*{path}" if root == "args" else path
            arguments[name] = position
    return arguments, state


def own_inputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """Positions of a Dynamo graph's inputs that the module itself has and that are no parameters or buffers.

    Such are numbers and tensors among its attributes, as the scale of an adapter.
    """
    sources = map(source_name, gm.graph.find_nodes(op="placeholder"))
    return tuple(
        position
        for position, source in enumerate(sources)
        if source is not None and source.startswith("L['self']") and not is_model_state(source)
    )


def analyse(
    gm: fx.GraphModule,
    context: CompileContext,
    index: int,
    arguments: dict[str, int],
    state: dict[str, int],
    latents: int | None,
    *,
    follows: bool = False,
) -> Trace:
    """Find the sites of a functional ATen graph.

    ``latents`` is the position of the input that changes every step; of a graph that ``follows`` a graph break it is
    not known: there the residual stream is looked for among all arguments.
    """
    trace = Trace(index, gm, context, arguments, state)
    placeholders = trace.placeholders
    if len(placeholders) != len(arguments) + len(state):
        trace.notes.append(
            f"graph has {len(placeholders)} inputs, the capture named {len(arguments) + len(state)}; "
            "inputs are not told apart"
        )
        trace.arguments, trace.state_names = {}, {}
        latents = None
    if latents is not None:
        trace.roots = (latents,)
    elif follows:
        trace.roots = tuple(sorted(trace.arguments.values()))
    changing = trace.changing() if trace.roots else set(gm.graph.nodes)
    trace.blocks = _find_blocks(gm, changing)
    if follows and trace.blocks:
        trace.roots = _entering_streams(trace, changing) or trace.roots
        changing = trace.changing()
    if trace.roots and trace.blocks:
        entering = {placeholders[position] for position in trace.roots} if follows else set()
        trace.boundaries = _find_boundaries(gm, trace.blocks, changing, entering)
    trace.sites = tuple(_find_sites(trace))
    return trace


def block_of(node: fx.Node) -> str | None:
    """The outermost numbered module of a node's stack: ``blocks.3`` for ``blocks.3.attn1.to_q``."""
    for path in module_stack(node):
        parts = path.split(".")
        for depth, part in enumerate(parts):
            if part.isdigit() and depth:
                return ".".join(parts[: depth + 1])
    return None


def _find_blocks(gm: fx.GraphModule, changing: set[fx.Node]) -> tuple[str, ...]:
    """Numbered modules in execution order with attention among the ``changing`` nodes; a prompt refiner's is not."""
    seen: dict[str, None] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is ATTENTION and node in changing:
            name = block_of(node)
            if name is not None:
                seen[name] = None
    return tuple(seen)


def dependents(gm: fx.GraphModule, *roots: fx.Node) -> set[fx.Node]:
    """All nodes whose value depends on one of ``roots``."""
    found = set(roots)
    for node in gm.graph.nodes:
        if any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def _entering_streams(trace: Trace, changing: set[fx.Node]) -> tuple[int, ...]:
    """The arguments that are the residual stream before the first block.

    That is: which no later block reads, and which have the shape and type of a value that the first block hands on.
    """
    order = list(trace.gm.graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in order}
    end = _edges(order, trace.blocks, changing)[1]
    handed_on = {_kind(n) for n in order[: end + 1] if n in changing and n.op == "call_function" and last_use[n] > end}
    found = {trace.placeholders[p]: p for p in trace.arguments.values()}
    return tuple(sorted(p for node, p in found.items() if 0 <= last_use[node] <= end and _kind(node) in handed_on))


def _kind(node: fx.Node) -> tuple[tuple[str, ...], torch.dtype] | None:
    """Shape and type; sizes as text, as those of a dynamic shape have no hash."""
    value = node.meta.get("val")
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


def _edges(order: list[fx.Node], blocks: tuple[str, ...], changing: set[fx.Node]) -> list[int]:
    """Where in ``order`` the last node before the first block is, and the last node of every block."""
    spans = {
        name: [i for i, n in enumerate(order) if n.op == "call_function" and n in changing and block_of(n) == name]
        for name in blocks
    }
    return [min(spans[blocks[0]]) - 1] + [max(spans[name]) for name in blocks]


def _find_boundaries(
    gm: fx.GraphModule, blocks: tuple[str, ...], changing: set[fx.Node], entering: set[fx.Node]
) -> tuple[Boundary, ...]:
    """The residual stream between blocks: latents-dependent (``changing``) values that cross the edge.

    Views that only look into a crossing value (``getitem`` of a split) count as the values they are; of the graph's
    inputs only those ``entering`` as the stream count.
    """
    order = list(gm.graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in order}
    boundaries = []
    for edge in _edges(order, blocks, changing):
        crossing = [
            n
            for n in order[: edge + 1]
            if n in changing and (n.op == "call_function" or n in entering) and last_use[n] > edge
        ]
        streams = [n for n in crossing if isinstance(n.meta.get("val"), torch.Tensor)]
        boundaries.append(Boundary(order[edge].name, tuple(n.name for n in streams)))
    return tuple(boundaries)


def _find_sites(trace: Trace) -> list[Site]:
    sites: list[Site] = []
    repeats: dict[str, int] = {}
    placeholders = trace.placeholders
    weights = {placeholders[position] for position in trace.state_names.values()} or set(placeholders)
    for node in trace.gm.graph.nodes:
        if node.op != "call_function":
            continue
        stack = module_stack(node)
        if node.target is ATTENTION:
            query, key = node.args[0].meta["val"], node.args[1].meta["val"]
            sites.append(
                AttentionSite(
                    _distinct(repeats, stack[-1] if stack else node.name),
                    trace.index,
                    int(query.shape[1]),
                    int(query.shape[-2]),
                    int(key.shape[-2]),
                    int(query.shape[-1]),
                    len(node.args) > 3 and node.args[3] is not None,
                )
            )
            trace.site_nodes[sites[-1].name] = node.name
            node.meta[SITE] = sites[-1].name
        elif node.target in PRODUCTS and seen_through(node.args[PRODUCTS[node.target][1]]) in weights:
            left, right = (node.args[i].meta["val"] for i in PRODUCTS[node.target])
            rows = math.prod(map(int, left.shape[:-1]))  # a strided input makes a batched product of a linear layer
            sites.append(
                LinearSite(
                    _distinct(repeats, stack[-1] if stack else node.name),
                    trace.index,
                    int(right.shape[-2]),
                    int(right.shape[-1]),
                    rows,
                )
            )
            trace.site_nodes[sites[-1].name] = node.name
    if trace.boundaries:
        for position, name in enumerate(trace.blocks):
            streams = trace.boundaries[position + 1].streams
            sites.append(BlockSite(name, trace.index, position, tuple(_shape(trace.gm, s) for s in streams)))
    outputs = [n for n in trace.gm.graph.output_node().args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    sites.append(StepSite(trace.index, tuple(tuple(map(int, n.meta["val"].shape)) for n in outputs)))
    return sites


def seen_through(node: fx.Node) -> fx.Node:
    """What a value is made of, if only views, casts and expansions lie between."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _distinct(repeats: dict[str, int], name: str) -> str:
    """A second site in one module is ``name#1``."""
    repeats[name] = repeats.get(name, -1) + 1
    return f"{name}#{repeats[name]}" if repeats[name] else name


def _shape(gm: fx.GraphModule, name: str) -> tuple[int, ...]:
    node = next(n for n in gm.graph.nodes if n.name == name)
    return tuple(map(int, node.meta["val"].shape))


def count_flops(gm: fx.GraphModule, block: str | None = None) -> int:
    """FLOPs (two per multiply-add) of the matrix products and attention of a graph, or of one block of it."""
    total = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or (block is not None and block_of(node) != block):
            continue
        if node.target in PRODUCTS:
            total += product_flops(node)
        elif node.target is ATTENTION:
            total += attention_flops(node)
    return total
