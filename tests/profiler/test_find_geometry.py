"""Where a model's tokens lie is found from config, positions, shapes and periods, and what is given is checked."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.profiler.find_geometry import find_geometry
from ditopt.profiler.periods import periods
from tests.profiler.planted import watched
from tests.trace.models import CASES, Captured, capture, interpreted

KNOWN = {
    "DiT": Geometry(1, 4, 4),
    "PixArt": Geometry(1, 4, 4),
    "SD3": Geometry(1, 4, 4, 6, text_first=False),
    "Flux": Geometry(1, 4, 4, 6, text_first=True),
    "Wan": Geometry(2, 4, 4),
    "CogVideoX": Geometry(2, 4, 4, 6, text_first=True),
    "LTX": Geometry(2, 4, 4),
    "HunyuanVideo": Geometry(2, 4, 4, 6, text_first=False),
}
PACKED = ("Flux", "LTX")
"""Models whose latents come as a sequence: no config tells how it lies."""


@functools.cache
def captured(name: str) -> Captured:
    model, inputs = CASES[name.split()[0]].make()
    if name == "Flux":
        at = torch.arange(16)
        inputs["img_ids"] = torch.stack([torch.zeros(16), at // 4, at % 4], 1).float()
    if name == "Flux of 192":
        inputs |= {"hidden_states": torch.randn(1, 192, 4), "img_ids": torch.randint(0, 4, (192, 3)).float()}
    with interpreted():
        return capture(model, inputs)


def found(name: str, **known: Any) -> tuple[Geometry | None, str]:
    variants = captured(name).program.variants
    return find_geometry(variants.trace, variants.latents, **known)


@pytest.mark.parametrize("name", CASES)
def test_configs_and_positions_tell_the_geometry_and_the_graph_where_text_stands(name: str) -> None:
    geometry, how = found(name, config=captured(name).model.config, arguments=captured(name).arguments)
    assert geometry == KNOWN[name]
    assert how.startswith("the positions in" if name in PACKED else "the config's patch size (1, 2, 2)")


@pytest.mark.parametrize("name", CASES)
def test_positions_of_a_real_call_tell_it_without_a_config(name: str) -> None:
    geometry, _ = found(name, arguments=captured(name).arguments)
    assert geometry == KNOWN[name]


@pytest.mark.parametrize("name", ["DiT", "HunyuanVideo", "CogVideoX"])
def test_positions_are_read_where_the_shape_of_the_latents_misleads(name: str) -> None:
    """A config that lies about patches does not fit the tokens, and is passed over."""
    geometry, how = found(name, config={"patch_size": 4}, arguments=captured(name).arguments)
    assert geometry == KNOWN[name]
    assert how.startswith("the positions in")


@pytest.mark.parametrize("name", ["DiT", "SD3", "Wan", "CogVideoX"])
def test_the_shape_of_the_latents_tells_it_where_nothing_else_does(name: str) -> None:
    geometry, how = found(name)
    assert geometry == KNOWN[name]
    assert "patches of 2 x 2" in how


def test_a_packed_image_whose_position_ids_are_not_known_has_no_geometry_but_by_periods() -> None:
    known = {"config": captured("Flux of 192").model.config, "arguments": captured("Flux of 192").arguments}
    geometry, why = found("Flux of 192", **known)
    assert geometry is None
    assert "the 192 tokens of transformer_blocks.0.attn and 6 of text" in why
    geometry, how = found("Flux of 192", by_distance=attention(Geometry(1, 16, 12)), **known)
    assert geometry == Geometry(1, 16, 12, 6, text_first=True)
    assert how == "periods of attention, 12 and 192"


def test_configs_are_mappings_or_objects_and_patches_numbers_or_tuples() -> None:
    class Config:
        patch_size = (2, 2)
        patch_size_t = None

    for config in (Config(), {"patch_size": 2}, {"patch_size": (1, 2, 2)}, {"patch_size": 2, "patch_size_t": 1}):
        geometry, how = found("Wan", config=config)
        assert geometry == KNOWN["Wan"]
        assert how.startswith("the config's patch size (1, 2, 2)")
    for strange in ({"patch_size": "2"}, {"patch_size": 0}, {"patch_size": (1, 2, 2, 2)}, {}, 3):
        assert found("Wan", config=strange)[1].startswith("latents of [1, 4, 2, 8, 8]")


def test_what_is_given_wins_and_gets_the_text_of_the_graph() -> None:
    assert found("Wan", given=(2, 2, 8), config=captured("Wan").model.config) == (Geometry(2, 2, 8), "given")
    assert found("SD3", given=(2, 8))[0] == Geometry(1, 2, 8, 6, text_first=False)
    assert found("CogVideoX", given=[2, 2, 8])[0] == Geometry(2, 2, 8, 6, text_first=True)
    assert found("CogVideoX", given=Geometry(2, 4, 4, 6, text_first=True))[0] == KNOWN["CogVideoX"]


@pytest.mark.parametrize(
    ("name", "given", "complaint"),
    [
        ("Wan", (2, 4, 5), "makes 40 tokens, self-attention blocks.0.attn1 has 32 tokens, none of them text"),
        ("Wan", (32,), r"has to be \(frames, rows, columns\), or \(rows, columns\)"),
        ("Wan", (2, 4, 4, 1), r"has to be \(frames, rows, columns\)"),
        ("Wan", (0, 4, 4), "at least 1"),
        ("SD3", (1, 2, 11), "22 tokens, of which the last 6 are text"),
        ("CogVideoX", Geometry(2, 4, 4, 6), "text last, self-attention .* the first 6 are text"),
        ("CogVideoX", Geometry(2, 4, 4, 5, text_first=True), "37 tokens, self-attention .* has 38"),
    ],
)
def test_what_is_given_and_does_not_fit_is_an_error(name: str, given: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        found(name, given=given)


def test_without_the_place_of_the_latents_only_a_full_geometry_is_taken() -> None:
    trace = captured("SD3").program.variants.trace
    geometry, why = find_geometry(trace, None, captured("SD3").model.config)
    assert geometry is None
    assert "which input holds the latents" in why
    full = Geometry(1, 4, 4, 6)
    assert find_geometry(trace, None, given=full) == (full, "given")
    with pytest.raises(InputError, match=r"where text stands is not known .* give Geometry\("):
        find_geometry(trace, None, given=(4, 4))


def attention(
    geometry: Geometry,
    seed: int = 0,
    noise: float = 0.3,
    near: float = 1.0,
    over_frames: float = 0.3,
    rows: bool = True,
) -> Table:
    """By distance: heads that look at what is near (in raster order alone without ``rows``) and at a pixel's frames."""
    places = np.stack([axis.ravel() for axis in np.indices(geometry.sizes)], 1)
    apart = np.abs(places[:, None] - places[None])
    order = np.arange(geometry.video)
    raster = np.abs(order[:, None] - order[None])
    local = np.exp(-((apart**2).sum(-1) if rows else raster**2) / 4.0)
    mass = 0.02 / geometry.video + near * local + over_frames * (apart[..., 1:].max(-1) == 0) / geometry.frames
    mass *= np.exp(noise * np.random.default_rng(seed).standard_normal(mass.shape))
    mass /= mass.sum(1, keepdims=True)
    labels = tuple(range(1 - geometry.video, geometry.video))
    values = np.array([np.diagonal(mass, distance).mean() for distance in labels])
    return Table({"by_distance": Measure(("prompt", "distance_bin"), values[None])}, {"distance_bin": labels})


