"""Rests that a graph hands on and another adds: the numbers, what goes in and out, what audits catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from ditopt.errors import AuditError
from ditopt.kernels.block_sparse_attention.kept import MERGE, RESIDUAL, other_lists
from ditopt.kernels.ops import ADD_REST, BLOCK_SPARSE_ATTENTION, KEEP_REST
from ditopt.passes._infra import SITE, StepPlan, outputs, set_outputs
from ditopt.passes.audit import audit
from ditopt.passes.kept import REST, kept_names, readers_name, slot_of, stand_ins
from ditopt.passes.kept_rest import forms_name, other_names, resting_name
from ditopt.passes.sparse import list_names
from ditopt.profiler.work import counted_work
from ditopt.runtime.variants import VariantCache
from tests.passes.test_kept import check_refused
from tests.passes.test_sparse import KEY_BLOCK, KEY_BLOCKS, QUERY_BLOCK, SITES, SPARSE, cache, emulated, maps, wan
from tests.passes.test_sparse import inputs_of as given
from tests.trace.models import Captured

__all__ = ["cache", "wan"]  # fixtures

KEEPS = StepPlan(sparse=tuple(replace(each, keeps=(REST,), others=KEY_BLOCKS) for each in SPARSE))
READS = StepPlan(sparse=tuple(replace(each, reads=(REST,)) for each in SPARSE))
BOTH = StepPlan(sparse=tuple(replace(each, keeps=(REST,), reads=(REST,), others=KEY_BLOCKS) for each in SPARSE))


def forms(*codes: int) -> dict[str, Tensor]:
    return {forms_name(site): torch.tensor(codes, dtype=torch.int32) for site in SITES}


def others(*heads: bool) -> dict[str, Tensor]:
    """Lists of all other blocks of these heads."""
    found: dict[str, Tensor] = {}
    for site, attended in maps().items():
        lists = other_lists(attended, torch.tensor(heads), QUERY_BLOCK, KEY_BLOCK, KEY_BLOCKS)
        found |= zip(other_names(site), (lists.indices, lists.counts), strict=True)
    return found


def slots(handed_on: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one graph handed on (as the slots of features are called), as inputs of another."""
    tensors = [*handed_on.values()]
    found: dict[str, Tensor] = {}
    for at, site in enumerate(SITES):
        found |= zip(kept_names(REST, site), tensors[2 * at : 2 * at + 2], strict=True)
    return found


def test_what_keeps_is_dense_and_what_reads_the_same_right_after(wan: Captured) -> None:
    lists, of_heads = given(maps()), forms(MERGE, RESIDUAL)
    (first,), kept = wan.run(KEEPS, {**lists, **of_heads, **others(True, True)})
    torch.testing.assert_close(first, wan.eager[0], rtol=1e-4, atol=1e-5)
    (second,), none = wan.run(READS, {**lists, **of_heads, **slots(kept)})
    torch.testing.assert_close(second, wan.eager[0], rtol=1e-4, atol=1e-5)
    assert not none and (emulated(wan, maps()) - first).abs().max() > 1e-3, "what lists leave out matters"


def test_heads_without_a_rest_have_their_lists_alone(wan: Captured) -> None:
    lists, of_heads = given(maps()), forms(0, MERGE)
    attended = {site: torch.cat([each[:, :1], torch.ones_like(each[:, 1:])], 1) for site, each in maps().items()}
    expected = emulated(wan, attended)
    (first,), kept = wan.run(KEEPS, {**lists, **of_heads, **others(False, True)})
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    (second,), _ = wan.run(READS, {**lists, **of_heads, **slots(kept)})
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)


