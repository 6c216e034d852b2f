"""Attention by our own kernel: against float64, in every layout, what it refuses, and how it gets into a graph."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from ditopt._torch import has_amx, has_bfloat16_dot_products
from ditopt.errors import AuditError
from ditopt.kernels.flash_attention import cpu, reference
from ditopt.kernels.ops import ATTENTION, FLASH_ATTENTION, plain_attention, refusal
from ditopt.passes._infra import GraphIndex, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.cast import MIN_ROWS
from ditopt.passes.flash import flash
from ditopt.passes.simplify import simplifiable
from ditopt.quality import relative_l2
from tests.kernels.layouts import LAYOUTS, laid_out
from tests.tiny import compiled_tiny, euler, make_model

needs_dot_products = pytest.mark.skipif(
    has_amx() or not has_bfloat16_dot_products(),
    reason="this processor has no dot products of bfloat16 pairs (avx512_bf16), or AMX beside them",
)
INDEX = GraphIndex((), {}, None)
Operands = tuple[Tensor, Tensor, Tensor]
ROUNDING = 2**-8  # of bfloat16, relative


def operands(batch: int, heads: int, key_heads: int, tokens: int, keys: int, depth: int, width: int) -> Operands:
    """Query, key and value as projections leave them: tokens before heads."""
    generator = torch.Generator().manual_seed(tokens * keys + depth)
    shapes = ((batch, tokens, heads, depth), (batch, keys, key_heads, depth), (batch, keys, key_heads, width))
    query, key, value = ((1.5 * torch.randn(s, generator=generator)).to(torch.bfloat16) for s in shapes)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def check(ours: Tensor, parts: Operands, scale: float) -> None:
    """Against float64: numerators and the result are each rounded once, and the former cancel as values do."""
    query, key, value = (part.double() for part in parts)
    exact = reference.flash_attention(query, key, value, scale)
    bound = 2.1 * ROUNDING * reference.flash_attention(query, key, value.abs(), scale)
    assert not ours.isnan().any() and ((ours.double() - exact).abs() <= bound + 1e-30).all()


def attend(parts: Operands, scale: float) -> Tensor:
    """The kernel's result, in memory that held NaN."""
    made = parts[0].new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda self, *size: made(*size).fill_(math.nan))
        return cpu.flash_attention(*parts, scale)


@needs_dot_products
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 3),
    key_heads=st.integers(1, 2),
    tokens=st.integers(1, 150),
    keys=st.integers(1, 210),
    depth=st.integers(1, 40).map(lambda half: 2 * half),
    width=st.integers(1, 40).map(lambda half: 2 * half),
    scale=st.floats(0.01, 1.0),
)
def test_it_is_as_near_to_float64_as_rounding_allows(
    batch: int, group: int, key_heads: int, tokens: int, keys: int, depth: int, width: int, scale: float
) -> None:
    parts = operands(batch, group * key_heads, key_heads, tokens, keys, depth, width)
    ours = attend(parts, scale)
    assert ours.dtype == torch.bfloat16 and ours.shape == (batch, group * key_heads, tokens, width)
    check(ours, parts, scale)


@needs_dot_products
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    parts = operands(2, 3, 3, 70, 100, 32, 16)
    expected = cpu.flash_attention(*parts, 0.2)
    query, key, value = laid_out(parts, layout)
    assert torch.equal(cpu.flash_attention(query, key, value, 0.2), expected)
    assert expected.transpose(1, 2).is_contiguous()


@needs_dot_products
def test_it_agrees_with_torch_on_what_is_not_finite() -> None:
    for number, position in ((math.nan, 0), (math.nan, 1), (math.nan, 2), (math.inf, 2)):
        parts = operands(1, 2, 2, 65, 97, 16, 16)
        parts[position][0, 1, 7, 3] = number
        ours, theirs = cpu.flash_attention(*parts, 0.25), F.scaled_dot_product_attention(*parts)
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


@needs_dot_products
def test_large_scores_do_not_overflow() -> None:
    query, key, value = operands(1, 1, 1, 64, 300, 16, 16)
    check(cpu.flash_attention(10 * query, 10 * key, value, 1.0), (10 * query, 10 * key, value), 1.0)


@needs_dot_products
def test_early_keys_do_not_fade_in_a_long_sequence() -> None:
    """Equal scores weigh all values alike: the first half of the keys has ones, the second none."""
    query, key, value = operands(1, 1, 1, 64, 60_000, 2, 2)
    value[:, :, :30_000], value[:, :, 30_000:] = 1.0, 0.0
    assert (attend((0 * query, key, value), 0.25).float() - 0.5).abs().max() < 1e-4


@needs_dot_products
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    parts, before = operands(1, 3, 3, 200, 130, 32, 32), torch.get_num_threads()
    many = cpu.flash_attention(*parts, 0.2)
    torch.set_num_threads(1)
    try:
        assert torch.equal(cpu.flash_attention(*parts, 0.2), many)
    finally:
        torch.set_num_threads(before)


@needs_dot_products
def test_the_fake_has_the_shape_and_the_strides() -> None:
    parts = operands(2, 4, 2, 30, 50, 32, 16)
    torch.library.opcheck(FLASH_ATTENTION, (*parts, 0.2), test_utils=("test_schema", "test_faketensor"))


