"""Second order: a computed step returns its output combined with that of the computed step before.

What is recorded stays as computed, so predictions read the network and not what the sampler was handed. The two
factors are an input of the graph (``search.predictors.second_order_factors``).
"""

from __future__ import annotations

from torch import fx

from ditopt.passes._infra import GraphIndex, PassResult, StepPlan, add_input, outputs, set_outputs, tensor_value
from ditopt.passes.combine import combine, factors_input, like, slot_name
from ditopt.passes.features import feature, user_outputs
from ditopt.sites import STEP

SECOND_ORDER = "second_order"
"""Names the input of the factors ``[2]``: of the output, and of the one before."""


def second_order(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Return ``factors[0] * output + factors[1] * slot`` in place of every output of the user's that holds floats."""
    if not plan.second_order:
        return PassResult(gm, False)
    count = user_outputs(gm)
    combined: dict[fx.Node, fx.Node] = {}
    for stream, end in enumerate(feature(gm, index, STEP).ends):
        if end in combined or not tensor_value(end).dtype.is_floating_point:
            continue
        slot = add_input(gm, slot_name(STEP, 0, stream), like(end))
        factors = factors_input(gm, SECOND_ORDER, 2, end)
        with gm.graph.inserting_before(gm.graph.output_node()):
            combined[end] = combine(gm, factors, [end, slot], end, None)
    returned, recorded = outputs(gm)[:count], outputs(gm)[count:]
    set_outputs(gm, [*(node if node is None else combined.get(node, node) for node in returned), *recorded])
    return PassResult(gm, bool(combined))
