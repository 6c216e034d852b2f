"""The audit: proof that what a step's plan decided is really in its graph."""

from __future__ import annotations

from torch import fx

from ditopt.errors import AuditError
from ditopt.passes._infra import GraphIndex, StepPlan
from ditopt.passes.cast import castable
from ditopt.passes.combine import factors_name, slot_name
from ditopt.passes.features import user_outputs
from ditopt.passes.second_order import SECOND_ORDER
from ditopt.sites import STEP


def audit(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex, dead: dict[str, tuple[str, ...]]) -> None:
    """Check a rewritten graph against its plan.

    ``dead[site]`` names the nodes that only the site's feature needed: in a graph that predicts the site
    none of them may be left.

    Raises:
        AuditError: a decision is not in the graph; names site and finding.
    """
    names = {node.name for node in gm.graph.nodes}
    inputs = {str(node.target) for node in gm.graph.find_nodes(op="placeholder")}
    for wanted in plan.predicted:
        if wanted.site != STEP and wanted.site not in index.ranges:
            raise AuditError(f"{wanted.site}: predicted by the plan, but the graph has no such site")
        streams = 1 if wanted.site == STEP else len(index.boundaries[index.ranges[wanted.site][1] + 1].streams)
        needed = [
            {factors_name(wanted.site)}
        ]  # of a feature's streams some may be dead, as the prompt's before a predicted last block
        needed += [{slot_name(wanted.site, age, stream) for stream in range(streams)} for age in range(wanted.history)]
        missing = [sorted(names)[0] for names in needed if not names & inputs]
        if missing:
            raise AuditError(f"{wanted.site}: predicted by the plan, but the graph does not read {', '.join(missing)}")
        left = [name for name in dead.get(wanted.site, ()) if name in names]
        if left:
            raise AuditError(
                f"{wanted.site}: predicted by the plan, but {len(left)} of its nodes are still computed, e.g. {left[0]}"
            )
    if plan.dtype is not None:
        left = [node.name for node in castable(gm)]
        if left:
            raise AuditError(f"products are to run in {plan.dtype}, but {len(left)} do not, e.g. {left[0]}")
    if plan.second_order:
        unread = {factors_name(SECOND_ORDER), slot_name(STEP, 0, 0)} - inputs
        if unread:
            raise AuditError(f"{STEP}: second order by the plan, but the graph does not read {sorted(unread)[0]}")
    extra = len(gm.graph.output_node().args[0]) - user_outputs(gm)  # type: ignore[arg-type]
    if plan.recorded and extra < len(plan.recorded):
        raise AuditError(
            f"{len(plan.recorded)} features are to be recorded ({', '.join(plan.recorded)}), the graph hands on {extra}"
        )


def only_needed_by(gm: fx.GraphModule, index: GraphIndex, site: str, changing: set[str]) -> tuple[str, ...]:
    """Names of the captured nodes that must vanish once ``site`` is predicted.

    For the step these are all calls; for a block range the calls between its edges that depend on the
    latents (``changing``).
    """
    calls = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    if site == STEP:
        return tuple(calls)
    if site not in index.ranges:
        return ()
    first, last = index.ranges[site]
    order = [node.name for node in gm.graph.nodes]
    begin, end = order.index(index.boundaries[first].after), order.index(index.boundaries[last + 1].after)
    inside = set(order[begin + 1 : end + 1])
    return tuple(name for name in calls if name in inside and name in changing)
