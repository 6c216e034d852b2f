"""The audit: proof that what a step's plan decided is really in its graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ditopt.errors import AuditError
from ditopt.kernels.ops import ATTENTION, BLOCK_SPARSE_ATTENTION, CLUSTER_ORDER, FLASH_ATTENTION, LINEAR_REST
from ditopt.passes._infra import SITE, GraphIndex, Ordered, SparseAttention, StepPlan, outputs, tensor_value
from ditopt.passes.attention import list_maker, rest_of
from ditopt.passes.cast import VIEWS, castable, readers, source
from ditopt.passes.combine import factors_name, slot_name
from ditopt.passes.features import user_outputs
from ditopt.passes.hoist import check_hoisted
from ditopt.passes.kept import LISTS, REST, check_handed_on, kept_slots, slot_of, taken
from ditopt.passes.kept_rest import check_with_rest, keeps_rest
from ditopt.passes.second_order import SECOND_ORDER
from ditopt.passes.simplify import simplifiable
from ditopt.passes.sparse import (
    MEANS,
    cluster_sizes,
    clusters_name,
    draft_inputs,
    int8_name,
    list_names,
    order_names,
    projection_name,
    rest_name,
)
from ditopt.sites import STEP

aten = torch.ops.aten

EXPANSIONS = (aten.expand.default, aten.unsqueeze.default, aten.clone.default)
ATTENTIONS = (ATTENTION, FLASH_ATTENTION, BLOCK_SPARSE_ATTENTION)


def audit(
    gm: fx.GraphModule,
    plan: StepPlan,
    index: GraphIndex,
    dead: dict[str, tuple[str, ...]],
    reasons: Sequence[str] = (),
) -> None:
    """Check a rewritten graph against its plan.

    ``dead[site]`` names the nodes that only the site's feature needed: in a graph that predicts the site
    none of them may be left. ``reasons`` are those of the passes.

    Raises:
        AuditError: a decision is not in the graph; names site and finding.
    """
    names = {node.name for node in gm.graph.nodes}
    inputs = {str(node.target) for node in gm.graph.find_nodes(op="placeholder")}
    for wanted in plan.predicted:
        single = wanted.site == STEP or wanted.site in index.components
        if not single and wanted.site not in index.ranges:
            raise AuditError(f"{wanted.site}: predicted by the plan, but the graph has no such site")
        streams = 1 if single else len(index.boundaries[index.ranges[wanted.site][1] + 1].streams)
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
    if plan.simplify:
        left = [node.name for node in simplifiable(gm)]
        if left:
            raise AuditError(f"the step is to be simplified, but {len(left)} nodes are as they were, e.g. {left[0]}")
    made = _check_sparse(gm, plan, index, reasons)
    check_hoisted(gm, plan, index, reasons)
    if plan.second_order:
        _check_second_order(gm)
    _check_outputs(gm, plan, index, made)


def _check_outputs(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex, made: Mapping[str, Sequence[object]]) -> None:
    """Behind what the user gets are the streams of every recorded feature, of every boundary, and what is kept."""
    returned = user_outputs(gm)
    streams = [len(boundary.streams) for boundary in index.boundaries]
    of_sites = {site: streams[last + 1] for site, (_, last) in index.ranges.items()}
    of_sites[STEP] = sum(node is not None for node in outputs(gm)[:returned])
    wanted = sum(of_sites.get(site, 1) for site in plan.recorded) + (sum(streams) if plan.boundaries else 0)
    kept = sum(count for _, count in kept_slots(plan))
    extra = len(outputs(gm)) - returned
    if extra - kept < wanted:
        raise AuditError(
            f"{len(plan.recorded)} features are to be recorded ({', '.join(plan.recorded)}) in {wanted} tensors, and "
            f"{kept} kept; the graph hands on {extra}"
        )
    check_handed_on(gm, plan, returned + wanted, made)


def _check_sparse(
    gm: fx.GraphModule, plan: StepPlan, index: GraphIndex, reasons: Sequence[str]
) -> dict[str, Sequence[object]]:
    """Exactly the sites of the plan have block-sparse attention and no other, each by lists of its own.

    What they make that may be kept is told by slot.
    """
    made: dict[str, Sequence[object]] = {}
    calls = [node for node in gm.graph.nodes if node.target in ATTENTIONS]
    for wanted in plan.sparse:
        of_site = [node for node in calls if node.meta.get(SITE) == wanted.site]
        if [node.target for node in of_site] != [BLOCK_SPARSE_ATTENTION] * (1 + keeps_rest(wanted)):
            why = [told.partition(": ")[2] for told in reasons if told.startswith(f"sparse {wanted.site}: ")]
            found = ", ".join(str(node.target) for node in of_site) or "not in the graph"
            raise AuditError(f"{wanted.site}: sparse by the plan, but its attention is {'; '.join([found, *why])}")
        node = of_site[0]
        lists = _of_draft(node, wanted) if wanted.draft else node.args[3:5]
        if LISTS in wanted.reads:
            own = [taken(each, LISTS, wanted.site, place) for place, each in enumerate(lists[:2])]
            if any(each is None for each in own):
                raise AuditError(f"{wanted.site}: to read lists that were kept, but its attention does not")
            lists = (*own, *lists[2:])
        read = [str(each.target) for each in lists if isinstance(each, fx.Node)]
        sizes = (*node.args[5:7], tensor_value(node.args[3]).shape[-1])
        names = [*list_names(wanted.site), *draft_inputs(wanted)]
        if read != names or sizes != (wanted.query_block, wanted.key_block, wanted.width):
            raise AuditError(f"{wanted.site}: to be {wanted}, but its attention reads {', '.join(read)} in {sizes}")
        _check_rest(node, wanted)
        results, rest = check_with_rest(gm, wanted, of_site)
        made |= {slot_of(LISTS, wanted.site): node.args[3:5], slot_of(REST, wanted.site): rest}
        _check_order(gm, node, wanted, _check_linear(node, wanted, results))
        _check_mask(node, wanted, index.masks.get(wanted.site))
        _check_int8(node, wanted)
    planned = {wanted.site for wanted in plan.sparse}
    for node in calls:
        if node.target is BLOCK_SPARSE_ATTENTION and node.meta.get(SITE) not in planned:
            raise AuditError(f"{node.meta.get(SITE, node.name)}: sparse in the graph, but not by the plan")
    return made


def _check_mask(node: fx.Node, wanted: SparseAttention, named: str | None) -> None:
    """Block-sparse attention has the model's own mask, or none where the model has none."""
    mask = node.kwargs.get("mask")
    if named is None:
        if mask is not None:
            raise AuditError(f"{wanted.site}: its attention has a mask in the graph, and none in the model")
    elif not isinstance(mask, fx.Node) or named not in {each.name for each in _makers(mask)}:
        raise AuditError(
            f"{wanted.site}: the model masks its attention by {named}, which the graph does not read there"
        )


