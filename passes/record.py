"""Record features: a graph hands the features that later steps read on as further outputs (state slots)."""

from __future__ import annotations

import torch
from torch import fx

from ditopt.passes._infra import GraphIndex, PassResult, StepPlan, call, contiguous, find, outputs, set_outputs
from ditopt.passes.features import feature, user_outputs


def record(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Append the tensors of every recorded site to the outputs, in the plan's order."""
    user_outputs(gm)
    extra: list[fx.Node | None] = []
    reasons = []
    for site in plan.recorded:
        try:
            found = feature(gm, index, site)
        except KeyError:
            reasons.append(f"record {site}: the graph has no such site")
            continue
        with gm.graph.inserting_before(gm.graph.output_node()):
            for end, start in zip(found.ends, found.starts, strict=True):
                extra.append(contiguous(gm, call(gm, torch.ops.aten.sub.Tensor, end, start) if start else end))
    if plan.boundaries:
        with gm.graph.inserting_before(gm.graph.output_node()):
            for boundary in index.boundaries:
                extra += [contiguous(gm, find(gm, name)) for name in boundary.streams]
    set_outputs(gm, [*outputs(gm), *extra])
    return PassResult(gm, bool(extra), tuple(reasons))
