"""Lists that a graph hands on and another reads: the numbers, what goes in and out, what audits catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from ditopt.errors import AuditError
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, DRAFT_LISTS
from ditopt.passes._infra import PassManager, StepPlan, outputs, set_outputs
from ditopt.passes.audit import audit
from ditopt.passes.kept import LISTS, kept_names, readers_name, room_name, slot_of, stand_ins
from ditopt.passes.sparse import draft_names, list_names
from ditopt.profiler.work import counted_work
from ditopt.runtime.variants import PASSES, VariantCache
from ditopt.sites import STEP
from tests.passes.test_sparse import KEY_BLOCK, KEY_BLOCKS, QUERY_BLOCK, SITES, SPARSE, cache, emulated, maps, wan
from tests.passes.test_sparse import inputs_of as given
from tests.trace.models import Captured

__all__ = ["cache", "wan"]  # fixtures

FINDS = StepPlan(sparse=tuple(replace(each, draft=True, keeps=(LISTS,)) for each in SPARSE))
READS = StepPlan(sparse=tuple(replace(each, reads=(LISTS,)) for each in SPARSE))
BOTH = StepPlan(sparse=tuple(replace(each, draft=True, keeps=(LISTS,), reads=(LISTS,)) for each in SPARSE))


def limits(keep: list[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in SITES:
        each = torch.tensor(keep, dtype=torch.int32), torch.tensor([math.inf] * len(keep))
        found |= zip(draft_names(site), each, strict=True)
    return found


def slots(handed_on: dict[str, Tensor], readers: list[bool]) -> dict[str, Tensor]:
    """What one graph handed on (as the slots of features are called), as inputs of another."""
    tensors = [*handed_on.values()]
    found: dict[str, Tensor] = {}
    for at, site in enumerate(SITES):
        found |= zip(kept_names(LISTS, site), tensors[2 * at : 2 * at + 2], strict=True)
        found[readers_name(LISTS, site)] = torch.tensor(readers)
    return found


def kept_maps(handed_on: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = [*handed_on.values()]
    return {
        site: BlockLists(tensors[2 * at], tensors[2 * at + 1], QUERY_BLOCK, KEY_BLOCK).to_map(KEY_BLOCKS)
        for at, site in enumerate(SITES)
    }


def test_what_a_graph_found_gives_another_the_same(wan: Captured) -> None:
    (first,), kept = wan.run(FINDS, {**given(maps()), **limits([3, 5])})
    (second,), none = wan.run(READS, {**given(maps()), **slots(kept, [True, True])})
    torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)
    assert not none
    torch.testing.assert_close(first, emulated(wan, kept_maps(kept)), rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_read_have_what_they_are_given_or_find(wan: Captured) -> None:
    _, kept = wan.run(FINDS, {**given(maps()), **limits([3, 5])})
    found, attended = kept_maps(kept), maps()
    for site in SITES:
        attended[site][:, 1] = found[site][:, 1]
    (one,), _ = wan.run(READS, {**given(maps()), **slots(kept, [False, True])})
    torch.testing.assert_close(one, emulated(wan, attended), rtol=1e-4, atol=1e-5)
    (other,), again = wan.run(BOTH, {**given(maps()), **limits([6, 0]), **slots(kept, [False, True])})
    now = kept_maps(again)
    torch.testing.assert_close(other, emulated(wan, now), rtol=1e-4, atol=1e-5)
    for site in SITES:
        assert torch.equal(now[site][:, 1], found[site][:, 1]), "what was read is handed on with what was found"
        assert (now[site][:, 0].sum(-1) >= 6).all()


@pytest.mark.parametrize("plan", [FINDS, READS, BOTH], ids=["finds", "reads", "both"])
def test_inputs_and_outputs_are_those_of_the_plan(cache: VariantCache, plan: StepPlan) -> None:
    gm = cache.graph(plan)
    reads, keeps = bool(plan.sparse[0].reads), bool(plan.sparse[0].keeps)
    names = [name for site in SITES for name in list_names(site)]
    names += [name for site in SITES for name in draft_names(site) if keeps]
    names += [name for site in SITES for name in (*kept_names(LISTS, site), readers_name(LISTS, site)) if reads]
    assert sorted(name for name in gm.meta["ditopt_inputs"] if isinstance(name, str)) == sorted(names)
    assert len(outputs(gm)) == 1 + 4 * keeps
    variant = cache.get(plan)
    assert variant.recorded == (tuple((slot_of(LISTS, site), 2) for site in SITES) if keeps else ())
    assert sum(node.target is DRAFT_LISTS for node in gm.graph.nodes) == 2 * keeps, "what is read is not found"


def test_features_are_recorded_before_what_is_kept(wan: Captured) -> None:
    sites = (STEP, "blocks.1..2")
    inputs = {**given(maps()), **limits([3, 5])}
    (out,), slots_of = wan.run(replace(FINDS, recorded=sites), inputs)
    _, alone = wan.run(FINDS, inputs)
    tensors = [*slots_of.values()]
    assert torch.equal(tensors[0], out) and tensors[1].shape[-1] == tensors[1].numel() // (2 * 8 * 8)
    assert all(map(torch.equal, tensors[-4:], alone.values()))
    graph = wan.program.variants.graph(replace(FINDS, recorded=sites))
    assert [node.meta["val"].dtype for node in outputs(graph)[-4:] if node is not None] == [torch.int32] * 4


def attention(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is BLOCK_SPARSE_ATTENTION]


def swapped(gm: fx.GraphModule) -> None:
    """Each site keeps what the other found."""
    *before, a, b, c, d = outputs(gm)
    set_outputs(gm, [*before, c, d, a, b])


def turned(gm: fx.GraphModule) -> None:
    *before, a, b = outputs(gm)
    set_outputs(gm, [*before, b, a])


def one_less(gm: fx.GraphModule) -> None:
    set_outputs(gm, outputs(gm)[:-1])


def one_more(gm: fx.GraphModule) -> None:
    set_outputs(gm, [*outputs(gm), outputs(gm)[-1]])


def a_feature_in_its_place(gm: fx.GraphModule) -> None:
    user, feature, *kept = outputs(gm)
    set_outputs(gm, [user, feature, feature, *kept[1:]])


def before_the_slot(gm: fx.GraphModule) -> None:
    """What is handed on is what was given, not what attention reads."""
    first = attention(gm)[0]
    (maker,) = {each.args[0] for each in first.args[3:5] if isinstance(each, fx.Node)}
    *before, _, b, c, d = outputs(gm)
    assert isinstance(maker, fx.Node)
    set_outputs(gm, [*before, maker.args[2], b, c, d])  # type: ignore[list-item]  # a node


@pytest.mark.parametrize("plan", [FINDS, BOTH], ids=["finds", "both"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swapped, r"lists blocks\.1\.attn1: to be kept, but the graph hands on getitem"),
        (turned, r"lists blocks\.2\.attn1: to be kept, but the graph hands on getitem"),
        (one_less, r"1 features are to be recorded \(step\) in 1 tensors, and 4 kept; the graph hands on 4"),
        (one_more, r"hands on 1 values that the plan does not keep, e\.g\. getitem"),
        (a_feature_in_its_place, r"lists blocks\.1\.attn1: to be kept, but the graph hands on clone.*, getitem"),
        (before_the_slot, r"lists blocks\.1\.attn1: to be kept, but the graph hands on (where|indices).*, getitem"),
    ],
)
def test_an_audit_refuses_other_outputs(
    cache: VariantCache, plan: StepPlan, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    check_refused(cache, replace(plan, recorded=(STEP,)), spoil, message)


def check_refused(cache: VariantCache, plan: StepPlan, spoil: Callable[[fx.GraphModule], None], message: str) -> None:
    gm = PassManager(PASSES).run(cache.trace.gm, plan, cache.index)
    audit(gm, plan, cache.index, {})
    spoil(gm)
    with pytest.raises(AuditError, match=message):
        audit(gm, plan, cache.index, {})


def where(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is torch.ops.aten.where.self]


def what_is_given(gm: fx.GraphModule) -> None:
    one = where(gm)[0]
    one.replace_all_uses_with(one.args[2])  # type: ignore[arg-type]  # a node


def of_the_other_site(gm: fx.GraphModule) -> None:
    one, _, other, _ = where(gm)
    one.args = (one.args[0], other.args[1], one.args[2])


def by_other_heads(gm: fx.GraphModule) -> None:
    one, _, other, _ = where(gm)
    one.args = (other.args[0], *one.args[1:])


def the_other_way_round(gm: fx.GraphModule) -> None:
    one = where(gm)[0]
    one.args = (one.args[0], one.args[2], one.args[1])


def past_the_slot(gm: fx.GraphModule) -> None:
    """What is given in place of a slot is another site's."""
    one, _, other, _ = where(gm)
    one.args = (*one.args[:2], other.args[2])


