"""Invariants of a functional ATen graph; checked after every pass in tests and by the audit."""

from __future__ import annotations

from torch import fx

from ditopt._torch import is_mutating
from ditopt.errors import AuditError


def verify(gm: fx.GraphModule) -> None:
    """Check that no operator mutates, that every value is described, and that no output is an input.

    Raises:
        AuditError: the first invariant that does not hold, with the node's name.
    """
    gm.graph.lint()
    inputs = set(gm.graph.find_nodes(op="placeholder"))
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "call_function", "get_attr", "output"):
            raise AuditError(f"node {node.name}: op {node.op!r} is not allowed in a functional graph")
        if node.op in ("placeholder", "call_function") and "val" not in node.meta:
            raise AuditError(f"node {node.name} ({node.target}): no meta['val'], so its shape and dtype are unknown")
        if is_mutating(node.target):
            raise AuditError(f"node {node.name}: {node.target} mutates its input")
    values = gm.graph.output_node().args[0]
    for value in values if isinstance(values, list | tuple) else ():
        if (
            isinstance(value, fx.Node)
            and value in inputs
            and value.name not in gm.meta.get("ditopt_returned_inputs", ())
        ):
            raise AuditError(f"output {value.name} is an input of the graph: slots must not alias arguments")
