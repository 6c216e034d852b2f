"""The profiler's numbers against plain arithmetic on the features themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditopt.adapters.base import CallLog, CallRecord, Sampler
from ditopt.calls import NetworkCalls, call_pattern
from ditopt.errors import RolloutError
from ditopt.profile import FeatureGram, NetworkProfile, Profile, merge
from ditopt.profiler import features
from ditopt.profiler.features import FeatureCollector, range_gram
from ditopt.profiler.run import step_widths
from ditopt.runtime.program import Observation

STEPS = 4
CALLS = NetworkCalls((1.0, 0.7, 0.4, 0.2), tuple((t, b) for t in range(STEPS) for b in range(2)), 2, False)


def collect(calls: NetworkCalls, size: int) -> tuple[FeatureCollector, dict[str, torch.Tensor]]:
    """A collector that has seen a generation of random features, and the features ``[steps, branches, size]``."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(calls.timesteps), calls.branches, size)
    seen = {name: torch.randn(shape, generator=generator) for name in ("out", "edge0", "edge1", "edge2")}
    latents = torch.randn(len(calls.timesteps), size, generator=generator)
    collector = FeatureCollector(calls, 0, (1, 1, 1))
    for step, branch in calls.calls:
        edges = [seen[f"edge{i}"][step, branch] for i in range(3)]
        collector(Observation([latents[step]], [seen["out"][step, branch]], edges))
    seen["latents"] = latents
    return collector, seen


def test_gram_of_outputs_and_latents_is_that_of_the_features() -> None:
    collector, seen = collect(CALLS, 50)
    assert collector.complete
    rows = torch.cat([seen["out"][:, 0], seen["out"][:, 1], seen["latents"]]).double()
    np.testing.assert_allclose(collector.step_gram(), (rows @ rows.T).numpy(), rtol=1e-6)
    assert collector.has_latents


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (0, 1)])
def test_range_gram_is_that_of_the_residuals(first: int, last: int) -> None:
    collector, seen = collect(CALLS, 50)
    residual = seen[f"edge{last + 1}"] - seen[f"edge{first}"]
    rows = torch.cat([residual[:, 0], residual[:, 1]]).double()
    np.testing.assert_allclose(range_gram(collector.edge_gram(), first, last), (rows @ rows.T).numpy(), atol=1e-4)


def test_last_block_may_end_in_fewer_streams_than_the_others() -> None:
    """The last block of an MM-DiT gives no text; of ranges of the others the Gram matrices are as they were."""
    collector = FeatureCollector(CALLS, 0, (2, 2, 1))
    generator = torch.Generator().manual_seed(1)
    residuals = torch.zeros(2, STEPS, 70)
    for step, branch in CALLS.calls:
        image, text, latents = (torch.randn(3, size, generator=generator) for size in (50, 20, 30))
        streams = [image[0], text[0], image[1], text[1], image[2]]
        collector(Observation([latents[0]], [latents[1]], streams))
        residuals[branch, step] = torch.cat([image[1] - image[0], text[1] - text[0]])
    rows = residuals.flatten(0, 1).double()
    np.testing.assert_allclose(range_gram(collector.edge_gram(), 0, 0), (rows @ rows.T).numpy(), atol=1e-4)
    assert collector.comparable(0, 0) and not collector.comparable(0, 1) and not collector.comparable(1, 1)


def test_guided_gram_is_that_of_the_guided_output() -> None:
    collector, seen = collect(CALLS, 50)
    gram = FeatureGram("step", STEPS, CALLS.branch_names, collector.step_gram()[None], collector.present(), True)
    guided = 4 * seen["out"][:, 0] - 3 * seen["out"][:, 1]
    rows = torch.cat([guided, seen["latents"]]).double()
    np.testing.assert_allclose(gram.effective(CALLS.weights(4.0))[0], (rows @ rows.T).numpy(), rtol=1e-5, atol=1e-5)


