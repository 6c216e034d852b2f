"""The parts that the report is made of: pictures, samples, maps, curves, what was tried, where the time goes."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ditopt.errors import InputError
from ditopt.measures import Measure
from ditopt.profile import FeatureGram
from ditopt.report import svg
from ditopt.report.explained import Explained, Explanation, Rival
from ditopt.report.features import change_maps, lag_rows, similarity_panels
from ditopt.report.heatmaps import attention_maps
from ditopt.report.html import render_report
from ditopt.report.layers import layers_of, with_site
from ditopt.report.planted import corrections, growth, planted_in_rollouts
from ditopt.report.png import Bytes, heat_levels, heat_palette, png, resized
from ditopt.report.profiled import average, candidate_name, format_snr, good_patterns, role_counts, similarity, upper
from ditopt.report.samples import Samples, amplification, drawn, load_samples, psnr
from ditopt.report.tried import agreements, nearest_rivals, pareto, rank_correlation, trials_chart
from ditopt.report.work import roof, work_bars
from tests.report_pages import make_clips, make_plan, make_side
from tests.report_profiles import STEPS, make_profile

shades = st.integers(0, 255)


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_picture_is_read_back_as_it_was(height: int, width: int, random: Any) -> None:
    rng = np.random.default_rng(random.randrange(1 << 30))
    colours = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    with PIL.Image.open(io.BytesIO(png(colours))) as found:
        assert np.array_equal(np.asarray(found), colours)
    levels = rng.integers(0, 32, (height, width), dtype=np.uint8)
    with PIL.Image.open(io.BytesIO(png(levels, heat_palette()))) as found:
        assert np.array_equal(np.asarray(found.convert("RGB")), heat_palette()[levels])


@pytest.mark.parametrize("pixels", [np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2)), np.zeros((0, 2, 3), np.uint8)])
def test_what_is_no_picture_is_refused(pixels: Bytes) -> None:
    with pytest.raises(InputError, match="should be uint8"):
        png(pixels)


def test_the_palette_is_about_even_in_lightness() -> None:
    lightness = heat_palette() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all() and lightness[0] < 15 and lightness[-1] > 230
    assert heat_levels([0.0, 0.5, 2.0], 0.0, 1.0).tolist() == [0, 16, 31]


def test_resizing_keeps_means_and_leaves_gaps_out() -> None:
    values = np.arange(16.0).reshape(4, 4)
    assert resized(values, 2, 2).tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert resized(values, 4, 8)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    values[0, 0] = np.nan
    assert resized(values, 2, 2)[0, 0] == pytest.approx(10 / 3)
    assert resized(values, 3, 5).shape == (3, 5)


def test_samples_are_drawn_with_their_differences() -> None:
    clips = drawn(Samples(make_clips(), {}))
    assert list(clips) == ["dense", "optimised", "fewer_steps"]
    assert clips["dense"].difference is None and clips["dense"].psnr is None
    ours, fewer = clips["optimised"], clips["fewer_steps"]
    assert ours.psnr is not None and fewer.psnr is not None and ours.psnr > fewer.psnr + 10
    assert ours.louder == fewer.louder, "one amplification for all, so that they compare"
    assert (ours.frames, ours.height, ours.width) == (6, 32, 32)


def test_differences_are_amplified_up_to_what_can_be_shown() -> None:
    small = np.full((1, 4, 4, 3), 7, dtype=np.int16)
    assert amplification({"a": small}) == 32 and amplification({"a": small, "b": 8 * small}) == 4
    assert amplification({"a": 0 * small}) == 64
    clip = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(clip, clip) == math.inf and psnr(clip + np.uint8(1), clip) == pytest.approx(48.13, abs=0.01)


def test_large_samples_are_made_small_enough() -> None:
    clips = drawn(Samples(_noise(20, 240, 320), {}))
    assert sum(len(clip.uri) + len(clip.difference or "") for clip in clips.values()) < 3_000_000
    assert clips["dense"].frames == 16
    assert clips["dense"].width / clips["dense"].height == pytest.approx(320 / 240, abs=0.03)


def _noise(frames: int, height: int, width: int) -> dict[str, Bytes]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8) for name in ("dense", "optimised")}


def test_a_file_that_holds_no_samples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.samples.safetensors"
    with pytest.raises(InputError, match="not found; `ditopt optimize` writes"):
        load_samples(path)
    path.write_text("no samples")
    with pytest.raises(InputError, match="cannot be read as the samples"):
        load_samples(path)
    save_file({"optimised": make_clips()["dense"]}, path)
    with pytest.raises(InputError, match="holds no tensor 'dense'"):
        load_samples(path)
    save_file({"dense": make_clips()["dense"], "optimised": make_clips(edge=16)["dense"]}, path)
    with pytest.raises(InputError, match="tensor optimised: uint8"):
        load_samples(path)


def test_maps_have_a_tile_for_each_head() -> None:
    part = make_profile(branches=2).networks["transformer"]
    maps = attention_maps(part)
    assert maps is not None and maps.anchors == (0, 5, 9) and maps.branches == ("branch0", "branch1")
    assert [(group.kind, len(group.columns)) for group in maps.groups] == [("self", 8), ("cross", 8)]
    tile = maps.groups[0].columns[0].tiles[1]
    assert tile.role is not None and tile.role.role == "temporal"
    assert "sparsest pattern under 2% error: temporal, columns 0, rows 0: 40% of the work" in tile.tip
    assert "same pixel: 66" in tile.tip and ", uniform 1.0%" in tile.tip
    assert role_counts(part, "self") == {"spatial": 7, "temporal": 8, "local": 8, "idle": 1}


def test_maps_of_large_models_are_fewer_and_smaller() -> None:
    part = make_profile(layers=2, heads=2).networks["transformer"]
    small, large = attention_maps(part, room=100_000), attention_maps(part, room=1_500)
    assert small is not None and large is not None
    assert small.left_out == "" and large.left_out.startswith("steps ")
    sizes = [_size(each.groups[0].columns[0].tiles[0].uri) for each in (small, large)]
    assert sizes == [(48, 3 * 48), (12, 12)], "a strip of maps, one per step"


def _size(uri: str) -> tuple[int, int]:
    with PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as found:
        return found.size


def test_the_page_of_a_model_as_large_as_the_shipped_one_is_under_five_megabytes() -> None:
    profile = make_profile(branches=2)
    part, anchors = profile.networks["transformer"], tuple(range(6))
    rng = np.random.default_rng(0)
    noise = rng.dirichlet(np.ones(96) * 0.2, size=(1, 6, 2, 3, 96)).astype(np.float16)
    axes = ("prompt", "anchor", "branch", "head", "query_block", "key_block")
    tables = {
        site: replace(
            table, measures={**table.measures, "map": Measure(axes, noise)}, labels={**table.labels, "anchor": anchors}
        )
        for site, table in part.tables["attention"].items()
    }
    part = replace(part, tables={**part.tables, "attention": tables})
    text = render_report(None, None, None, "p.profile", replace(profile, networks={"transformer": part}))
    assert 500_000 < len(text) < 5_000_000


def test_similarity_is_the_cosine_to_the_step_before() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, STEPS, 5))
    part = make_profile(layers=1).networks["transformer"]
    gram = features @ features.transpose(0, 2, 1)
    del part.grams["step"]
    table = part.tables["features"]["step"]
    measures = {**table.measures, "gram": Measure(("prompt", "row", "column"), gram)}
    part.tables["features"]["step"] = replace(table, measures=measures)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    expected = (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(0)
    found = similarity(part)["step"]["step"]
    assert math.isnan(found[0]) and found[1:] == pytest.approx(expected)
    part.tables["features"]["step"] = table
    assert "step" not in similarity(part), "nothing is known of it"
    present = np.ones((1, STEPS), dtype=bool)
    part.grams["step"] = FeatureGram("step", STEPS, ("cond",), np.pad(gram, ((0, 0), (0, STEPS), (0, STEPS))), present)
    assert similarity(part)["step"]["step"][1:] == pytest.approx(expected), "latents are no output"


def test_features_are_drawn_by_kind_of_site() -> None:
    part = make_profile(layers=3).networks["transformer"]
    titles = [title for title, _ in similarity_panels(part)]
    assert titles[0] == "self-attention output (3 sites)" and titles[-1] == "the whole step (1 site)"
    lags, rows = lag_rows(part)
    assert lags == (1, 2, 3) and (rows[0].kind, rows[0].way) == ("self-attention output", "as it was")
    means, uppers = zip(*rows[0].errors, strict=True)
    assert means == pytest.approx((0.05, 0.1, 0.15), rel=0.05)
    assert all(mean < high < 1.1 * mean for mean, high in rows[0].errors if mean and high), uppers


def test_planted_errors_are_drawn_by_depth_and_against_prediction() -> None:
    part = make_profile(layers=3).networks["transformer"]
    drawing, kinds = growth(part)
    assert [kind for kind, _ in kinds] == ["self-attention output", "cross-attention output", "MLP output"]
    assert "MLP output, layer 2: 1." in str(drawing)
    found = planted_in_rollouts(part)
    assert found is not None and found.count == 9 and found.rank == 1.0
    (told,) = corrections(part.tables["sensitivity"]["rollouts"])
    assert told.startswith("noise at a module: measured 1.1 times the predicted, off by a factor of 1")
    bare = make_profile(tables=False).networks["transformer"]
    assert growth(bare) == (None, []) and planted_in_rollouts(bare) is None


def test_change_maps_show_frames_beside_each_other() -> None:
    part = make_profile(layers=1).networks["transformer"]
    step = change_maps(part)[0]
    assert step.site == "step" and step.frames == 3 and step.pictures[0][0] == 1, "step 0 has none before it"
    table = part.tables["tokens"]["step"]
    part.tables["tokens"]["step"] = replace(table, facts={})
    assert "geometry is not known" in change_maps(part)[0].note


def test_patterns_are_told_in_words() -> None:
    part = make_profile(layers=1).networks["transformer"]
    good = good_patterns(part.tables["patterns"]["blocks.0.attn1"])
    assert [each.name if each else None for each in good] == [
        "spatial, frames 0", "temporal, columns 0, rows 0", "skip",
    ]  # fmt: skip
    parts = [{"frames": 1, "pattern": "sink", "places": []}, {"pattern": "band", "width": 0.125}]
    assert candidate_name(json.dumps({"of": parts, "pattern": "union"})) == "sink, frames 1 + band, width 0.125"
    assert candidate_name("dense") == "dense"
    assert candidate_name('{"pattern": "skip", "rest": "pooled"}') == "skip, rest by means"
    first_order = {"pattern": "skip", "rest": {"taylor": 16}}
    assert candidate_name(json.dumps(first_order)) == "skip, rest to first order around means of 16"
    assert candidate_name('{"frames": 1, "pattern": "spatial", "rest": {"pooled": 16}}') == (
        "spatial, frames 1, rest by means of 16"
    )


def test_beside_means_stands_what_few_prompts_exceed() -> None:
    values = np.array([[[1.0, 3.0], [10.0, 10.0]], [[3.0, 5.0], [10.0, 10.0]]])  # of two prompts
    measure = Measure(("prompt", "head", "step"), values)
    assert average(measure, "head").tolist() == [3.0, 10.0]
    assert upper(measure, "head") == pytest.approx([2 + 0.9 * 2, 10.0])
    assert upper(measure, "head", quantile=0.0).tolist() == [2.0, 10.0]
    assert upper(Measure(("head",), np.array([1.0, 2.0])), "head").tolist() == [1.0, 2.0], "of no prompts, as it is"
    part = make_profile(layers=1).networks["transformer"]
    table = part.tables["linear"]["blocks.0.attn1.to_q"]
    snr = np.full((2, *table["snr"].values.shape[1:]), 30.0)
    snr[1] = 20.0
    part.tables["linear"] = {
        name: replace(table, measures={**table.measures, "snr": Measure(table["snr"].axes, values)})
        for name, values in (("one", snr), ("other", snr - 10))
    }
    found = format_snr(part)["int8_smooth"]
    assert (found.mean, found.worst, found.site) == (20.0, 15.0, "other")
    assert (found.lower, found.worst_lower) == pytest.approx((16.0, 11.0))


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto([(3, 9), (1, 2), (2, 1), (2, 5), (4, 9), (math.inf, 99)]) == [(1, 2), (2, 5), (3, 9)]


def test_the_search_is_drawn_over_seconds_where_they_are_known() -> None:
    found = Explained.model_validate(make_side())
    assert "seconds of a generation" in str(trials_chart(make_plan(), found, None))
    untimed = [trial.model_copy(update={"seconds": None}) for trial in found.trials]
    chart = str(trials_chart(make_plan(), found.model_copy(update={"trials": tuple(untimed)}), None))
    assert "network evaluations" in chart and "dense, 4 steps" in chart and "this plan" in chart
    assert trials_chart(make_plan(), Explained(), None) is None


def test_a_plan_that_is_exact_does_not_flatten_the_others() -> None:
    found = Explained.model_validate(make_side())
    exact = found.trials[0].model_copy(update={"psnr": 140.0})
    chart = str(trials_chart(make_plan(), found.model_copy(update={"trials": (*found.trials, exact)}), None))
    assert "exact but for rounding" in chart and ">120<" not in chart


def test_predictions_are_compared_with_what_was_measured() -> None:
    error, seconds = agreements(make_plan(), Explained.model_validate(make_side()))
    assert error.count == 8 and error.rank == 1.0 and seconds.count == 9
    assert "the plan, on held-out prompts: predicted 0.018, measured 0.021" in error.chart
    bare = make_plan().model_copy(update={"predicted": {}})
    assert [each.count for each in agreements(bare, Explained())] == [0, 0]


def test_ranks_are_correlated_with_ties_in_the_middle() -> None:
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == 1.0
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None and rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_equal_reasons_are_told_once() -> None:
    def made(step: int, reason: str) -> Explanation:
        rivals = (Rival(name="reuse", objective=2.0), Rival(name="compute", objective=1.0, reason=reason))
        return Explanation(step=step, site="step", chosen="fit2", rivals=rivals)

    found = nearest_rivals([made(1, "too slow"), made(2, "other"), made(3, "too slow")])
    assert [(one.title, one.rival, one.reason) for one in found] == [
        ("steps 1, 3, step", "compute", "too slow"), ("step 2, step", "compute", "other"),
    ]  # fmt: skip


def test_layers_are_named_by_what_speaks_of_them() -> None:
    plan, side = make_plan(), Explained.model_validate(make_side())
    layers = layers_of(plan, "transformer", side)
    assert layers == tuple(f"blocks.{i}" for i in range(8))
    assert layers_of(plan.model_copy(update={"rules": ()}), "transformer", Explained()) == ()
    explanations = side.explanations["transformer"]
    assert [one.site for one in with_site(explanations, "blocks.3", layers)] == ["blocks.2..5"]
    assert with_site(explanations, "blocks.6", layers) == []


def test_the_time_of_a_step_is_drawn_under_the_roof() -> None:
    side = Explained.model_validate(make_side())
    work = side.kernels["transformer"]
    bars = str(work_bars(work))
    assert "dense, attention: 0.05" in bars and "not accounted for" in bars and "70 ms" in bars
    assert side.roofline is not None
    drawing = str(roof(work, side.roofline))
    assert "dense, elementwise: 0.667 GFLOP/s at 0.333 FLOP per byte, 8% of what the roof allows" in drawing
    assert "float32 200 GFLOP/s" in drawing


def test_logarithmic_axes_hold_their_values() -> None:
    axis = svg.Axis.over([0.003, 4.0], "x", 0, 100, log=True)
    assert 0 <= axis.at(0.003) < axis.at(4.0) <= 100 and not axis.holds(0.0)
    assert axis.at(0.1) - axis.at(0.01) == pytest.approx(axis.at(1.0) - axis.at(0.1))
