"""What depends on what; the cheapest cut against trying every choice; what the audit refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from ditopt.errors import AuditError
from ditopt.passes._infra import GraphIndex, PassManager, StepPlan, find
from ditopt.passes.audit import audit
from ditopt.passes.cast import MIN_ROWS
from ditopt.passes.cut import Rates, cheapest_cut, seconds_to_make, seconds_to_read
from ditopt.passes.dependence import dependences
from ditopt.passes.hoist import PROLOGUES, Prologue
from ditopt.passes.prune import prune
from ditopt.runtime.variants import VariantCache
from tests.tiny import compiled_tiny, euler, make_model
from tests.trace.models import CASES, capture

pytest.importorskip("diffusers")

aten = torch.ops.aten
TABLE = StepPlan(hoist=4)


def made(build: Callable[[fx.Graph], fx.Node], **index: object) -> tuple[fx.GraphModule, GraphIndex]:
    """A graph with its values described, and what is known of its inputs."""
    graph = fx.Graph()
    graph.output((build(graph),))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    gm.meta["ditopt_captured"] = [node.name for node in graph.find_nodes(op="placeholder")]
    return gm, replace(GraphIndex((), {}, 0), **index)  # type: ignore[arg-type]


def described(node: fx.Node, *shape: int) -> fx.Node:
    node.meta["val"] = torch.empty(shape, device="meta")
    return node


def test_dependence_goes_through_views_and_stops_at_chance_and_what_a_call_writes() -> None:
    def build(graph: fx.Graph) -> fx.Node:
        latents, prompt, weight, buffer = (
            described(graph.placeholder(name), 4, 4) for name in ("latents", "prompt", "weight", "buffer")
        )
        added = described(graph.placeholder("slot_step_age0_stream0"), 4, 4)
        view = described(graph.call_function(aten.t.default, (prompt,)), 4, 4)
        product = described(graph.call_function(aten.mm.default, (view, weight)), 4, 4)
        drawn = described(graph.call_function(aten.bernoulli.p, (weight, 0.5)), 4, 4)
        state = described(graph.call_function(aten.add.Tensor, (weight, buffer)), 4, 4)
        held = described(graph.call_function(aten.add.Tensor, (weight, added)), 4, 4)
        mixed = described(graph.call_function(aten.add.Tensor, (latents, product)), 4, 4)
        total = mixed
        for each in (drawn, state, held):
            total = described(graph.call_function(aten.add.Tensor, (total, each)), 4, 4)
        return total

    gm, index = made(build, arguments=frozenset({0, 1}), written=frozenset({3}))
    gm.meta["ditopt_captured"].remove("slot_step_age0_stream0")
    found = {node.name: depends for node, depends in dependences(gm, index).items()}
    kept = {"prompt": {"prompt"}, "t_default": {"prompt"}, "mm_default": {"prompt"}, "weight": set()}
    assert {name: depends for name, depends in found.items() if depends is not None} == kept


Drawn = list[tuple[tuple[int, ...], int, bool]]
"""Of each value its operands, its width, and whether steps need it."""


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    count = draw(st.integers(1, 5))
    return [
        (
            tuple(draw(st.lists(st.integers(0, number), min_size=1, max_size=2, unique=True))),
            draw(st.sampled_from([1, 40, 4000])),
            draw(st.booleans()) or number == count - 1,
        )
        for number in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_the_cut_is_the_cheapest_choice(drawn: Drawn) -> None:
    graph = fx.Graph()
    nodes = [described(graph.placeholder("prompt"), 8, 8)]
    for operands, width, _ in drawn:
        target = aten.cat.default if len(operands) > 1 else aten.sin.default if width > 1 else aten.t.default
        operand = [nodes[i] for i in operands]
        nodes.append(described(graph.call_function(target, (operand if len(operand) > 1 else operand[0],)), width, 8))
    wanted = [nodes[number + 1] for number, (_, _, is_wanted) in enumerate(drawn) if is_wanted]
    rates = Rates()
    found = cheapest_cut(wanted, dict.fromkeys(nodes), rates)

    def cost(read: set[fx.Node]) -> float:
        """Of reading these, and of making whatever else is needed then."""
        needed: set[fx.Node] = set()
        waiting = list(wanted)
        while waiting:
            node = waiting.pop()
            if node not in needed and node.op == "call_function":
                needed.add(node)
                waiting += () if node in read else node.all_input_nodes
        return sum(seconds_to_read(n, rates) if n in read else seconds_to_make(n, rates) for n in needed)

    calls = nodes[1:]
    choices = (set(itertools.compress(calls, picked)) for picked in itertools.product((0, 1), repeat=len(calls)))
    assert cost(found) == pytest.approx(min(map(cost, choices)), rel=1e-3, abs=1e-10)


@pytest.fixture(scope="module")
def cache() -> Iterator[VariantCache]:
    captured = capture(*CASES["SD3"].make())
    yield captured.program.variants
    torch._dynamo.reset()


def test_no_modulation_and_no_text_projection_is_left(cache: VariantCache) -> None:
    plain, hoisted = cache.graph(StepPlan()), cache.graph(TABLE)
    read = {str(node.target) for node in hoisted.graph.find_nodes(op="placeholder")}
    placeholders = cache.trace.placeholders
    weights = {name: placeholders[position].name for name, position in cache.trace.state_names.items()}
    gone = {name for name, node in weights.items() if node not in read}
    assert {name for name in weights if ".norm1" in name or "context_embedder" in name} <= gone
    assert not {name for name in gone if ".attn." in name and "norm" not in name and "add_" not in name}
    assert len(list(hoisted.graph.nodes)) < len(list(plain.graph.nodes))
    prologues: tuple[Prologue, ...] = hoisted.meta[PROLOGUES]
    for prologue in prologues:
        for node in prologue.gm.graph.find_nodes(op="placeholder"):
            assert isinstance(node.meta["val"], Tensor)
        assert (prologue.rows, prologue.clock is None) in ((4, False), (0, True))
        for end in prologue.gm.graph.output_node().args[0]:  # type: ignore[union-attr]
            assert end.meta["val"].is_contiguous()  # type: ignore[union-attr]


def test_equal_values_have_equal_names_in_all_variants(cache: VariantCache) -> None:
    given = [
        {name for prologue in cache.graph(plan).meta[PROLOGUES] for name in prologue.outputs}
        for plan in (TABLE, replace(TABLE, recorded=("step",)), replace(TABLE, simplify=True))
    ]
    assert given[0] == given[1] and given[0] & given[2]


def test_weights_of_a_step_in_bfloat16_are_rounded_ahead() -> None:
    with compiled_tiny(make_model(), lambda model: euler(model, "a", 0, 2, MIN_ROWS)) as (_, program):
        cache = program.variants
        plan = replace(TABLE, dtype="bfloat16")
        hoisted = cache.graph(plan)
        placeholders = cache.trace.placeholders
        read = {str(node.target) for node in hoisted.graph.find_nodes(op="placeholder")}
        weights = {name: placeholders[position] for name, position in cache.trace.state_names.items()}
        matrices = {name for name, node in weights.items() if name.startswith("blocks") and node.meta["val"].ndim == 2}
        assert matrices and not {name for name in matrices if str(weights[name].target) in read}
        (ahead,) = (each for each in hoisted.meta[PROLOGUES] if not {*each.inputs} & cache.index.arguments)
        ends = ahead.gm.graph.output_node().args[0]
        assert {end.meta["val"].dtype for end in ends} == {torch.bfloat16}


def test_the_audit_refuses_what_is_not_ahead_of_the_steps(cache: VariantCache) -> None:
    index = cache.index
    untouched = PassManager([prune]).run(cache.trace.gm, TABLE, index)
    with pytest.raises(AuditError, match="values are to be computed ahead of the steps, but the graph reads none"):
        audit(untouched, TABLE, index, {})
    gm = cache.graph(TABLE)
    audit(gm, TABLE, index, {})
    prologues: tuple[Prologue, ...] = gm.meta[PROLOGUES]
    of_prompt = next(each for each in prologues if each.clock is None and each.inputs)
    wrong = {
        r"is computed ahead from arg": replace(of_prompt, inputs=(index.latents or 0, *of_prompt.inputs[1:])),
        r"for all steps by another input than the timestep": replace(of_prompt, clock=0),
        r"the step reads hoisted_\w+, which is not computed ahead of it": None,
    }
    for message, planted in wrong.items():
        others = tuple(each for each in prologues if each is not of_prompt)
        gm.meta[PROLOGUES] = (*others, *([planted] if planted is not None else []))
        with pytest.raises(AuditError, match=message):
            audit(gm, TABLE, index, {})
    gm.meta[PROLOGUES] = prologues
    weight = next(node for node in gm.graph.find_nodes(op="placeholder") if node.meta["val"].ndim == 2)
    with gm.graph.inserting_before(gm.graph.output_node()):
        turned = gm.graph.call_function(aten.t.default, (weight,))
        turned.meta["val"] = weight.meta["val"].t()
        again = gm.graph.call_function(aten.mm.default, (weight, turned))
        again.meta["val"] = weight.meta["val"].new_empty(len(weight.meta["val"]), len(weight.meta["val"]))
    if seconds_to_make(again, Rates()) > seconds_to_read(again, Rates()):
        with pytest.raises(AuditError, match="is the same in every step, and yet it is computed in each"):
            audit(gm, TABLE, index, {})
    assert find(gm, again.name) is again
