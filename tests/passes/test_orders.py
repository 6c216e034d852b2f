"""Attention whose tokens are put into another order: reads its own operands by its own order, and is put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ditopt.errors import AuditError
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION
from ditopt.passes._infra import Ordered, PassManager, SparseAttention, StepPlan, call, tensor_value
from ditopt.passes.audit import audit
from ditopt.passes.sparse import gathered, list_names, order_names
from ditopt.runtime.variants import PASSES, VariantCache
from tests.passes.test_draft import Grouped
from tests.passes.test_sparse import SITES, SPARSE, cache, inputs_of, maps, wan
from tests.trace.models import Captured, capture, interpreted

__all__ = ["cache", "wan"]  # fixtures

TOKENS = 128
FORMS = (Ordered.SITE, Ordered.HEADS)
aten = torch.ops.aten


def drawn(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An order and its inverse, along the last dimension."""
    order = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order, order.argsort(-1)


def orders(form: Ordered) -> dict[str, Tensor]:
    shape = (TOKENS,) if form is Ordered.SITE else (2, TOKENS)
    return {
        name: tensor
        for seed, site in enumerate(SITES)
        for name, tensor in zip(order_names(site), drawn(*shape, seed=seed), strict=True)
    }


@pytest.mark.parametrize("form", FORMS)
def test_all_blocks_give_the_dense_output_in_any_order(wan: Captured, form: Ordered) -> None:
    plan = StepPlan(sparse=tuple(replace(each, order=form) for each in SPARSE))
    lists = inputs_of({site: torch.ones(1, 2, 2, 8) > 0 for site in SITES})
    (found,), _ = wan.run(plan, {**lists, **orders(form)})
    torch.testing.assert_close(found, wan.eager[0], rtol=1e-4, atol=1e-5)
    (other,), _ = wan.run(plan, {**inputs_of(maps()), **orders(form)})
    (raster,), _ = wan.run(StepPlan(sparse=SPARSE), inputs_of(maps()))
    assert (other - raster).abs().max() > 1e-3, "blocks are of other tokens"


