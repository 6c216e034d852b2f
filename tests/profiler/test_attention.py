"""Statistics of attention: against plain references on full maps, on planted heads, in captured models."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.profiled_tensors import SUMS
from ditopt.profiler import attention, rows
from ditopt.profiler.attention import AttentionCollector, attention_collectors
from ditopt.profiler.rows import Operands, anchor_steps, refusal
from tests.profiler.attention_rig import (
    BEFORE,
    BEHIND,
    PLAIN,
    SITE,
    compare,
    full_scores,
    measured,
    model,
    operands,
    planted,
    reference,
    run,
    steps,
    trace_of,
)


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
        expected = {f"{SITE}: {reason}": 3}
        if collector.name == "patterns":
            expected[f"{SITE}: there is a mask; no pattern is tried with means of what it skips"] = 1
        assert collector.reasons == expected
        table = collector.tables()[SITE]
        unknown = {name: each for name, each in table.measures.items() if name not in ("density", *SUMS)}
        assert unknown and all(np.isnan(measure.values).all() for measure in unknown.values())


def test_a_batch_that_guidance_branches_cannot_share_is_skipped() -> None:
    captured = planted(operands(24))
    collectors = attention_collectors(trace_of(captured), steps(2, 2, batched=True), PLAIN)
    run(captured, steps(2, 2, batched=True), collectors)
    for collector in collectors:
        assert collector.reasons == {f"{SITE}: a batch of 1 does not divide into 2 guidance branches": 2}
        measures = collector.tables()[SITE].measures
        assert all(
            np.isnan(measure.values).all() for name, measure in measures.items() if name not in ("density", *SUMS)
        )


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
        in_orders = 2 if "patterns" in names else 1  # patterns are tried in another order, too
        assert counted == [0, 1] * in_orders * 2
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
        names = [json.loads(str(label)) for label in patterns[site].labels["candidate"]]
        of_others = [each["pattern"] != "listed" for each in names]
        errors = patterns[site]["error"].values
        assert patterns[site].facts["projected"] and not np.isnan(errors[..., of_others]).any()


def test_cross_attention_respects_the_prompts_mask() -> None:
    captured = model("PixArt")
    trace = trace_of(captured)
    calls = steps(1, 2, batched=True)  # the second prompt is padded from its fourth token on
    collector = AttentionCollector(trace, calls, GEOMETRIES["PixArt"])
    run(captured, calls, [collector])
    table = next(table for table in collector.tables().values() if table.facts["kind"] == "cross")
    gathered = table["gathered"].values[0, 0].astype(float)
    assert (gathered[0] > 0.05).all() and (gathered[1, :3] > 0.05).all() and not gathered[1, 3:].any()
