"""Statistics of attention: against plain references on full maps, on planted heads, in captured models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.calls import NetworkCalls
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.measures import Table
from ditopt.profiler import attention, rows
from ditopt.profiler.attention import AttentionCollector, attention_collectors
from ditopt.profiler.interpret import Collector, WatchedCalls
from ditopt.profiler.maps import by_distance, mass_in, pooled_keys, pooled_rows, top_blocks
from ditopt.profiler.rows import Operands, anchor_steps, refusal, sample_rows
from ditopt.trace import Trace
from tests.trace.models import CASES, Captured, capture, interpreted

SITE = "blocks.0.attn"
PLAIN = Geometry(2, 3, 4)
BEHIND = Geometry(2, 3, 4, text=5)
BEFORE = Geometry(2, 3, 4, text=5, text_first=True)


class _Attend(nn.Module):
    """Attention whose queries, keys and values stand in its input ``[B, H + 2 Hkv, S, D]``."""

    def __init__(self, heads: tuple[int, int], projected: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.settings = heads, settings
        self.to_out = nn.Linear(heads[0] * 8, 24) if projected else nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = x.split((self.heads[0], self.heads[1], self.heads[1]), 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.settings)
        found: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return found


class _Block(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.attn = _Attend(*args)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self.attn(x, mask)
        return found


class Planted(nn.Module):
    """A network of one block, ``blocks.0.attn``, that attends to what it is given."""

    def __init__(self, heads: tuple[int, int], projected: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(heads, projected, settings)])

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, mask: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.blocks[0](hidden_states, mask) + timestep,)


def operands(tokens: int, heads: tuple[int, int] = (2, 2), batch: int = 1, seed: int = 0, sharp: float = 2.0) -> Tensor:
    """``[B, H + 2 Hkv, S, 8]``: random queries, keys and values."""
    return torch.randn(batch, heads[0] + 2 * heads[1], tokens, 8, generator=torch.Generator().manual_seed(seed)) * sharp


def planted(
    x: Tensor,
    mask: Tensor | None = None,
    heads: tuple[int, int] = (2, 2),
    projected: bool = True,
    **settings: Any,
) -> Captured:
    """The captured network with these inputs."""
    like = (tuple(mask.shape), mask.dtype) if mask is not None else None
    found = _planted(tuple(x.shape), like, heads, projected, tuple(settings.items()))
    trace, arguments = trace_of(found), list(found.arguments)
    arguments[trace.roots[0]] = x
    if mask is not None:
        arguments[trace.arguments["mask"]] = mask
    return replace(found, arguments=arguments)


@lru_cache
def _planted(
    shape: tuple[int, ...],
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    heads: tuple[int, int],
    projected: bool,
    settings: tuple[tuple[str, Any], ...],
) -> Captured:
    torch.manual_seed(0)
    model = Planted(heads, projected, dict(settings)).eval().requires_grad_(False)
    inputs = {"hidden_states": torch.randn(shape), "timestep": torch.tensor([0.5])}
    if mask is not None:
        inputs["mask"] = torch.ones(mask[0], dtype=mask[1])
    with interpreted():
        return capture(model, inputs)


def trace_of(captured: Captured) -> Trace:
    return captured.program.variants.trace


def steps(count: int, branches: int = 1, batched: bool = False) -> NetworkCalls:
    """Calls of ``count`` steps, branch 0 first in each."""
    calls = [(step, branch) for step in range(count) for branch in range(1 if batched else branches)]
    return NetworkCalls(tuple(float(count - step) for step in range(count)), tuple(calls), branches, batched)


def run(captured: Captured, calls: NetworkCalls, collectors: Sequence[Collector], *inputs: Tensor) -> None:
    """Show a generation to collectors, whose calls have these latents (the last ones for the rest)."""
    trace = trace_of(captured)
    watched = WatchedCalls(trace, calls, collectors)
    for number in range(len(calls.calls)):
        arguments = list(captured.arguments)
        if inputs:
            arguments[trace.roots[0]] = inputs[min(number, len(inputs) - 1)]
        watched(arguments, lambda *_: pytest.fail("the model is not to be called"))
    assert watched.complete


def measured(
    captured: Captured, geometry: Geometry | None, *inputs: Tensor, calls: NetworkCalls | None = None, side: int = 128
) -> Table:
    """The table ``attention`` of the planted site."""
    calls = calls or steps(1)
    collector = AttentionCollector(trace_of(captured), calls, geometry, side)
    run(captured, calls, [collector], *inputs)
    assert not collector.reasons
    return collector.tables()[SITE]


def full_scores(x: Tensor, heads: tuple[int, int], mask: Tensor | None, causal: bool = False) -> Tensor:
    """``[H, S, S]`` float64 of the first sample."""
    query, key, _ = x[0].double().split((heads[0], heads[1], heads[1]), 0)
    key = key.repeat_interleave(heads[0] // heads[1], 0)
    scores: Tensor = query @ key.transpose(1, 2) / math.sqrt(8)
    if mask is not None:
        whole = torch.broadcast_to(mask, (1, *scores.shape))[0]
        scores = scores.masked_fill(~whole, -math.inf) if mask.dtype == torch.bool else scores + whole.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -math.inf)
    return scores


def reference(scores: Tensor, geometry: Geometry, block: int) -> dict[str, np.ndarray]:
    """Every statistic of one call by its definition, from the full map."""
    tokens = geometry.tokens
    first = geometry.text if geometry.text_first else 0
    video = np.arange(tokens) - first
    is_video = (video >= 0) & (video < geometry.video)
    where = np.stack(np.unravel_index(video.clip(0, geometry.video - 1), geometry.sizes))
    apart = np.abs(where[:, :, None] - where[:, None])
    both = is_video[:, None] & is_video[None]
    regions = {
        "mass_text": np.broadcast_to(~is_video, (tokens, tokens)),
        "mass_first_frame": np.broadcast_to(is_video & (where[0] == 0), (tokens, tokens)),
        "mass_in_frame": both & (apart[0] == 0),
        "mass_same_pixel": both & (apart[1:].max(0) == 0),
        "mass_self": np.eye(tokens, dtype=bool),
        "mass_near_pixel": both & (apart[0] > 0) & (apart[1:].max(0) <= 1),
    }
    maps = scores.softmax(-1).numpy()
    some = maps[:, is_video]
    entropy = -(some * np.log(np.where(some > 0, some, 1))).sum(-1).mean(-1)
    lse = scores.logsumexp(-1).numpy()[:, is_video]
    found = {name: (some * region[is_video]).sum(-1).mean(-1) for name, region in regions.items()}
    found["mass_near"] = np.stack(
        [(some * (both & (apart.max(0) <= far))[is_video]).sum(-1).mean(-1) for far in (1, 2, 4)], -1
    )
    columns = some.mean(1)
    found |= {"entropy": entropy / math.log(tokens), "lse_mean": lse.mean(-1), "lse_std": lse.std(-1)}
    found["mass_sinks"] = np.sort(columns, -1)[:, -max(1, tokens // 100) :].sum(-1)
    found["gathered"] = columns.mean(0)
    starts = np.arange(0, tokens, block)
    sizes = np.diff([*starts, tokens])
    found["map"] = np.add.reduceat(np.add.reduceat(maps, starts, 1) / sizes[:, None], starts, 2)
    in_video = maps[:, is_video][:, :, is_video].mean(0)
    found["by_distance"] = np.array(
        [np.trace(in_video, offset) / geometry.video for offset in range(1 - geometry.video, geometry.video)]
    )
    return found


def compare(table: Table, expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    for name, values in expected.items():
        found = table[name].values[0, 0, 0]
        np.testing.assert_allclose(found, values, atol=1e-3 if found.dtype == np.float16 else atol, err_msg=name)


@pytest.mark.parametrize("geometry", [PLAIN, BEHIND, BEFORE, Geometry(1, 5, 5), Geometry(7, 6, 1, 3)])
def test_all_statistics_are_those_of_the_full_map(geometry: Geometry) -> None:
    x = operands(geometry.tokens)
    table = measured(planted(x), geometry)
    compare(table, reference(full_scores(x, (2, 2), None), geometry, table.facts["block"]))
    assert table.facts["kind"] == ("joint" if geometry.text else "self") and not table.facts["masked"]


def test_without_geometry_tokens_stand_in_a_line() -> None:
    x = operands(40)
    table = measured(planted(x), None)
    compare(table, reference(full_scores(x, (2, 2), None), Geometry(1, 1, 40), 4))
    assert table.labels["distance_bin"][0] == -39 and table.labels["distance_bin"][-1] == 39


def _some(*shape: int) -> Tensor:
    """A boolean mask in which every query has a key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "heads", "settings"),
    [
        (_some(1, 1, 1, 29), (2, 2), {}),
        (_some(29, 29), (2, 2), {}),
        (_some(1, 2, 29, 29), (2, 2), {}),
        (torch.randn(1, 2, 29, 29, generator=torch.Generator().manual_seed(2)), (2, 2), {}),
        (torch.zeros(1, 1, 29, 29).masked_fill(~_some(29, 29), -math.inf), (2, 2), {}),
        (torch.zeros(29, 29).masked_fill(~_some(29, 29), torch.finfo(torch.float32).min), (2, 2), {}),
        (None, (2, 2), {"is_causal": True}),
        (None, (4, 2), {"enable_gqa": True}),
        (_some(1, 4, 29, 29), (4, 1), {"enable_gqa": True}),
    ],
)
def test_masks_causality_and_shared_keys_are_respected(
    mask: Tensor | None, heads: tuple[int, int], settings: dict[str, Any]
) -> None:
    x = operands(29, heads)
    table = measured(planted(x, mask, heads, **settings), BEHIND)
    scores = full_scores(x, heads, mask, settings.get("is_causal", False))
    compare(table, reference(scores, BEHIND, table.facts["block"]))
    assert table.facts["masked"] == (mask is not None)


