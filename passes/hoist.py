"""Hoist: what is the same in many steps is computed ahead of them, in prologues, and read in each.

What depends on neither the latents nor the timestep is the same in all steps of a generation; what depends on the
timestep alone, and on such values, is computed for all steps of the schedule at once. ``passes.cut`` chooses what is
worth carrying. Of what depends on the same arguments of the call one prologue is made, so that another prompt leaves
what the timestep decides as it is. A prologue is a graph of its own over inputs of the captured graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ditopt.errors import AuditError
from ditopt.passes._infra import (
    GraphIndex,
    Pass,
    PassResult,
    StepPlan,
    Tracer,
    add_input,
    call,
    last_input,
    memory_order,
    outputs,
    set_outputs,
    tensor_value,
)
from ditopt.passes.batch import as_outputs, batched
from ditopt.passes.cut import FREE, Rates, bytes_of, cheapest_cut, is_product, seconds_to_make, seconds_to_read
from ditopt.passes.dependence import Dependence, dependences
from ditopt.passes.lower_attention import lower_attention_with
from ditopt.passes.prune import prune

aten = torch.ops.aten

PROLOGUES = "ditopt_prologues"
"""Of the ``meta`` of a graph: what is computed ahead of it."""
PREFIX = "hoisted_"
STAYS = "hoist: what the timestep decides stays in the steps"
MAX_TABLE_BYTES = 256 * 2**20
"""What one prologue holds for all steps; of longer schedules fewer steps are computed at once."""


@dataclass(frozen=True, eq=False)
class Prologue:
    """What is computed ahead: a graph over the captured inputs ``inputs`` (positions) that gives ``outputs``.

    ``outputs`` are names of inputs of the graph behind it, which tell what is computed: equal names are equal values.
    ``clock`` is the place of the timestep among ``inputs`` (None: it is not there); then the graph takes ``rows`` of
    them, in a first dimension, and its outputs have as many.
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    outputs: tuple[str, ...]
    clock: int | None = None
    rows: int = 0


