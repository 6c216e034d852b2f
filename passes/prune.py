"""Prune: remove what nobody reads any more, inputs included."""

from __future__ import annotations

from torch import fx

from ditopt.passes._infra import GraphIndex, PassResult, StepPlan


def prune(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Drop dead nodes; inputs without users go too, and ``gm.meta["ditopt_inputs"]`` keeps the positions left.

    Inputs of the captured graph are listed by position, inputs that a pass added by name.
    """
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    captured = {name: position for position, name in enumerate(gm.meta["ditopt_captured"])}
    left: list[int | str] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        if not node.users:
            gm.graph.erase_node(node)
        else:
            left.append(captured.get(node.name, str(node.target)))
    gm.meta["ditopt_inputs"] = left
    return PassResult(gm, len(gm.graph.nodes) < before)
