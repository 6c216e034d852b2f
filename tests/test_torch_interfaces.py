"""The private interfaces of torch in ``ditopt/_torch.py``: where a release moves one, a test named after it fails."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ditopt import _torch

# what is imported, by which of our functions, and what stops working without it
USED = [
    ("torch._dynamo.backends.common", "aot_autograd", "functionalise: no functional graph, so nothing compiles"),
    ("torch._guards", "detect_fake_mode", "functionalise: variants cannot be compiled from the captured shapes"),
    ("torch._dynamo.utils", "counters", "compile_counts, break_reasons: no graph breaks in reports"),
    ("torch._dynamo.utils", "compilation_time_metrics", "compile_counts: recompiles are not counted"),
    ("torch._dynamo", "reset", "forget_compiled_code: measured contenders share compiled code"),
    ("torch._guards", "TracingContext", "functionalise, lower: variants cannot be compiled behind the capture"),
    ("torch._guards", "tracing", "functionalise, lower: variants cannot be compiled behind the capture"),
    (
        "torch._inductor.decomposition",
        "select_decomp_table",
        "functionalise: other operators than Inductor's own, other numbers",
    ),
    ("torch._inductor.virtualized", "V", "functionalise, lower: Inductor does not find the fake mode"),
    ("torch._inductor.compile_fx", "compile_fx_forward", "lower: no variant compiles"),
    ("torch._inductor.compile_fx", "compile_fx_inner", "lower: no variant compiles"),
    ("torch._inductor.compile_fx", "create_compiler_config_extra", "lower: no variant compiles"),
    ("torch._inductor", "config", "lower: a capture's settings are not applied to its variants"),
    ("torch._dispatch.python", "enable_python_dispatcher", "lower: Inductor's own passes see other decompositions"),
    ("torch._C", "_DisableAutocast", "lower: passes of Inductor would cast under the caller's autocast"),
    ("torch.fx.experimental.proxy_tensor", "make_fx", "trace_aten: attention cannot be lowered"),
    ("torch._inductor.codecache", "CppCodeCache", "load_cpp: our C++ kernels are not built"),
    ("torch.cpu", "_is_avx512_bf16_supported", "has_bfloat16_dot_products: no kernel for them is used"),
    ("torch.cpu", "_is_avx512_supported", "has_byte_dot_products: no kernel for them is used"),
    ("torch.cpu", "_is_vnni_supported", "has_byte_dot_products: no kernel for them is used"),
    (
        "torch.utils._python_dispatch",
        "_disable_current_modes",
        "real_tensors: lists of sparse attention that are made while a model compiles have no values",
    ),
    ("torch._ops", "OpOverload", "is_mutating, is_repeatable: passes are blind to mutation and chance"),
]


@pytest.mark.parametrize(("module", "name", "breaks"), USED, ids=[f"{module}.{name}" for module, name, _ in USED])
def test_exists(module: str, name: str, breaks: str) -> None:
    found = hasattr(importlib.import_module(module), name)
    assert found, (
        f"torch {torch.__version__} has no {module}.{name} any more. What breaks: {breaks}. Mend ditopt/_torch.py"
    )


def test_the_list_is_complete() -> None:
    """Every private module that ``_torch.py`` imports from stands in the list above, and no other file imports one."""
    listed = {(module, name) for module, name, _ in USED}
    for node in ast.walk(ast.parse(Path(_torch.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and "torch." in node.module:
            for alias in node.names:
                assert (node.module, alias.name) in listed, f"{node.module}.{alias.name} is used and not listed here"


ARGUMENTS = {
    ("torch._dynamo.backends.common", "aot_autograd"): (),
    ("torch._inductor.compile_fx", "compile_fx_forward"): (
        "gm",
        "example_inputs",
        "num_orig_model_outputs",
        "num_example_inputs",
        "compiler_config_extra",
        "inner_compile",
        "is_inference",
    ),
    ("torch._inductor.compile_fx", "create_compiler_config_extra"): (),
    ("torch.fx.experimental.proxy_tensor", "make_fx"): ("f", "decomposition_table", "tracing_mode"),
}


@pytest.mark.parametrize(("where", "expected"), ARGUMENTS.items(), ids=[name for _, name in ARGUMENTS])
def test_takes_the_arguments_that_it_is_given(where: tuple[str, str], expected: tuple[str, ...]) -> None:
    signature = inspect.signature(getattr(importlib.import_module(where[0]), where[1]))
    missing = [name for name in expected if name not in signature.parameters]
    assert not missing, (
        f"{'.'.join(where)} of torch {torch.__version__} takes {list(signature.parameters)}, not {missing}; "
        "mend ditopt/_torch.py"
    )


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor, extra: dict[str, Tensor]) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        assert isinstance(self.scale, Tensor)
        return x * self.scale + extra["shift"]


@pytest.fixture(scope="module")
def captured() -> dict[str, Any]:
    """Dynamo's graph and the functional one of a small module, as a backend gets them; nothing is compiled."""
    seen: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen["sources"] = [_torch.source_name(node) for node in gm.graph.find_nodes(op="placeholder")]

        def on_graph(graph: fx.GraphModule, given: Any, context: _torch.CompileContext) -> Any:
            seen["graph"], seen["context"] = graph, context
            return lambda arguments: graph(*arguments)

        return _torch.functionalise(gm, inputs, on_graph)

    torch._dynamo.reset()
    with torch.no_grad():
        model = Twice().requires_grad_(False)
        x, shift = torch.randn(2, 3), torch.randn(3)
        seen["result"] = torch.compile(model, backend=backend, fullgraph=True)(x, extra={"shift": shift})
        seen["expected"] = model(x, {"shift": shift})
    torch._dynamo.reset()
    return seen


