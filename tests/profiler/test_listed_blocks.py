"""Errors of heads whose blocks earlier prompts chose: against masks that are written out, from full maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.head_tensors import BlockMaps
from ditopt.kernels.patterns.candidates import block_for
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import Listed
from ditopt.measures import Table, joined
from ditopt.profile import NetworkProfile
from ditopt.profiled_tensors import profiled_tensors
from ditopt.profiler import listed_blocks
from ditopt.profiler.listed_blocks import PERIODS, lists_of, period_starts
from ditopt.profiler.pattern_errors import PatternCollector
from ditopt.profiler.rows import pool_size
from tests.kernels.test_listed import literal
from tests.profiler.attention_rig import SITE, full_scores, operands, planted, run, steps, trace_of
from tests.profiler.test_draft_blocks import expanded
from tests.profiler.test_pattern_errors import attend, heads_weight, norm, of_video, total
from tests.profiler.test_rest_errors import with_means

LINE = Geometry(2, 3, 7)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)  # the second block holds text and video
STEPS = 4


def prompt(
    geometry: Geometry, heads: tuple[int, int], seed: int, before: list[Table], linear: bool = False
) -> tuple[Table, list[Tensor]]:
    """The table of a prompt's generation behind earlier ones, and its operands by step."""
    inputs = [operands(geometry.tokens, heads, sharp=1.5, seed=10 * seed + step) for step in range(STEPS)]
    settings = {"enable_gqa": True} if heads[0] != heads[1] else {}
    captured, calls = planted(inputs[0], None, heads, **settings), steps(STEPS)
    collector = PatternCollector(
        trace_of(captured), calls, geometry, before={SITE: before} if before else None, linear=linear
    )
    run(captured, calls, [collector], *inputs)
    return collector.tables()[SITE], inputs


def attention_sums(inputs: list[Tensor], heads: tuple[int, int], block: int, order: Tensor) -> np.ndarray:
    """``[H, Qb, Kb]``: block sums of the true maps of some calls, each block of queries by the mean of its rows."""
    found = []
    for x in inputs:
        maps = full_scores(x[:, :, order], heads, None).softmax(-1)
        columns = torch.stack([part.sum(-1) for part in maps.split(block, -1)], -1)
        found.append(torch.stack([part.mean(1) for part in columns.split(block, 1)], 1))
    return np.asarray(torch.stack(found).sum(0))


def listed(table: Table) -> dict[str, int]:
    names = {str(name): at for at, name in enumerate(table.labels["candidate"])}
    return {name: at for name, at in names.items() if BlockMaps.text_of(name) and "qk" not in json.loads(name)}


@pytest.mark.parametrize(("geometry", "heads"), [(LINE, (2, 2)), (BEFORE, (4, 2))])
def test_a_prompt_is_measured_by_lists_that_others_chose(geometry: Geometry, heads: tuple[int, int]) -> None:
    """Of every head and period, in raster order and in tiles, with a rest and without."""
    first, chose = prompt(geometry, heads, 0, [])
    table, inputs = prompt(geometry, heads, 1, [first])
    captured = planted(inputs[0], None, heads, **({"enable_gqa": True} if heads[0] != heads[1] else {}))
    weight, video, block = heads_weight(captured, heads[0]), of_video(geometry), block_for(geometry.tokens)
    periods = [0, 0, 1, 2]
    assert table.labels["period"] == (0, 2, 3) and len(set(periods)) == PERIODS
    names = listed(table)
    assert len(names) >= 8 and {"rest" in name for name in names} == {True, False} == {"order" in n for n in names}
    for name, at in names.items():
        assert np.isnan(first["error"].values[..., at]).all(), "nobody had a say before the first prompt"
        choice = SparseChoice.from_data(json.loads(name))
        assert isinstance(choice.pattern, Listed)
        order = torch.arange(geometry.tokens)
        if choice.order is not None:
            order = torch.from_numpy(choice.order.of_sequence(geometry, block))
        place = order.argsort()
        always = lists_of(geometry, block, choice.order).always
        for step, x in enumerate(inputs):
            of_period = [each for at_step, each in enumerate(chose) if periods[at_step] == periods[step]]
            sums = attention_sums(of_period, heads, block, order)
            kept = torch.tensor([literal(choice.pattern, head, always) for head in sums])
            dense = attend(x, heads)
            if choice.rest is None:
                tokens = expanded(kept, block, geometry.tokens)[:, place][..., place]
                found = torch.stack([attend(x, heads, tokens[head])[head] for head in range(heads[0])])
            else:
                found = with_means(x[:, :, order], heads, kept, block, pool_size(block), False)[:, place]
            expected = norm((found - dense)[:, video], weight) / total(dense[:, video], weight)
            np.testing.assert_allclose(table["error"].values[0, step, 0, :, at], expected, atol=2e-5, err_msg=name)


