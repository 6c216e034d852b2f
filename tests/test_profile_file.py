"""Profile files: what is written is read back bit for bit, and damage is told by file and field."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ditopt.errors import ProfileError
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.plan import Plan
from ditopt.profile import NetworkProfile, Profile
from ditopt.profile_data import profile_arrays, profile_text
from ditopt.profile_file import KEY, fingerprint
from tests.made_profiles import TIMES, made_plan, made_profile, toy_profile, with_network


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made_profile().save(tmp_path / "p.profile")
    return tmp_path / "p.profile"


def refused(path: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        Profile.load(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def assert_same(one: Profile, two: Profile) -> None:
    assert profile_text(one) == profile_text(two)
    mine, theirs = profile_arrays(one), profile_arrays(two)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert values.dtype == theirs[name].dtype
        np.testing.assert_array_equal(values, theirs[name])


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], sign: bool = True) -> None:
    """Change what the file says (the envelope's mapping, the tensors), and sign it anew."""
    from ditopt.profile_data import canonical
    from ditopt.profile_file import _hash

    with safe_open(path, framework="numpy") as opened:
        data = json.loads(opened.metadata()[KEY])
    tensors = load_file(path)
    change(data, tensors)
    if sign and "profile" in data:
        data["fingerprint"] = _hash(canonical(data["profile"]), tensors)
    save_file(tensors, path, metadata={KEY: json.dumps(data)})


def test_what_is_written_is_read_back(file: Path) -> None:
    profile, loaded = made_profile(), Profile.load(file)
    assert_same(profile, loaded)
    network = loaded.networks["transformer"]
    table = network.tables["attention"]["blocks.1.attn1"]
    assert table["map"].values.dtype == np.float16 and table["entropy"].axes == ("prompt", "step", "branch", "head")
    assert table["reuse"].partial and not table["entropy"].partial
    assert table.labels["channel"] == ("a", "b", 3, 4, 5.5) and isinstance(table.labels["channel"][2], int)
    assert table.facts["sizes"] == [2, 3, 4]
    assert network.geometry == Geometry(2, 3, 4) and network.grams["step"].has_latents
    assert list(network.grams) == ["step", "blocks.0..1"] and network.tables["patterns"].keys() == {"a/b %c"}
    assert loaded.prompts == profile.prompts and loaded.reasons == ("reason 0",)
    assert loaded.plan == profile.plan and loaded.sample == profile.sample


def test_a_bare_profile_is_read_back(tmp_path: Path) -> None:
    """What an early profile has: no plan, no tables, no geometry."""
    bare = replace(with_network(made_profile(), tables={}, geometry=None), plan={}, sample={}, reasons=())
    bare.save(tmp_path / "p.profile")
    assert_same(bare, Profile.load(tmp_path / "p.profile"))


def test_equal_profiles_make_equal_files(tmp_path: Path, file: Path) -> None:
    made_profile().save(tmp_path / "again.profile")
    Profile.load(file).save(tmp_path / "loaded.profile")
    made_profile(weight=1.0000001).save(tmp_path / "other.profile")
    same, loaded, other = ((tmp_path / f"{n}.profile").read_bytes() for n in ("again", "loaded", "other"))
    assert file.read_bytes() == same == loaded != other
    assert fingerprint(made_profile()) == fingerprint(Profile.load(file)) != fingerprint(made_profile(seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.profile", "loaded.profile", "other.profile", "p.profile",
    ]  # fmt: skip


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FLOATS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements={"allow_infinity": False},
        )
    ),
    st.text(min_size=1, max_size=8),
    st.lists(st.text(max_size=4) | st.integers(-(2**60), 2**60) | FLOATS, max_size=4),
    st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    FLOATS,
)
def test_any_measure_name_label_fact_and_number_is_read_back(
    values: Any, name: str, labels: list[Any], facts: dict[str, Any], number: float
) -> None:
    measure = Measure(tuple(f"axis{i}" for i in range(values.ndim)), values, partial=True)
    table = Table({name: measure}, {"unused": tuple(labels)}, facts)
    profile = with_network(made_profile(), tables={"attention": {name: table}}, seconds={"blocks.0": number})
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "p.profile")
        loaded = Profile.load(Path(folder) / "p.profile")
    assert_same(profile, loaded)
    read = loaded.networks["transformer"].tables["attention"][name]
    assert read[name].values.tobytes() == values.tobytes() and read.facts == facts
    assert loaded.networks["transformer"].seconds["blocks.0"] == number