PLANTED = [Geometry(4, 8, 12), Geometry(3, 16, 10), Geometry(6, 6, 9), Geometry(8, 8, 8), Geometry(5, 7, 11)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("geometry", PLANTED, ids=str)
def test_planted_periods_are_found(geometry: Geometry, seed: int) -> None:
    assert periods(attention(geometry, seed)) == (geometry.columns, geometry.columns * geometry.rows)


@pytest.mark.parametrize("geometry", [Geometry(1, 24, 16), Geometry(1, 20, 30)], ids=str)
def test_an_image_has_one_frame(geometry: Geometry) -> None:
    assert periods(attention(geometry)) == (geometry.columns, geometry.video)


@pytest.mark.parametrize("seed", range(20))
def test_noise_has_no_periods(seed: int) -> None:
    assert periods(attention(Geometry(4, 8, 12), seed, near=0, over_frames=0)) is None


@pytest.mark.parametrize("geometry", [Geometry(5, 12, 8), Geometry(6, 16, 16)], ids=str)
def test_the_attention_of_planted_heads_tells_the_geometry_of_a_model_that_says_nothing(geometry: Geometry) -> None:
    """Of the larger one the collector looks at a quarter of the queries."""
    roles = ["local", "temporal", "spatial", "global", "stripe"]
    variants, (attention, _) = watched(roles, geometry, None, steps=1)
    found, how = find_geometry(variants.trace, variants.latents, by_distance=attention.tables()["blocks.0"])
    assert found == geometry
    assert how.startswith("periods of attention")


def test_heads_that_look_everywhere_tell_no_geometry() -> None:
    variants, (attention, _) = watched(["global", "stripe"], Geometry(5, 12, 8), None, steps=1)
    table = attention.tables()["blocks.0"]
    assert find_geometry(variants.trace, variants.latents, by_distance=table)[0] is None


def test_too_few_tokens_show_no_periods() -> None:
    assert periods(attention(Geometry(1, 4, 4))) is None
    assert periods(attention(Geometry(2, 4, 12))) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_in_one_dimension_has_no_periods(seed: int) -> None:
    assert periods(attention(Geometry(4, 8, 12), seed, over_frames=0, rows=False)) is None


def test_bins_of_several_tokens_show_no_periods() -> None:
    table = attention(Geometry(4, 8, 12))
    halved = Measure(("prompt", "distance_bin"), table["by_distance"].values[:, ::2])
    labels = {"distance_bin": table.labels["distance_bin"][::2]}
    assert periods(table) is not None
    assert periods(Table({"by_distance": halved}, labels)) is None