def _check_int8(node: fx.Node, wanted: SparseAttention) -> None:
    """Block-sparse attention reads the site's own input of which heads have int8 scores, or none."""
    heads = node.kwargs.get("int8")
    read = str(heads.target) if isinstance(heads, fx.Node) else None
    if read != (int8_name(wanted.site) if wanted.int8 else None):
        raise AuditError(
            f"{wanted.site}: to be {wanted}, but which heads have int8 scores its attention reads in {read}"
        )


def _check_rest(node: fx.Node, wanted: SparseAttention) -> None:
    """Pooled operands of block-sparse attention are the plan's: means of its own keys and values, or none at all."""
    *given, heads, pool = rest_of(node)
    read = str(heads.target) if isinstance(heads, fx.Node) else None
    if (read, pool) != ((rest_name(wanted.site), wanted.pool) if wanted.pool else (None, 0)):
        raise AuditError(f"{wanted.site}: to be {wanted}, but its attention reads {read} in pools of {pool}")
    for name, whole, means in zip(("keys", "values"), node.args[1:3], given, strict=True):
        found = isinstance(means, fx.Node)
        if found != bool(wanted.pool) or (found and source(whole) not in _sources_of_means(means)):
            what = f"to be {wanted}, but its attention has {'other' if found else 'no'} pooled {name}"
            raise AuditError(f"{wanted.site}: {what}")


