"""Attention whose tokens are sorted by clusters: of its own queries and keys, and put back by the queries' order."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from ditopt.errors import AuditError
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, CLUSTER_ORDER
from ditopt.passes._infra import Ordered, PassManager, StepPlan, call
from ditopt.passes.audit import audit
from ditopt.passes.sparse import clusters_name, gathered
from ditopt.runtime.variants import PASSES, VariantCache
from tests.passes.test_orders import gathers
from tests.passes.test_sparse import SPARSE, cache, wan

__all__ = ["cache", "wan"]  # fixtures

aten = torch.ops.aten
CLUSTERED = tuple(replace(each, order=Ordered.HEADS, draft=True, clusters=(0, 128)) for each in SPARSE)


@pytest.fixture(params=[None, "bfloat16"])
def rewritten(cache: VariantCache, request: pytest.FixtureRequest) -> tuple[fx.GraphModule, Callable[[], None]]:
    """A graph of two sites with clusters, and its audit."""
    plan = StepPlan(sparse=CLUSTERED, dtype=request.param, simplify=True)
    gm = PassManager(PASSES).run(cache.trace.gm, plan, cache.index)
    audit(gm, plan, cache.index, {})
    return gm, lambda: audit(gm, plan, cache.index, {})


def makers(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is CLUSTER_ORDER]


def results(maker: fx.Node) -> dict[object, fx.Node]:
    return {use.args[1]: use for use in maker.users if use.target is operator.getitem}


def by(gm: fx.GraphModule, place: int, result: int) -> None:
    """Let one of the first site's gathers be by another result of its clusters."""
    gather, order = gathers(gm)[place], results(makers(gm)[0])[result]
    with gm.graph.inserting_before(gather):
        other = gathered(gm, gather.args[0], order, 2)  # type: ignore[arg-type]  # a node
    gather.replace_all_uses_with(other)


def keys_by_the_queries_order(gm: fx.GraphModule) -> None:
    by(gm, 1, 0)


def put_back_by_the_keys_order(gm: fx.GraphModule) -> None:
    by(gm, 3, 1)


def clusters_of_the_values(gm: fx.GraphModule) -> None:
    maker = makers(gm)[0]
    maker.args = (maker.args[0], gathers(gm)[2].args[0], *maker.args[2:])


def heads_of_the_neighbours(gm: fx.GraphModule) -> None:
    first, second = makers(gm)
    second.args = (*second.args[:3], first.args[3], *second.args[4:])


def other_sizes(gm: fx.GraphModule) -> None:
    maker = makers(gm)[0]
    maker.args = (*maker.args[:4], 4, *maker.args[5:])


def queries_turned_round(gm: fx.GraphModule) -> None:
    maker = makers(gm)[0]
    source = maker.args[0]
    assert isinstance(source, fx.Node)
    with gm.graph.inserting_before(maker):
        turned = call(gm, aten.flip.default, source, [2])
    maker.args = (turned, *maker.args[1:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (keys_by_the_queries_order, r"blocks\.1\.attn1: to be .*, but its keys are not in the order of"),
        (put_back_by_the_keys_order, r"blocks\.1\.attn1: to be .*, but its result is not put back by"),
        (clusters_of_the_values, r"blocks\.1\.attn1: to be .*, but its clusters are of other queries, keys, heads or"),
        (heads_of_the_neighbours, r"blocks\.2\.attn1: to be .*, but its clusters are of other queries, keys, heads or"),
        (other_sizes, r"blocks\.1\.attn1: to be .*, but its clusters are of other queries, keys, heads or sizes"),
        (queries_turned_round, r"blocks\.1\.attn1: to be .*, but its clusters are of other queries, keys, heads or"),
    ],
)
def test_an_audit_refuses_clusters_that_are_not_the_sites_own(
    rewritten: tuple[fx.GraphModule, Callable[[], None]], spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    gm, check = rewritten
    nodes = [node for node in gm.graph.nodes if node.target is BLOCK_SPARSE_ATTENTION]
    before = {node: node.args[:2] for node in nodes}
    spoil(gm)
    for node, old in before.items():  # what finds blocks is spoilt alike, so that the order is what is wrong
        for one, other in zip(old, node.args[:2], strict=True):
            if one is not other:
                one.replace_all_uses_with(other)
    with pytest.raises(AuditError, match=message):
        check()


def test_an_audit_refuses_clusters_that_no_plan_asked_for(cache: VariantCache) -> None:
    gm = cache.graph(StepPlan(sparse=CLUSTERED))
    given = StepPlan(sparse=tuple(replace(each, clusters=None) for each in CLUSTERED))
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: to be .*, but its queries are not in the order of order_"):
        audit(gm, given, cache.index, {})
    assert {str(node.target) for node in gm.graph.find_nodes(op="placeholder")} >= {
        clusters_name(each.site) for each in CLUSTERED
    }