def test_what_no_kernel_takes_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.has_bfloat16_dot_products", lambda: True)
    monkeypatch.setattr("ditopt.kernels.ops.has_amx", lambda: False)
    narrow = torch.bfloat16
    query, key, value = operands(1, 2, 2, 8, 8, 16, 16)
    assert refusal(query, key, value, 0.25, narrow) is None
    assert "only, not for torch.float32" in str(refusal(query, key, value, 0.25, torch.float32))
    assert "for meta" in str(refusal(query.to("meta"), key, value, 0.25, narrow))
    assert "scale is -1" in str(refusal(query, key, value, -1.0, narrow))
    assert "not [B, H, S, D]" in str(refusal(query[0], key, value, 0.25, narrow))
    assert "do not match" in str(refusal(query, key[:, :1], value, 0.25, narrow))
    assert "odd number" in str(refusal(query[..., :7], key[..., :7], value, 0.25, narrow))
    assert "no token" in str(refusal(query[:, :, :0], key, value, 0.25, narrow))
    monkeypatch.setattr("ditopt.kernels.ops.has_bfloat16_dot_products", lambda: False)
    assert "avx512_bf16" in str(refusal(query, key, value, 0.25, narrow))
    monkeypatch.setattr("ditopt.kernels.ops.has_bfloat16_dot_products", lambda: True)
    assert "several dtypes" in str(refusal(query, key.float(), value, 0.25, narrow))
    monkeypatch.setattr("ditopt.kernels.ops.has_amx", lambda: True)
    assert "AMX" in str(refusal(query, key, value, 0.25, narrow))


def test_the_operator_refuses_what_no_kernel_takes() -> None:
    query, key, value = operands(1, 2, 2, 8, 8, 16, 16)
    with pytest.raises(ValueError, match=r"there is a kernel for torch\.bfloat16 only"):
        torch.ops.ditopt.flash_attention(query.float(), key.float(), value.float(), 0.25)


@needs_dot_products
def test_a_narrow_default_dtype_changes_nothing() -> None:
    parts, before = operands(1, 3, 3, 200, 130, 32, 32), torch.get_default_dtype()
    expected = cpu.flash_attention(*parts, 0.2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(attend(parts, 0.2), expected)
    finally:
        torch.set_default_dtype(before)


@needs_dot_products
def test_a_first_block_without_a_finite_score_leaves_the_others() -> None:
    query, key, value = operands(1, 1, 1, 64, 200, 16, 16)
    query = query.abs() + 0.1
    key[:, :, :120] = -math.inf
    finite = attend((query, key, value), 0.25)
    check(finite, (query, key[:, :, 120:], value[:, :, 120:]), 0.25)
    key[:] = -math.inf
    assert attend((query, key, value), 0.25).isnan().all()


def graph_of(*settings: Any) -> fx.GraphModule:
    """One attention call with ``settings`` behind its operands."""
    graph, parts = fx.Graph(), operands(1, 2, 2, 8, 8, 16, 16)
    nodes = [graph.placeholder(name) for name in ("query", "key", "value")]
    for node, part in zip(nodes, parts, strict=True):
        node.meta["val"] = part.to("meta")
    made = graph.call_function(ATTENTION, (*nodes, *settings))
    made.meta["val"] = plain_attention(*(node.meta["val"] for node in nodes))
    graph.output((made,))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("settings", "told"),
    [((None, 0.0, True), "there is a causal mask"), ((None, 0.5), "dropout is 0.5"), ((), "for meta")],
)
def test_other_calls_stay_and_tell_why(settings: tuple[Any, ...], told: str) -> None:
    result = flash(graph_of(*settings), StepPlan(simplify=True), INDEX)
    assert not result.modified and [reason.endswith(told) for reason in result.reasons] == [True]
    assert flash(graph_of(), StepPlan(), INDEX).reasons == ()


@needs_dot_products
@torch.no_grad()
def test_a_model_runs_in_it_and_the_audit_wants_it() -> None:
    cast = StepPlan(dtype="bfloat16")
    simple = replace(cast, simplify=True)
    seen: list[Any] = []
    with compiled_tiny(make_model(), lambda model: euler(model, "a", 0, 2, MIN_ROWS)) as (model, program):

        def keep(arguments: list[Any], compute: Any) -> Any:
            seen[:] = list(arguments)
            return compute(arguments)

        program.interceptor = keep
        euler(model, "a", 0, 2, MIN_ROWS)
        variants = program.variants
        results = []
        for plan, present, absent in ((simple, FLASH_ATTENTION, ATTENTION), (cast, ATTENTION, FLASH_ATTENTION)):
            gm = variants.graph(plan)
            targets = [node.target for node in gm.graph.nodes]
            assert present in targets and absent not in targets
            results.append(gm(*(seen[position] for position in gm.meta["ditopt_inputs"]))[0])
            compiled = variants.get(plan)
            again = compiled.run([seen[position] for position in compiled.inputs if isinstance(position, int)])[0]
            assert relative_l2(again, results[-1]) < ROUNDING
        assert relative_l2(*results) < 2 * ROUNDING
        assert simplifiable(variants.trace.gm, "bfloat16") and not simplifiable(variants.trace.gm)
        with pytest.raises(AuditError, match="as they were"):
            audit(variants.graph(cast), simple, variants.index, {})
