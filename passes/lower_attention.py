"""Lower attention: every opaque site operator becomes what Inductor would have traced in its place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from ditopt.kernels.ops import ATTENTION, plain_attention
from ditopt.passes._infra import GraphIndex, PassResult, StepPlan, Tracer


def lower_attention_with(trace: Tracer) -> Callable[[fx.GraphModule, StepPlan, GraphIndex], PassResult]:
    """The pass, given how to trace a function on fake tensors into ATen."""

    def lower_attention(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
        nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is ATTENTION]
        for node in nodes:
            tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
            positions = [i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node)]
            settings = list(node.args)

            def call(*values: Tensor, settings: list[object] = settings, positions: list[int] = positions) -> Tensor:
                given = list(settings)
                for position, value in zip(positions, values, strict=True):
                    given[position] = value
                return plain_attention(*given)  # type: ignore[arg-type]  # settings are the operator's own arguments

            body = trace(call, [tensor.meta["val"] for tensor in tensors])
            inputs = dict(zip(body.graph.find_nodes(op="placeholder"), tensors, strict=True))
            with gm.graph.inserting_before(node):
                result = gm.graph.graph_copy(body.graph, inputs)
            for copied in inputs.values():
                if copied not in tensors and "nn_module_stack" in node.meta:
                    copied.meta.setdefault("nn_module_stack", node.meta["nn_module_stack"])
            assert isinstance(result, fx.Node)
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
        return PassResult(gm, bool(nodes))

    return lower_attention
