"""Errors of patterns, skipping and reuse: against torch's attention with masks and the real projection."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.band import Band
from ditopt.kernels.patterns.candidates import block_for, candidates
from ditopt.kernels.patterns.registry import DYNAMIC, FROM_FILE, pattern_from_data, pattern_to_data
from ditopt.kernels.patterns.whole import Nothing
from ditopt.measures import Table
from ditopt.profiler import pattern_errors
from ditopt.profiler.attention import attention_collectors
from ditopt.profiler.interpret import Collector, Seen
from ditopt.profiler.moments import error_moments
from ditopt.profiler.pattern_errors import PatternCollector, Projection
from ditopt.profiler.places import attentions
from ditopt.profiler.sample import second_moments
from tests.profiler.attention_rig import SITE, model, operands, planted, run, steps, trace_of
from tests.trace.models import Captured

PLAIN = Geometry(2, 3, 4)
BEHIND = Geometry(2, 3, 4, text=8)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)  # the second block holds text and video
ALIGNED = Geometry(3, 3, 4, text=4, text_first=True)


def measured(
    captured: Captured, geometry: Geometry | None, *inputs: Tensor, calls: NetworkCalls | None = None
) -> Table:
    """The table ``patterns`` of the planted site."""
    calls = calls or steps(1)
    collector = PatternCollector(trace_of(captured), calls, geometry)
    run(captured, calls, [collector], *inputs)
    assert all("mask; no pattern is tried with" in reason for reason in collector.reasons)
    return collector.tables()[SITE]


def heads_weight(captured: Captured, heads: int = 2) -> Tensor:
    """``[H, 8, 24]`` float64."""
    weight: Tensor = captured.model.blocks[0].attn.to_out.weight  # type: ignore[index, union-attr]
    return weight.double().T.reshape(heads, 8, -1)


def attend(x: Tensor, heads: tuple[int, int] = (2, 2), mask: Tensor | None = None) -> Tensor:
    """``[H, S, 8]`` float64: torch's attention of the first sample; ``mask`` is boolean, rows without a key give 0."""
    query, key, value = x[:1].double().split((heads[0], heads[1], heads[1]), 1)
    key, value = (part.repeat_interleave(heads[0] // heads[1], 1) for part in (key, value))
    found: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0]
    return found.nan_to_num(0.0)


def static(table: Table) -> list[str]:
    """Candidates in raster order, without a rest or int8, whose blocks do not depend on the call: the first ones."""
    names = [str(name) for name in table.labels["candidate"]]
    beside = [{"rest", "order", "qk"} & json.loads(name).keys() for name in names]
    mapped = [json.loads(name)["pattern"] not in {*DYNAMIC, *FROM_FILE} for name in names]
    found = [name for name, has, known in zip(names, beside, mapped, strict=True) if known and not has]
    assert names[: len(found)] == found
    return found


def expanded(geometry: Geometry, name: str, block: int) -> Tensor:
    """``[S, S]`` boolean: the blocks of a candidate, token by token."""
    blocks = torch.from_numpy(pattern_from_data(json.loads(name)).block_map(geometry, block))
    tokens = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return tokens[: geometry.tokens, : geometry.tokens]


def of_video(geometry: Geometry) -> slice:
    first = geometry.text if geometry.text_first else 0
    return slice(first, first + geometry.video)


def norm(heads: Tensor, weight: Tensor) -> Tensor:
    """Norms ``[H]`` of ``[H, S, 8]`` behind the projection."""
    found: Tensor = torch.linalg.vector_norm(heads @ weight, dim=(1, 2))
    return found


def total(heads: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(torch.einsum("hse,heo->so", heads, weight))
    return found


@pytest.mark.parametrize(
    ("geometry", "heads", "masked", "settings"),
    [
        *((geometry, (2, 2), False, {}) for geometry in (PLAIN, BEHIND, BEFORE, ALIGNED)),
        *((Geometry(*sizes), (2, 2), False, {}) for sizes in ((1, 6, 6), (5, 3, 3))),
        (BEFORE, (4, 2), False, {"enable_gqa": True}),
        (BEFORE, (2, 2), True, {}),
        (BEFORE, (2, 2), False, {"is_causal": True}),
    ],
)
def test_pattern_errors_are_those_of_masked_attention(
    geometry: Geometry, heads: tuple[int, int], masked: bool, settings: dict[str, Any]
) -> None:
    tokens = geometry.tokens
    x = operands(tokens, heads, sharp=1.5)
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    if masked:
        mask[:, 5:11] = False
    captured = planted(x, mask[None, None] if masked else None, heads, **settings)
    table = measured(captured, geometry)
    if settings.get("is_causal"):
        mask = mask.tril()
    weight, video = heads_weight(captured, heads[0]), of_video(geometry)
    dense = attend(x, heads, mask)[:, video]
    whole = total(dense, weight)
    names = static(table)
    assert len(names) > 3 and table.facts["projected"] and table.facts["rows"] == geometry.video
    for number, name in enumerate(names):
        kept = expanded(geometry, str(name), table.facts["block_queries"])
        error = attend(x, heads, mask & kept)[:, video] - dense
        found = table["error"].values[0, 0, 0, :, number]
        np.testing.assert_allclose(found, norm(error, weight) / whole, atol=1e-5, err_msg=str(name))
        density = pattern_from_data(json.loads(str(name))).block_map(geometry, table.facts["block_queries"]).mean()
        assert table["density"].values[number] == pytest.approx(density)
    np.testing.assert_allclose(table["share"].values[0, 0, 0], norm(dense, weight) / whole, atol=1e-5)
    np.testing.assert_allclose(table["output"].values[0, 0, 0], whole / (geometry.video * 24) ** 0.5, rtol=1e-5)
    if not geometry.text:
        np.testing.assert_allclose(table["error"].values[0, 0, 0, :, 0], table["share"].values[0, 0, 0], atol=1e-5)


def test_a_planted_head_is_served_by_its_pattern_only() -> None:
    geometry = Geometry(4, 8, 8)
    where = np.stack(np.unravel_index(np.arange(256), geometry.sizes))
    apart = np.abs(where[:, :, None] - where[:, None])
    biases = [np.where(pairs, 0.0, -1e4) for pairs in (apart[0] == 0, apart[1:].max(0) == 0)]
    x = operands(256, sharp=1.0)
    x[:, :4] = 0
    table = measured(planted(x, torch.from_numpy(np.stack(biases)).float()[None]), geometry)
    for number, name in enumerate(table.labels["candidate"]):
        settings = json.loads(str(name))
        if "kept" in settings.get("rest", {}):  # a rest that this very step keeps: it is dense
            continue
        pattern = settings["pattern"]
        of_spatial, of_temporal = table["error"].values[0, 0, 0, :, number]
        if pattern == "spatial":
            assert of_spatial < 1e-6 and of_temporal > 0.05
        if pattern == "temporal":
            assert of_temporal < 1e-6 and of_spatial > 0.05
    assert table["share"].values.min() > 0.1


def test_reuse_is_the_error_of_an_earlier_output() -> None:
    inputs = [operands(30, seed=seed) for seed in range(5)]
    captured = planted(inputs[0])
    table = measured(captured, Geometry(2, 3, 4, 6), *inputs, calls=steps(5))
    weight, outputs = heads_weight(captured), [attend(x)[:, :24] for x in inputs]
    assert table.labels["lag"] == (1, 2, 3)
    for step in range(5):
        for place, lag in enumerate((1, 2, 3)):
            found = table["reuse"].values[0, step, 0, :, place]
            if lag > step:
                assert np.isnan(found).all()
            else:
                expected = norm(outputs[step] - outputs[step - lag], weight) / total(outputs[step], weight)
                np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(table["branches"].values).all()


def test_branches_are_compared_called_apart_or_in_a_batch_in_any_order() -> None:
    inputs = [operands(24, seed=seed) for seed in range(6)]
    captured = planted(inputs[0])
    apart = measured(captured, PLAIN, *inputs, calls=steps(3, 2))
    weight, outputs = heads_weight(captured), [attend(x) for x in inputs]
    for step in range(3):
        first, second = outputs[2 * step : 2 * step + 2]
        expected = norm(first - second, weight) / total(second, weight)
        np.testing.assert_allclose(apart["branches"].values[0, step], expected, atol=1e-5)
        if step:
            expected = norm(second - outputs[2 * step - 1], weight) / total(second, weight)
            np.testing.assert_allclose(apart["reuse"].values[0, step, 1, :, 0], expected, atol=1e-5)
    together = [torch.cat(inputs[at : at + 2]) for at in (0, 2, 4)]
    batched = measured(planted(together[0]), PLAIN, *together, calls=steps(3, 2, batched=True))
    reversed_calls = NetworkCalls((3.0, 2.0, 1.0), tuple((s, b) for s in range(3) for b in (1, 0)), 2, False)
    backwards = measured(captured, PLAIN, *(inputs[i] for i in (1, 0, 3, 2, 5, 4)), calls=reversed_calls)
    for name, measure in apart.measures.items():
        np.testing.assert_allclose(batched[name].values, measure.values, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(backwards[name].values, measure.values, atol=1e-6, err_msg=name)


def test_of_several_samples_per_branch_the_first_is_measured() -> None:
    x = operands(24, batch=4)
    batched = measured(planted(x), PLAIN, calls=steps(1, 2, batched=True))
    first = measured(planted(x[[0, 2]]), PLAIN, calls=steps(1, 2, batched=True))
    for name, measure in first.measures.items():
        np.testing.assert_allclose(batched[name].values, measure.values, atol=1e-6, err_msg=name)


def test_a_branch_that_left_out_a_step_has_no_such_lag() -> None:
    calls = NetworkCalls((3.0, 2.0, 1.0), ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)), 2, False)
    table = measured(planted(operands(24)), PLAIN, calls=calls)
    reuse = np.isnan(table["reuse"].values[0, :, :, 0])
    assert reuse[2].tolist() == [[False, False, True], [True, False, True]]
    assert np.isnan(table["error"].values[0, 1, 1]).all() and np.isnan(table["branches"].values[0, 1]).all()


def test_without_a_projection_errors_are_measured_before_it() -> None:
    x = operands(24)
    captured = planted(x, projected=False)
    collector = PatternCollector(trace_of(captured), steps(2), PLAIN)
    run(captured, steps(2), [collector], x)
    assert collector.reasons == {f"{SITE}: no product with a weight was found behind it; errors are those before it": 1}
    table, dense = collector.tables()[SITE], attend(x)
    assert not table.facts["projected"]
    np.testing.assert_allclose(table["share"].values[0, 1, 0], dense.flatten(1).norm(dim=1) / dense.norm(), atol=1e-5)
    np.testing.assert_allclose(table["output"].values[0, 1, 0], dense.square().mean().sqrt(), rtol=1e-5)
    assert table["reuse"].values[0, 1, 0, :, 0].max() == 0


def test_sampled_rows_come_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(6, 16, 16, text=12)
    inputs = [operands(geometry.tokens, seed=seed, sharp=1.0) for seed in range(2)]
    captured = planted(inputs[0])
    table = measured(captured, geometry, *inputs, calls=steps(2))
    assert table.facts["rows"] < 0.5 * geometry.video and len(table.labels["candidate"]) >= 16
    weight, video = heads_weight(captured), of_video(geometry)
    dense = attend(inputs[1])[:, video]
    for number, name in enumerate(static(table)):
        error = attend(inputs[1], mask=expanded(geometry, str(name), 64))[:, video] - dense
        expected = norm(error, weight) / total(dense, weight)
        np.testing.assert_allclose(table["error"].values[0, 1, 0, :, number], expected, rtol=0.1, err_msg=str(name))
    expected = norm(attend(inputs[0])[:, video] - dense, weight) / total(dense, weight)
    np.testing.assert_allclose(table["reuse"].values[0, 1, 0, :, 0], expected, rtol=0.05)
    monkeypatch.setattr(pattern_errors, "REMEMBERED", 128 * 16)  # so many of the sampled rows are kept
    fewer = measured(captured, geometry, *inputs, calls=steps(2))
    np.testing.assert_allclose(fewer["reuse"].values[0, 1, 0, :, 0], expected, rtol=0.15)
    np.testing.assert_array_equal(fewer["error"].values, table["error"].values)


def test_rows_that_lose_all_their_mass_become_zero() -> None:
    sums = torch.zeros(2, 1, 3)
    sums[1, 0] = torch.tensor([3.0, 4.0, 1.0])  # the second block of keys has all the mass
    kept = torch.tensor([[[True, False], [False, True], [False, False]]])
    found = error_moments(sums, kept, torch.ones(1, 1))
    assert found.diagonal(dim1=1, dim2=2).sum(1).tolist() == [25.0, 0.0, 25.0]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_norms_come_from_second_moments(heads: int, rows: int, width: int, out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(heads, rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(heads, width, out, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    squares = second_moments(outputs, weights)
    scaled = outputs * weights.sqrt()[:, None]
    assert torch.allclose(Projection(weight).norms(squares), norm(scaled, weight))
    assert torch.allclose(Projection(None).norms(squares), scaled.flatten(1).norm(dim=1))
    assert torch.allclose(Projection(weight).norms(squares[:, None])[:, 0], norm(scaled, weight))
    together = torch.einsum("hre,heo->ro", outputs, weight)
    found, channels = Projection(weight).rows(outputs)
    assert torch.allclose(found, together.square().sum(1)) and channels == out


class _Kept(Collector):
    """Keeps what goes in and out of the products behind attention, and attention's outputs."""

    name = "kept"

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.wanted, self.seen = names, dict[str, Seen]()

    def see(self, seen: Seen) -> None:
        self.seen[seen.node.name] = seen

    def tables(self) -> dict[str, Table]:
        return {}


GEOMETRIES = {
    "Wan": Geometry(2, 4, 4),
    "SD3": Geometry(1, 4, 4, text=6),
    "Flux": Geometry(1, 4, 4, text=6, text_first=True),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_in_models_shares_are_of_what_the_real_product_gives(name: str) -> None:
    captured, geometry = model(name), GEOMETRIES[name]
    trace = trace_of(captured)
    entries = attentions(trace)
    kept = _Kept(frozenset(n.name for entry in entries for n in (entry.node, entry.projection) if n is not None))
    collector = PatternCollector(trace, steps(1), geometry)
    run(captured, steps(1), [kept, collector])
    assert not collector.reasons
    for entry in entries:
        table = collector.tables()[entry.site.name]
        assert entry.projection is not None and entry.weight is not None
        product = kept.seen[entry.projection.name]
        left, weight = (product.arguments[place].double() for place in (entry.weight - 1, entry.weight))
        left = left.view(kept.seen[entry.node.name].result.shape[0], -1, left.shape[-1])[0]
        weight = weight[0] if weight.ndim == 3 else weight
        video = slice(0, None) if entry.cross else of_video(geometry)
        taken = slice(video.start - entry.rows[0], video.stop and video.stop - entry.rows[0])
        width = entry.site.heads * entry.site.head_dim
        columns = slice(entry.column, entry.column + width)
        rows, part = left[taken, columns], weight[columns]  # what the product really took
        whole = (rows @ part).norm()
        shares = [
            (rows[:, at : at + entry.site.head_dim] @ part[at : at + entry.site.head_dim]).norm() / whole
            for at in range(0, width, entry.site.head_dim)
        ]
        np.testing.assert_allclose(table["share"].values[0, 0, 0], shares, rtol=1e-4)
        np.testing.assert_allclose(table["output"].values[0, 0, 0], whole / (rows @ part).numel() ** 0.5, rtol=1e-4)
        assert table.facts["projected"] and table.facts["kind"] == ("cross" if entry.cross else table.facts["kind"])
        if entry.cross:
            assert table.labels["candidate"] == ('{"pattern": "skip"}',)
            np.testing.assert_allclose(table["error"].values[..., 0], table["share"].values, rtol=1e-5)


def test_the_same_generation_gives_the_same_bits() -> None:
    inputs = [operands(700, seed=seed) for seed in range(3)]
    captured = planted(inputs[0])
    one, other = (measured(captured, Geometry(4, 25, 7), *inputs, calls=steps(3)) for _ in range(2))
    for name, measure in one.measures.items():
        assert measure.values.tobytes() == other[name].values.tobytes(), name


def test_all_candidates_of_all_heads_add_up_as_the_search_adds_them() -> None:
    x = operands(24, sharp=1.0)
    captured = planted(x)
    weight, dense = heads_weight(captured), attend(x)
    (collector,) = attention_collectors(trace_of(captured), steps(1), PLAIN, names=("patterns",))
    run(captured, steps(1), [collector])
    found = collector.tables()[SITE]["error"].values[0, 0, 0, :, 0]
    assert found @ found == pytest.approx(float((norm(dense, weight) ** 2).sum() / total(dense, weight) ** 2), rel=1e-4)


VIDEOS = [Geometry(6, 16, 16, 12), Geometry(4, 32, 32), Geometry(16, 16, 16), Geometry(9, 30, 45, 100, True)]


@pytest.mark.parametrize("geometry", [*VIDEOS, Geometry(1, 32, 32), Geometry(2, 4, 4), Geometry(1, 1, 512)])
def test_candidates_are_distinct_sparse_and_can_be_written(geometry: Geometry) -> None:
    found = candidates(geometry)
    assert isinstance(found[0], Nothing) and len(found) <= 25
    maps = [pattern.block_map(geometry, block_for(geometry.tokens)) for pattern in found]
    assert not any(kept.all() for kept in maps) and len({kept.tobytes() for kept in maps}) == len(found)
    for pattern in found:
        assert pattern_from_data(json.loads(json.dumps(pattern_to_data(pattern)))) == pattern
    if geometry in VIDEOS:
        assert len(found) >= 16
        assert {p.kind for p in found} >= {"spatial", "temporal", "band", "window", "union"}  # type: ignore[attr-defined]
    if geometry.rows == 1:
        assert all(isinstance(pattern, Band) for pattern in found[1:]) and len(found) > 4
