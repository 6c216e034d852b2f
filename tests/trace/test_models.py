"""The trace on diffusers' transformers: one graph, complete sites, the numbers of Inductor, exact features."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ditopt._torch import module_stack
from ditopt.passes._infra import Prediction, StepPlan
from ditopt.sites import STEP, AttentionSite, BlockSite, LinearSite, StepSite, range_name
from ditopt.trace import dependents
from tests.trace.models import CASES, Captured, Case, capture


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    pytest.importorskip("diffusers")
    return CASES[request.param]


@pytest.fixture(scope="module")
def captured(case: Case) -> Iterator[Captured]:
    yield capture(*case.make())
    torch._dynamo.reset()


def _visible(name: str) -> str:
    return re.sub(r"#\d+$", "", name)


def test_every_attention_call_is_a_site_named_by_its_module(captured: Captured) -> None:
    with (
        mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention,
        torch.no_grad(),
    ):
        captured.model(**captured.inputs)
    sites = [site for site in captured.program.variants.trace.sites if isinstance(site, AttentionSite)]
    assert len(sites) == attention.call_count > 0
    assert {_visible(site.name) for site in sites} <= dict(captured.model.named_modules()).keys()
    assert len({site.name for site in sites}) == len(sites)


def test_every_linear_layer_that_ran_is_a_site(captured: Captured) -> None:
    ran: Counter[str] = Counter()
    modules = {name: module for name, module in captured.model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.update([name])) for name, module in modules.items()]
    with torch.no_grad():
        captured.model(**captured.inputs)
    for hook in hooks:
        hook.remove()
    sites = [site for site in captured.program.variants.trace.sites if isinstance(site, LinearSite)]
    assert Counter(_visible(site.name) for site in sites) == ran
    for site in sites:
        layer = modules[_visible(site.name)]
        assert (site.in_features, site.out_features) == (layer.in_features, layer.out_features)


def test_blocks_are_the_stacks_in_order(case: Case, captured: Captured) -> None:
    trace = captured.program.variants.trace
    assert trace.blocks == case.blocks
    assert [site.name for site in trace.sites if isinstance(site, BlockSite)] == list(case.blocks)
    assert [site.outputs for site in trace.sites if isinstance(site, StepSite)] == [
        tuple(tuple(out.shape) for out in captured.outputs)
    ]
    assert not trace.notes


def test_the_residual_stream_crosses_each_edge_and_nothing_else(case: Case, captured: Captured) -> None:
    trace = captured.program.variants.trace
    edges = [len(boundary.streams) for boundary in trace.boundaries]
    assert len(edges) == len(case.blocks) + 1
    assert edges[1:-1] == [case.streams] * (len(case.blocks) - 1)
    assert edges[-1] == 1, "only the picture leaves the last block"
    assert 1 <= edges[0] <= case.streams, "a prompt stream does not depend on the latents before the first block"


def test_dense_equals_inductor_bit_for_bit(captured: Captured) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        inductor = torch.compile(captured.model, backend="inductor")(**captured.inputs, return_dict=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured.outputs, inductor, strict=True))
    assert len(captured.outputs) == len(captured.eager)
    for ours, eager in zip(captured.outputs, captured.eager, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_positional_and_keyword_arguments_are_named(captured: Captured) -> None:
    trace = captured.program.variants.trace
    given = {name for name, value in captured.inputs.items() if isinstance(value, torch.Tensor)}
    assert set(trace.arguments) == given
    for name in given:
        assert torch.equal(captured.arguments[trace.arguments[name]], captured.inputs[name])
    positions = captured.program.positions
    assert (positions.timestep, positions.latents) == (trace.arguments["timestep"], trace.arguments["hidden_states"])
    assert trace.state_names.keys() <= captured.model.state_dict().keys() | dict(captured.model.named_buffers()).keys()


def test_a_predicted_step_computes_nothing_and_gives_the_forecast(captured: Captured) -> None:
    plan = StepPlan((Prediction(STEP, 2),))
    outputs, _ = captured.run(
        plan,
        {
            "factors_step": torch.tensor([2.0, -1.0]),
            **{
                f"slot_step_age{age}_stream{i}": (age + 1.0) * torch.ones_like(out)
                for age in range(2)
                for i, out in enumerate(captured.outputs)
            },
        },
    )
    assert not [i for i in captured.program.variants.compiled[plan].inputs if isinstance(i, int)], (
        "no parameter is read"
    )
    for out in outputs:
        assert torch.equal(out, torch.zeros_like(out))  # 2 * 1 - 1 * 2


def test_predicting_all_blocks_leaves_nothing_of_them(case: Case, captured: Captured) -> None:
    everything = range_name(case.blocks[0], case.blocks[-1])
    outputs, _ = captured.predict(everything)
    for ours, dense in zip(outputs, captured.eager, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    cache = captured.program.variants
    original = {
        node.name
        for node in dependents(cache.trace.gm, cache.trace.placeholders[captured.program.positions.latents or 0])
    }
    left = [
        node.name
        for node in cache.graph(StepPlan((Prediction(everything, 1),))).graph.nodes
        if node.op == "call_function"
        and node.name in original
        and any(path.startswith(case.blocks) for path in module_stack(node))
    ]
    assert not left


def test_every_range_fed_with_its_own_feature_gives_the_dense_output(captured: Captured) -> None:
    for site in captured.program.variants.trace.ranges():
        outputs, _ = captured.predict(site)
        for ours, dense in zip(outputs, captured.eager, strict=True):
            assert torch.allclose(ours, dense, rtol=1e-5, atol=1e-5), site


def test_every_single_block_predicted_on_its_own_in_one_step(case: Case, captured: Captured) -> None:
    outputs, _ = captured.predict(*case.blocks)
    for ours, dense in zip(outputs, captured.eager, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


def test_a_block_recorded_behind_a_predicted_one(case: Case, captured: Captured) -> None:
    first, second = case.blocks[:2]
    _, alone = captured.run(StepPlan((), (second,)))
    _, behind = captured.predict(first, also=(second,))
    assert alone.keys() == behind.keys()
    for name, feature in alone.items():
        torch.testing.assert_close(behind[name], feature, rtol=1e-4, atol=1e-5)
