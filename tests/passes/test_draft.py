"""Blocks that a graph finds for itself: attention reads lists made of its own queries and keys."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ditopt.errors import AuditError
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, DRAFT_LISTS
from ditopt.kernels.patterns.draft import SELECTORS
from ditopt.passes._infra import PassManager, SparseAttention, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.sparse import draft_inputs, draft_names, list_names
from ditopt.runtime.variants import PASSES, VariantCache
from tests.kernels.test_draft_lists import literal
from tests.passes.test_sparse import (
    KEY_BLOCK,
    KEY_BLOCKS,
    QUERY_BLOCK,
    SITES,
    SPARSE,
    Attends,
    cache,
    inputs_of,
    maps,
    wan,
)
from tests.trace.models import Captured, capture, interpreted

__all__ = ["cache", "wan"]  # fixtures

DRAFTS = tuple(replace(each, draft=True) for each in SPARSE)


def inputs(keep: list[int], mass: list[float] | None = None) -> dict[str, Tensor]:
    found = inputs_of(maps())
    for site in SITES:
        given = (torch.tensor(keep, dtype=torch.int32), torch.tensor(mass or [math.inf] * 2))
        found |= dict(zip(draft_names(site), given, strict=True))
    return found


def test_heads_that_find_nothing_attend_to_what_is_given(wan: Captured) -> None:
    (found,), _ = wan.run(StepPlan(sparse=DRAFTS), inputs([0, 0]))
    (given,), _ = wan.run(StepPlan(sparse=SPARSE), inputs_of(maps()))
    torch.testing.assert_close(found, given, rtol=1e-6, atol=1e-6)


def test_heads_that_find_everything_are_dense(wan: Captured) -> None:
    (found,), _ = wan.run(StepPlan(sparse=DRAFTS), inputs([KEY_BLOCKS] * 2))
    torch.testing.assert_close(found, wan.eager[0], rtol=1e-4, atol=1e-5)
    (some,), _ = wan.run(StepPlan(sparse=DRAFTS), inputs([KEY_BLOCKS] * 2, [0.5, math.inf]))
    assert (some - wan.eager[0]).abs().max() > 1e-3


@pytest.mark.parametrize("plan", [StepPlan(sparse=DRAFTS), StepPlan(sparse=DRAFTS, dtype="bfloat16", simplify=True)])
def test_one_operator_for_each_site_and_two_inputs_more(cache: VariantCache, plan: StepPlan) -> None:
    gm = cache.graph(plan)
    dtypes = [node.args[0].meta["val"].dtype for node in drafts(gm)]  # type: ignore[union-attr]  # a node
    assert dtypes == [torch.bfloat16 if plan.dtype else torch.float32] * 2, "as attention reads them"
    added = [name for name in gm.meta["ditopt_inputs"] if isinstance(name, str)]
    assert sorted(added) == sorted(name for site in SITES for name in (*list_names(site), *draft_names(site)))


@pytest.fixture(params=[None, "bfloat16"])
def rewritten(cache: VariantCache, request: pytest.FixtureRequest) -> tuple[fx.GraphModule, Callable[[], None]]:
    """A graph of two sites with drafts, and its audit."""
    plan = StepPlan(sparse=DRAFTS, dtype=request.param)
    gm = PassManager(PASSES).run(cache.trace.gm, plan, cache.index)
    audit(gm, plan, cache.index, {})
    return gm, lambda: audit(gm, plan, cache.index, {})


def attention(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is BLOCK_SPARSE_ATTENTION]


def drafts(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is DRAFT_LISTS]


def without_operator(gm: fx.GraphModule) -> None:
    first = attention(gm)[0]
    first.args = (*first.args[:3], *drafts(gm)[0].args[2:4], *first.args[5:])


def of_the_other_site(gm: fx.GraphModule) -> None:
    """Of an earlier one, so that the graph stays one."""
    first, second = attention(gm)
    second.args = (*second.args[:3], *first.args[3:5], *second.args[5:])


def other_limits(gm: fx.GraphModule) -> None:
    one, other = drafts(gm)
    one.args = (*one.args[:4], *other.args[4:6], *one.args[6:])


def other_keys(gm: fx.GraphModule) -> None:
    one = drafts(gm)[0]
    one.args = (one.args[0], one.args[0], *one.args[2:])


def other_scale(gm: fx.GraphModule) -> None:
    one = drafts(gm)[0]
    one.args = (*one.args[:8], 3.0)


def half_of_it(gm: fx.GraphModule) -> None:
    """The operator's lists with the counts of the inputs."""
    first = attention(gm)[0]
    first.args = (*first.args[:4], drafts(gm)[0].args[3], *first.args[5:])