def test_another_scale_is_taken() -> None:
    x = operands(24)
    table = measured(planted(x, scale=1.0), PLAIN)
    compare(table, reference(full_scores(x, (2, 2), None) * math.sqrt(8), PLAIN, 4))


def test_sampled_rows_come_near_the_full_map() -> None:
    geometry = Geometry(6, 16, 16, text=12)
    x = operands(geometry.tokens, sharp=1.0)
    table = measured(planted(x), geometry)
    assert table.facts["rows"] < 0.5 * geometry.tokens
    expected = reference(full_scores(x, (2, 2), None), geometry, table.facts["block"])
    np.testing.assert_allclose(table["map"].values[0, 0, 0].sum(-1), 1, atol=2e-3)
    np.testing.assert_allclose(table["map"].values[0, 0, 0], expected.pop("map"), atol=0.05)
    for name, allowed in {"by_distance": 3e-3, "gathered": 1e-3, "mass_sinks": 0.02, "lse_mean": 0.05}.items():
        np.testing.assert_allclose(table[name].values[0, 0, 0], expected.pop(name), atol=allowed, err_msg=name)
    compare(table, expected, 0.03)


def one_hot(pairs: np.ndarray) -> Tensor:
    """``[S, S]`` scores with all mass evenly on the pairs."""
    return torch.from_numpy(np.where(pairs, 0.0, -1e4)).float()


