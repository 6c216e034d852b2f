"""Passes on a captured tiny model: what each does to the graph, what the verifier and the audit catch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ditopt._torch import fake_mode_of, trace_aten
from ditopt.errors import AuditError
from ditopt.kernels.ops import ATTENTION
from ditopt.passes._infra import (
    GraphIndex,
    PassManager,
    PassResult,
    Prediction,
    StepPlan,
    in_layout_of,
    outputs,
    set_outputs,
)
from ditopt.passes.audit import audit, only_needed_by
from ditopt.passes.features import user_outputs
from ditopt.passes.lower_attention import lower_attention_with
from ditopt.passes.predict import predict
from ditopt.passes.prune import prune
from ditopt.passes.record import record
from ditopt.passes.second_order import second_order
from ditopt.passes.verify import verify
from ditopt.runtime.variants import VariantCache
from ditopt.sites import STEP
from ditopt.trace import block_of, dependents
from tests.trace.models import CASES, Captured, capture, interpreted

aten = torch.ops.aten
ALL = "blocks.0..3"


@pytest.fixture(scope="module")
def wan() -> Iterator[Captured]:
    """Four blocks, never compiled by Inductor."""
    pytest.importorskip("diffusers")
    with interpreted():
        yield capture(*CASES["Wan"].make())
    torch._dynamo.reset()


@pytest.fixture
def cache(wan: Captured) -> VariantCache:
    return wan.program.variants


@pytest.fixture
def gm(cache: VariantCache) -> fx.GraphModule:
    """A copy to spoil."""
    return PassManager([]).run(cache.trace.gm, StepPlan(), cache.index)


def ops_by_block(gm: fx.GraphModule) -> dict[str | None, Counter[object]]:
    """How often each operator stands in each block (None: outside)."""
    counts: dict[str | None, Counter[object]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            counts.setdefault(block_of(node), Counter())[node.target] += 1
    return counts


def first_call(gm: fx.GraphModule, dtype: torch.dtype = torch.float32) -> fx.Node:
    calls = (node for node in gm.graph.nodes if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor))
    found: fx.Node = next(node for node in calls if node.meta["val"].dtype == dtype)
    return found


def changing(cache: VariantCache) -> set[str]:
    assert cache.latents is not None
    return {node.name for node in dependents(cache.trace.gm, cache.trace.placeholders[cache.latents])}


def test_the_verifier_accepts_the_captured_graph(gm: fx.GraphModule) -> None:
    verify(gm)


def test_the_verifier_catches_a_mutation(gm: fx.GraphModule) -> None:
    victim = first_call(gm)
    with gm.graph.inserting_after(victim):
        gm.graph.call_function(aten.add_.Tensor, (victim, 1.0)).meta["val"] = victim.meta["val"]
    with pytest.raises(AuditError, match=r"aten\.add_\.Tensor mutates its input"):
        verify(gm)


def test_the_verifier_catches_a_value_without_description(gm: fx.GraphModule) -> None:
    del first_call(gm).meta["val"]
    with pytest.raises(AuditError, match="no meta"):
        verify(gm)


def test_the_verifier_catches_an_input_that_is_returned(gm: fx.GraphModule) -> None:
    set_outputs(gm, [*outputs(gm), gm.graph.find_nodes(op="placeholder")[0]])
    with pytest.raises(AuditError, match="slots must not alias arguments"):
        verify(gm)


def test_the_verifier_catches_calls_of_modules(gm: fx.GraphModule) -> None:
    gm.add_submodule("norm", torch.nn.Identity())
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_module("norm", (first_call(gm),))
    with pytest.raises(AuditError, match="'call_module' is not allowed"):
        verify(gm)


def test_passes_leave_the_graph_that_they_are_given_alone(cache: VariantCache) -> None:
    before = ops_by_block(cache.trace.gm)
    names = [node.name for node in cache.trace.gm.graph.nodes]
    cache.graph(StepPlan((Prediction("blocks.1..2", 2),), ("blocks.0",)))
    assert ops_by_block(cache.trace.gm) == before and [node.name for node in cache.trace.gm.graph.nodes] == names


def test_predicting_a_range_empties_its_blocks_and_no_other(cache: VariantCache) -> None:
    before = ops_by_block(cache.trace.gm)
    after = ops_by_block(cache.graph(StepPlan((Prediction("blocks.1..2", 2),))))
    for block in ("blocks.0", "blocks.3"):
        assert after[block] == before[block]
    for block in ("blocks.1", "blocks.2"):
        assert not after.get(block), "modulation and text projections of a block that nobody reads go too"
    # a forecast of order 1: two products with factors, their sum, added to the stream
    assert after[None] - before[None] == Counter({aten.mul.Tensor: 2, aten.select.int: 2, aten.add.Tensor: 2})


def test_predicting_all_blocks_leaves_embedding_and_output_layers(cache: VariantCache) -> None:
    after = cache.graph(StepPlan((Prediction(ALL, 1),)))
    left = {node for node in after.graph.nodes if node.op == "call_function" and block_of(node) is not None}
    assert not left
    assert not after.graph.find_nodes(op="call_function", target=ATTENTION)
    parameters = {name for name, position in cache.trace.state_names.items() if position in after.meta["ditopt_inputs"]}
    assert parameters and not any(name.startswith("blocks.") for name in parameters), (
        "weights of dead blocks are no inputs any more"
    )


def test_predicting_the_step_leaves_the_prediction_alone(cache: VariantCache) -> None:
    after = cache.graph(StepPlan((Prediction(STEP, 2, latents=True),)))
    assert ops_by_block(after) == {None: Counter({aten.select.int: 3, aten.mul.Tensor: 3, aten.add.Tensor: 2})}
    slots = ["slot_step_age0_stream0", "slot_step_age1_stream0"]
    assert sorted(map(str, after.meta["ditopt_inputs"])) == sorted(["factors_step", *slots, str(cache.latents)])


def test_recording_adds_outputs_and_changes_no_block(cache: VariantCache) -> None:
    before, after = cache.trace.gm, cache.graph(StepPlan((), (STEP, "blocks.1..2")))
    assert len(outputs(after)) == len(outputs(before)) + 2
    counts = ops_by_block(after)
    assert all(counts[block] == ops_by_block(before)[block] for block in cache.trace.blocks)
    assert all(node is not None and node.meta["val"].is_contiguous() for node in outputs(after)[len(outputs(before)) :])


def test_prune_drops_dead_inputs_and_remembers_the_rest(gm: fx.GraphModule, cache: VariantCache) -> None:
    set_outputs(gm, [first_call(gm)])
    result = prune(gm, StepPlan(), cache.index)
    assert result.modified
    kept = gm.graph.find_nodes(op="placeholder")
    names = [node.name for node in cache.trace.placeholders]
    assert [names[position] for position in gm.meta["ditopt_inputs"]] == [node.name for node in kept] and len(
        kept
    ) < len(names)
    assert not prune(gm, StepPlan(), cache.index).modified


def test_a_site_that_does_not_exist_keeps_its_reason(gm: fx.GraphModule, cache: VariantCache) -> None:
    manager = PassManager([record, predict])
    plan = StepPlan((Prediction("blocks.9", 1), Prediction("blocks.1", 1, latents=True)), ("blocks.8",))
    before = ops_by_block(gm)
    after = manager.run(gm, plan, cache.index)
    assert ops_by_block(after) == before
    assert sorted(manager.reasons) == [
        "predict blocks.1: latents are no regressor here",
        "predict blocks.9: the graph has no such site",
        "record blocks.8: the graph has no such site",
    ]
    with pytest.raises(AuditError, match=r"blocks\.9: predicted by the plan, but the graph has no such site"):
        cache.graph(StepPlan((Prediction("blocks.9", 1),)))
    assert "predict blocks.9: the graph has no such site" in cache.reasons


def test_latents_of_another_shape_are_no_regressor() -> None:
    graph = fx.Graph()
    latents = graph.placeholder("latents")
    latents.meta["val"] = torch.empty(1, 4, device="meta")
    twice = graph.call_function(aten.cat.default, ([latents, latents],))
    twice.meta["val"] = torch.empty(2, 4, device="meta")
    graph.output((twice,))
    result = predict(fx.GraphModule({}, graph), StepPlan((Prediction(STEP, 1, latents=True),)), GraphIndex((), {}, 0))
    assert not result.modified and result.reasons == ("predict step: latents are no regressor here",)


@pytest.mark.parametrize("site", [STEP, "blocks.2", ALL])
def test_the_audit_catches_a_pass_that_does_nothing(site: str, gm: fx.GraphModule, cache: VariantCache) -> None:
    plan = StepPlan((Prediction(site, 1),))
    dead = {site: only_needed_by(cache.trace.gm, cache.index, site, changing(cache))}

    def idle(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
        return PassResult(gm, False)

    with pytest.raises(AuditError, match="predicted by the plan, but the graph does not read"):
        audit(PassManager([idle, prune]).run(gm, plan, cache.index), plan, cache.index, dead)


@pytest.mark.parametrize("site", [STEP, "blocks.2", ALL])
def test_the_audit_catches_work_that_was_not_removed(site: str, gm: fx.GraphModule, cache: VariantCache) -> None:
    plan = StepPlan((Prediction(site, 1),))
    names = only_needed_by(cache.trace.gm, cache.index, site, changing(cache))

    def keep_one(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
        user_outputs(gm)
        kept = next(node for node in gm.graph.nodes if node.name in names and isinstance(node.meta["val"], Tensor))
        set_outputs(gm, [*outputs(gm), kept])
        return PassResult(gm, True)

    with pytest.raises(AuditError, match=r"of its nodes are still computed, e\.g\. "):
        audit(PassManager([keep_one, predict, prune]).run(gm, plan, cache.index), plan, cache.index, {site: names})


def test_second_order_changes_what_is_returned_and_not_what_is_recorded(cache: VariantCache) -> None:
    plain, finer = (cache.graph(StepPlan((), (STEP,), second_order=share)) for share in (False, True))
    added = [name for name in finer.meta["ditopt_inputs"] if isinstance(name, str)]
    assert added == ["slot_step_age0_stream0", "factors_second_order"]
    (computed, recorded), (returned, still_recorded) = outputs(plain), outputs(finer)
    assert computed is not None and returned is not None and recorded is not None and still_recorded is not None
    assert still_recorded.name == recorded.name
    assert returned.name != computed.name


def test_the_audit_catches_outputs_that_were_not_combined(cache: VariantCache) -> None:
    plan = StepPlan((), (STEP,), second_order=True)
    untouched = PassManager([record, prune]).run(cache.trace.gm, plan, cache.index)
    with pytest.raises(AuditError, match="output 0 of the graph does not read factors_second_order"):
        audit(untouched, plan, cache.index, {})


def test_the_audit_catches_a_recorded_output_that_was_combined(cache: VariantCache) -> None:
    plan = StepPlan((), (STEP,), second_order=True)
    late = PassManager([second_order, record, prune]).run(cache.trace.gm, plan, cache.index)
    with pytest.raises(AuditError, match="is recorded as the sampler gets it, not as computed"):
        audit(late, plan, cache.index, {})


def test_outputs_that_hold_no_floats_are_returned_as_they_are() -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    ids = graph.placeholder("ids")
    value.meta["val"], ids.meta["val"] = torch.ones(2, 3), torch.ones(2, dtype=torch.int64)
    graph.output((value, ids))
    gm = fx.GraphModule({}, graph)
    result = second_order(gm, StepPlan(second_order=True), GraphIndex((), {}, None))
    returned = outputs(result.gm)
    assert returned[0] is not value and returned[1] is ids


def test_the_audit_catches_a_feature_that_is_not_handed_on(gm: fx.GraphModule, cache: VariantCache) -> None:
    plan = StepPlan((), (STEP, "blocks.0"))
    with pytest.raises(AuditError, match="2 features are to be recorded"):
        audit(PassManager([predict, prune]).run(gm, plan, cache.index), plan, cache.index, {})


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": True}, {"enable_gqa": True}])
def test_lowered_attention_is_what_aot_would_have_traced(settings: dict[str, Any]) -> None:
    """Operator by operator, with the same arguments: Inductor cannot tell the difference."""
    from torch._subclasses import FakeTensorMode

    masked = "mask" in settings
    settings = {name: value for name, value in settings.items() if name != "mask"}

    with FakeTensorMode() as mode:
        query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 10, 8), torch.randn(1, 4, 10, 8)
        if settings.get("is_causal"):
            key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
        if settings.get("enable_gqa"):
            key, value = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
        tensors = [query, key, value]
        if masked:
            tensors.append(torch.randn(1, 1, 6, 10))

    def plain(*given: Tensor) -> Tensor:
        query, key, value, *mask = given
        return F.scaled_dot_product_attention(query, key, value, mask[0] if mask else None, **settings) * 2

    def opaque(*given: Tensor) -> Tensor:
        query, key, value, *mask = given
        defaults = {"is_causal": False, "scale": None, "enable_gqa": False}
        result: Tensor = ATTENTION(query, key, value, mask[0] if mask else None, 0.0, *(defaults | settings).values())
        return result * 2

    def trace(function: Callable[..., object], values: list[Tensor]) -> fx.GraphModule:
        with fake_mode_of(values[0]) as entered:
            return trace_aten(function, values, entered)

    expected, found = trace_aten(plain, tensors, mode), trace_aten(opaque, tensors, mode)
    assert found.graph.find_nodes(op="call_function", target=ATTENTION)
    for name, node in zip(tensors, found.graph.find_nodes(op="placeholder"), strict=True):
        node.meta["val"] = name
    lowered = PassManager([]).run(_returning_a_tuple(found), StepPlan(), GraphIndex((), {}, None))
    result = lower_attention_with(trace)(lowered, StepPlan(), GraphIndex((), {}, None))
    assert result.modified
    result.gm.graph.eliminate_dead_code()
    assert _calls(result.gm) == _calls(_returning_a_tuple(expected))


def _returning_a_tuple(gm: fx.GraphModule) -> fx.GraphModule:
    value = gm.graph.output_node().args[0]
    gm.graph.output_node().args = ((value,),)
    gm.graph.eliminate_dead_code()
    return gm


def _calls(gm: fx.GraphModule) -> list[tuple[object, ...]]:
    """Operators in order with their arguments, nodes as their places."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    as_place = [fx.node.map_arg((node.args, node.kwargs), lambda n: f"@{place[n]}") for node in gm.graph.nodes]
    return [
        (str(node.target), arguments)
        for node, arguments in zip(gm.graph.nodes, as_place, strict=True)
        if node.op == "call_function"
    ]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 2, 3)])
