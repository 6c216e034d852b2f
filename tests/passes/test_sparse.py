"""Attention by lists in a graph: the numbers of attention under masks of blocks; what is refused, what audits catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ditopt.errors import AuditError
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.pooled import FIRST_ORDER, pool_tokens
from ditopt.kernels.ops import ATTENTION, BLOCK_SPARSE_ATTENTION
from ditopt.passes._infra import SITE, PassManager, Prediction, SparseAttention, StepPlan, find
from ditopt.passes.audit import audit
from ditopt.passes.cast import castable
from ditopt.passes.prune import prune
from ditopt.passes.sparse import list_names, pooled_tokens, rest_name, sparse_refusal
from ditopt.profiler.head_edits import BlockMask, under_blocks
from ditopt.profiler.interpret import Watched
from ditopt.profiler.work import counted_work
from ditopt.runtime.variants import PASSES, VariantCache
from ditopt.sites import AttentionSite
from tests.literal_rest import under_blocks_and_means
from tests.tiny import tiny_wan
from tests.trace.models import Captured, capture, interpreted

QUERY_BLOCK, KEY_BLOCK, KEY_BLOCKS = 64, 16, 8
SITES = ("blocks.1.attn1", "blocks.2.attn1")
SPARSE = tuple(SparseAttention(site, QUERY_BLOCK, KEY_BLOCK, KEY_BLOCKS) for site in SITES)


@pytest.fixture(scope="module")
def wan() -> Iterator[Captured]:
    """128 tokens: two blocks of queries, eight of keys; two heads of 16 channels."""
    pytest.importorskip("diffusers")
    model = tiny_wan(text_dim=12, num_layers=4, attention_head_dim=16, cross_attn_norm=True)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
    }
    with interpreted():
        yield capture(model, inputs)
    torch._dynamo.reset()


@pytest.fixture
def cache(wan: Captured) -> VariantCache:
    return wan.program.variants


def maps() -> dict[str, Tensor]:
    """``[1, 2, 2, 8]`` for each site; a block of queries of one head attends to nothing."""
    drawing = torch.Generator().manual_seed(3)
    found = {site: torch.rand((1, 2, 2, KEY_BLOCKS), generator=drawing) < 0.5 for site in SITES}
    found[SITES[0]][0, 1, 0] = False
    return found


def inputs_of(attended: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site, kept in attended.items():
        lists = BlockLists.from_map(kept, QUERY_BLOCK, KEY_BLOCK, KEY_BLOCKS)
        found |= dict(zip(list_names(site), (lists.indices, lists.counts), strict=True))
    return found


def emulated(captured: Captured, attended: dict[str, Tensor]) -> Tensor:
    """The captured graph, node by node, with heads under masks."""
    trace = captured.program.variants.trace
    edits = {
        trace.site_nodes[site]: under_blocks(
            {head: BlockMask(np.asarray(each), QUERY_BLOCK, KEY_BLOCK) for head, each in enumerate(kept[0].numpy())}
        )
        for site, kept in attended.items()
    }
    with torch.no_grad():
        (found,) = Watched(trace, edits=edits).run(*captured.arguments)
    assert isinstance(found, Tensor)
    return found


def test_listed_blocks_give_attention_under_their_mask(wan: Captured) -> None:
    attended = maps()
    (found,), _ = wan.run(StepPlan(sparse=SPARSE), inputs_of(attended))
    expected = emulated(wan, attended)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - wan.eager[0]).abs().max() > 1e-3, "the blocks left out matter"


def test_all_blocks_give_the_dense_output(wan: Captured) -> None:
    (found,), _ = wan.run(StepPlan(sparse=SPARSE), inputs_of({site: torch.ones(1, 2, 2, 8) > 0 for site in SITES}))
    torch.testing.assert_close(found, wan.eager[0], rtol=1e-4, atol=1e-5)


def test_other_sites_stay_and_only_lists_come_in(cache: VariantCache) -> None:
    gm = cache.graph(StepPlan(sparse=SPARSE))
    attention = {
        node.meta[SITE]: node.target for node in gm.graph.nodes if node.target in (ATTENTION, BLOCK_SPARSE_ATTENTION)
    }
    sites = [site.name for site in cache.trace.sites if isinstance(site, AttentionSite)]
    assert attention == {site: BLOCK_SPARSE_ATTENTION if site in SITES else ATTENTION for site in sites}
    added = [name for name in gm.meta["ditopt_inputs"] if isinstance(name, str)]
    assert sorted(added) == sorted(name for site in SITES for name in list_names(site))


def test_it_is_cast_and_simplified_with_the_rest(wan: Captured) -> None:
    attended = maps()
    plan = StepPlan(sparse=SPARSE, dtype="bfloat16", simplify=True)
    gm = wan.program.variants.graph(plan)
    calls = [node for node in gm.graph.nodes if node.target is BLOCK_SPARSE_ATTENTION]
    assert [each.args[0].meta["val"].dtype for each in calls] == [torch.bfloat16] * 2
    assert [each.meta["val"][0].dtype for each in calls] == [torch.bfloat16] * 2
    assert not castable(gm)
    (found,), _ = wan.run(plan, inputs_of(attended))
    expected = emulated(wan, attended)
    error = (found - expected).norm() / expected.norm()
    assert 1e-5 < error < 2e-2, "rounded to bfloat16, and nothing worse"
    assert error < (wan.eager[0] - expected).norm() / expected.norm() / 2


POOLED = (replace(SPARSE[0], pool=8), SPARSE[1])
HEADS = {rest_name(SITES[0]): torch.tensor([0, 1], dtype=torch.int32)}


def test_a_head_with_a_rest_attends_to_the_means_of_what_is_not_listed(wan: Captured) -> None:
    """The head that has one attends to nothing else in a block of queries."""
    attended = maps()
    (found,), _ = wan.run(StepPlan(sparse=POOLED), {**inputs_of(attended), **HEADS})
    trace = wan.program.variants.trace
    pools = {SITES[0]: (0, 8), SITES[1]: (0, 0)}
    edits = {}
    for site, kept in attended.items():
        masks = (BlockMask(np.asarray(each), QUERY_BLOCK, KEY_BLOCK) for each in kept[0].numpy())
        edits[trace.site_nodes[site]] = under_blocks_and_means(dict(enumerate(zip(masks, pools[site], strict=True))))
    with torch.no_grad():
        (expected,) = Watched(trace, edits=edits).run(*wan.arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lost = emulated(wan, attended)
    assert (found - lost).abs().max() > 1e-3, "the means matter"


def test_work_of_attention_is_what_lists_and_means_take(cache: VariantCache) -> None:
    attended = maps()
    dense = counted_work(cache.graph(StepPlan()))["attention"]["flops"]
    lists = inputs_of(attended)
    one = 4 * 2 * 128 * 128 * 16  # two heads of 128 tokens and 16 channels, products with keys and values
    shares = {site: float(kept.float().mean()) for site, kept in attended.items()}
    found = counted_work(cache.graph(StepPlan(sparse=SPARSE)), lists)["attention"]
    assert found["dtype"] == "float32"
    assert found["flops"] == pytest.approx(dense - one * sum(1 - share for share in shares.values()), rel=1e-4)
    pooled = counted_work(cache.graph(StepPlan(sparse=POOLED)), {**lists, **HEADS})["attention"]["flops"]
    assert pooled - found["flops"] == pytest.approx(one / 2 / 8, rel=1e-3), "one of two heads, a pair for eight tokens"
    to_first_order = {rest_name(SITES[0]): torch.tensor([0, FIRST_ORDER], dtype=torch.int32)}
    same = counted_work(cache.graph(StepPlan(sparse=POOLED)), {**lists, **to_first_order})["attention"]["flops"]
    assert same == pooled, "its means are scored once, too"
    unknown = counted_work(cache.graph(StepPlan(sparse=SPARSE)))["attention"]["flops"]
    assert unknown == dense, "without the lists at hand it counts as dense"


@pytest.mark.parametrize("tokens", [64, 70, 5])
def test_means_in_the_graph_are_those_of_the_kernels(tokens: int) -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    x = torch.randn(2, tokens, 3, 4, dtype=torch.float64).transpose(1, 2)
    node.meta["val"] = x
    output = graph.output(node)
    gm = fx.GraphModule({}, graph)
    with gm.graph.inserting_before(output):
        output.args = (pooled_tokens(gm, node, 16),)
    gm.recompile()
    torch.testing.assert_close(gm(x), pool_tokens(x, 16))


def test_it_goes_with_predicted_blocks(wan: Captured) -> None:
    _, slots = wan.run(StepPlan((), ("blocks.3",)))
    attended = maps()
    plan = StepPlan((Prediction("blocks.3", 1),), ("blocks.1",), sparse=SPARSE)
    factors = {"factors_blocks_3": torch.ones(1)}
    outputs, features = wan.run(plan, {**slots, **factors, **inputs_of(attended)})
    (feature,) = features.values()
    _, alone = wan.run(StepPlan((), ("blocks.1",), sparse=SPARSE), inputs_of(attended))
    torch.testing.assert_close(feature, *alone.values())
    assert not torch.equal(outputs[0], wan.eager[0])


def spoilt(
    cache: VariantCache,
    spoil: Callable[[fx.GraphModule], None],
    sites: tuple[SparseAttention, ...] = SPARSE,
    dtype: str | None = None,
) -> None:
    """Audit a graph of sparse sites after something was done to it."""
    plan = StepPlan(sparse=sites, dtype=dtype)
    manager = PassManager(PASSES)
    gm = manager.run(cache.trace.gm, plan, cache.index)
    audit(gm, plan, cache.index, {})
    spoil(gm)
    audit(gm, plan, cache.index, {}, manager.reasons)


def sparse_calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is BLOCK_SPARSE_ATTENTION]


def swap_lists(gm: fx.GraphModule) -> None:
    one, other = sparse_calls(gm)
    one.args, other.args = (
        (*one.args[:3], *other.args[3:5], *one.args[5:]),
        (*other.args[:3], *one.args[3:5], *other.args[5:]),
    )


def other_blocks(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.args = (*call.args[:5], 128, *call.args[6:])


def dense_beside(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    with gm.graph.inserting_before(call):
        dense = gm.graph.call_function(ATTENTION, call.args[:3])
    dense.meta.update({SITE: call.meta[SITE], "val": call.meta["val"][0]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swap_lists, r"blocks\.1\.attn1: to be .*, but its attention reads indices_blocks_2_attn1, counts_blocks_2"),
        (other_blocks, r"blocks\.1\.attn1: to be SparseAttention.*query_block=64.* in \(128, 16, 8\)"),
        (
            dense_beside,
            r"blocks\.1\.attn1: sparse by the plan, but its attention is ditopt\.attention\.default, ditopt",
        ),
    ],
)
def test_an_audit_refuses_what_is_not_the_plans(
    cache: VariantCache, spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    with pytest.raises(AuditError, match=message):
        spoilt(cache, spoil)


def no_means(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.args = call.args[:8]


def no_pooled_values(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.args = (*call.args[:9], None, *call.args[10:])


def swap_means(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.args = (*call.args[:8], call.args[9], call.args[8], *call.args[10:])


def other_pool(gm: fx.GraphModule) -> None:
    call = sparse_calls(gm)[0]
    call.args = (*call.args[:11], 16)


def means_of_a_neighbour(gm: fx.GraphModule) -> None:
    one, other = sparse_calls(gm)
    other.args = (*other.args[:8], *one.args[8:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_means, r"blocks\.1\.attn1: to be .*pool=8.*\), but its attention reads None in pools of 0"),
        (no_pooled_values, r"blocks\.1\.attn1: to be .*, but its attention has no pooled values"),
        (swap_means, r"blocks\.1\.attn1: to be .*, but its attention has other pooled keys"),
        (other_pool, r"blocks\.1\.attn1: .* reads rest_blocks_1_attn1 in pools of 16"),
        (
            means_of_a_neighbour,
            r"blocks\.2\.attn1: .*pool=0.*\), but its attention reads rest_blocks_1_attn1 in pools of 8",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_audit_refuses_means_that_are_not_the_plans(
    cache: VariantCache, spoil: Callable[[fx.GraphModule], None], message: str, dtype: str | None
) -> None:
    with pytest.raises(AuditError, match=message):
        spoilt(cache, spoil, POOLED, dtype)


def test_an_audit_refuses_dense_graphs_and_sparse_ones_that_no_plan_asked_for(cache: VariantCache) -> None:
    dense = PassManager([prune]).run(cache.trace.gm, StepPlan(), cache.index)
    with pytest.raises(
        AuditError, match=r"blocks\.1\.attn1: sparse by the plan, but its attention is ditopt\.attention"
    ):
        audit(dense, StepPlan(sparse=SPARSE), cache.index, {})
    both = cache.graph(StepPlan(sparse=SPARSE))
    with pytest.raises(AuditError, match=r"blocks\.2\.attn1: sparse in the graph, but not by the plan"):
        audit(both, StepPlan(sparse=SPARSE[:1]), cache.index, {})
    with pytest.raises(
        AuditError, match=r"blocks\.9\.attn1: sparse by the plan, but its attention is not in the graph"
    ):
        cache.graph(StepPlan(sparse=(SparseAttention("blocks.9.attn1", 64, 16, 8),)))


class Attends(nn.Module):
    """One block, whose attention is given ``settings``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.blocks[0].forward = lambda x: F.scaled_dot_product_attention(x, x, x, **settings)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.blocks[0](hidden_states + timestep),)


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"is_causal": True}, torch.float32, "there is a causal mask"),
        ({"scale": -1.0}, torch.float32, "the scale is -1, it has to be above 0"),
        ({}, torch.float64, r"operands are of torch\.float64"),
    ],
)
def test_what_no_kernel_takes_is_an_error_with_the_reason(
    settings: dict[str, Any], dtype: torch.dtype, message: str
) -> None:
    inputs = {"hidden_states": torch.randn(1, 2, 128, 8, dtype=dtype), "timestep": torch.ones(1, dtype=dtype)}
    with interpreted():
        found = capture(Attends(**settings).eval(), inputs)
    cache = found.program.variants
    wanted = SparseAttention("blocks.0", 64, 16, 8)
    told = rf"blocks\.0: sparse by the plan, but its attention is ditopt\.attention\.default; {message}"
    with pytest.raises(AuditError, match=told):
        cache.graph(StepPlan(sparse=(wanted,)))
    assert any(reason.startswith("sparse blocks.0: ") for reason in cache.reasons)
    torch._dynamo.reset()