def test_slots_are_of_the_heads_that_keep_a_rest(wan: Captured) -> None:
    keeps, reads = (StepPlan(sparse=tuple(replace(each, resting=1) for each in plan.sparse)) for plan in (KEEPS, READS))
    lists, of_heads = given(maps()), {**forms(0, MERGE), **{resting_name(site): torch.tensor([1]) for site in SITES}}
    (first,), kept = wan.run(keeps, {**lists, **of_heads, **others(False, True)})
    (second,), _ = wan.run(reads, {**lists, **of_heads, **slots(kept)})
    (_,), of_all = wan.run(KEEPS, {**lists, **forms(0, MERGE), **others(False, True)})
    for one, every in zip(kept.values(), of_all.values(), strict=True):
        assert torch.equal(one, every[:, 1:]) and one.numel() == every.numel() / 2
    attended = {site: torch.cat([each[:, :1], torch.ones_like(each[:, 1:])], 1) for site, each in maps().items()}
    for found in (first, second):
        torch.testing.assert_close(found, emulated(wan, attended), rtol=1e-4, atol=1e-5)


def test_some_keep_and_some_read_in_one_graph(wan: Captured) -> None:
    lists, of_heads = given(maps()), forms(MERGE, MERGE)
    _, kept = wan.run(KEEPS, {**lists, **of_heads, **others(True, True)})
    readers = {readers_name(REST, site): torch.tensor([False, True]) for site in SITES}
    (found,), again = wan.run(BOTH, {**lists, **of_heads, **others(True, False), **slots(kept), **readers})
    torch.testing.assert_close(found, wan.eager[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(kept.values(), again.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [KEEPS, READS, BOTH], ids=["keeps", "reads", "both"])
def test_inputs_and_outputs_are_those_of_the_plan(cache: VariantCache, plan: StepPlan) -> None:
    gm = cache.graph(plan)
    reads, keeps = bool(plan.sparse[0].reads), bool(plan.sparse[0].keeps)
    names = [name for site in SITES for name in (*list_names(site), forms_name(site))]
    names += [name for site in SITES for name in other_names(site) if keeps]
    names += [name for site in SITES for name in kept_names(REST, site) if reads]
    names += [readers_name(REST, site) for site in SITES if reads and keeps]
    assert sorted(name for name in gm.meta["ditopt_inputs"] if isinstance(name, str)) == sorted(names)
    assert len(outputs(gm)) == 1 + 4 * keeps
    variant = cache.get(plan)
    assert variant.recorded == (tuple((slot_of(REST, site), 2) for site in SITES) if keeps else ())
    assert sum(node.target is BLOCK_SPARSE_ATTENTION for node in gm.graph.nodes) == 2 * (1 + keeps)
    assert stand_ins(gm, {}).keys() == {name for site in SITES for name in kept_names(REST, site) if reads}


def of(gm: fx.GraphModule, target: object, which: int = 0) -> fx.Node:
    found: fx.Node = [node for node in gm.graph.nodes if node.target is target][which]
    return found


def put(node: fx.Node, place: int, value: object) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])  # type: ignore[arg-type]  # a node or a number


def swapped(gm: fx.GraphModule) -> None:
    *before, a, b, c, d = outputs(gm)
    set_outputs(gm, [*before, c, d, a, b])


def the_others_alone(gm: fx.GraphModule) -> None:
    """What is handed on is the second call's result, whatever the form."""
    *before, _, b, c, d = outputs(gm)
    keep = of(gm, KEEP_REST)
    set_outputs(gm, [*before, keep.args[2], b, c, d])  # type: ignore[list-item]  # a node


def own_lists_again(gm: fx.GraphModule) -> None:
    first, second = of(gm, BLOCK_SPARSE_ATTENTION), of(gm, BLOCK_SPARSE_ATTENTION, 1)
    put(second, 3, first.args[3])


def other_queries(gm: fx.GraphModule) -> None:
    put(of(gm, BLOCK_SPARSE_ATTENTION, 1), 0, of(gm, BLOCK_SPARSE_ATTENTION).args[1])


def another_scale(gm: fx.GraphModule) -> None:
    put(of(gm, BLOCK_SPARSE_ATTENTION, 1), 7, 0.5)


def turned_round(gm: fx.GraphModule) -> None:
    keep = of(gm, KEEP_REST)
    keep.args = (*keep.args[2:4], *keep.args[:2], *keep.args[4:])


def forms_of_the_other_site(gm: fx.GraphModule) -> None:
    put(of(gm, KEEP_REST), 4, of(gm, KEEP_REST, 1).args[4])