def turned_round(gm: fx.GraphModule) -> None:
    first = attention(gm)[0]
    for place, node in enumerate(first.args[3:5]):
        assert isinstance(node, fx.Node) and node.target is operator.getitem
        node.args = (node.args[0], 1 - place)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_operator, r"blocks\.1\.attn1: to be .*draft=True.*, but its attention reads indices_blocks_1_attn1"),
        (half_of_it, r"blocks\.1\.attn1: to be .*, but its attention reads .*getitem.*, counts_blocks_1_attn1"),
        (turned_round, r"blocks\.1\.attn1: to be .*, but its attention reads .*getitem"),
        (of_the_other_site, r"blocks\.2\.attn1: finds its blocks by other queries, keys, values, sizes"),
        (other_keys, r"blocks\.1\.attn1: finds its blocks by other queries, keys"),
        (other_scale, r"blocks\.1\.attn1: finds its blocks by other queries, keys, values, sizes"),
        (other_limits, r"blocks\.1\.attn1: to be .*reads indices_blocks_1_attn1, counts_blocks_1_attn1, keep_blocks_2"),
    ],
)  # fmt: skip
def test_an_audit_refuses_lists_that_are_not_the_operators(
    rewritten: tuple[fx.GraphModule, Callable[[], Any]], spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    gm, check = rewritten
    spoil(gm)
    with pytest.raises(AuditError, match=message):
        check()


def test_an_audit_refuses_drafts_that_no_plan_asked_for(cache: VariantCache) -> None:
    gm = cache.graph(StepPlan(sparse=DRAFTS))
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: to be .*draft=False.*, but its attention reads .*getitem"):
        audit(gm, StepPlan(sparse=SPARSE), cache.index, {})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_audit_refuses_other_selectors_or_values(cache: VariantCache, dtype: str | None) -> None:
    plan = StepPlan(sparse=tuple(replace(each, by=("means", "error")) for each in DRAFTS), dtype=dtype)

    def rewrite() -> tuple[fx.GraphModule, fx.Node]:
        gm = PassManager(PASSES).run(cache.trace.gm, plan, cache.index)
        audit(gm, plan, cache.index, {})
        return gm, drafts(gm)[0]

    gm, maker = rewrite()
    assert maker.args[9] is attention(gm)[0].args[2] and maker.args[11] == "means,error"
    maker.args = (*maker.args[:11], "means,mass")
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: to be .*, but its blocks are chosen by means,mass"):
        audit(gm, plan, cache.index, {})
    gm, maker = rewrite()
    maker.args = (*maker.args[:9], maker.args[1], *maker.args[10:])
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: finds its blocks by other queries, keys, values"):
        audit(gm, plan, cache.index, {})
    gm, maker = rewrite()
    maker.args = (*maker.args[:10], drafts(gm)[1].args[10], *maker.args[11:])
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: to be .*mass_blocks_1_attn1, by_blocks_2_attn1"):
        audit(gm, plan, cache.index, {})
    alone = StepPlan(sparse=DRAFTS, dtype=dtype)
    with pytest.raises(AuditError, match=r"blocks\.1\.attn1: finds its blocks by other queries, keys, values"):
        audit(rewrite()[0], alone, cache.index, {})


def test_sizes_are_those_of_the_site(cache: VariantCache) -> None:
    for node in drafts(cache.graph(StepPlan(sparse=DRAFTS))):
        assert node.args[6:8] == (QUERY_BLOCK, KEY_BLOCK)
        indices, counts = node.meta["val"]
        assert indices.shape == (1, 2, 2, KEY_BLOCKS) and counts.shape == (1, 2, 2)


class Grouped(nn.Module):
    """One block, whose four heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.blocks[0].forward = lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, 2:], enable_gqa=True)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.blocks[0](hidden_states + timestep),)


BY = (None, ("error", "means", "mass", "error"), ("mass",) * 4)


@pytest.mark.parametrize("by", BY)
def test_grouped_heads_and_samples_find_blocks_of_their_own(by: tuple[str, ...] | None) -> None:
    """The last block of keys is short."""
    x, scale = 1.5 * torch.randn(2, 4, 120, 8, generator=torch.Generator().manual_seed(0)), 8**-0.5
    with interpreted():
        found = capture(Grouped().eval(), {"hidden_states": x, "timestep": torch.zeros(1)})
        always = torch.rand((1, 4, 2, 8), generator=torch.Generator().manual_seed(1)) < 0.2
        lists = BlockLists.from_map(always, 64, 16, 8)
        keep, mass = [3, 0, 8, 5], [math.inf, math.inf, 0.6, math.inf]
        given = (lists.indices, lists.counts, torch.tensor(keep, dtype=torch.int32), torch.tensor(mass))
        named = tuple(each for each in SELECTORS if by is None or each in by)[: None if by else 1]
        wanted = SparseAttention("blocks.0", 64, 16, 8, draft=True, by=named)
        codes = [SELECTORS.index(each) for each in by or ("means",) * 4]
        inputs = (*given, torch.tensor(codes, dtype=torch.int32))
        names = (*list_names("blocks.0"), *draft_inputs(wanted))
        (out,), _ = found.run(StepPlan(sparse=(wanted,)), dict(zip(names, inputs, strict=False)))
    torch._dynamo.reset()
    kept = torch.tensor(literal(x, x[:, :2], always, (64, 16), keep, mass, scale, x[:, 2:], by)).view(2, 4, 2, 8)
    assert not torch.equal(kept[0], kept[1])
    mask = kept.repeat_interleave(64, -2).repeat_interleave(16, -1)[..., :120, :120]
    keys, values = (part.repeat_interleave(2, 1) for part in (x[:, :2], x[:, 2:]))
    scores = (scale * x @ keys.transpose(-2, -1)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1).nan_to_num(0.0) @ values, rtol=1e-4, atol=1e-5)


def test_causal_masks_are_refused_as_under_static_patterns() -> None:
    inputs = {"hidden_states": torch.randn(1, 2, 128, 8), "timestep": torch.ones(1)}
    with interpreted():
        found = capture(Attends(is_causal=True).eval(), inputs)
    plan = StepPlan(sparse=(SparseAttention("blocks.0", 64, 16, 8, draft=True),))
    with pytest.raises(AuditError, match=r"blocks\.0: sparse by the plan, but its .*; there is a causal mask"):
        found.program.variants.graph(plan)
    torch._dynamo.reset()