def network_of(table: Table, geometry: Geometry) -> NetworkProfile:
    each = tuple(float(step) for step in range(STEPS))
    return NetworkProfile(each, each, each, each, (1.0,), {}, tables={"patterns": {SITE: table}}, geometry=geometry)


def test_the_plan_has_what_all_prompts_choose() -> None:
    heads = (2, 2)
    tables: list[Table] = []
    inputs: list[Tensor] = []
    for seed in range(3):
        table, of_prompt = prompt(LINE, heads, seed, tables)
        tables.append(table)
        inputs += of_prompt
    whole = joined(tables)
    found = profiled_tensors("net", network_of(whole, LINE))
    names = dict.fromkeys(BlockMaps.text_of(name) for name in listed(whole))
    assert [each.pattern for each in found.maps] == list(names)
    for maps in found.maps:
        assert (maps.network, maps.site, maps.heads, maps.starts) == ("net", SITE, (0, 1), (0, 2, 3))
        assert maps.geometry == LINE and maps.block == 4 and maps.complaint() is None
        choice = SparseChoice.from_data(json.loads(maps.pattern))
        assert isinstance(choice.pattern, Listed)
        order = torch.arange(LINE.tokens)
        if choice.order is not None:
            order = torch.from_numpy(choice.order.of_sequence(LINE, 4))
        always = lists_of(LINE, 4, choice.order).always
        sums = attention_sums([x for at, x in enumerate(inputs) if at % STEPS == 3], heads, 4, order)
        for head in range(2):
            # sums are kept in 16 bits, so of two that are nearly equal either may be taken
            apart = maps.kept(head, 3) != np.array(literal(choice.pattern, sums[head], always))
            assert apart.mean() < 0.02, maps.pattern
        shares = np.mean([maps.kept(head, step).mean() for head in range(2) for step in (0, 2, 3)])
        density = tables[-1]["density"].values[listed(whole)[maps.pattern]]
        assert density == pytest.approx(shares, abs=0.02), "that of the last prompt's table is of all prompts"
    without = network_of(Table({key: each for key, each in whole.measures.items() if "mass" not in key}, whole.labels,
                               whole.facts), LINE)  # fmt: skip
    assert not profiled_tensors("net", without), "profiles of before have no sums"
    assert not profiled_tensors("net", network_of(whole, Geometry(2, 3, 8))), "they are of other tokens"


def test_sums_that_would_be_too_large_have_fewer_periods_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert period_starts(8, 3) == (0, 3, 6) and period_starts(2, 3) == (0, 1)
    x = operands(LINE.tokens)
    captured, calls = planted(x), steps(STEPS)
    one = 2 * 2 * 11 * 11 * 2  # two heads, two orders, 16 bits
    for most, starts in ((3 * one, (0, 2, 3)), (3 * one - 1, (0, 2)), (one, (0,))):
        monkeypatch.setattr(listed_blocks, "MOST_BYTES", most)
        assert PatternCollector(trace_of(captured), calls, LINE).tables()[SITE].labels["period"] == starts
    monkeypatch.setattr(listed_blocks, "MOST_BYTES", one - 1)
    collector = PatternCollector(trace_of(captured), calls, LINE)
    run(captured, calls, [collector], x)
    table = collector.tables()[SITE]
    assert not listed(table) and "mass" not in table.measures
    assert [*collector.reasons] == [
        "sums of attention by blocks would be too large: lists chosen from them are not tried"
    ]


def test_names_are_those_of_decisions_and_distinct() -> None:
    names = lists_of(Geometry(4, 16, 16), 64).names
    settings = ({"keep": 0.5}, {"keep": 0.25}, {"keep": 0.125}, {"mass": 0.9}, {"columns": 0.125})
    assert names == tuple(pattern_text({"pattern": "listed", **each}) for each in settings)
    assert lists_of(Geometry(1, 1, 8), 4).names == tuple(names[at] for at in (0, 3, 4))
    assert not lists_of(Geometry(1, 1, 4), 4).names
