"""Ranges and noise of linear layers' inputs against plain loops over the values that the layers were given."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.errors import InputError
from ditopt.passes.flops import PRODUCTS
from ditopt.profiler import linear_inputs
from ditopt.profiler.drawn import drawn
from ditopt.profiler.formats import FORMATS
from ditopt.profiler.interpret import Moment, Seen
from ditopt.profiler.linear_inputs import QUANTILES, LinearInputs, outlier_ratio, ranges, ratios
from ditopt.profiler.places import linears
from ditopt.profiler.rows import anchor_steps
from tests.profiler.watched_models import (
    BATCHED,
    ONE,
    SEPARATE,
    STEPS,
    Keeper,
    captured,
    generate,
    kept_by,
    trace_of,
)

LONG = NetworkCalls(  # more steps than anchors, the second branch in some of them
    tuple(map(float, range(8))), tuple((t, b) for t in range(8) for b in (0, 1) if b == 0 or 2 < t < 7), 2, False
)
PATTERNS = [("Wan", LONG), ("SD3", BATCHED), ("Flux", SEPARATE), ("PixArt", BATCHED)]


def collect(name: str, calls: NetworkCalls, **settings: Any) -> LinearInputs:
    collector = LinearInputs(trace_of(name), calls, **settings)
    generate(name, calls, collector)
    return collector


class Inputs(Keeper):
    """Keeps what layers were given, ``[tokens, in]``, by site, step and branch."""

    def see(self, seen: Seen) -> None:
        value = seen.arguments[PRODUCTS[seen.node.target][0]]  # type: ignore[index]
        count = len(seen.moment.branches)
        for position, branch in enumerate(seen.moment.branches):
            half = value[position * len(value) // count : (position + 1) * len(value) // count]
            self.values[seen.node.name, seen.moment.step, branch] = half.reshape(-1, value.shape[-1]).double()


def weight_of(name: str, site: str) -> Tensor:
    """A layer's weight ``[out, in]`` from the model itself."""
    module = captured(name).model.get_submodule(site)
    assert isinstance(module, torch.nn.Linear)
    return module.weight.double()


@pytest.mark.parametrize(("name", "calls"), PATTERNS)
def test_measures_are_those_of_what_the_layers_were_given(name: str, calls: NetworkCalls) -> None:
    steps = len(calls.timesteps)
    anchors = anchor_steps(steps)
    collector = LinearInputs(trace_of(name), calls, rows=9)
    keeper = Inputs(collector.wanted)
    generate(name, calls, collector, keeper)
    tables = collector.tables()
    sites = linears(trace_of(name))
    assert [site.name for site, _ in sites] == list(tables)
    unseen = 0
    for site, node in sites:
        table, weight = tables[site.name], weight_of(name, site.name)
        facts = {"in_features": weight.shape[1], "out_features": weight.shape[0], "rows": site.rows}
        assert table.facts == facts and table.labels["anchor"] == anchors and table.labels["format"] == tuple(FORMATS)
        np.testing.assert_allclose(table["weight_max"].values, weight.abs().amax(0), rtol=1e-6)
        for step in range(steps):
            for branch in range(calls.branches):
                at = anchors.index(step) if step in anchors else None
                x = keeper.values.get((node.name, step, branch))
                if x is None:
                    unseen += 1
                    assert np.isnan(table["token_max"].values[0, step, branch]).all()
                    assert np.isnan(table["outlier"].values[0, step, branch])
                    assert np.isnan(table["channel_max"].values[0, step, branch]).all()
                    assert at is None or np.isnan(table["snr"].values[0, at, branch]).all()
                    continue
                channels = [max(abs(v) for v in column) for column in x.T.tolist()]
                largest = sorted(max(abs(v) for v in row) for row in x.tolist())
                quantiles = [quantile(largest, q) for q in QUANTILES]
                np.testing.assert_allclose(table["token_max"].values[0, step, branch], quantiles, rtol=1e-5)
                ratio = max(channels) / float(np.median(channels))
                assert table["outlier"].values[0, step, branch] == pytest.approx(ratio, rel=1e-5)
                np.testing.assert_allclose(table["channel_max"].values[0, step, branch], channels, rtol=1e-3)
                if at is None:
                    continue
                some = x[drawn(len(x), 9)]
                reference = some @ weight.T
                for position, product in enumerate(FORMATS.values()):
                    noise = (product(some, weight) - reference).square().sum()
                    expected = 10 * math.log10(reference.square().sum() / noise)
                    # float32 may round what lies between two codes to the other
                    assert table["snr"].values[0, at, branch, position] == pytest.approx(expected, abs=0.3)
    assert (unseen > 0) == (calls is LONG)


def quantile(ordered: list[float], share: float) -> float:
    """Linear between the two values beside it."""
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def test_every_measure_has_its_axes_and_type() -> None:
    collector = collect("Wan", ONE)
    assert collector.anchors == tuple(range(STEPS))  # few steps are all anchors
    for table in collector.tables().values():
        axes = {name: measure.axes for name, measure in table.measures.items()}
        assert axes == {
            "channel_max": ("prompt", "channel_step", "branch", "channel"),
            "token_max": ("prompt", "step", "branch", "quantile"),
            "outlier": ("prompt", "step", "branch"),
            "snr": ("prompt", "anchor", "branch", "format"),
            "weight_max": ("channel",),
        }
        types = {name: measure.values.dtype for name, measure in table.measures.items()}
        assert types == dict.fromkeys(types, np.dtype(np.float32)) | {"channel_max": np.dtype(np.float16)}
        assert {name for name, measure in table.measures.items() if measure.partial} == axes.keys() - {"weight_max"}