def hoist_with(trace: Tracer) -> Pass:
    """The pass, given how to trace a function on fake tensors into ATen; it leaves ``Prologue``s in the ``meta``."""

    def hoist(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
        gm.meta[PROLOGUES] = ()
        if not plan.hoist:
            return PassResult(gm, False)
        if index.latents is None or not index.arguments:
            return PassResult(gm, False, ("hoist: the inputs of the graph are not told apart",))
        names: list[str] = gm.meta["ditopt_captured"]
        clock = None if index.timestep is None else names[index.timestep]
        found = {node: depends for node, depends in dependences(gm, index).items() if depends is not None}
        carried, prologues, told = _prologues(gm, plan, index, found, clock, trace)
        if told is not None:
            found = {node: depends for node, depends in found.items() if clock not in depends}
            carried, prologues, _ = _prologues(gm, plan, index, found, None, trace)
        reasons = () if told is None else (f"{STAYS}, {told}",)
        if not carried:
            return PassResult(gm, False, (*reasons, "hoist: nothing is worth being computed ahead"))
        _read(gm, carried)
        gm.meta[PROLOGUES] = prologues
        gm = prune(gm, plan, index).gm
        return PassResult(gm, True, reasons)

    return hoist


def _prologues(
    gm: fx.GraphModule,
    plan: StepPlan,
    index: GraphIndex,
    repeated: Mapping[fx.Node, Dependence],
    clock: str | None,
    trace: Tracer,
) -> tuple[dict[fx.Node, str], tuple[Prologue, ...], str | None]:
    """What to carry by name, and what computes it; or why not for all steps at once."""
    wanted = [node for node in repeated if any(user not in repeated for user in node.users)]
    chosen = cheapest_cut(wanted, repeated, Rates())
    keys = _keys(gm)
    carried = {node: PREFIX + keys[node] for node in gm.graph.nodes if node in chosen}
    groups: dict[frozenset[str], list[fx.Node]] = {}
    for node in {name: node for node, name in reversed(carried.items())}.values():  # what is made twice is carried once
        groups.setdefault(repeated[node] or frozenset(), []).append(node)
    made = []
    for depends, nodes in groups.items():
        part, inputs = _part(gm, nodes)
        part = lower_attention_with(trace)(part, plan, index).gm
        part.recompile()
        names = tuple(carried[node] for node in nodes)
        if clock is None or clock not in depends:
            made.append(Prologue(as_outputs(part, trace), inputs, names))
            continue
        at = inputs.index(gm.meta["ditopt_captured"].index(clock))
        one = sum(bytes_of(node.meta["val"]) for node in nodes)
        rows = min(plan.hoist, max(1, MAX_TABLE_BYTES // max(one, 1)))
        table = batched(part, at, rows, trace)
        if isinstance(table, str):
            return {}, (), table
        made.append(Prologue(table, inputs, names, at, rows))
    return carried, tuple(made), None


def _keys(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """A name of every value that says how it is made from the graph's inputs: values of one name are equal."""
    keys: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            given = fx.map_arg((node.args, node.kwargs), lambda arg: keys[arg])
            made = hashlib.blake2b(f"{node.target} {given!r}".encode(), digest_size=8)
            keys[node] = made.hexdigest()
        else:
            keys[node] = f"{node.op} {node.name}"
    return keys


def _part(gm: fx.GraphModule, nodes: list[fx.Node]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The part of a graph that computes ``nodes``, each in its own memory order, and the inputs that it takes."""
    needed: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = []
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
            if node.op == "placeholder":
                inputs.append(gm.meta["ditopt_captured"].index(node.name))
    graph.output(())
    part = fx.GraphModule(gm, graph)
    with graph.inserting_before(graph.output_node()):
        ends = [call(part, aten.permute.default, copies[node], memory_order(tensor_value(node))) for node in nodes]
    set_outputs(part, ends)
    return part, tuple(inputs)


def _read(gm: fx.GraphModule, carried: Mapping[fx.Node, str]) -> None:
    """Let what is carried come in as inputs of the graph; what it returns of them is its own."""
    given: dict[str, fx.Node] = {}
    for node, name in carried.items():
        value, order = tensor_value(node), memory_order(tensor_value(node))
        if name not in given:
            given[name] = add_input(gm, name, value.new_empty([value.shape[dim] for dim in order]))
    with gm.graph.inserting_after(last_input(gm)):
        for node, name in carried.items():
            order = memory_order(tensor_value(node))
            back = call(gm, aten.permute.default, given[name], [order.index(dim) for dim in range(len(order))])
            node.replace_all_uses_with(back, propagate_meta=False)
    returned: list[fx.Node | None] = []
    with gm.graph.inserting_before(gm.graph.output_node()):
        for end in outputs(gm):
            is_carried = end is not None and _seen_through(end) in given.values()
            returned.append(call(gm, aten.clone.default, end) if is_carried else end)
    set_outputs(gm, returned)
    gm.graph.eliminate_dead_code()


def _seen_through(node: fx.Node) -> fx.Node:
    """What a value is a view of."""
    while node.target in FREE and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def check_hoisted(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex, reasons: Sequence[str]) -> None:
    """Prove that what is computed ahead depends on nothing that changes in between, and that steps do read it.

    Raises:
        AuditError: it does not; names the value and what it depends on.
    """
    prologues: tuple[Prologue, ...] = gm.meta.get(PROLOGUES, ())
    read = {str(node.target) for node in gm.graph.find_nodes(op="placeholder") if str(node.target).startswith(PREFIX)}
    given = [name for prologue in prologues for name in prologue.outputs]
    if read - set(given):
        raise AuditError(f"the step reads {sorted(read - set(given))[0]}, which is not computed ahead of it")
    if plan.hoist and not read and not any(told.startswith("hoist: ") for told in reasons):
        raise AuditError("values are to be computed ahead of the steps, but the graph reads none")
    for prologue in prologues:
        forbidden = {index.latents, *index.written} | ({index.timestep} if prologue.clock is None else set())
        wrong = sorted(position for position in prologue.inputs if position in forbidden)
        if wrong:
            raise AuditError(f"{prologue.outputs[0]} is computed ahead from {gm.meta['ditopt_captured'][wrong[0]]}")
        if prologue.clock is not None and prologue.inputs[prologue.clock] != index.timestep:
            raise AuditError(f"{prologue.outputs[0]} is computed for all steps by another input than the timestep")
    if prologues:
        _check_products(gm, index, told_of_clock=any(told.startswith(STAYS) for told in reasons))


def _check_products(gm: fx.GraphModule, index: GraphIndex, told_of_clock: bool) -> None:
    """No product is left in the steps that costs more than reading its result."""
    rates = Rates()
    clock = None if index.timestep is None else gm.meta["ditopt_captured"][index.timestep]
    for node, depends in dependences(gm, index).items():
        if depends is None or not is_product(node) or (told_of_clock and clock in depends):
            continue
        if seconds_to_make(node, rates) > seconds_to_read(node, rates):
            raise AuditError(f"{node.name} is the same in every step, and yet it is computed in each")