@pytest.mark.parametrize("plan", [READS, BOTH], ids=["reads", "both"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (what_is_given, r"blocks\.1\.attn1: to read lists that were kept, but its attention does not"),
        (of_the_other_site, r"blocks\.1\.attn1: to read lists that were kept"),
        (by_other_heads, r"blocks\.1\.attn1: to read lists that were kept"),
        (the_other_way_round, r"blocks\.1\.attn1: to read lists that were kept"),
        (past_the_slot, r"blocks\.1\.attn1: to be .*, but its attention reads indices_blocks_2_attn1, counts_blocks_1"),
    ],
)
def test_an_audit_refuses_lists_that_are_not_the_slots(
    cache: VariantCache, plan: StepPlan, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    check_refused(cache, plan, spoil, message)


def test_an_audit_refuses_slots_that_no_plan_asked_for(cache: VariantCache) -> None:
    with pytest.raises(
        AuditError, match=r"blocks\.1\.attn1: to be .*reads=\(\).*, but its attention reads aten\.where"
    ):
        audit(cache.graph(READS), StepPlan(sparse=SPARSE), cache.index, {})
    without = StepPlan(sparse=tuple(replace(each, keeps=()) for each in FINDS.sparse))
    with pytest.raises(AuditError, match=r"hands on 4 values that the plan does not keep"):
        audit(cache.graph(FINDS), without, cache.index, {})


def test_work_is_counted_by_what_lists_have_room_for(cache: VariantCache) -> None:
    gm = cache.graph(READS)
    lists = given({site: torch.eye(2, KEY_BLOCKS, dtype=torch.bool).expand(1, 2, -1, -1) for site in SITES})
    lists |= {room_name(site): torch.tensor([4, 0], dtype=torch.int32) for site in SITES}
    stand_in = stand_ins(gm, lists)
    assert stand_in.keys() == {name for site in SITES for name in kept_names(LISTS, site)}
    indices, counts = (stand_in[name] for name in kept_names(LISTS, SITES[0]))
    assert indices.shape == (1, 2, 2, KEY_BLOCKS) and indices[0, 0, 0].tolist() == [*range(KEY_BLOCKS)]
    assert counts.tolist() == [[[4, 4], [0, 0]]]
    dense = counted_work(cache.graph(StepPlan()))["attention"]["flops"]
    every = counted_work(gm)["attention"]["flops"]
    assert every == dense, "unknown lists count as all blocks"
    of_site = 4 * 2 * 128 * 128 * 16
    assert counted_work(gm, lists)["attention"]["flops"] == dense - 2 * of_site * (1 - (4 + 1) / 16)
