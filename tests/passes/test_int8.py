"""Int8 scores in a graph: which heads have them is an input; the numbers, by the reference; what audits catch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ditopt.errors import AuditError
from ditopt.kernels.block_sparse_attention import reference
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, INT8_ON_CPU
from ditopt.passes._infra import StepPlan
from ditopt.passes.sparse import int8_name
from ditopt.runtime.variants import VariantCache
from tests.passes.test_sparse import SITES, SPARSE, cache, inputs_of, maps, sparse_calls, spoilt, wan
from tests.trace.models import Captured

__all__ = ["cache", "wan"]  # fixtures

PLANNED = (replace(SPARSE[0], int8=True), SPARSE[1])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every processor has a kernel; a graph can be made all the same."""
    monkeypatch.setattr("ditopt.passes.sparse.block_sparse_refusal", lambda *given: None)


class ByReference(fx.Interpreter):
    """Runs a graph with the reference in place of the kernel."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not BLOCK_SPARSE_ATTENTION:
            return super().call_function(target, args, kwargs)
        (query, key, value, *lists), scale = args[:7], args[7]
        int8 = kwargs.get("int8")
        out, logs = reference.block_sparse_attention(query, key, value, BlockLists(*lists), scale, int8=int8)
        return out.transpose(1, 2).contiguous().transpose(1, 2), logs


def run(captured: Captured, plan: tuple[Any, ...], added: dict[str, Tensor]) -> Tensor:
    gm = captured.program.variants.graph(StepPlan(sparse=plan))
    given = [captured.arguments[name] if isinstance(name, int) else added[name] for name in gm.meta["ditopt_inputs"]]
    with torch.no_grad():
        found: Tensor = ByReference(gm).run(*given)[0]
    return found


def test_heads_whose_number_is_not_0_have_int8_scores(wan: Captured, taken: None) -> None:
    lists = inputs_of(maps())
    plain = run(wan, SPARSE, lists)
    for heads, differs in (((0, 0), False), ((1, 0), True), ((1, 1), True)):
        numbers = {int8_name(SITES[0]): torch.tensor(heads, dtype=torch.int32)}
        change = float((run(wan, PLANNED, {**lists, **numbers}) - plain).norm() / plain.norm())
        assert (1e-6 < change < 1e-2) if differs else change == 0


def test_without_a_kernel_the_site_is_refused_with_the_reason(
    cache: VariantCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.has_byte_dot_products", lambda: False)
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: sparse by the plan.*" + re.escape(INT8_ON_CPU)):
        cache.graph(StepPlan(sparse=PLANNED))


def without_it(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.kwargs = {}


def of_another_input(gm: fx.GraphModule) -> None:
    one, other = sparse_calls(gm)
    other.kwargs = one.kwargs


def counts_in_its_place(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.kwargs = {"int8": call.args[4]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_it, r"blocks\.1\.attn1: to be .*int8=True.*, but which heads have int8 scores .* reads in None"),
        (of_another_input, r"blocks\.2\.attn1: to be .*int8=False.* reads in int8_blocks_1_attn1"),
        (counts_in_its_place, r"blocks\.1\.attn1: to be .*int8=True.* reads in counts_blocks_1_attn1"),
    ],
)
def test_an_audit_refuses_what_is_not_the_plans(
    cache: VariantCache, taken: None, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    with pytest.raises(AuditError, match=message):
        spoilt(cache, spoil, PLANNED)