def test_ranges_of_channels_are_of_fewer_steps_where_they_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect("Wan", ONE)
    assert whole.channel_steps == tuple(range(STEPS))
    of_step = 2 * sum(table.facts["in_features"] for table in whole.tables().values())
    monkeypatch.setattr(linear_inputs, "CHANNEL_BYTES", 3 * of_step)
    some = collect("Wan", ONE)
    assert some.channel_steps == anchor_steps(STEPS, 3) != whole.channel_steps
    for site, table in some.tables().items():
        assert table.labels["channel_step"] == some.channel_steps
        values = whole.tables()[site]["channel_max"].values[:, list(some.channel_steps)]
        np.testing.assert_array_equal(table["channel_max"].values, values)
    monkeypatch.setattr(linear_inputs, "CHANNEL_BYTES", 1)
    assert LinearInputs(trace_of("Wan"), ONE).channel_steps == (0, STEPS - 1)


def test_layers_that_read_one_value_share_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = mock.Mock(side_effect=ranges)
    monkeypatch.setattr(linear_inputs, "ranges", counted)
    tables = collect("Wan", ONE).tables()
    # of a block's eight layers, the first attention's three read one value
    assert counted.call_count == STEPS * 4 * 6 and len(tables) == 4 * 8
    for name in ("to_k", "to_v"):
        other = tables[f"blocks.2.attn1.{name}"]["channel_max"].values
        np.testing.assert_array_equal(tables["blocks.2.attn1.to_q"]["channel_max"].values, other)


def test_values_with_strides_are_measured_as_their_copies_are() -> None:
    value = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)).permute(1, 0, 2)
    one, two = ranges(value), ranges(value.reshape(-1, 5))
    np.testing.assert_array_equal(one.channels, two.channels)
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_outlier_ratios_are_finite() -> None:
    assert outlier_ratio(np.array([1.0, 2.0, 30.0])) == 15
    assert outlier_ratio(np.zeros(4)) == 1
    assert outlier_ratio(np.array([0.0, 0.0, 3.0])) == linear_inputs.RATIO


def test_planted_outliers_and_precisions_are_told_apart() -> None:
    drawing = torch.Generator().manual_seed(0)
    x, w = torch.randn(128, 256, generator=drawing), torch.randn(96, 256, generator=drawing)
    calm = dict(zip(FORMATS, ratios(x, w), strict=True))
    x[:, 7] *= 100
    w[:, 7] *= 0.01  # so that the other channels still carry the product
    loud = dict(zip(FORMATS, ratios(x, w), strict=True))
    assert loud["int8_dynamic"] < calm["int8_dynamic"] - 15
    assert min(loud["int8_smooth"], loud["int8_rotated"]) > loud["int8_dynamic"] + 10
    assert calm["bfloat16"] > calm["int8_weight"] > calm["int8_dynamic"] > calm["fp8_e4m3"] > 20


def test_a_wide_layer_is_measured_in_some_of_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_inputs, "OUTPUTS", 10)
    measured = mock.Mock(side_effect=ratios)
    monkeypatch.setattr(linear_inputs, "ratios", measured)
    collect("Wan", ONE)
    assert {tuple(weight.shape) for _, weight in (call.args for call in measured.call_args_list)} == {
        (10, 24),
        (10, 32),
    }


def test_nothing_as_large_as_a_value_is_kept() -> None:
    trace = trace_of("Wan")
    collector = LinearInputs(trace, ONE)
    value = torch.randn(1, 4096, 24)
    for site, node in linears(trace):
        value = torch.randn(4096, site.in_features)
        weight = torch.randn(site.in_features, site.out_features)
        arguments = (torch.zeros(site.out_features), value, weight)
        collector.see(Seen(Moment(0, (0,)), node, arguments, {}, value @ weight))
    held = list(kept_by(collector))
    assert len(held) > 100
    assert max(tensor.untyped_storage().nbytes() for tensor in held) < 4096


def test_the_same_generation_gives_the_same_bits() -> None:
    one, two = (collect("SD3", BATCHED).tables() for _ in range(2))
    for site, table in one.items():
        for name, measure in table.measures.items():
            assert measure.values.tobytes() == two[site][name].values.tobytes()


def test_bad_input_is_refused_or_skipped_by_name() -> None:
    with pytest.raises(InputError, match="rows=0"):
        LinearInputs(trace_of("Wan"), ONE, rows=0)
    collector = LinearInputs(trace_of("Wan"), BATCHED)
    site, node = linears(trace_of("Wan"))[0]
    arguments = (torch.zeros(24), torch.zeros(31, 24), torch.zeros(24, 24))
    collector.see(Seen(Moment(0, (0, 1)), node, arguments, {}, torch.zeros(31, 24)))
    assert list(collector.reasons) == [f"{site.name}: inputs of shape [31, 24] do not divide into guidance branches"]
    assert not collector.tables()
