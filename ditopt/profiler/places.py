"""Where in a captured graph the values are that collectors look at: attention, and products behind it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ditopt.passes.flops import PRODUCTS
from ditopt.sites import AttentionSite, LinearSite
from ditopt.trace import Trace, block_of, seen_through

BLOCK, RANGE, STEP_KIND = "block", "range", "step"
"""Kinds of features beside components."""

aten = torch.ops.aten
PASSING = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.expand.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}
"""Operators that hand all of a value on: views, copies, casts."""
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}


@dataclass(frozen=True)
class Attention:
    """An attention site in a graph: its node, what kind it is, and the weight that mixes its heads.

    ``cross``: its keys do not depend on the latents. ``projection`` is the node of the product that its output goes
    into, ``weight`` the position of that product's weight ``[inputs, outputs]`` among the node's arguments; None where
    there is none. Where text and video have products of their own, it is the video's: ``rows`` are the first and past
    the last query that it takes. Where it takes other inputs too (the MLP's, say), ``column`` is the first of them that
    is this site's; heads follow each other from there.
    """

    site: AttentionSite
    node: fx.Node
    cross: bool
    projection: fx.Node | None
    weight: int | None
    rows: tuple[int, int]
    column: int = 0


def attentions(trace: Trace) -> tuple[Attention, ...]:
    """The attention sites of the stack of blocks, in order of execution."""
    changing = trace.changing()
    nodes = {node.name: node for node in trace.gm.graph.nodes}
    lengths = _stream_lengths(trace, nodes)
    found = []
    for site in trace.sites:
        if not isinstance(site, AttentionSite):
            continue
        node = nodes[trace.site_nodes[site.name]]
        if block_of(node) not in trace.blocks or node not in changing:
            continue
        cross = node.args[1] not in changing
        product = _product_behind(node, site.queries, lengths)
        if product is None:
            found.append(Attention(site, node, cross, None, None, (0, site.queries)))
        else:
            found.append(Attention(site, node, cross, product.node, product.weight, product.rows, product.column))
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


@dataclass(frozen=True)
class _Product:
    """A product that takes the attention output of the queries ``rows``, from its input ``column`` on."""

    node: fx.Node
    weight: int
    rows: tuple[int, int]
    column: int


def _stream_lengths(trace: Trace, nodes: dict[str, fx.Node]) -> set[int]:
    """How many tokens the stream has that enters the first block and changes with the latents: the video's."""
    streams = trace.boundaries[0].streams if trace.boundaries else ()
    return {int(nodes[name].meta["val"].shape[-2]) for name in streams if nodes[name].meta["val"].ndim > 1}


def _product_behind(node: fx.Node, queries: int, lengths: set[int]) -> _Product | None:
    """The one product that an attention's output goes into; of several for parts of the queries, the video's.

    Only views, casts and copies may lie between, parts along the queries, and joining with other values.
    """
    found: dict[fx.Node, _Product] = {}
    for each in _products(node, (0, queries), 0):
        if each is None:
            return None
        other = found.setdefault(each.node, each)
        if other is not each:  # parts that were taken apart and joined again
            (start, stop), (begin, end) = sorted((other.rows, each.rows))
            if stop != begin or other.column != each.column:
                return None
            found[each.node] = replace(each, rows=(start, end))
    ordered = sorted(found.values(), key=lambda product: product.rows)
    if any(one.rows[1] > other.rows[0] for one, other in pairwise(ordered)):
        return None
    of_video = ordered if len(ordered) == 1 else [p for p in ordered if p.rows[1] - p.rows[0] in lengths]
    return of_video[0] if len(of_video) == 1 else None


def _products(at: fx.Node, rows: tuple[int, int], column: int) -> Iterator[_Product | None]:
    """Every product that a value goes into; None for a use that is no product."""
    for user in at.users:
        if user.op != "call_function":
            yield None
        elif user.target in PRODUCTS:
            left, right = PRODUCTS[user.target]
            weight = user.args[right]
            known = isinstance(weight, fx.Node) and seen_through(weight).op == "placeholder"
            yield _Product(user, right, rows, column) if user.args[left] is at and known else None
        elif user.target in PASSING:
            yield from _products(user, rows, column)
        elif user.target is aten.slice.Tensor:
            given: tuple[Any, ...] = user.args[1:]
            defaults: tuple[Any, ...] = (0, None, None, 1)
            dim, start, stop, step = given + defaults[len(given) :]
            part = _part(at, dim, rows, start, stop) if step == 1 else None
            yield from _products(user, part, column) if part is not None else (None,)
        elif user.target in SPLITS:
            for piece in user.users:
                before = sum(int(value.shape[_split_dim(user)]) for value in user.meta["val"][: piece.args[1]])
                here = int(piece.meta["val"].shape[_split_dim(user)])
                part = _part(at, _split_dim(user), rows, before, before + here)
                known = piece.target is operator.getitem and part is not None
                yield from _products(piece, part, column) if known and part is not None else (None,)
        elif user.target is aten.cat.default:
            columns = _columns_before(user, at)
            yield from (None,) if columns is None else _products(user, rows, column + columns)
        else:
            yield None


def _split_dim(node: fx.Node) -> int:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim


def _part(at: fx.Node, dim: int, rows: tuple[int, int], start: int | None, stop: int | None) -> tuple[int, int] | None:
    """The queries that a part along ``dim`` of a value has; None where that is not the axis of queries."""
    value = at.meta["val"]
    size = int(value.shape[dim])
    begin, end, _ = slice(start, stop).indices(size)
    if (begin, end) == (0, size):
        return rows
    last = dim % value.ndim == value.ndim - 1
    return None if last or size != rows[1] - rows[0] else (rows[0] + begin, rows[0] + end)


def _columns_before(cat: fx.Node, at: fx.Node) -> int | None:
    """How many channels stand before a value among those it is joined with; joined along another axis none do.

    None if it is joined with itself.
    """
    parts = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    assert isinstance(parts, list | tuple) and isinstance(dim, int)
    value = at.meta["val"]
    if parts.count(at) > 1:
        return None
    if dim % value.ndim != value.ndim - 1:
        return 0
    before = parts[: parts.index(at)]
    return sum(int(part.meta["val"].shape[-1]) for part in before if isinstance(part, fx.Node))