def _check_linear(node: fx.Node, wanted: SparseAttention, results: list[fx.Node]) -> list[fx.Node]:
    """Linear attention of the same operands to what the same lists leave out is added to ``results`` once, or none is.

    Returns the nodes that hold the whole result of the site's attention.
    """
    read_by = readers(results)
    further = [source(each.args[1]) if each.target is aten.add.Tensor else None for each in read_by]
    linear = [each for each in further if isinstance(each, fx.Node) and each.target is LINEAR_REST]
    if not wanted.linear:
        if linear:
            raise AuditError(f"{wanted.site}: linear attention is added to its result, but not by the plan")
        return results
    own = (*map(source, node.args[:5]), *node.args[5:7])
    if len(linear) != len(read_by) or len(read_by) != 1:
        raise AuditError(f"{wanted.site}: to be {wanted}, but no linear attention is added to its result")
    (rest,), (added,) = linear, read_by
    once = len(added.args) == 2 and added.kwargs.get("alpha", 1) == 1 and readers([rest]) == [added]
    if not once or source(added.args[0]) not in results:
        told = "; ".join(str(each.format_node()) for each in readers([rest]))
        raise AuditError(f"{wanted.site}: its linear attention is not added to its result once, but read by {told}")
    read = rest.args[5]
    if (*map(source, rest.args[:5]), *rest.args[6:8]) != own or not isinstance(read, fx.Node):
        raise AuditError(f"{wanted.site}: its linear attention has other operands or lists than its own")
    if str(read.target) != projection_name(wanted.site):
        raise AuditError(f"{wanted.site}: to be {wanted}, but its linear attention reads {read.target}")
    return read_by


def _check_order(gm: fx.GraphModule, node: fx.Node, wanted: SparseAttention, results: Sequence[fx.Node]) -> None:
    """Operands are gathered by the site's own order if the plan has one, and all that reads ``results`` by its inverse.

    Else none is gathered by any order of the plan's.
    """
    names = {str(each.target): each for each in gm.graph.find_nodes(op="placeholder")}
    there, back = (names.get(name) for name in order_names(wanted.site))
    ordered = wanted.order is not Ordered.NOT
    orders: Sequence[fx.Node | None] = [there] * 3
    if wanted.clusters is not None:
        *orders, back = _cluster_orders(node, wanted, there, names.get(clusters_name(wanted.site)))
    for name, operand, own in zip(("queries", "keys", "values"), node.args[:3], orders, strict=True):
        by = _gathered_by(source(operand))
        if ordered and (by is None or by is not own):
            raise AuditError(
                f"{wanted.site}: to be {wanted}, but its {name} are not in the order of {order_names(wanted.site)[0]}"
            )
        if not ordered and by is not None and (by.op != "placeholder" or str(by.target).startswith(order_names("")[0])):
            raise AuditError(f"{wanted.site}: its {name} are in the order of {by.target}, but not by the plan")
    read = readers(results)
    if ordered and (back is None or not read or any(_gathered_by(each) is not back for each in read)):
        raise AuditError(
            f"{wanted.site}: to be {wanted}, but its result is not put back by {order_names(wanted.site)[1]}"
        )


def _cluster_orders(
    node: fx.Node, wanted: SparseAttention, there: fx.Node | None, heads: fx.Node | None
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None, fx.Node | None]:
    """The orders of queries, keys and values, and what undoes the first, if clusters of these very ones make them."""
    by = _gathered_by(source(node.args[0]))
    maker = by.args[0] if by is not None and by.target is operator.getitem else None
    own = [source(each.args[0]) for each in map(source, node.args[:2]) if isinstance(each, fx.Node)]
    if not isinstance(maker, fx.Node) or maker.target is not CLUSTER_ORDER:
        return None, None, None, None
    given = [source(each) for each in maker.args[:2]]
    # of heads that share keys these are expanded before they are gathered
    same = given[0] is own[0] and given[1] in _sources_of_expanded(own[1])
    if not same or maker.args[2:] != (there, heads, *(wanted.clusters or ()), *cluster_sizes(wanted)):
        raise AuditError(f"{wanted.site}: to be {wanted}, but its clusters are of other queries, keys, heads or sizes")
    of = {use.args[1]: use for use in maker.users}
    return of.get(0), of.get(1), of.get(1), of.get(2)


def _sources_of_expanded(node: object) -> set[object]:
    """A value and what it repeats."""
    found = {source(node)}
    while isinstance(node, fx.Node) and node.target in (*VIEWS, *EXPANSIONS):
        node = node.args[0]
        found.add(source(node))
    return found