def test_drawn_coordinates_estimate_the_error_of_a_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MAX_COORDINATES", 4096)
    collector, seen = collect(CALLS, 60_000)
    error = np.array([1.0, -2.0, 1.0, 0.0])
    estimate = error @ collector.step_gram()[:STEPS, :STEPS] @ error
    exact = float((seen["out"][0, 0] - 2 * seen["out"][1, 0] + seen["out"][2, 0]).double().square().sum())
    assert estimate == pytest.approx(exact, rel=0.1)


def records(*calls: tuple[float, int]) -> CallLog:
    found = [CallRecord("transformer", timestep, identity, 1) for timestep, identity in calls]
    return CallLog(found, "timestep", "hidden_states", "encoder_hidden_states", (), [{}] * len(found))


def test_separate_branches_and_a_guidance_interval() -> None:
    part = call_pattern(records((9, 1), (6, 1), (6, 2), (3, 1), (3, 2), (1, 1)), 4.0)["transformer"]
    assert part.timesteps == (9.0, 6.0, 3.0, 1.0)
    assert part.calls == ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0))
    assert part.weights(4.0) == (4.0, -3.0)


def test_repeated_values_of_one_branch_are_steps_of_their_own() -> None:
    part = call_pattern(records((9, 1), (6, 1), (6, 1), (3, 1)), 1.0)["transformer"]
    assert part.calls == ((0, 0), (1, 0), (2, 0), (3, 0))


def test_batched_guidance_is_two_branches_in_one_call() -> None:
    log = records((9, 1), (6, 1))
    log.records[:] = [CallRecord("transformer", r.timestep, 1, 2) for r in log.records]
    part = call_pattern(log, 4.0)["transformer"]
    assert part.batched
    assert part.weights(4.0) == (-3.0, 4.0)


def test_no_calls_is_an_error() -> None:
    with pytest.raises(RolloutError, match="without calling the model"):
        call_pattern(CallLog(), 1.0)


def test_step_widths_reach_from_network_to_network() -> None:
    high = NetworkCalls((1.0, 0.8), ((0, 0), (1, 0)), 1, False)
    low = NetworkCalls((0.5, 0.1), ((0, 0), (1, 0)), 1, False)
    widths = step_widths({"transformer": high, "transformer_2": low}, Sampler("Euler", 1.0, {}))
    sigmas = [1.0, 0.8, 1.0, 0.2]  # each network's own scale, where the scheduler tells no sigmas
    assert len(widths["transformer"]) == 2
    assert all(width > 0 for part in widths.values() for width in part), sigmas
    told = Sampler("Euler", 1.0, {1.0: 1.0, 0.8: 0.8, 0.5: 0.5, 0.1: 0.1})
    widths = step_widths({"transformer": high, "transformer_2": low}, told)
    assert widths["transformer"] == pytest.approx((0.2, 0.3))
    assert widths["transformer_2"] == pytest.approx((0.4, 0.1))


def test_profiles_merge_by_prompts() -> None:
    def profile(prompts: int, value: float) -> Profile:
        gram = FeatureGram("step", 1, ("all",), np.full((prompts, 1, 1), value), np.ones((1, 1), bool))
        network = NetworkProfile((1.0,), (1.0,), (1.0,), (value,), (1.0,), {"step": gram}, {"full": value})
        return Profile({"transformer": network}, tuple(map(str, range(prompts))), value)

    merged = merge(profile(1, 1.0), profile(3, 5.0))
    assert merged.networks["transformer"].grams["step"].values.ravel().tolist() == [1, 5, 5, 5]
    assert merged.networks["transformer"].sensitivity == pytest.approx((5.0**0.75,)), "the mean of the logarithm"
    assert merged.sample_norm == 4.0
    narrow = profile(1, 1.0)
    narrow.networks["transformer"].seconds["bfloat16"] = 0.5
    assert merge(narrow, profile(3, 5.0)).networks["transformer"].seconds == {"full": 4.0}, "timed in one of them only"
