"""Seconds of attention by itself: what is timed, in which forms, and what a step's share of it makes worth a look."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import fx

from ditopt._torch import has_byte_dot_products
from ditopt.cost_models.sparse import INT8, TIMED
from ditopt.kernels.block_sparse_attention.lists import check, check_entries
from ditopt.kernels.ops import ATTENTION
from ditopt.measures import Table
from ditopt.profile import NetworkProfile
from ditopt.profiler.attention_timing import (
    DENSITIES,
    _seconds,
    _table,
    attention_latency,
    even_lists,
    listed,
    uneven_budgets,
)
from ditopt.profiler.take import attention_share
from ditopt.profiler.timing import Timed
from ditopt.sites import AttentionSite
from ditopt.trace import Trace
from tests.search.test_sparse import with_attention
from tests.search.toy import Toy
from tests.tiny import compiled_tiny, euler, make_model

needs_bytes = pytest.mark.skipif(not has_byte_dot_products(), reason="no dot products of bytes (avx512_vnni)")


@pytest.fixture(scope="module")
def trace() -> Trace:
    with compiled_tiny(make_model(blocks=2), lambda model: euler(model, "one", 0, steps=1)) as (_, program):
        return program.variants.trace


def in_order(variants: Mapping[str, Timed]) -> dict[str, float]:
    """One second for the first, two for the second, and so on; each is run."""
    assert all(run() > 0 for run in variants.values())
    return {name: float(place) for place, name in enumerate(variants, 1)}


@needs_bytes
def test_sites_of_equal_shapes_are_timed_once_in_every_form(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def counted(variants: Mapping[str, Timed]) -> dict[str, float]:
        rounds.append(list(variants))
        return in_order(variants)

    monkeypatch.setattr("ditopt.profiler.attention_timing.time_in_turn", counted)
    tables, reasons = attention_latency(trace, ("full", "bfloat16", "predicted", "blocks.0..1"), 2.0)
    assert not reasons
    assert len(tables) == 2 and len(rounds) == 2, "two blocks, two forms"
    for table in tables.values():
        assert table.labels == {"form": ("full", "bfloat16"), "density": DENSITIES, "need": TIMED}
        assert table["dense"].values.tolist() == [2.0, 2.0], "two calls a step"
        assert table["sparse"].values.tolist() == [[4.0, 6.0, 8.0, 10.0]] * 2
        assert table["shared"].values.tolist() == [[12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 28.0, 24.0, 26.0]] * 2
        assert table["int8"].values.tolist() == [[30.0, 32.0, 34.0, 36.0]] * 2
        assert table.facts == {"queries": 64, "block_queries": 64, "profiled": 4}


def test_without_a_kernel_int8_scores_are_not_timed(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.has_byte_dot_products", lambda: False)
    monkeypatch.setattr("ditopt.profiler.attention_timing.time_in_turn", in_order)
    tables, reasons = attention_latency(trace, ("full",), 1.0)
    assert reasons == []
    for table in tables.values():
        assert np.isnan(table["int8"].values).all() and np.isnan(table["shared"].values[0, TIMED.index(INT8)])
        assert table["shared"].values[0, :6].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]


def test_a_form_without_a_kernel_is_told(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*given: object, **named: object) -> str:
        return "there is no kernel for it"

    monkeypatch.setattr("ditopt.profiler.attention_timing.block_sparse_refusal", refusal)
    tables, reasons = attention_latency(trace, ("full",), 1.0)
    assert not tables
    assert len(reasons) == 1 and reasons[0].endswith("steps was not timed: there is no kernel for it")


@pytest.mark.parametrize(("queries", "keys"), [(1024, 1024), (1000, 1000), (300, 77), (20, 20)])
@pytest.mark.parametrize("share", DENSITIES)
def test_lists_are_of_the_share_that_is_timed(queries: int, keys: int, share: float) -> None:
    lists = even_lists(3, queries, keys, share)
    assert check(lists, 1, 3, queries) is None and check_entries(lists, keys) is None
    columns = -(-keys // lists.key_block)
    assert torch.equal(lists.counts, torch.full_like(lists.counts, max(1, round(share * columns))))


@pytest.mark.parametrize(
    ("heads", "tokens", "share"), [(8, 4096, 0.25), (24, 4704, 0.25), (4, 1024, 0.5), (3, 1000, 0.5)]
)
def test_one_head_is_dense_beside_others_of_the_rest(heads: int, tokens: int, share: float) -> None:
    budgets = uneven_budgets(heads, tokens, tokens)
    assert budgets is not None and len(budgets) == heads
    lists = listed(budgets, tokens, tokens)
    assert check(lists, 1, heads, tokens) is None and check_entries(lists, tokens) is None
    columns = -(-tokens // lists.key_block)
    assert lists.counts[0, 0].tolist() == [columns] * lists.counts.shape[-1] and len(set(budgets[1:])) == 1
    assert float(lists.counts.double().mean()) / columns == pytest.approx(share, abs=0.5 / columns)


@pytest.mark.parametrize(("heads", "tokens"), [(2, 4096), (1, 4096), (8, 8)])
def test_few_heads_or_blocks_cannot_be_unlike(heads: int, tokens: int) -> None:
    assert uneven_budgets(heads, tokens, tokens) is None


def test_budgets_that_are_not_alike_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.profiler.attention_timing.time_in_turn", in_order)
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in "qkv"]
    for each in operands:
        each.meta["val"] = torch.zeros(1, 4, 256, 16)
    seconds = _seconds(graph.call_function(ATTENTION, (*operands,)), None, False)
    assert seconds["uneven"] == 6.0, "behind dense and four densities"
    table = _table({"full": seconds}, 2.0, AttentionSite("attn", 0, 4, 256, 256, 16, False))
    assert table["uneven"].values.tolist() == [12.0] and table["budget"].values.tolist() == [1.0, *[5 / 16] * 3]


def test_where_attention_is_little_of_a_step_it_is_not_worth_a_look() -> None:
    def share_of(dense: float) -> tuple[float, str]:
        part: NetworkProfile = with_attention(Toy(steps=8).profile(), dense)
        part.seconds.clear()
        part.seconds.update({"full": 10.0, "predicted": 0.1})
        return attention_share(part)

    large, _ = share_of(5.0)
    assert large == pytest.approx((5.0 - 5.0 * (0.05 + 1.25 * 0.25)) / 10)
    small, told = share_of(0.5)
    assert small == pytest.approx(large / 10) and "save 3% of a full step, less than 10%" in told
    part = with_attention(Toy(steps=8).profile())
    slow = Table(
        {**part.tables["latency"]["attn"].measures, "dense": part.tables["latency"]["attn"]["dense"]},
        part.tables["latency"]["attn"].labels,
        part.tables["latency"]["attn"].facts,
    )
    slow["dense"].values[:] = 0.01
    part.tables["latency"]["attn"] = slow
    assert np.isclose(attention_share(part)[0], 0.0)
    assert attention_share(part)[1] == "no self-attention takes less time block-sparse here"