def without_its_rest(gm: fx.GraphModule) -> None:
    keep = of(gm, KEEP_REST)
    whole = next(use for use in keep.users if use.args[1] == 0)
    whole.replace_all_uses_with(keep.args[0])  # type: ignore[arg-type]  # a node


@pytest.mark.parametrize("plan", [KEEPS, BOTH], ids=["keeps", "both"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swapped, r"rest blocks\.1\.attn1: to be kept, but the graph hands on getitem"),
        (the_others_alone, r"rest blocks\.1\.attn1: to be kept, but the graph hands on getitem"),
        (own_lists_again, r"blocks\.1\.attn1: to be .* its second call reads the lists indices_blocks_1_attn1"),
        (other_queries, r"blocks\.1\.attn1: to be .* its second call has other operands, sizes, mask or scale"),
        (another_scale, r"blocks\.1\.attn1: to be .* its second call has other operands, sizes, mask or scale"),
        (turned_round, r"blocks\.1\.attn1: to be .* put together with is not its own attention"),
        (forms_of_the_other_site, r"blocks\.1\.attn1: to be .* its rest reads forms_blocks_2_attn1"),
        (without_its_rest, r"blocks\.1\.attn1: to be .* its attention is read without its rest"),
    ],
)
def test_an_audit_refuses_what_is_not_the_plans_rest(
    cache: VariantCache, plan: StepPlan, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    check_refused(cache, plan, spoil, message)


def another_slot(gm: fx.GraphModule) -> None:
    put(of(gm, ADD_REST), 3, of(gm, ADD_REST, 1).args[3])


def not_added(gm: fx.GraphModule) -> None:
    added = of(gm, ADD_REST)
    added.replace_all_uses_with(added.args[0])  # type: ignore[arg-type]  # a node
    gm.graph.erase_node(added)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_slot, r"blocks\.1\.attn1: to be .* its rest reads forms_blocks_1_attn1, kept_rest_blocks_2_attn1_0"),
        (not_added, r"blocks\.1\.attn1: to be .* its rest is made by nothing"),
    ],
)
def test_an_audit_refuses_another_slot(
    cache: VariantCache, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    check_refused(cache, READS, spoil, message)


def other_heads(gm: fx.GraphModule) -> None:
    keep = of(gm, KEEP_REST)
    keep.kwargs = {"heads": of(gm, KEEP_REST, 1).kwargs["heads"]}


def all_heads(gm: fx.GraphModule) -> None:
    of(gm, KEEP_REST).kwargs = {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_heads, r"blocks\.1\.attn1: to be .* its rest reads forms_blocks_1_attn1, resting_blocks_2_attn1"),
        (all_heads, r"blocks\.1\.attn1: to be .* its rest reads forms_blocks_1_attn1$"),
    ],
)
def test_an_audit_refuses_slots_of_other_heads(
    cache: VariantCache, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    check_refused(cache, StepPlan(sparse=tuple(replace(each, resting=1) for each in KEEPS.sparse)), spoil, message)


def test_an_audit_refuses_rests_that_no_plan_asked_for(cache: VariantCache) -> None:
    with pytest.raises(
        AuditError, match=r"blocks\.1\.attn1: sparse by the plan, but its attention is ditopt.*, ditopt"
    ):
        audit(cache.graph(KEEPS), StepPlan(sparse=SPARSE), cache.index, {})
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: to be .* has a rest"):
        audit(cache.graph(READS), StepPlan(sparse=SPARSE), cache.index, {})


def test_both_calls_count_as_work(cache: VariantCache) -> None:
    gm, reads = cache.graph(KEEPS), cache.graph(READS)
    lists = {**given(maps()), **others(True, True)}
    dense = counted_work(cache.graph(StepPlan()))["attention"]["flops"]
    assert counted_work(gm, lists)["attention"]["flops"] == dense, "listed and other blocks are all"
    assert counted_work(reads, lists)["attention"]["flops"] < dense
    assert {node.meta[SITE] for node in gm.graph.nodes if node.target is KEEP_REST} == {*SITES}
