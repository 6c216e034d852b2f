"""Errors of candidates whose blocks are of tokens in another order: against masks and means of tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt._torch import has_byte_dot_products
from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import block_for, candidates
from ditopt.kernels.patterns.choice import Linear, SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.listed import Listed
from ditopt.kernels.patterns.orders import ORDERS, TokenOrder, compact_order, spread
from ditopt.measures import Table
from ditopt.profiler.attention import AttentionCollector
from ditopt.profiler.pattern_errors import PatternCollector
from ditopt.profiler.rows import Reads, SharedRows, pool_size
from ditopt.profiler.sample import sample_rows
from ditopt.search.heads import SKIP
from tests.profiler.attention_rig import SITE, operands, planted, run, steps, trace_of
from tests.profiler.test_draft_blocks import kept
from tests.profiler.test_pattern_errors import attend, heads_weight, measured, norm, of_video, total
from tests.profiler.test_rest_errors import with_means

SMALL = Geometry(2, 3, 7)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)  # the second block holds text and video
LARGER = Geometry(3, 8, 7)  # blocks of 16, the last one short


def in_orders(table: Table) -> dict[str, int]:
    """Where candidates in another order than raster stand in a table, but those with a kept rest or int8 scores."""
    names = [str(name) for name in table.labels["candidate"]]
    return {
        name: at
        for at, name in enumerate(names)
        if "order" in json.loads(name) and not ("kept" in name or "qk" in name)
    }


def attention_to_tokens(x: Tensor, heads: tuple[int, int], attended: Tensor) -> Tensor:
    """``[H, S, 8]`` under masks of tokens ``[H, S, S]``, head by head."""
    each = [attend(x, heads, attended[head])[head] for head in range(heads[0])]
    return torch.stack(each)


@pytest.mark.parametrize(("geometry", "heads"), [(SMALL, (2, 2)), (BEFORE, (4, 2)), (LARGER, (2, 2))])
def test_errors_are_those_of_attention_in_the_order(geometry: Geometry, heads: tuple[int, int]) -> None:
    settings: dict[str, Any] = {"enable_gqa": True} if heads[0] != heads[1] else {}
    x = operands(geometry.tokens, heads, sharp=1.5)
    captured = planted(x, None, heads, **settings)
    table = measured(captured, geometry, x)
    weight, video, block = heads_weight(captured, heads[0]), of_video(geometry), table.facts["block_queries"]
    dense = attend(x, heads)
    whole = total(dense[:, video], weight)
    places = in_orders(table)
    assert len(places) >= 6 and {"rest" in json.loads(name) for name in places} == {False, True}
    for name, at in places.items():
        choice = SparseChoice.from_data(json.loads(name))
        assert choice.order is not None
        if isinstance(choice.pattern, Listed) or isinstance(choice.rest, Linear):
            assert np.isnan(table["error"].values[..., at]).all(), (
                "lists are chosen by earlier prompts, projections fitted to them"
            )
            continue
        order = torch.from_numpy(choice.order.of_sequence(geometry, block))
        place = order.argsort()
        if isinstance(choice.pattern, Draft):
            plain = pattern_text(SparseChoice(choice.pattern).to_data())
            blocks = kept(x[:, :, order], heads, geometry, block, plain)
        else:
            of_video_order = choice.order.of_video(geometry, block)
            one = torch.from_numpy(choice.pattern.block_map(geometry, block, order=of_video_order))
            blocks = one.expand(heads[0], -1, -1)
        if choice.pooled is None:
            found = attention_to_tokens(x, heads, blocks[:, place // block][..., place // block])
        else:
            settled = pool_size(block), choice.pooled.first_order
            found = with_means(x[:, :, order], heads, blocks, block, *settled)[:, place]
        expected = norm((found - dense)[:, video], weight) / whole
        np.testing.assert_allclose(table["error"].values[0, 0, 0, :, at], expected, atol=2e-5, err_msg=name)
        share = float(blocks.float().mean()) + (1 / pool_size(block) if choice.pooled is not None else 0)
        assert table["density"].values[at] == pytest.approx(min(share, 1.0), rel=1e-5), name


@pytest.mark.parametrize("geometry", [SMALL, BEFORE, LARGER, Geometry(6, 28, 28)])
def test_names_are_those_of_decisions_and_nothing_is_told_twice(geometry: Geometry) -> None:
    captured = planted(operands(geometry.tokens))
    table = PatternCollector(trace_of(captured), steps(1), geometry).tables()[SITE]
    names = [str(name) for name in table.labels["candidate"]]
    dense = ['{"pattern": "dense", "qk": "int8"}'] if has_byte_dot_products() else []
    choices = [SparseChoice.from_data(Sparse(pattern=name).settings) for name in names]
    assert [pattern_text(choice.to_data()) for choice in choices] == names and len(set(names)) == len(names)
    block = block_for(geometry.tokens)
    fixed = {choice.order for choice in choices if choice.order is None or not choice.order.is_found}
    assert fixed == {None, compact_order(geometry, block)}
    assert [name for name, choice in zip(names, choices, strict=True) if choice.in_any_order] == [SKIP, *dense]


@pytest.mark.parametrize("geometry", [Geometry(6, 28, 28), Geometry(21, 30, 52), Geometry(1, 32, 32), BEFORE])
def test_candidates_in_an_order_are_distinct_and_sparse(geometry: Geometry) -> None:
    block = block_for(geometry.tokens)
    for order in map(TokenOrder, ORDERS):
        there = order.of_video(geometry, block)
        maps = [pattern.block_map(geometry, block, order=there) for pattern in candidates(geometry, block, order)]
        assert not any(each.all() for each in maps) and len({each.tobytes() for each in maps}) == len(maps)


def test_the_more_compact_order_is_tried_and_none_on_a_line() -> None:
    for geometry in (Geometry(6, 28, 28), Geometry(21, 30, 52), Geometry(13, 30, 45, 226, True), Geometry(1, 64, 64)):
        order = compact_order(geometry, 64)
        assert order is not None
        spreads = [spread(each(geometry, 64), geometry, 64) for each in ORDERS.values()]
        assert spread(order.of_video(geometry, 64), geometry, 64) == min(spreads)
    assert compact_order(Geometry(1, 1, 4096), 64) is None and compact_order(Geometry(2, 1, 4), 64) is None


def test_neighbours_in_space_have_means_that_tell_more_than_neighbours_in_the_sequence() -> None:
    """Values that are smooth in space and time, and attention to all of them alike."""
    geometry = Geometry(4, 16, 16)
    phases = torch.from_numpy(2 * np.pi / 16 * np.stack(np.unravel_index(np.arange(geometry.video), geometry.sizes)).T)
    x = 0.02 * operands(geometry.tokens, sharp=1.0)
    x[..., :6] += 2 * torch.cat([phases.cos(), phases.sin()], 1).float()
    table = measured(planted(x), geometry, x)
    errors = table["error"].values[0, 0, 0].mean(0)
    names = [json.loads(str(name)) for name in table.labels["candidate"]]
    means = {
        "order" in each: errors[at]
        for at, each in enumerate(names)
        if each["pattern"] == "skip" and "pooled" in each.get("rest", {})
    }
    assert means[True] < 0.7 * means[False]


def test_sites_with_masks_are_measured_in_raster_order_only() -> None:
    x = operands(SMALL.tokens)
    mask = torch.ones(1, 1, SMALL.tokens, SMALL.tokens, dtype=torch.bool)
    mask[..., 5:9] = False
    assert not in_orders(measured(planted(x, mask), SMALL))
    assert not in_orders(measured(planted(x, is_causal=True), SMALL))


def test_samples_stand_for_the_tokens_that_count_in_any_order() -> None:
    geometry = Geometry(3, 20, 20, text=5)
    sample = sample_rows(geometry.tokens, 64)
    order = torch.from_numpy(TokenOrder("tiles").of_sequence(geometry, 64))
    for first, last in ((0, geometry.video), (0, 400), (300, 900)):
        weights = sample.weights(first, last, order)
        tokens = order[sample.rows]
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        assert ((weights > 0) == (sample.real & (tokens >= first) & (tokens < last))).all()
        for block, part in enumerate(order.split(64)):
            inside = int(((part >= first) & (part < last)).sum())
            if (weights[block] > 0).any():
                assert float(weights[block].sum()) == pytest.approx(inside / (last - first), rel=0.1)
    raster = torch.arange(geometry.tokens)
    torch.testing.assert_close(sample.weights(100, 700), sample.weights(100, 700, raster))


def test_maps_are_not_read_in_another_order() -> None:
    captured, calls = planted(operands(SMALL.tokens)), steps(1)
    rows = SharedRows(trace_of(captured), SMALL)
    maps = AttentionCollector(trace_of(captured), calls, SMALL, rows=rows)
    patterns = PatternCollector(trace_of(captured), calls, SMALL, rows)
    (place,) = rows.ordered.values()
    assert maps.reads(place) is Reads.NOTHING and patterns.reads(place) is Reads.SUMS
    run(captured, calls, [maps, patterns])
    alone = AttentionCollector(trace_of(captured), calls, SMALL)
    run(captured, calls, [alone])
    for name, measure in alone.tables()[SITE].measures.items():
        np.testing.assert_array_equal(measure.values, maps.tables()[SITE][name].values, err_msg=name)
