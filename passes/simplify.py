"""Simplify: the rewrites that make a step faster and leave its numbers as they are, but for rounding in its dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ditopt.kernels.ops import ATTENTION
from ditopt.passes._infra import GraphIndex, Pass, PassResult, StepPlan
from ditopt.passes.cast import castable
from ditopt.passes.flash import flash, flash_refusal
from ditopt.passes.rotary import rotary, rotation_of
from ditopt.passes.sigmoid import sigmoid, tangent_plus_one

REWRITES: tuple[tuple[Pass, Callable[[fx.Node], object]], ...] = ((rotary, rotation_of), (sigmoid, tangent_plus_one))
"""Each with what tells a node that it would take: None for others. ``flash`` follows them, behind the cast."""


def simplify(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Do all rewrites that there are nodes for."""
    if not plan.simplify:
        return PassResult(gm, False)
    modified = False
    for rewrite, _ in REWRITES:
        result = rewrite(gm, plan, index)
        gm, modified = result.gm, modified or result.modified
    if modified or plan.predicted or _for_flash(gm, plan.dtype):  # of the blocks that are left there may be none
        return PassResult(gm, modified)
    names = " or ".join([*(rewrite.__name__ for rewrite, _ in REWRITES), flash.__name__])
    return PassResult(gm, False, (f"simplify: nothing in the graph for {names}",))


def simplifiable(gm: fx.GraphModule, dtype: str | None = None) -> list[fx.Node]:
    """The nodes that one of the rewrites would take, or ``flash`` once products are cast to ``dtype``."""
    return [node for node in gm.graph.nodes if any(find(node) is not None for _, find in REWRITES)] + _for_flash(
        gm, dtype
    )


def _for_flash(gm: fx.GraphModule, dtype: str | None) -> list[fx.Node]:
    """Attention calls that a kernel takes as they are, or as ``cast`` leaves them where there is a ``dtype``."""
    calls = [node for node in gm.graph.nodes if node.target is ATTENTION]
    narrowed = set(castable(gm)) if dtype else set()
    return [node for node in calls if flash_refusal(node, dtype if node in narrowed else None) is None]