def plant(geometry: Geometry, role: str) -> Tensor:
    """A bias that makes attention look at one region only."""
    where = np.stack(np.unravel_index(np.arange(geometry.video), geometry.sizes))
    apart = np.abs(where[:, :, None] - where[:, None])
    pairs = {
        "mass_self": apart.max(0) == 0,
        "mass_same_pixel": apart[1:].max(0) == 0,
        "mass_in_frame": apart[0] == 0,
        "mass_first_frame": np.broadcast_to(where[0] == 0, apart.shape[1:]),
        "mass_near": apart.max(0) <= 1,
        "mass_near_pixel": (apart[0] > 0) & (apart[1:].max(0) <= 1),
    }[role]
    return one_hot(pairs)


@pytest.mark.parametrize(
    "role", ["mass_self", "mass_same_pixel", "mass_near_pixel", "mass_in_frame", "mass_first_frame", "mass_near"]
)
def test_a_planted_head_has_its_mass_where_it_was_planted(role: str) -> None:
    geometry = Geometry(4, 12, 12)
    bias = torch.stack([plant(geometry, role), torch.zeros(geometry.tokens, geometry.tokens)])[None]
    table = measured(planted(operands(geometry.tokens, sharp=0.0), bias), geometry)
    uniform = table.facts["uniform"][role]
    found = table[role].values[0, 0, 0]
    if role == "mass_near_pixel":  # rows at an edge have fewer
        np.testing.assert_allclose(found, [1, uniform], atol=2e-3)
    elif role == "mass_near":
        np.testing.assert_allclose(found[0], 1, atol=1e-5)
        np.testing.assert_allclose(found[1], uniform, atol=2e-3)
    else:
        np.testing.assert_allclose(found, [1, uniform], atol=1e-5)


