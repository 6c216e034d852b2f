"""Predictors refitted in closed loop: what they promise is what the compiled plan does, and it is nearer to dense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.measure import DensePath
from ditopt.search import solve_kept
from ditopt.steer import way_back
from ditopt.tune import Tuner
from ditopt.verify import VerifiedSearch
from tests.tiny import euler, make_model, prompt_features

PROMPTS = [f"prompt {i}" for i in range(6)]


def guided(model: nn.Module, prompt: str, seed: int) -> Tensor:
    """Euler with classifier-free guidance, one call a branch, without it in the first steps."""
    x = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(seed))
    cond, uncond = prompt_features(prompt), prompt_features("")
    for i in range(12):
        t = torch.tensor([1000.0 * (1 - i / 12)])
        velocity = model(x, t, cond)
        if i >= 3:
            velocity = 3 * velocity - 2 * model(x, t, uncond)
        x = x - velocity / 12
    return x


@pytest.fixture(params=[euler, guided])
def tuner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tuner:
    """The tuner of a profiled model, before it has tried anything."""
    seen: list[VerifiedSearch] = []

    def keep(self: VerifiedSearch) -> None:
        seen.append(self)

    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(VerifiedSearch, "__call__", keep)
    torch._dynamo.reset()
    ditopt.optimize(make_model(), PROMPTS, rollout=request.param, quality="fast")
    (found,) = seen[0]._tuners.values()
    return found


def test_the_compiled_plan_does_what_the_refit_promised(tuner: Tuner) -> None:
    assert tuner._steering is not None
    for count in (8, 5):
        plain = solve_kept(tuner.problem, count)
        refit, samples = tuner._steering(plain)
        assert refit.kept == plain.kept
        assert refit.variants <= 8
        tuner.evaluator.bind(refit.rules)
        for pair, promised in zip(tuner.pairs, samples, strict=True):
            torch.testing.assert_close(tuner.evaluator.adapter.checked_rollout(*pair), promised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_a_refit_plan_is_nearer_to_dense(tuner: Tuner) -> None:
    assert tuner._steering is not None
    plain = solve_kept(tuner.problem, 5)
    refit, _ = tuner._steering(plain)
    before, after = (tuner.evaluator.quality(found.rules, tuner.pairs)[0] for found in (plain, refit))
    assert after.rel_l2 < 0.8 * before.rel_l2
    assert after.psnr > before.psnr + 1


def test_the_way_back_of_euler_is_one_over_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0])
    outputs = torch.randn(4, 500, generator=generator)
    latents = [torch.randn(500, generator=generator)]
    for step in range(3):
        latents.append(latents[-1] + (sigmas[step + 1] - sigmas[step]) * outputs[step])
    widths = -np.diff(sigmas.numpy()).astype(float)
    found = way_back([DensePath(outputs, torch.stack(latents))], widths)
    np.testing.assert_allclose(found, -1 / widths, rtol=1e-4)