@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads_and_samples_under_an_order(form: Ordered) -> None:
    """Four heads of queries share two of keys and values; the last block of keys is short."""
    x = 1.5 * torch.randn(2, 4, 120, 8, generator=torch.Generator().manual_seed(0))
    order, back = drawn(*((120,) if form is Ordered.SITE else (4, 120)))
    kept = torch.rand((1, 4, 2, 8), generator=torch.Generator().manual_seed(1)) < 0.4
    lists = BlockLists.from_map(kept, 64, 16, 8)
    names = (*list_names("blocks.0"), *order_names("blocks.0"))
    with interpreted():
        found = capture(Grouped().eval(), {"hidden_states": x, "timestep": torch.zeros(1)})
        plan = StepPlan(sparse=(SparseAttention("blocks.0", 64, 16, 8, order=form),))
        (out,), _ = found.run(plan, dict(zip(names, (lists.indices, lists.counts, order, back), strict=True)))
    torch._dynamo.reset()
    for head in range(4):
        place = back if form is Ordered.SITE else back[head]
        mask = kept[0, head][place // 64][:, place // 16]
        scores = 8**-0.5 * x[:, head] @ x[:, head // 2].transpose(-2, -1)
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ x[:, 2 + head // 2]
        torch.testing.assert_close(out[:, head], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[(form, dtype) for form in FORMS for dtype in (None, "bfloat16")], ids=str)
def rewritten(cache: VariantCache, request: pytest.FixtureRequest) -> tuple[fx.GraphModule, Callable[[], None]]:
    """A graph of two sites with orders, and its audit."""
    form, dtype = request.param
    sparse = tuple(replace(each, order=form, pool=8, draft=True) for each in SPARSE)
    plan = StepPlan(sparse=sparse, dtype=dtype, simplify=True)
    gm = PassManager(PASSES).run(cache.trace.gm, plan, cache.index)
    audit(gm, plan, cache.index, {})
    return gm, lambda: audit(gm, plan, cache.index, {})


def attention(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is BLOCK_SPARSE_ATTENTION]


def gathers(gm: fx.GraphModule) -> list[fx.Node]:
    """Those of the queries, keys and values and of the result of each site, in turn."""
    return [node for node in gm.graph.nodes if node.target in (aten.index.Tensor, aten.gather.default)]


def by(gm: fx.GraphModule, place: int, name: str) -> None:
    """Let one of the gathers be by the input of that name."""
    gather = gathers(gm)[place]
    order = next(node for node in gm.graph.find_nodes(op="placeholder") if node.target == name)
    source = gather.args[0]
    assert isinstance(source, fx.Node)
    with gm.graph.inserting_before(gather):
        other = gathered(gm, source, order, tensor_value(gather).shape[1])
    gather.replace_all_uses_with(other)


def values_in_raster_order(gm: fx.GraphModule) -> None:
    gather = gathers(gm)[2]
    gather.replace_all_uses_with(gather.args[0])  # type: ignore[arg-type]  # a node


def keys_by_the_inverse(gm: fx.GraphModule) -> None:
    by(gm, 5, order_names(SITES[1])[1])


def queries_by_the_neighbours(gm: fx.GraphModule) -> None:
    by(gm, 4, order_names(SITES[0])[0])


def keys_turned_round(gm: fx.GraphModule) -> None:
    gather = gathers(gm)[1]
    with gm.graph.inserting_after(gather):
        turned = call(gm, aten.flip.default, gather, [2])
    gather.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)


def not_put_back(gm: fx.GraphModule) -> None:
    gather = gathers(gm)[3]
    gather.replace_all_uses_with(gather.args[0])  # type: ignore[arg-type]  # a node


def put_back_by_the_order(gm: fx.GraphModule) -> None:
    by(gm, 3, order_names(SITES[0])[0])


def put_back_for_some(gm: fx.GraphModule) -> None:
    """One more reader sees the result as it is."""
    gather = gathers(gm)[3]
    with gm.graph.inserting_after(gather):
        both = call(gm, aten.add.Tensor, gather, gather)
    gather.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    both.args = (gather, gather.args[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (values_in_raster_order, r"blocks\.1\.attn1: to be .*, but its values are not in the order of order_blocks_1"),
        (keys_by_the_inverse, r"blocks\.2\.attn1: to be .*, but its keys are not in the order of order_blocks_2_attn1"),
        (queries_by_the_neighbours, r"blocks\.2\.attn1: to be .*, but its queries are not in the order of order_blo"),
        (keys_turned_round, r"blocks\.1\.attn1: to be .*, but its keys are not in the order of order_blocks_1_attn1"),
        (not_put_back, r"blocks\.1\.attn1: to be .*, but its result is not put back by back_blocks_1_attn1"),
        (put_back_by_the_order, r"blocks\.1\.attn1: to be .*, but its result is not put back by back_blocks_1_attn1"),
        (put_back_for_some, r"blocks\.1\.attn1: to be .*, but its result is not put back by back_blocks_1_attn1"),
    ],
)
def test_an_audit_refuses_operands_in_an_order_that_is_not_the_plans(
    rewritten: tuple[fx.GraphModule, Callable[[], None]], spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    gm, check = rewritten
    before = {node: (node.args[0], node.args[1]) for node in attention(gm)}
    spoil(gm)
    for node in attention(gm):  # what finds blocks and takes means is spoilt alike, so that the order is what is wrong
        _alike(gm, before[node], node)
    with pytest.raises(AuditError, match=message):
        check()


def _alike(gm: fx.GraphModule, before: tuple[Any, Any], node: fx.Node) -> None:
    for old, new in zip(before, node.args[:2], strict=True):
        if old is not new:
            old.replace_all_uses_with(new)


def test_an_audit_refuses_orders_that_no_plan_asked_for(cache: VariantCache) -> None:
    gm = cache.graph(StepPlan(sparse=tuple(replace(each, order=Ordered.SITE) for each in SPARSE)))
    with pytest.raises(
        AuditError, match=r"blocks\.1\.attn1: its queries are in the order of order_blocks_1_attn1, but"
    ):
        audit(gm, StepPlan(sparse=SPARSE), cache.index, {})
