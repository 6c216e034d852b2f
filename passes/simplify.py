"""The rewrites of a simplified step: for speed, and exact but for rounding."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ditopt.passes._infra import Pass
from ditopt.passes.rotary import rotary, rotation_of
from ditopt.passes.sigmoid import sigmoid, tangent_plus_one

REWRITES: tuple[tuple[Pass, Callable[[fx.Node], object]], ...] = ((rotary, rotation_of), (sigmoid, tangent_plus_one))
"""Each with what finds a node for it: None where there is none."""


def simplifiable(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that one of the rewrites would take."""
    return [node for node in gm.graph.nodes if any(find(node) is not None for _, find in REWRITES)]