def test_dropout_and_other_devices_are_refused(cache: VariantCache) -> None:
    node = find(PassManager([]).run(cache.trace.gm, StepPlan(), cache.index), cache.trace.site_nodes[SITES[0]])
    assert sparse_refusal(node, SPARSE[0]) is None
    node.args = (*node.args[:3], None, 0.1)
    assert sparse_refusal(node, SPARSE[0]) == "dropout is 0.1"
    node.args = node.args[:3]
    for operand in node.all_input_nodes:
        operand.meta["val"] = torch.empty(operand.meta["val"].shape, device="meta")
    assert sparse_refusal(node, SPARSE[0]) == "there is no kernel for meta"


def test_blocks_that_no_kernel_takes_are_an_error(cache: VariantCache) -> None:
    with pytest.raises(AuditError, match="blocks of 32 queries and 16 keys: multiples of 64 and of 2 are taken"):
        cache.graph(StepPlan(sparse=(SparseAttention(SITES[0], 32, 16, 8),)))
    with pytest.raises(AuditError, match="a pool of 32 tokens does not divide blocks of 16 keys"):
        cache.graph(StepPlan(sparse=(replace(SPARSE[0], pool=32),)))


def test_captured_attention_knows_its_site(cache: VariantCache) -> None:
    for site, name in cache.trace.site_nodes.items():
        node = find(cache.trace.gm, name)
        assert node.meta.get(SITE) == (site if node.target is ATTENTION else None)
