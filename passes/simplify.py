"""Simplify: the rewrites that make a step faster and leave its numbers as they are, but for rounding."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ditopt.passes._infra import GraphIndex, Pass, PassResult, StepPlan
from ditopt.passes.rotary import rotary, rotation_of
from ditopt.passes.sigmoid import sigmoid, tangent_plus_one

REWRITES: tuple[tuple[Pass, Callable[[fx.Node], object]], ...] = ((rotary, rotation_of), (sigmoid, tangent_plus_one))
"""Each with what tells a node that it would take: None for others."""


def simplify(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Do all rewrites that there are nodes for."""
    if not plan.simplify:
        return PassResult(gm, False)
    modified = False
    for rewrite, _ in REWRITES:
        result = rewrite(gm, plan, index)
        gm, modified = result.gm, modified or result.modified
    if modified or plan.predicted:  # of the blocks that are left there may be none
        return PassResult(gm, modified)
    names = " or ".join(rewrite.__name__ for rewrite, _ in REWRITES)
    return PassResult(gm, False, (f"simplify: nothing in the graph for {names}",))


def simplifiable(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that one of the rewrites would take."""
    return [node for node in gm.graph.nodes if any(find(node) is not None for _, find in REWRITES)]
