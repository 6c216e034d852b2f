"""``profile_model`` as a user calls it: everything measured, bit for bit the same, resumed, saved and searched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import InputError, RolloutError
from ditopt.geometry import Geometry
from ditopt.offline import OfflineSearch
from ditopt.profile import LATENCY, Profile, merge
from ditopt.profile_file import fingerprint
from ditopt.search.heads import correction
from ditopt.target import Target
from ditopt.techniques import COLLECTORS
from tests.tiny import euler, make_model, tiny_wan
from tests.trace.models import interpreted

PROMPTS = ["a red ball", "a blue cube"]
STEPS = 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    with interpreted():
        yield
    torch._dynamo.reset()


def wan_loop(model: nn.Module, prompt: str, seed: int) -> Tensor:
    """Guided Euler steps of a video of 3 x 4 x 4 tokens, a branch after the other."""
    x = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    texts = [torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(len(p))) for p in (prompt, "")]
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for now, then in pairwise(sigmas):
        parts = [
            model(hidden_states=x, timestep=now[None] * 1000, encoder_hidden_states=text, return_dict=False)[0]
            for text in texts
        ]
        x = x + (then - now) * (3 * parts[0] - 2 * parts[1])
    return x


def loop(model: nn.Module, prompt: str, seed: int) -> Tensor:
    return euler(model, prompt, seed, steps=STEPS, tokens=32)


def taken(**settings: Any) -> Profile:
    return ditopt.profile_model(tiny_wan(), PROMPTS, rollout=wan_loop, quiet=True, **settings)


def timeless(profile: Profile) -> str:
    """The fingerprint of all that is not a time."""
    networks = {
        name: replace(part, seconds={}, tables={key: each for key, each in part.tables.items() if key != LATENCY})
        for name, part in profile.networks.items()
    }
    return fingerprint(replace(profile, networks=networks, plan={}))  # the plan names the loop, and tests have several


def test_everything_is_measured_and_a_profile_is_enough_to_search(tmp_path: Path) -> None:
    profile = taken()
    (network,) = profile.networks.values()
    assert network.geometry == Geometry(3, 4, 4)
    assert set(network.tables) == set(COLLECTORS)
    attention = network.tables["attention"]["blocks.0.attn1"]
    assert attention["entropy"].values.shape == (2, STEPS, 2, 2)
    assert np.isfinite(attention["entropy"].values).all()
    assert np.isfinite(attention["between_branches"].values).all()
    assert network.tables["attention"]["blocks.0.attn2"].facts["kind"] == "cross"
    assert {"blocks.0.ffn", "blocks.1.attn2", "blocks.0", "step"} <= set(network.grams)
    rollouts = network.tables["sensitivity"]["rollouts"]
    assert len(rollouts.labels["plant"]) == rollouts["measured"].size("plant") >= 3
    assert 0.1 < correction(rollouts)[0] < 10
    path = tmp_path / "p.profile"
    profile.save(path)
    loaded = Profile.load(path)
    assert fingerprint(loaded) == fingerprint(profile)
    found = OfflineSearch(loaded, Target.from_arguments(None, 0.05, None, None))()
    assert found is not None


def test_deep_models_and_silent_modules_are_profiled_to_the_end() -> None:
    model = tiny_wan(num_layers=10)
    with torch.no_grad():
        for parameter in model.blocks[4].ffn.net[2].parameters():
            parameter.zero_()
    profile = ditopt.profile_model(
        model, PROMPTS[:1], rollout=wan_loop, quiet=True, collect=["patterns", "sensitivity"], techniques=["reuse"]
    )
    (network,) = profile.networks.values()
    sensitivity = network.tables["sensitivity"]
    attention = [site for site in network.tables["patterns"] if site.endswith("attn1")]
    assert len(attention) == 10 > sum(site in sensitivity for site in attention), "not all were planted"
    planted = sensitivity["heads"]
    assert np.isfinite(planted["measured"].values).all() and (planted["predicted"].values > 0).all()


def test_attention_in_the_block_itself_is_profiled_to_the_end() -> None:
    profile = ditopt.profile_model(make_model(), PROMPTS, rollout=loop, quiet=True, geometry=Geometry(2, 4, 4))
    (network,) = profile.networks.values()
    assert "heads" in network.tables["sensitivity"], profile.reasons


def test_profiles_of_other_numbers_of_prompts_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.profiler.linear_inputs.CHANNEL_BYTES", 2000)
    monkeypatch.setattr("ditopt.profiler.detail.MAP_BYTES", 20_000)
    collect = ["attention", "linear"]
    one = ditopt.profile_model(tiny_wan(), PROMPTS[:1], rollout=wan_loop, quiet=True, collect=collect)
    more = ditopt.profile_model(tiny_wan(), ["x", "y", "z"], rollout=wan_loop, quiet=True, collect=collect)
    both = merge(one, more)
    (network,) = both.networks.values()
    assert len(both.prompts) == 4 and network.tables["linear"]["blocks.0.attn1.to_q"]["channel_max"].size("prompt") == 4


def test_the_same_seeds_give_the_same_profile_bit_for_bit() -> None:
    assert timeless(taken(resume=False)) == timeless(taken(resume=False))


def test_a_profile_that_was_interrupted_goes_on_where_it_stopped() -> None:
    whole = taken(resume=False)
    calls = 0

    def stopping(model: nn.Module, prompt: str, seed: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return wan_loop(model, prompt, seed)

    ran = []
    with suppress(KeyboardInterrupt):
        stop = 6
        ditopt.profile_model(tiny_wan(), PROMPTS, rollout=stopping, quiet=True)
    ran.append(calls)
    calls, stop = 0, 0
    resumed = ditopt.profile_model(tiny_wan(), PROMPTS, rollout=stopping, quiet=True)
    ran.append(calls)
    assert timeless(resumed) == timeless(whole)
    calls, stop = 0, 0
    ditopt.profile_model(tiny_wan(), PROMPTS, rollout=stopping, quiet=True)
    assert calls < ran[1] < ran[0] + ran[1], "what was finished is not generated again"


def test_what_is_not_asked_for_is_not_measured_and_the_model_is_given_back() -> None:
    model = make_model()
    profile = ditopt.profile_model(model, PROMPTS, rollout=loop, collect=["tokens"], geometry=(1, 4, 8), quiet=True)
    (network,) = profile.networks.values()
    assert set(network.tables) == {"tokens"}
    assert network.tables["tokens"]["step"].facts == {"frames": 1, "rows": 4, "columns": 8}
    assert model._compiled_call_impl is None
    plain = ditopt.profile_model(model, PROMPTS, rollout=loop, collect=[], quiet=True)
    assert next(iter(plain.networks.values())).tables == {}


def test_tokens_whose_geometry_nobody_knows_lie_in_a_line() -> None:
    profile = ditopt.profile_model(make_model(), PROMPTS[:1], rollout=loop, collect=["attention"], quiet=True)
    (network,) = profile.networks.values()
    assert network.geometry is None
    assert any("geometry of its tokens is not known" in reason for reason in profile.reasons)
    assert network.tables["attention"]["blocks.0"]["mass_in_frame"].values == pytest.approx(1.0), "all is one frame"


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"collect": ["colour"]}, InputError, "collect colour: unknown; choose from attention, patterns"),
        ({"techniques": ["magic"]}, InputError, "techniques.*magic"),
        ({"geometry": (2, 3)}, InputError, r"geometry=\(2, 3\): give \(frames, rows, columns\)"),
        ({"geometry": (2, 3, 4)}, InputError, r"24 tokens"),
    ],
)
def test_what_cannot_be_used_is_named(settings: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        ditopt.profile_model(make_model(), PROMPTS, rollout=loop, quiet=True, **settings)


def test_no_prompts_one_step_and_a_loop_that_never_calls_are_errors() -> None:
    with pytest.raises(InputError, match="there are no prompts"):
        ditopt.profile_model(make_model(), [], rollout=loop, quiet=True)
    with pytest.raises(InputError, match="runs for 1 step only"):
        ditopt.profile_model(
            make_model(), PROMPTS, rollout=lambda m, p, s: euler(m, p, s, steps=1, tokens=32), quiet=True
        )
    with pytest.raises(RolloutError, match="without calling the model"):
        ditopt.profile_model(make_model(), PROMPTS, rollout=lambda m, p, s: torch.zeros(1), quiet=True)