def test_planted_periods_stand_out_by_distance() -> None:
    geometry = Geometry(5, 8, 8)
    table = measured(planted(operands(320, sharp=0.0), plant(geometry, "mass_same_pixel")), None)
    distances = table.labels["distance_bin"]
    found = table["by_distance"].values[0, 0, 0]
    assert {distances[place] for place in np.argsort(found)[-9:]} == {64 * frames for frames in range(-4, 5)}


def test_long_distances_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "REACH", 7)
    x = operands(40)
    table = measured(planted(x), None)
    expected = reference(full_scores(x, (2, 2), None), Geometry(1, 1, 40), 4)["by_distance"]
    np.testing.assert_allclose(table["by_distance"].values[0, 0, 0], expected[39 - 7 : 39 + 8], atol=1e-5)


@given(tokens=st.integers(1, 3000), block=st.sampled_from([1, 4, 16, 64]), wanted=st.integers(1, 900))
def test_sampled_rows_are_spread_over_all_blocks(tokens: int, block: int, wanted: int) -> None:
    sample = sample_rows(tokens, block, wanted)
    found = sample.rows[sample.real]
    assert (found.diff() > 0).all() and found.max() < tokens and (sample.rows.view(-1).diff() >= 0).all()
    assert sample.real.any(1).all() and len(found) >= min(wanted, tokens) * 0.9 - block
    inside = (sample.rows // block) == torch.arange(sample.blocks)[:, None]
    assert inside.all()
    assert float(sample.weights(0, tokens).sum()) == pytest.approx(1, abs=1e-5)
    if len(found) == tokens:
        weights = sample.weights(0, max(1, tokens // 2)).view(-1)
        assert torch.allclose(weights[weights > 0], torch.tensor(1 / max(1, tokens // 2)))


@given(st.integers(1, 200), st.integers(2, 9))
def test_anchors_are_spread_from_the_first_step_to_the_last(count: int, anchors: int) -> None:
    found = anchor_steps(count, anchors)
    assert found[0] == 0 and found[-1] == count - 1 and len(found) == min(count, anchors)
    assert np.ptp(np.diff(found)) <= 1 if len(found) > 1 else True


def test_small_functions_do_what_they_say() -> None:
    mass = torch.tensor([[[1.0, 3.0], [3.0, 1.0]], [[0.5, 0.5], [9.0, 9.0]]])
    real = torch.tensor([[True, True], [True, False]])
    assert pooled_rows(mass, real).tolist() == [[2.0, 2.0], [0.5, 0.5]]
    assert pooled_keys(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 2).tolist() == [6.0, 9.0]
    assert pooled_keys(torch.tensor([1.0, 2.0]), 5).tolist() == [1.0, 2.0]
    found = by_distance(torch.tensor([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]), [0, 5], torch.tensor([1.0, 1.0]), 2)
    np.testing.assert_allclose(found, [0, 0, 0.1, 0.2, 0.7])


@given(st.integers(1, 7), st.integers(1, 9), st.floats(0.1, 0.99), st.integers(0, 99))
def test_top_blocks_are_the_fewest_that_hold_the_share(height: int, width: int, share: float, seed: int) -> None:
    maps = torch.rand(height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    top = top_blocks(maps, share)
    for row, kept in zip(maps.tolist(), top.tolist(), strict=True):
        count, held = 0, 0.0
        for value in sorted(row, reverse=True):
            if held < share * sum(row) - 1e-12:
                count, held = count + 1, held + value
        assert sum(kept) == count and sum(value for value, k in zip(row, kept, strict=True) if k) == pytest.approx(held)
    assert float(mass_in(maps, top)) == pytest.approx(float((maps * top).sum() / height))
    assert top_blocks(torch.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]


def recall_reference(x: Tensor, of: Tensor) -> np.ndarray:
    """Mass of the map of ``x`` in the top blocks of that of ``of``, per head."""
    maps, others = (reference(full_scores(each, (2, 2), None), PLAIN, 4)["map"] for each in (x, of))
    found = []
    for head in range(2):
        rows_of = []
        for mine, theirs in zip(maps[head], others[head], strict=True):
            order = np.argsort(-theirs)
            count = int(np.searchsorted(np.cumsum(theirs[order]), 0.9)) + 1
            rows_of.append(mine[order[:count]].sum())
        found.append(np.mean(rows_of))
    return np.array(found)


def test_recall_is_of_all_steps_and_branches_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [operands(24, seed=seed) for seed in range(16)]
    captured = planted(inputs[0])
    table = measured(captured, PLAIN, *inputs, calls=steps(8, 2))
    assert table.labels["anchor"] == anchor_steps(8) and table.facts["recall_of"] == "all steps"
    recall = table["recall"].values[0]
    for anchor, at in enumerate(table.labels["anchor"]):
        for step in (0, 3, 7):
            for branch in (0, 1):
                expected = recall_reference(inputs[2 * step + branch], inputs[2 * int(at) + branch])
                np.testing.assert_allclose(recall[step, branch, :, anchor], expected, atol=2e-3)
    for step in range(8):
        expected = recall_reference(inputs[2 * step + 1], inputs[2 * step])
        np.testing.assert_allclose(table["between_branches"].values[0, step], expected, atol=2e-3)
    monkeypatch.setattr(attention, "HISTORY", 0)
    later = measured(captured, PLAIN, *inputs, calls=steps(8, 2))
    assert later.facts["recall_of"] == "steps from the anchor on"
    for anchor, at in enumerate(table.labels["anchor"]):
        assert np.isnan(later["recall"].values[0, : int(at), ..., anchor]).all()
        np.testing.assert_array_equal(later["recall"].values[0, int(at) :, ..., anchor], recall[int(at) :, ..., anchor])


def test_branches_in_a_batch_are_as_those_called_apart() -> None:
    inputs = [operands(24, seed=seed) for seed in range(4)]
    together = [torch.cat(inputs[at : at + 2]) for at in (0, 2)]
    apart = measured(planted(inputs[0]), PLAIN, *inputs, calls=steps(2, 2))
    batched = measured(planted(together[0]), PLAIN, *together, calls=steps(2, 2, batched=True))
    reversed_calls = NetworkCalls((2.0, 1.0), ((0, 1), (0, 0), (1, 1), (1, 0)), 2, False)
    backwards = measured(planted(inputs[0]), PLAIN, *(inputs[i] for i in (1, 0, 3, 2)), calls=reversed_calls)
    for name, measure in apart.measures.items():
        np.testing.assert_allclose(batched[name].values, measure.values, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(backwards[name].values, measure.values, err_msg=name)


def test_a_branch_that_does_not_run_is_not_measured() -> None:
    calls = NetworkCalls((3.0, 2.0, 1.0), ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)), 2, False)
    table = measured(planted(operands(24)), PLAIN, calls=calls)
    for name in ("entropy", "mass_near", "map", "by_distance", "gathered"):
        values = table[name].values[0]
        assert np.isnan(values[1, 1]).all() and not np.isnan(values[[0, 2], 1]).any() and table[name].partial
    missing = np.isnan(table["recall"].values[0, :, 1, 0])
    assert missing.tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert np.isnan(table["between_branches"].values[0, 1]).all()


def test_maps_have_at_most_so_many_blocks_per_side() -> None:
    x = operands(50)
    table = measured(planted(x), None, side=4)
    assert table["map"].values.shape[-2:] == (4, 4) and table.facts["block"] == 16
    expected = reference(full_scores(x, (2, 2), None), Geometry(1, 1, 50), 16)["map"]
    np.testing.assert_allclose(table["map"].values[0, 0, 0], expected, atol=1e-3)


def nan_bias() -> Tensor:
    bias = torch.zeros(1, 1, 24, 24)
    bias[0, 0, 3, 4] = math.nan
    return bias


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (nan_bias(), "a bias with NaN or infinity"),
        (torch.zeros(24, 24).index_fill(0, torch.tensor([5]), -math.inf), "rows that are wholly masked"),
        (torch.ones(1, 2, 24, 24).index_fill(2, torch.tensor([7]), 0).bool(), "rows that are wholly masked"),
    ],
)
def test_what_cannot_be_measured_is_skipped_and_counted(mask: Tensor, reason: str) -> None:
    captured = planted(operands(24), mask)
    collectors = attention_collectors(trace_of(captured), steps(3), PLAIN)
    run(captured, steps(3), collectors)
    for collector in collectors:
        assert collector.reasons == {f"{SITE}: {reason}": 3}
        table = collector.tables()[SITE]
        assert all(np.isnan(measure.values).all() for name, measure in table.measures.items() if name != "density")


def test_a_batch_that_guidance_branches_cannot_share_is_skipped() -> None:
    captured = planted(operands(24))
    collectors = attention_collectors(trace_of(captured), steps(2, 2, batched=True), PLAIN)
    run(captured, steps(2, 2, batched=True), collectors)
    for collector in collectors:
        assert collector.reasons == {f"{SITE}: a batch of 1 does not divide into 2 guidance branches": 2}
        assert np.isnan(next(iter(collector.tables()[SITE].measures.values())).values).all()


def test_values_that_are_not_finite_are_skipped() -> None:
    x = operands(24)
    captured = planted(x)
    bad = x.clone()
    bad[0, 3, 2, 1] = math.inf
    collectors = attention_collectors(trace_of(captured), steps(3), PLAIN)
    run(captured, steps(3), collectors, x, bad, x)
    for collector in collectors:
        assert collector.reasons == {f"{SITE}: its output has values that are not finite": 1}
    entropy = collectors[0].tables()[SITE]["entropy"].values[0]
    assert np.isnan(entropy[1]).all() and not np.isnan(entropy[[0, 2]]).any()


def test_operands_that_do_not_belong_together_are_refused() -> None:
    query, result = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)

    def refused(*arguments: Any, **settings: Any) -> str:
        found = refusal(Operands.of(arguments, settings), result, [0], torch.arange(4))
        assert found is not None
        return found

    assert "does not broadcast to [1, 2, 4, 4]" in refused(query, query, query, torch.ones(3, 4, dtype=torch.bool))
    assert "neither boolean nor a bias" in refused(query, query, query, attn_mask=torch.ones(4, 4, dtype=torch.long))
    assert "2 heads of queries and 1 of keys" in refused(query, query[:, :1], query[:, :1])
    assert refused(query, query, query, None, 0.25) == "attention with dropout (0.25)"
    assert "are not [B, H, S, D]" in refused(query[0], query[0], query[0])


def test_a_geometry_that_does_not_fit_is_told_and_the_rest_is_measured() -> None:
    captured = planted(operands(24))
    collectors = attention_collectors(trace_of(captured), steps(1), Geometry(5, 5, 5))
    run(captured, steps(1), collectors)
    for collector in collectors:
        ((reason, count),) = collector.reasons.items()
        assert "24 queries and 24 keys do not fit the geometry of 5 x 5 x 5 tokens" in reason and count == 1
    table = collectors[0].tables()[SITE]
    assert np.isnan(table["mass_in_frame"].values).all() and np.isnan(table["mass_near"].values).all()
    for name in ("entropy", "lse_std", "map", "by_distance", "mass_sinks"):
        assert not np.isnan(table[name].values).any()


def test_bad_settings_are_refused() -> None:
    trace = trace_of(planted(operands(24)))
    with pytest.raises(InputError, match="maps of 129 blocks per side: 1 to 128"):
        AttentionCollector(trace, steps(1), None, 129)
    with pytest.raises(InputError, match="collectors heads do not look at attention"):
        attention_collectors(trace, steps(1), None, names=("attention", "heads"))


def test_probabilities_are_computed_once_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = planted(operands(24))
    counted = []
    scores = Operands.scores

    def counting(self: Operands, *args: Any) -> Tensor:
        counted.append(args[1])
        return scores(self, *args)

    monkeypatch.setattr(rows.Operands, "scores", counting)
    tables = {}
    for names in (("attention",), ("patterns",), ("attention", "patterns")):
        counted.clear()
        collectors = attention_collectors(trace_of(captured), steps(2), PLAIN, names=names)
        run(captured, steps(2), collectors)
        tables[names] = [collector.tables()[SITE] for collector in collectors]
        assert counted == [0, 1, 0, 1]
    for name, alone in tables["patterns",][0].measures.items():
        np.testing.assert_array_equal(tables["attention", "patterns"][1][name].values, alone.values)


def test_the_same_generation_gives_the_same_bits() -> None:
    inputs = [operands(1100, seed=seed) for seed in range(2)]
    captured = planted(inputs[0])
    tables = []
    for _ in range(2):
        collectors = attention_collectors(trace_of(captured), steps(2), Geometry(4, 25, 11))
        run(captured, steps(2), collectors, *inputs)
        tables.append([collector.tables()[SITE] for collector in collectors])
    for one, other in zip(*tables, strict=True):
        assert one.facts == other.facts and one.labels == other.labels
        for name, measure in one.measures.items():
            assert measure.values.tobytes() == other[name].values.tobytes(), name


@lru_cache
def model(name: str) -> Captured:
    """A captured tiny model of diffusers."""
    with interpreted():
        return capture(*CASES[name].make())


GEOMETRIES = {"Wan": Geometry(2, 4, 4), "PixArt": Geometry(1, 4, 4), "SD3": Geometry(1, 4, 4, text=6)}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_models_are_measured_at_every_site(name: str) -> None:
    captured, geometry = model(name), GEOMETRIES[name]
    collectors = attention_collectors(trace_of(captured), steps(2), geometry)
    run(captured, steps(2), collectors)
    assert not any(collector.reasons for collector in collectors)
    tables, patterns = (collector.tables() for collector in collectors)
    kinds = {table.facts["kind"] for table in tables.values()}
    assert kinds == {"Wan": {"self", "cross"}, "PixArt": {"self", "cross"}, "SD3": {"joint"}}[name]
    assert tables.keys() == patterns.keys()
    for site, table in tables.items():
        cross = table.facts["kind"] == "cross"
        assert table.facts["masked"] == (cross and name == "PixArt")
        for measure, found in table.measures.items():
            of_region = measure.startswith("mass_") and measure != "mass_sinks"
            missing = (cross and of_region) or measure == "between_branches"
            assert np.isnan(found.values).all() == np.isnan(found.values).any() == missing, (site, measure)
        assert ("by_distance" in table.measures) != cross
        assert patterns[site].facts["projected"] and not np.isnan(patterns[site]["error"].values).any()


def test_cross_attention_respects_the_prompts_mask() -> None:
    captured = model("PixArt")
    trace = trace_of(captured)
    calls = steps(1, 2, batched=True)  # the second prompt is padded from its fourth token on
    collector = AttentionCollector(trace, calls, GEOMETRIES["PixArt"])
    run(captured, calls, [collector])
    table = next(table for table in collector.tables().values() if table.facts["kind"] == "cross")
    gathered = table["gathered"].values[0, 0].astype(float)
    assert (gathered[0] > 0.05).all() and (gathered[1, :3] > 0.05).all() and not gathered[1, 3:].any()
