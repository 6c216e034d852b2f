"""Merging profiles: prompts one behind the other, the rest by their numbers, and what cannot be merged is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditopt.errors import ProfileError
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.plan import SamplerPrint
from ditopt.profile import LATENCY, Profile, merge
from ditopt.profile_check import check_profile
from ditopt.profile_data import profile_arrays
from tests.made_profiles import TIMES, made_plan, made_profile, with_network

ONE, THREE = made_profile(1, prompts=1, weight=1.0), made_profile(2, prompts=3, weight=5.0)


def refused(one: Profile, two: Profile) -> str:
    with pytest.raises(ProfileError, match=r"^profiles cannot be merged: ") as caught:
        merge(one, two)
    return str(caught.value)


def test_what_is_per_prompt_is_put_one_behind_the_other() -> None:
    merged = merge(ONE, THREE)
    check_profile(merged)
    assert merged.prompts == ONE.prompts + THREE.prompts
    mine, first, second = (each.networks["transformer"] for each in (merged, ONE, THREE))
    for site, gram in mine.grams.items():
        np.testing.assert_array_equal(gram.values[:1], first.grams[site].values)
        np.testing.assert_array_equal(gram.values[1:], second.grams[site].values)
    for collector, site in (("attention", "blocks.1.attn1"), ("patterns", "a/b %c")):
        for name in ("entropy", "reuse", "map"):
            found = mine.tables[collector][site][name]
            assert found.axes == first.tables[collector][site][name].axes
            assert found.partial == (name == "reuse")
            np.testing.assert_array_equal(found.values[:1], first.tables[collector][site][name].values)
            np.testing.assert_array_equal(found.values[1:], second.tables[collector][site][name].values)
    assert mine.geometry == Geometry(2, 3, 4) and merged.plan == ONE.plan


def test_the_rest_is_averaged_by_the_numbers_of_prompts() -> None:
    """One prompt with 1, three with 5: 4 in the mean, 5 ** 0.75 in the logarithm."""
    merged = merge(ONE, THREE)
    network = merged.networks["transformer"]
    in_the_log = 5**0.75
    assert network.sensitivity == pytest.approx((in_the_log, 2 * in_the_log, in_the_log, in_the_log))
    assert network.range_weights == {"blocks.0..1": pytest.approx((in_the_log, in_the_log, 3 * in_the_log, in_the_log))}
    assert network.seconds == pytest.approx({"full": 4.0, "predicted": 0.4, "blocks.0..1": 1.6})
    assert merged.sample_norm == pytest.approx(40.0)
    assert merged.sample == pytest.approx({"peak": 8.0, "numel": 1000.0})
    weight = network.tables["attention"]["blocks.0.attn1"]["weight_max"]
    assert weight.values.dtype == np.float32
    np.testing.assert_allclose(weight.values, 4.0)
    assert merged.reasons == ("reason 1", "reason 2")


def same(one: Profile, two: Profile) -> None:
    mine, theirs = profile_arrays(one), profile_arrays(two)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert values.dtype == theirs[name].dtype
        np.testing.assert_allclose(values, theirs[name], rtol=1e-6)
    assert one.prompts == two.prompts and one.plan == two.plan and set(one.reasons) == set(two.reasons)
    assert one.sample_norm == pytest.approx(two.sample_norm) and one.sample == pytest.approx(two.sample)
    for name, network in one.networks.items():
        other = two.networks[name]
        for part in ("timesteps", "sigmas", "step_widths", "branch_weights", "geometry"):
            assert getattr(network, part) == getattr(other, part)
        assert network.sensitivity == pytest.approx(other.sensitivity)
        assert network.seconds == pytest.approx(other.seconds)
        assert network.range_weights.keys() == other.range_weights.keys()
        for site, weights in network.range_weights.items():
            assert weights == pytest.approx(other.range_weights[site])


@pytest.mark.parametrize("seed", range(5))
def test_merging_is_associative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (made_profile(int(rng.integers(3)), int(rng.integers(1, 5)), rng.uniform(0.5, 9)) for _ in range(3))
    b = with_network(b, tables={"attention": b.networks["transformer"].tables["attention"]})
    c = with_network(c, geometry=None, seconds={"full": 2.0, "bfloat16": 1.0}, range_weights={})
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(merge(a, b), c), merge(a, b, c))
    same(merge(merge(c, b), a), merge(c, b, a))
    assert merge(a) is a


def test_what_some_have_not_measured_is_left_out_by_name() -> None:
    network = THREE.networks["transformer"]
    poorer = with_network(
        THREE,
        tables={"attention": {"blocks.0.attn1": network.tables["attention"]["blocks.0.attn1"]}, "tokens": {}},
        seconds={"full": 5.0, "bfloat16": 1.0},
        range_weights={},
    )
    for merged in (merge(ONE, poorer), merge(poorer, ONE)):
        found = merged.networks["transformer"]
        assert {name: list(tables) for name, tables in found.tables.items()} == {"attention": ["blocks.0.attn1"]}
        assert found.seconds == pytest.approx({"full": 4.0}) and found.range_weights == {}
        told = "\n".join(merged.reasons)
        for what in (
            "tables of patterns", "tables of tokens", "attention tables of blocks.1.attn1", "seconds of predicted",
            "seconds of bfloat16", "range weights of blocks.0..1",
        ):  # fmt: skip
            assert f"transformer: {what} are left out: not in all profiles merged" in told
        check_profile(merged)


def test_seconds_of_another_machine_do_not_count() -> None:
    other = made_profile(2, prompts=3, weight=5.0, device="H100")
    merged = merge(ONE, other)
    assert merged.networks["transformer"].seconds == ONE.networks["transformer"].seconds
    assert merged.plan["device"]["device"] == "EPYC"
    assert "seconds measured on H100 are left out; those kept are of EPYC" in merged.reasons
    assert merge(other, ONE).networks["transformer"].seconds == other.networks["transformer"].seconds
    assert merged.networks["transformer"].sensitivity[0] == pytest.approx(5**0.75), "the rest counts"


def test_seconds_of_attention_are_kept_of_the_first_machine_and_averaged_on_one() -> None:
    def timed(profile: Profile, seconds: float) -> Profile:
        ((name, part),) = profile.networks.items()
        table = Table({"dense": Measure(("form",), np.array([seconds]))}, {"form": ("full",)})
        return replace(profile, networks={name: replace(part, tables={**part.tables, LATENCY: {"attn": table}})})

    def seconds_of(profile: Profile) -> float:
        return float(profile.networks["transformer"].tables[LATENCY]["attn"]["dense"].values[0])

    other = made_profile(2, prompts=3, weight=5.0, device="H100")
    merged = merge(timed(ONE, 1.0), timed(other, 5.0))
    assert seconds_of(merged) == 1.0
    assert merged.networks["transformer"].tables.keys() > {LATENCY}, "the rest is merged"
    assert seconds_of(merge(timed(ONE, 1.0), timed(THREE, 5.0))) == 4.0


def test_a_prompt_in_both_counts_twice_and_is_told() -> None:
    merged = merge(ONE, ONE)
    assert len(merged.prompts) == 2 and len(set(merged.prompts)) == 1
    assert (
        f"prompt {ONE.prompts[0]!r} is in more than one of the profiles merged and counts each time" in merged.reasons
    )
    assert not any("more than one" in reason for reason in merge(ONE, THREE).reasons)


def test_a_profile_that_says_less_takes_what_the_other_says() -> None:
    silent = replace(with_network(THREE, geometry=None), plan={}, sample={})
    for merged in (merge(ONE, silent), merge(silent, ONE)):
        assert merged.plan == ONE.plan and merged.networks["transformer"].geometry == Geometry(2, 3, 4)
        assert merged.sample == {}


def test_a_profile_from_a_file_merges_with_a_fresh_one(tmp_path: Path) -> None:
    """Facts that are tuples come back as lists."""
    THREE.save(tmp_path / "p.profile")
    same(merge(ONE, THREE), merge(ONE, Profile.load(tmp_path / "p.profile")))


def planned(**changes: Any) -> Profile:
    return replace(THREE, plan={**THREE.plan, **changes})


PLAN = THREE.plan
SAMPLER = SamplerPrint.model_validate(PLAN["sampler"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            planned(model={**PLAN["model"], "structure": "sha256:ff"}),
            "plan.model.structure: sha256:00ff in one, sha256:ff",
        ),
        (planned(model={**PLAN["model"], "class_name": "Other"}), "plan.model.class: Net in one, Other in the other"),
        (planned(sampler={**PLAN["sampler"], "class_name": "Heun"}), "plan.sampler.class: Euler in one, Heun"),
        (planned(sampler={**PLAN["sampler"], "guidance": 7.0}), "plan.sampler.guidance: 3.0 in one, 7.0 in the"),
        (planned(device={**PLAN["device"], "dtype": "bfloat16"}), "plan.device.dtype: float32 in one, bfloat16"),
        (
            planned(geometry={"transformer": (1, 4, 2, 9, 9)}),
            "plan.geometry.transformer (but for the batch): (4, 2, 6, 8) in one",
        ),
        (planned(settings={"height": 64, "width": 9}), "plan.settings.width: None in one, 9 in the other"),
        (
            replace(THREE, networks={"unet": THREE.networks["transformer"]}),
            "networks: ['transformer'] in one, ['unet']",
        ),
        (with_network(THREE, timesteps=(900.0, 600.0, 301.0, 100.0)), "transformer.timesteps[2]: 300.0 in one, 301.0"),
        (with_network(THREE, timesteps=TIMES[:2]), "the length of networks.transformer.timesteps: 4 in one, 2"),
        (with_network(THREE, step_widths=(0.3, 0.2, 0.2, 0.1)), "transformer.step_widths[1]: 0.3 in one, 0.2"),
        (with_network(THREE, branch_weights=(4.0, -3.0)), "transformer.branch_weights[0]: 3.0 in one, 4.0"),
        (with_network(THREE, sensitivity=(1.0,)), "the length of networks.transformer.sensitivity: 4 in one, 1"),
        (with_network(THREE, geometry=Geometry(1, 4, 6)), "transformer.geometry: geometry of 2 x 3 x 4 tokens in one,"),
        (with_network(THREE, grams={}), "sites of networks.transformer.grams: ['blocks.0..1', 'step'] in one, []"),
        (replace(THREE, sample={"peak": 1.0, "numel": 7.0}), "sample.numel: 1000.0 in one, 7.0 in the other"),
    ],
)
def test_what_cannot_be_merged_is_named(other: Profile, message: str) -> None:
    assert message in refused(ONE, other)


def test_profiles_of_other_weights_are_not_merged() -> None:
    one, two = (replace(made_profile(), weights={"transformer": f"sha256:{which}"}) for which in ("aa", "bb"))
    with pytest.raises(ProfileError, match="weights of transformer: sha256:aa in one, sha256:bb in the other"):
        merge(one, two)
    assert merge(one, made_profile()).weights == one.weights


def test_grams_and_tables_that_differ_are_named() -> None:
    network = THREE.networks["transformer"]
    step = network.grams["step"]
    for change, message in (
        ({"branches": ("a", "b")}, "grams.step.branches: ('cond', 'uncond') in one, ('a', 'b')"),
        ({"present": np.array([[True] * 4, [False] * 4])}, "grams.step.present: [[True, True, True, True]"),
        ({"has_latents": False}, "grams.step.has_latents: True in one, False"),
        ({"steps": 3}, "grams.step.steps: 4 in one, 3"),
    ):
        changed: Any = replace(step, **change)
        assert message in refused(ONE, with_network(THREE, grams={**network.grams, "step": changed}))
    table = network.tables["attention"]["blocks.0.attn1"]
    for other, message in (
        (
            Table(table.measures, {**table.labels, "anchor": (0, 2)}, table.facts),
            "axis 'anchor' is (0, 3) in one and (0, 2)",
        ),
        (
            Table(table.measures, table.labels, {**table.facts, "heads": 9}),
            "fact 'heads' is 3 in one and 9 in the other",
        ),
        (
            Table({}, table.labels, table.facts),
            "one has the measures entropy, map, reuse, weight_max, the other has not",
        ),
    ):
        told = refused(ONE, with_network(THREE, tables={"attention": {"blocks.0.attn1": other}}))
        assert "networks.transformer.tables.attention.blocks.0.attn1: " in told and message in told


def test_a_malformed_plan_is_told() -> None:
    with pytest.raises(ProfileError, match=r"field plan\.model: Field required"):
        merge(ONE, replace(THREE, plan={"ditopt": 1}))


def test_a_batch_of_another_size_is_no_other_geometry() -> None:
    other = planned(geometry={"transformer": (2, 4, 2, 6, 8)})
    assert merge(ONE, other).plan == ONE.plan


def test_growth_factors_of_nothing_stay_nothing() -> None:
    still = with_network(THREE, sensitivity=(0.0, 1.0, 1.0, 1.0))
    found = merge(still, still).networks["transformer"].sensitivity
    assert found[0] < 1e-300 and found[1:] == pytest.approx((1.0, 1.0, 1.0)) and all(map(math.isfinite, found))


def test_two_networks_are_merged_each() -> None:
    def two(profile: Profile) -> Profile:
        part = profile.networks["transformer"]
        networks = {"transformer": part, "transformer_2": replace(part, seconds={"full": 7.0})}
        return replace(profile, networks=networks, plan=made_plan(dict.fromkeys(networks, TIMES)))

    merged = merge(two(ONE), two(THREE))
    check_profile(merged)
    assert merged.networks["transformer_2"].seconds == {"full": 7.0}
    assert merged.networks["transformer"].seconds["full"] == pytest.approx(4.0)