def _gathered_by(node: object) -> fx.Node | None:
    """The graph input, or the result of ``ditopt::cluster_order``, by which a value's tokens are gathered.

    Tokens are dimension 2; None where they are not gathered.
    """
    if not isinstance(node, fx.Node):
        return None
    index: object = None
    if node.target is aten.index.Tensor:
        given = node.args[1]
        index = given[2] if isinstance(given, Sequence) and [*given[:2]] == [None, None] and len(given) == 3 else None
    elif node.target is aten.gather.default and node.args[1] == 2:
        index = node.args[2]
    while isinstance(index, fx.Node) and index.target in (*VIEWS, aten.expand.default):
        index = index.args[0]
    if not isinstance(index, fx.Node):
        return None
    made = index.target is operator.getitem and getattr(index.args[0], "target", None) is CLUSTER_ORDER
    return index if index.op == "placeholder" or made else None


def _sources_of_means(node: object) -> set[object]:
    """Nodes that a pooled operand is made from, by means, views and conversions alone."""
    seen: set[object] = set()
    waiting = [source(node)]
    while waiting:
        here = waiting.pop()
        if isinstance(here, fx.Node) and here not in seen:
            seen.add(here)
            waiting += map(source, here.all_input_nodes) if here.target in MEANS else ()
    return seen


def _of_draft(node: fx.Node, wanted: SparseAttention) -> tuple[object, ...]:
    """What the lists of an attention call are made from, if it finds them of its own operands by its selectors."""
    maker = list_maker(node)
    if maker is None:
        return node.args[3:5]
    value, by, selectors = maker.args[9:] or (None, None, "means")
    own = (*node.args[:2], *node.args[5:8], node.args[2] if "error" in wanted.by else None)
    if (*maker.args[:2], *maker.args[6:9], value) != own:
        told = "finds its blocks by other queries, keys, values, sizes or another scale than its own"
        raise AuditError(f"{wanted.site}: {told}")
    if maker.kwargs.get("mask") is not node.kwargs.get("mask"):
        raise AuditError(f"{wanted.site}: finds its blocks under another mask than its own")
    if selectors != ",".join(wanted.by):
        raise AuditError(f"{wanted.site}: to be {wanted}, but its blocks are chosen by {selectors}")
    return (*maker.args[2:6], *([] if by is None else [by]))


def _check_second_order(gm: fx.GraphModule) -> None:
    """Every output of the user's that holds floats reads the one before and the factors; what is recorded does not."""
    returned = [node for node in outputs(gm)[: user_outputs(gm)] if node is not None]
    factors = factors_name(SECOND_ORDER)
    for stream, node in enumerate(returned):
        first = returned.index(node)
        unread = {factors, slot_name(STEP, 0, first)} - _inputs_of(node)
        if unread and tensor_value(node).dtype.is_floating_point:
            raise AuditError(
                f"{STEP}: second order by the plan, but output {stream} of the graph does not read {sorted(unread)[0]}"
            )
    for recorded in outputs(gm)[user_outputs(gm) :]:
        if recorded is not None and factors in _inputs_of(recorded):
            raise AuditError(f"{STEP}: {recorded.name} is recorded as the sampler gets it, not as computed")


def _inputs_of(node: fx.Node) -> set[str]:
    """Names of the graph inputs that a value is made from."""
    return {str(each.target) for each in _makers(node) if each.op == "placeholder"}


def _makers(node: fx.Node) -> set[fx.Node]:
    """The nodes that a value is made from, itself included."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            waiting += here.all_input_nodes
    return seen


def only_needed_by(gm: fx.GraphModule, index: GraphIndex, site: str, changing: set[str]) -> tuple[str, ...]:
    """Names of the captured nodes that must vanish once ``site`` is predicted.

    For the step these are all calls; for a block range the calls between its edges that depend on the
    latents (``changing``); for a component the calls that lead to its output and to nothing else.
    """
    calls = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    if site == STEP:
        return tuple(calls)
    if site in index.components:
        return _leading_to(gm, index.components[site].node)
    if site not in index.ranges:
        return ()
    first, last = index.ranges[site]
    order = [node.name for node in gm.graph.nodes]
    begin, end = order.index(index.boundaries[first].after), order.index(index.boundaries[last + 1].after)
    inside = set(order[begin + 1 : end + 1])
    return tuple(name for name in calls if name in inside and name in changing)


def _leading_to(gm: fx.GraphModule, name: str) -> tuple[str, ...]:
    """A node, and all calls whose every user leads to it and to nothing else."""
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        leads = node.op == "call_function" and node.users and all(user in found for user in node.users)
        if node.name == name or leads:
            found.add(node)
    return tuple(node.name for node in gm.graph.nodes if node in found)