def test_a_value_takes_the_memory_order_of_another(order: tuple[int, ...]) -> None:
    graph = fx.Graph()
    value, model = graph.placeholder("value"), graph.placeholder("model")
    shape = (2, 3, 1, 5)
    value.meta["val"] = torch.randn(shape)
    model.meta["val"] = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
    graph.output((value,))
    gm = fx.GraphModule({}, graph)
    with gm.graph.inserting_before(gm.graph.output_node()):
        set_outputs(gm, [in_layout_of(gm, value, model)])
    gm.recompile()
    (found,) = gm(value.meta["val"], model.meta["val"])
    assert torch.equal(found, value.meta["val"])
    assert [s for s, n in zip(found.stride(), shape, strict=True) if n > 1] == [
        s for s, n in zip(model.meta["val"].stride(), shape, strict=True) if n > 1
    ]


def test_compiled_graphs_take_features_in_any_layout() -> None:
    """DiT's first stream is a transposed convolution output: slots are contiguous all the same, also for Inductor."""
    captured = capture(*CASES["DiT"].make())
    everything = "transformer_blocks.0..1"
    _, slots = captured.run(StepPlan((), (everything,)))
    variant = captured.program.variants.get(StepPlan((Prediction(everything, 1),), (STEP,)))
    added = copy.copy(slots) | {"factors_transformer_blocks_0__1": torch.ones(1)}
    outputs = variant.run([captured.arguments[i] if isinstance(i, int) else added[i] for i in variant.inputs])
    torch.testing.assert_close(outputs[0], captured.eager[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[0], outputs[1])
    torch._dynamo.reset()