def test_dynamo_says_where_inputs_come_from(captured: dict[str, Any]) -> None:
    """``Node._dynamo_source``: without it parameters and arguments are not told apart."""
    sources = captured["sources"]
    assert None not in sources
    state = {_torch.module_path(source) for source in sources if _torch.is_model_state(source)}
    assert state == {"layers.0.weight", "layers.0.bias", "layers.1.0.weight", "layers.1.0.bias", "scale"}
    assert len(sources) == len(state) + 2


def test_functional_graphs_keep_their_module_stacks(captured: dict[str, Any]) -> None:
    """``meta["nn_module_stack"]`` through AOTAutograd: without it no site has a name."""
    products = captured["graph"].graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    assert [_torch.module_stack(node)[-1] for node in products] == ["layers.0", "layers.1.0"]
    assert torch.equal(captured["result"], captured["expected"])


def test_inputs_keep_their_order_through_aot_autograd(captured: dict[str, Any]) -> None:
    """Positions found in Dynamo's graph are used in the functional one."""
    shapes = [tuple(node.meta["val"].shape) for node in captured["graph"].graph.find_nodes(op="placeholder")]
    wanted = {"weight": (3, 3), "bias": (3,), "scale": (3,)}
    for source, shape in zip(captured["sources"], shapes, strict=True):
        if _torch.is_model_state(source):
            assert shape == wanted[_torch.module_path(source).rpartition(".")[2]]


def test_a_captured_graph_is_described_by_fake_tensors(captured: dict[str, Any]) -> None:
    node = captured["graph"].graph.find_nodes(op="placeholder")[0]
    with _torch.fake_mode_of(node.meta["val"]) as mode:
        assert mode is captured["context"].fake_mode


def test_what_a_call_writes_into_is_known() -> None:
    """``fw_metadata.input_info``: without it values could be computed ahead from what every call changes."""
    seen: list[tuple[list[str | None], frozenset[int]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        sources = [_torch.source_name(node) for node in gm.graph.find_nodes(op="placeholder")]

        def on_graph(graph: fx.GraphModule, given: Any, context: _torch.CompileContext) -> Any:
            seen.append((sources, _torch.written_inputs(context)))
            return lambda arguments: graph(*arguments)

        return _torch.functionalise(gm, inputs, on_graph)

    def function(latents: Tensor, count: Tensor, prompt: Tensor) -> Tensor:
        count[:1].add_(1.0)
        return latents + count + prompt

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*(torch.zeros(3) for _ in range(3)))
    torch._dynamo.reset()
    ((sources, written),) = seen
    assert [sources[position] for position in written] == ["L['count']"]


def test_operators_that_give_the_same_again_are_known() -> None:
    aten = torch.ops.aten
    assert _torch.is_repeatable(aten.add.Tensor) and _torch.is_repeatable(torch.ops.ditopt.attention.default)
    unrepeatable = (aten.rand_like.default, aten.bernoulli.p, aten.native_dropout.default, aten.add_.Tensor, len)
    assert not any(map(_torch.is_repeatable, (*unrepeatable, aten.nonzero.default)))


def test_mutating_operators_are_known() -> None:
    assert _torch.is_mutating(torch.ops.aten.add_.Tensor)
    assert not _torch.is_mutating(torch.ops.aten.add.Tensor)
    assert not _torch.is_mutating(len)


def test_compilations_breaks_and_recompiles_are_counted() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break("a reason to be found")
        return x * 2

    torch._dynamo.reset()
    compiled = torch.compile(broken, backend="eager", dynamic=False)
    first = _torch.compile_counts()
    compiled(torch.zeros(2))
    second = _torch.compile_counts()
    compiled(torch.zeros(2))
    assert _torch.compile_counts() == second
    compiled(torch.zeros(3))
    third = _torch.compile_counts()
    torch._dynamo.reset()
    assert (second.graphs - first.graphs, second.breaks - first.breaks) == (2, 1)
    assert third.recompiles > second.recompiles
    assert any("a reason to be found" in reason for reason in _torch.break_reasons())