def test_no_file_no_profile(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such profile; make one with `ditopt profile" in refused(tmp_path / "none.profile")
    assert "is a folder" in refused(tmp_path)
    monkeypatch.setattr("ditopt.profile_file.MAX_BYTES", 100)
    assert "over the limit of 100" in refused(file)
    with pytest.raises(ProfileError, match=r"is not written: .* bytes are over the limit of 100"):
        made_profile().save(file)
    monkeypatch.undo()
    with pytest.raises(ProfileError, match=r"none/p\.profile: cannot be written.*choose a folder"):
        made_profile().save(tmp_path / "none" / "p.profile")


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_file_cut_short(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "was cut short" in refused(file)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip of pickles, say", "is not a profile, which is a safetensors file"),
        (b"short", "is not a profile"),
        (struct.pack("<Q", 4) + b"{no}", "is damaged: its header is no JSON"),
    ],
)
def test_no_safetensors_file(file: Path, contents: bytes, message: str) -> None:
    file.write_bytes(contents)
    assert message in refused(file)


def test_another_safetensors_file(file: Path) -> None:
    save_file({"weight": np.ones(3)}, file)
    assert "is a safetensors file, but not a profile: its metadata have no entry 'ditopt_profile'" in refused(file)
    save_file({"weight": np.ones(3)}, file, metadata={KEY: "[1]"})
    assert "expected a mapping, found list" in refused(file)
    save_file({"weight": np.ones(3)}, file, metadata={KEY: "{"})
    assert "no JSON" in refused(file)
    save_file({"weight": np.ones(3)}, file, metadata={KEY: "[" * 100_000})
    assert "no JSON" in refused(file)


def test_another_version(file: Path) -> None:
    rewrite(file, lambda data, _: data.update({KEY: 3}))
    assert "field ditopt_profile: format version 3 is not supported; upgrade ditopt" in refused(file)
    rewrite(file, lambda data, _: data.update({KEY: "old"}))
    assert "format version 'old' is not supported; expected 2" in refused(file)


def test_every_changed_byte_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(whole), 60).tolist(), len(whole) - 1]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(file)


def test_a_changed_tensor_or_field_is_told(file: Path) -> None:
    def change(data: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["transformer/grams/step/values"][0, 0, 0] += 1e-9

    rewrite(file, change, sign=False)
    assert "field fingerprint: is not that of the contents" in refused(file)
    made_profile().save(file)
    rewrite(file, lambda data, _: data["profile"].update(sample_norm=11.0), sign=False)
    assert "field fingerprint" in refused(file)


def test_missing_and_unknown_parts(file: Path) -> None:
    def expect(change: Callable[[dict[str, Any], dict[str, Any]], Any], *messages: str) -> None:
        made_profile().save(file)
        rewrite(file, change)
        found = refused(file)
        assert all(message in found for message in messages), found

    def network(data: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = data["profile"]["networks"]["transformer"]
        return found

    expect(lambda data, _: data.pop("profile"), "field profile: is missing")
    expect(lambda data, _: data["profile"].pop("prompts"), "field prompts: is missing")
    expect(lambda data, _: network(data).pop("sigmas"), "field networks.transformer.sigmas: is missing")
    expect(lambda data, _: network(data).update(extra=1), "field networks.transformer.extra")
    expect(lambda data, _: network(data).update(sigmas="x"), "networks.transformer.sigmas", "(found 'x')")
    expect(lambda data, _: network(data)["grams"]["step"].update(steps=0), "grams.step.steps", "(found 0)")
    expect(
        lambda data, _: network(data)["geometry"].update(frames=0),
        "networks.transformer.geometry", "frames, rows and columns have to be at least 1",
    )  # fmt: skip
    expect(
        lambda data, _: network(data)["tables"]["attention"]["blocks.0.attn1"]["measures"]["map"].update(axes=["a"]),
        "networks.transformer.tables.attention.blocks.0.attn1.map", "do not name the axes of shape [2, 2, 2, 3, 5]",
    )  # fmt: skip
    expect(
        lambda _, tensors: tensors.pop("transformer/grams/step/values"),
        "field networks.transformer.grams.step.values: its tensor is missing",
    )
    expect(lambda _, tensors: tensors.update(more=np.ones(2)), "tensor more: no field of the profile names it")
    expect(lambda _, tensors: tensors.update(more=np.ones(2, np.int64)), "tensor more: is I64; expected one of")


def gram_of(profile: Profile, **changes: Any) -> Profile:
    grams = profile.networks["transformer"].grams
    return with_network(profile, grams={**grams, "step": replace(grams["step"], **changes)})


def measure_of(profile: Profile, name: str, measure: Measure) -> Profile:
    table = profile.networks["transformer"].tables["attention"]["blocks.0.attn1"]
    changed = Table({**table.measures, name: measure}, table.labels, table.facts)
    return with_network(profile, tables={"attention": {"blocks.0.attn1": changed}})


def spoiled(values: Any, wrong: float = np.nan) -> Any:
    found = values.copy()
    found[(1,) * found.ndim] = wrong
    return found


GOOD = made_profile()
STEP = GOOD.networks["transformer"].grams["step"]
ENTROPY = GOOD.networks["transformer"].tables["attention"]["blocks.0.attn1"]["entropy"]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (replace(GOOD, networks={}), "field networks: there is none"),
        (replace(GOOD, prompts=()), "field prompts: there is none"),
        (replace(GOOD, prompts=("one",)), "grams.step.values: has shape [2, 12, 12]; 1 prompts, 2 branches"),
        (replace(GOOD, sample_norm=0.0), "field sample_norm: is 0.0; expected a positive number"),
        (replace(GOOD, sample_norm=np.inf), "field sample_norm: NaN or infinite"),
        (replace(GOOD, sample={"peak": -1.0}), "field sample.peak: is -1.0"),
        (with_network(GOOD, timesteps=()), "transformer.timesteps: there is none; a profile has at least one step"),
        (with_network(GOOD, branch_weights=()), "networks.transformer.branch_weights: there is none"),
        (with_network(GOOD, branch_weights=(1.0,)), "grams.step.branches: are cond, uncond; the network's weights are"),
        (with_network(GOOD, seconds={"full": 0.0}), "seconds.full: is 0.0; a step takes more than"),
        (with_network(GOOD, sensitivity=(1.0, 0.0, 1.0, 1.0)), "sensitivity: has 0.0; expected positive numbers"),
        (
            with_network(
                GOOD, tables={"attention": {"a": Table({"m": Measure(("x",), np.array([np.nan, np.inf]), True)})}}
            ),
            "tables.attention.a.m: NaN or infinite at x 1",
        ),
        (with_network(GOOD, sigmas=(0.5,)), "networks.transformer.sigmas: has 1 numbers; 4 steps need 4"),
        (with_network(GOOD, sensitivity=(1.0, np.nan, 1.0, 1.0)), "sensitivity: NaN or infinite at index 1"),
        (with_network(GOOD, branch_weights=(np.inf, 1.0)), "branch_weights: NaN or infinite at index 0"),
        (with_network(GOOD, seconds={"full": np.nan}), "seconds.full: NaN or infinite"),
        (with_network(GOOD, range_weights={"blocks.0..1": (1.0, np.nan, 1.0, 1.0)}), "range_weights.blocks.0..1: NaN"),
        (with_network(GOOD, range_weights={"blocks.7": (1.0,) * 4}), "range_weights.blocks.7: there is no Gram matrix"),
        (gram_of(GOOD, steps=3), "grams.step.steps: is 3; expected 4"),
        (gram_of(GOOD, site="blocks.9"), "grams.step.site: is 'blocks.9'; expected 'step'"),
        (gram_of(GOOD, has_latents=False), "grams.step.values: has shape [2, 12, 12]"),
        (gram_of(GOOD, values=spoiled(STEP.values)), "grams.step.values: NaN or infinite at index 1, index 1, index 1"),
        (gram_of(GOOD, values=STEP.values.astype(np.float32)), "grams.step.values: is float32; expected float64"),
        (gram_of(GOOD, present=np.ones((1, 4), bool)), "grams.step.present: has shape [1, 4]"),
        (gram_of(GOOD, present=np.ones((2, 4))), "grams.step.present: is float64; expected bool"),
        (
            measure_of(GOOD, "entropy", replace(ENTROPY, values=spoiled(ENTROPY.values))),
            "tables.attention.blocks.0.attn1.entropy: NaN or infinite at prompt 1, step 1, branch 1, head 1; only a "
            "measure that is partial",
        ),
        (
            measure_of(GOOD, "entropy", replace(ENTROPY, values=ENTROPY.values[:, :3])),
            "blocks.0.attn1.entropy: axis 'step' has 3 entries; expected 4, as in the profile",
        ),
        (
            measure_of(GOOD, "entropy", replace(ENTROPY, values=ENTROPY.values[:, :, :1])),
            "blocks.0.attn1.entropy: axis 'branch' has 1 entries; expected 2, as in the profile",
        ),
        (
            measure_of(GOOD, "map", Measure(("prompt", "anchor"), np.zeros((2, 3)))),
            "blocks.0.attn1.map: axis 'anchor' has 3 entries; expected 2, as labels",
        ),
        (
            measure_of(GOOD, "more", Measure(("head",), np.zeros(4))),
            "blocks.0.attn1.more: axis 'head' has 4 entries; expected 3, as in another measure",
        ),
        (
            measure_of(GOOD, "more", Measure(("head",), np.zeros(3, np.int32))),
            "blocks.0.attn1.more: is int32; expected one of float16, float32, float64",
        ),
        (
            with_network(GOOD, geometry=Geometry(9, 9, 9)),
            "networks.transformer.geometry: geometry of 9 x 9 x 9 tokens makes 729 tokens; attention blocks.0.attn1 "
            "has 24 queries",
        ),
        (replace(GOOD, plan={"ditopt": 1}), "field plan.model: Field required"),
        (
            replace(GOOD, plan=made_plan({"transformer": TIMES[:2]})),
            "field plan.sampler.timesteps.transformer: is 2 steps from 900 to 600, the profile was taken at 4 steps",
        ),
        (replace(GOOD, plan=made_plan({"unet": TIMES})), "plan.sampler.timesteps.transformer: is missing"),
        (replace(GOOD, plan={**GOOD.plan, "settings": {"a": np.nan}}), "field plan.settings"),
    ],
)  # fmt: skip
def test_what_no_profile_can_be_is_neither_written_nor_read(
    profile: Profile, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.profile"
    with pytest.raises(ProfileError) as caught:
        profile.save(path)
    assert message in str(caught.value) and "is not written" in str(caught.value)
    assert not list(tmp_path.iterdir())
    if any(what in message for what in ("NaN", "int32", "site: is", "plan.settings")):
        return  # no file can hold this
    monkeypatch.setattr("ditopt.profile_file.check_profile", lambda *given: None)
    profile.save(path)
    monkeypatch.undo()
    assert message in refused(path)


def test_numbers_that_are_not_finite_are_refused_when_read(file: Path) -> None:
    def expect(change: Callable[[dict[str, Any], dict[str, Any]], Any], message: str) -> None:
        made_profile().save(file)
        rewrite(file, change)
        assert message in refused(file)

    def spoil(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        return lambda _, tensors: tensors[name].__setitem__((0, 0, 0), np.inf)

    expect(spoil("transformer/grams/step/values"), "grams.step.values: NaN or infinite at index 0")
    expect(spoil("transformer/tables/attention/blocks.0.attn1/map"), "map: NaN or infinite at prompt 0, anchor 0")
    made_profile().save(file)
    with safe_open(file, framework="numpy") as opened:
        text = opened.metadata()[KEY]
    save_file(load_file(file), file, metadata={KEY: text.replace('"sample_norm":10.0', '"sample_norm":NaN')})
    assert "field profile: " in refused(file) and "expected finite numbers" in refused(file)


def test_attention_within_frames_alone_fits_a_geometry(tmp_path: Path) -> None:
    """A model may attend within frames and within pixels; and cross-attention says nothing of the geometry."""
    table = GOOD.networks["transformer"].tables["attention"]["blocks.0.attn1"]
    for facts in ({"kind": "self", "queries": 12}, {"kind": "self", "queries": 2}, {"kind": "cross", "queries": 7}):
        fitting = with_network(GOOD, tables={"attention": {"blocks.0.attn1": replace(table, facts=facts)}})
        fitting.save(tmp_path / "p.profile")
        assert Profile.load(tmp_path / "p.profile").networks["transformer"].geometry == Geometry(2, 3, 4)


def test_facts_that_are_no_json_are_not_written(tmp_path: Path) -> None:
    def save(facts: dict[str, Any]) -> None:
        table = Table({}, {"lag": (np.int64(1),)}, facts)  # type: ignore[dict-item]  # a collector may give one
        with_network(GOOD, tables={"attention": {"a": table}}).save(tmp_path / "p.profile")

    for facts, message in (({"x": object()}, "object"), ({"x": np.nan}, "not JSON compliant")):
        with pytest.raises(ProfileError, match=f"have to be plain JSON.*{message}"):
            save(facts)
    save({"count": np.int64(3), "share": np.float32(0.5)})
    table = Profile.load(tmp_path / "p.profile").networks["transformer"].tables["attention"]["a"]
    assert table.facts == {"count": 3, "share": 0.5} and table.labels == {"lag": (1,)}


def test_the_template_is_a_plan() -> None:
    plan = toy_profile().template()
    assert isinstance(plan, Plan) and plan.model.class_name == "Net" and not plan.rules
    assert replace(toy_profile(), plan={}).template() is None


def test_similarity_is_one_where_features_are_alike() -> None:
    network: NetworkProfile = toy_profile().networks["net"]
    similarity = network.grams["step"].similarity(network.branch_weights)
    assert similarity.shape == (12, 12)
    np.testing.assert_allclose(np.diag(similarity), 1.0)
    assert (np.abs(similarity) <= 1 + 1e-12).all() and similarity[3, 4] > similarity[0, 11]
