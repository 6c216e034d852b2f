"""Predict features: a site's feature is a linear combination of earlier ones, read from state slots.

Reuse, forecasts of any order and fitted predictors are one rewrite; they differ in their coefficients,
which are an input of the graph. So one compiled graph serves every schedule of the same shape.
"""

from __future__ import annotations

import torch
from torch import fx

from ditopt.passes._infra import (
    GraphIndex,
    PassResult,
    StepPlan,
    add_input,
    call,
    find,
    latents_part,
    outputs,
    set_outputs,
    tensor_value,
)
from ditopt.passes.combine import combine, factors_input, like, slot_name
from ditopt.passes.features import Feature, feature, user_outputs
from ditopt.sites import STEP

aten = torch.ops.aten


def predict(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Replace the feature of every predicted site; what only it needed is left without users."""
    user_outputs(gm)
    reasons = []
    modified = False
    for wanted in sorted(plan.predicted, key=lambda wanted: _position(index, wanted.site), reverse=True):
        try:
            found = feature(gm, index, wanted.site)
        except KeyError:
            reasons.append(f"predict {wanted.site}: the graph has no such site")
            continue
        if wanted.latents and not _latents_fit(gm, index, found):
            reasons.append(f"predict {wanted.site}: latents are no regressor here")
            continue
        modified = True
        edge = gm.graph.output_node() if wanted.site == STEP else _after_edge(gm, index, wanted.site)
        for stream, (end, start) in enumerate(zip(found.ends, found.starts, strict=True)):
            slots = [add_input(gm, slot_name(wanted.site, age, stream), like(end)) for age in range(wanted.history)]
            factors = factors_input(gm, wanted.site, wanted.terms, end)
            terms = list(slots)
            with gm.graph.inserting_before(edge):
                if wanted.latents and index.latents is not None:
                    terms.append(_latents_term(gm, index.latents, end))
                value = combine(gm, factors, terms, end, start)
            if wanted.site == STEP:
                kept = [value if node is end else node for node in outputs(gm)]
                set_outputs(gm, kept)
            else:
                _replace_after(gm, end, value, edge)
    return PassResult(gm, modified, tuple(reasons))


def _position(index: GraphIndex, site: str) -> int:
    """Later blocks are rewritten first, so that a block still finds the end of the one before, to be replaced next."""
    if site in index.components:
        return index.components[site].block
    return index.ranges.get(site, (-1, -1))[0]


def _latents_fit(gm: fx.GraphModule, index: GraphIndex, found: Feature) -> bool:
    """Whether the latents are a regressor for a feature: that of the step, in the same shape."""
    if found.site != STEP or index.latents is None:
        return False
    latents = tensor_value(gm.graph.find_nodes(op="placeholder")[index.latents])
    return all(latents_part(latents, tensor_value(end)) is not None for end in found.ends)


def _latents_term(gm: fx.GraphModule, position: int, end: fx.Node) -> fx.Node:
    """The latents, or those of their channels that have the shape of ``end``."""
    latents: fx.Node = gm.graph.find_nodes(op="placeholder")[position]
    if tensor_value(latents).shape == tensor_value(end).shape:
        return latents
    return call(gm, aten.slice.Tensor, latents, 1, 0, latents_part(tensor_value(latents), tensor_value(end)))


def _after_edge(gm: fx.GraphModule, index: GraphIndex, site: str) -> fx.Node:
    """The first node behind the end of a block range, or behind a component's output."""
    if site in index.components:
        return find(gm, index.components[site].node).next
    return find(gm, index.boundaries[index.ranges[site][1] + 1].after).next


def _replace_after(gm: fx.GraphModule, old: fx.Node, new: fx.Node, edge: fx.Node) -> None:
    """Let every user of ``old`` from ``edge`` on read ``new``."""
    behind = set()
    node = edge
    while node.op != "root":
        behind.add(node)
        node = node.next
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user in behind, propagate_meta=False)
