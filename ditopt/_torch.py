"""The only file that touches private interfaces of torch; written for torch 2.11 to 2.13.

``tests/test_torch_interfaces.py`` names what broke when a release moves one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

BoxedCallable = Callable[[list[Any]], Sequence[Any]]

COPIES = 256
"""Of one forward, compiled for so many backends side by side."""

_MODULE_STEP = re.compile(
    r"\.__dict__|\._modules|\['_modules'\]|\._parameters|\._buffers|\['_parameters'\]|\['_buffers'\]"
)


def source_name(placeholder: fx.Node) -> str | None:
    """Where Dynamo took a graph input from, e.g. ``L['timestep']`` or ``L['self']._modules['proj'].weight``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def module_path(text: str) -> str:
    """The dotted path below the compiled module in a source or module-stack name.

    >>> module_path("L['self'].__dict__['_modules']['blocks'].2.ffn")
    'blocks.2.ffn'
    >>> module_path("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    'blocks.0.weight'
    """
    text = _MODULE_STEP.sub("", re.sub(r"^L\['\w+'\]", "", text))
    return re.sub(r"\['?([^'\]]*)'?\]", r".\1", text).strip(".")


def is_model_state(source: str) -> bool:
    """Whether a Dynamo source is a parameter or buffer of a module (and not an argument of the call)."""
    return "_parameters" in source or "_buffers" in source


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """Dotted paths of the modules that a node was traced in, outermost first."""
    return tuple(module_path(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values())


@dataclass
class CompileContext:
    """What lowering a graph later needs from the time of its capture."""

    fake_mode: Any
    tracing: Any


def functionalise(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    on_graph: Callable[[fx.GraphModule, Sequence[Any], CompileContext], BoxedCallable],
) -> Callable[..., Any]:
    """Run AOTAutograd in inference mode: ``on_graph`` gets the functional ATen graph, whose inputs are ``gm``'s.

    Returns what Dynamo is to call. Gradients are not kept: everything runs under ``no_grad``. Sizes that Dynamo took
    for dynamic are fixed, so that Dynamo asks again for others: a graph is for one shape.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    for value in example_inputs:
        for size in value.shape if isinstance(value, Tensor) else [value]:
            if isinstance(size, torch.SymInt):
                int(size)  # which Dynamo guards
    fake_mode = detect_fake_mode(example_inputs)
    context = TracingContext.try_get() or TracingContext(fake_mode)

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> BoxedCallable:
        run = on_graph(graph, inputs, CompileContext(fake_mode, context))
        run._boxed_call = True  # type: ignore[attr-defined]  # the mark AOTAutograd looks for
        return run

    build = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=False,
    )
    with torch.no_grad(), V.set_fake_mode(fake_mode), tracing(context):
        return build(gm, example_inputs)


def lower(gm: fx.GraphModule, context: CompileContext) -> BoxedCallable:
    """Compile a functional ATen graph with Inductor's inference pipeline; inputs are described by ``meta["val"]``.

    Takes ownership of ``gm``. The result is boxed: it empties the list that it is called with.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_forward, compile_fx_inner, create_compiler_config_extra
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    outputs = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    fresh = TracingContext(context.fake_mode)
    fresh.fw_metadata = context.tracing.fw_metadata

    def inner(graph: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
        # Slots and pruned inputs move the parameters, so no input may be taken to stay at one address.
        return compile_fx_inner(
            graph, example_inputs, **{**settings, "static_input_idxs": ()}, get_decomp_fn=select_decomp_table
        )

    with (
        torch.no_grad(),
        V.set_fake_mode(context.fake_mode),
        tracing(fresh),
        enable_python_dispatcher(),
        torch._C._DisableAutocast(),
    ):
        return compile_fx_forward(
            gm,
            inputs,
            num_orig_model_outputs=outputs,
            num_example_inputs=len(inputs),
            compiler_config_extra=create_compiler_config_extra(gm),
            inner_compile=inner,
            is_inference=True,
        )


def trace_aten(function: Callable[..., Any], arguments: Sequence[Any], context_mode: Any) -> fx.GraphModule:
    """The ATen graph of ``function`` on fake ``arguments``, decomposed as Inductor would have it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with context_mode, torch.no_grad():
        return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*arguments)


@contextlib.contextmanager
def fake_mode_of(value: Tensor) -> Iterator[Any]:
    """Enter the fake tensor mode that a fake tensor belongs to."""
    mode: Any = value.fake_mode  # type: ignore[attr-defined]
    with mode:
        yield mode


def real_tensors() -> contextlib.AbstractContextManager[object]:
    """While it lasts tensors are made and computed with as outside of a compilation, where they are fake."""
    from torch.utils._python_dispatch import _disable_current_modes

    without: contextlib.AbstractContextManager[object] = _disable_current_modes()
    return without


def is_mutating(target: object) -> bool:
    """Whether a graph node's target is an operator that writes into an argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def is_repeatable(target: object) -> bool:
    """Whether a graph node's target is an operator without side effects, chance or shapes that depend on values."""
    chance = torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return bool(target._schema.returns) and not any(tag in target.tags for tag in chance)


def written_inputs(context: CompileContext) -> frozenset[int]:
    """Positions of the inputs that a call of the captured graph writes into."""
    metadata = getattr(context.tracing, "fw_metadata", None)
    return frozenset(
        position
        for position, found in enumerate(metadata.input_info if metadata is not None else ())
        if found.mutates_data or found.mutates_metadata
    )


@dataclass(frozen=True)
class CompileCounts:
    """What Dynamo has counted in this process so far."""

    graphs: int
    breaks: int
    recompiles: int


def compile_counts() -> CompileCounts:
    """Graphs captured, graph breaks, and compilations of frames (the first of each included)."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    graphs = int(counters["stats"].get("unique_graphs", 0))
    breaks = sum(int(count) for count in counters["graph_break"].values())
    frames = len(compilation_time_metrics.get("_compile.compile_inner", ()))
    return CompileCounts(graphs, breaks, frames)


def break_reasons() -> tuple[str, ...]:
    """The graph breaks that Dynamo has met in this process, in its own words."""
    from torch._dynamo.utils import counters

    return tuple(str(reason) for reason in counters["graph_break"])


def graph_break_after(gm: fx.GraphModule) -> str | None:
    """File, line and reason of the graph break that a Dynamo graph ends at; None where the function returns."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    place = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}: " if reason.user_stack else ""
    told = [line.strip() for line in str(reason.reason).splitlines()]
    return place + " ".join(line for line in told[:2] if line)


def forget_compiled_code() -> None:
    """Drop all that Dynamo has compiled in this process."""
    torch._dynamo.reset()


def many_compiled_copies() -> contextlib.AbstractContextManager[None]:
    """While it lasts Dynamo does not give up on a forward that it has compiled for several backends (its limit is 8).

    Past the limit it would run that forward eagerly, without a word.
    """
    import torch._dynamo.config as settings

    patched: contextlib.AbstractContextManager[None] = settings.patch(
        recompile_limit=max(settings.recompile_limit, COPIES)
    )
    return patched


def has_bfloat16_dot_products() -> bool:
    """Whether the processor has AVX-512's dot products of bfloat16 pairs (``vdpbf16ps``), where we can build for it."""
    return os.name == "posix" and torch.cpu._is_avx512_bf16_supported()


def has_byte_dot_products() -> bool:
    """Whether the processor has AVX-512's dot products of four bytes (``vpdpbusd``), where we can build for it."""
    return os.name == "posix" and torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()


def has_amx() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def load_cpp(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """A library of C++ source, built as Inductor builds its own and kept in its cache; ``flags`` are the compiler's.

    So it has the compiler, the OpenMP threads and the cache folder of compiled graphs.
    """
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=tuple(flags))
    return library
