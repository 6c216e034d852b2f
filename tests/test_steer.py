"""Predictors refitted in closed loop: what they promise is what the compiled plan does, and it is nearer to dense."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.decisions import Dense, Fit
from ditopt.measure import DensePath
from ditopt.profile import branch_shares
from ditopt.profiler.features import FeatureCollector
from ditopt.profiler.moves import sampler_moves, second_order
from ditopt.profiler.observe import observed
from ditopt.profiler.run import ROUNDED, whole_program
from ditopt.quality import compare
from ditopt.runtime.schedule import bind
from ditopt.search import Solution, solve_kept
from ditopt.sites import STEP
from ditopt.steer import Steering
from ditopt.target import Target
from ditopt.tune import NEAR, Tuner
from ditopt.verify import VerifiedSearch
from tests.tiny import TinyDiT, euler, make_model, prompt_features

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


class Conditioned(nn.Module):
    """Takes the condition as two channels behind the four noisy ones, as image-to-video models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = TinyDiT(channels=6)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(2).transpose(1, 2)
        out: Tensor = self.net(tokens, timestep, encoder_hidden_states).transpose(1, 2).unflatten(2, (8, 8))
        return out[:, :4]


def conditioned(model: nn.Module, prompt: str, seed: int) -> Tensor:
    """Euler from noise beside a condition that stays."""
    noise = torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
    x, condition = noise[:, :4], noise[:, 4:]
    text = prompt_features(prompt)
    for i in range(12):
        x = x - model(torch.cat([x, condition], 1), torch.tensor([1000.0 * (1 - i / 12)]), text) / 12
    return x


@pytest.fixture(params=[euler, guided, conditioned])
def tuner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tuner:
    """The tuner of a profiled model, before it has tried anything."""
    seen: list[VerifiedSearch] = []

    def keep(self: VerifiedSearch) -> None:
        seen.append(self)

    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(VerifiedSearch, "__call__", keep)
    torch._dynamo.reset()
    model = Conditioned().eval() if request.param is conditioned else make_model()
    ditopt.optimize(model, PROMPTS, rollout=request.param, quality="fast")
    (found,) = seen[0]._tuners.values()
    return found


def test_the_compiled_plan_does_what_the_refit_promised(tuner: Tuner) -> None:
    assert tuner._steering is not None
    for count, share in ((8, None), (5, None), (8, 0.5)):
        plain = solve_kept(tuner.problem, count)
        refit, samples = replace(tuner._steering, problem=replace(tuner.problem, second_order=share))(plain)
        assert refit.kept == plain.kept
        plan = tuner.evaluator.bind(refit.rules)
        bound = bind(plan, tuner.network, {})
        assert len(bound.variants) <= refit.variants <= 8
        led = [step for step, each in enumerate(bound.steps) if each.second_order]
        groups = tuner.problem.groups
        alike = [(one, two) for one, two in pairwise(plain.kept) if groups[one] == groups[two]]
        assert led == ([] if share is None else [step for _, step in alike if step + 1 < tuner.problem.steps])
        for pair, promised in zip(tuner.pairs, samples, strict=True):
            torch.testing.assert_close(tuner.evaluator.adapter.checked_rollout(*pair), promised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuner", [euler, guided], indirect=True)
def test_a_refit_plan_is_nearer_to_dense(tuner: Tuner) -> None:
    assert tuner._steering is not None
    plain = solve_kept(tuner.problem, 5)
    refit, _ = replace(tuner._steering, paths=tuner.evaluator.paths[tuner.network])(plain)
    before, after = (tuner.evaluator.quality(found.rules, tuner.pairs)[0] for found in (plain, refit))
    assert after.rel_l2 < 0.8 * before.rel_l2
    assert after.psnr > before.psnr + 1


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_a_prompt_of_little_weight_is_hardly_fitted(tuner: Tuner) -> None:
    steering, plain = tuner._steering, solve_kept(tuner.problem, 5)
    assert steering is not None
    factors = {}
    first, *others = tuner.pairs
    for name, changed in {
        "alone": replace(steering, pairs=[first]),
        "weighted": replace(steering, weights=dict.fromkeys(others, 1e-9)),
        "even": steering,
    }.items():
        fits = [rule.do for rule in changed(plain)[0].rules if isinstance(rule.do, Fit)]
        factors[name] = np.concatenate([fit.coefficients[step] for fit in fits for step in sorted(fit.coefficients)])
    np.testing.assert_allclose(factors["weighted"], factors["alone"], atol=1e-3)
    assert np.abs(factors["even"] - factors["alone"]).max() > 0.01


@pytest.mark.parametrize("tuner", [guided], indirect=True)
def test_branch_weights_are_those_of_the_loop(tuner: Tuner) -> None:
    weights = tuner.profile.networks[tuner.network].branch_weights
    assert weights == pytest.approx((3.0, -2.0), abs=1e-3)


@pytest.mark.parametrize("tuner", [conditioned], indirect=True)
def test_leading_channels_of_the_input_are_the_latents(tuner: Tuner) -> None:
    assert tuner._steering is not None
    paths = tuner.evaluator.paths[tuner.network]
    assert all(path.latents.shape == path.outputs.shape == (12, 4 * 64) for path in paths.values())
    refit, _ = tuner._steering(solve_kept(tuner.problem, 5))
    assert any(choice.candidate and choice.candidate.latents for choice in refit.choices["step"])


def test_moves_of_euler_are_its_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0])
    outputs = torch.randn(4, 500, generator=generator)
    latents = [torch.randn(500, generator=generator)]
    for step in range(3):
        latents.append(latents[-1] + (sigmas[step + 1] - sigmas[step]) * outputs[step])
    widths = -np.diff(sigmas.numpy()).astype(float)
    moves = sampler_moves([DensePath(outputs, torch.stack(latents))], widths)
    assert moves is not None and moves.is_euler
    np.testing.assert_allclose(moves.back, -1 / widths, rtol=1e-4)
    np.testing.assert_allclose(moves.b, -widths, rtol=1e-4)


def test_moves_of_a_two_step_solver_are_not_of_first_order() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 500, generator=generator) + 0.3 * torch.randn(6, 500, generator=generator).cumsum(0)
    latents = [torch.randn(500, generator=generator)]
    for step in range(5):
        past = outputs[max(step - 1, 0)]
        latents.append(latents[-1] - (1.5 * outputs[step] - 0.5 * past) / 6)
    moves = sampler_moves([DensePath(outputs, torch.stack(latents))], [1 / 6] * 6)
    assert moves is not None and not moves.is_euler


@pytest.mark.parametrize(("second", "expected"), [(0.0, True), (0.5, False)])
def test_moves_are_told_apart_through_rounded_latents(second: float, expected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 4000, generator=generator) + 0.2 * torch.randn(30, 4000, generator=generator).cumsum(0)
    latents = [torch.randn(4000, generator=generator)]
    for step in range(29):
        past = outputs[max(step - 1, 0)]
        latents.append(latents[-1] - ((1 + second) * outputs[step] - second * past) / 30)
    entered = torch.stack(latents).bfloat16().float()
    moves = sampler_moves([DensePath(outputs, entered)], [1 / 30] * 30, ROUNDED * torch.finfo(torch.bfloat16).eps)
    assert moves is not None and moves.is_euler is expected
    plain = sampler_moves([DensePath(outputs, entered)], [1 / 30] * 30)
    assert plain is not None and not plain.is_euler, "what is left is more than a sampler of first order leaves"


def test_noisy_moves_are_not_taken_for_rounded_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, latents = torch.randn(30, 4000, generator=generator), [torch.randn(4000, generator=generator)]
    for step in range(29):
        latents.append(latents[-1] - outputs[step] / 30 + 0.003 * torch.randn(4000, generator=generator))
    entered = torch.stack(latents).bfloat16().float()
    moves = sampler_moves([DensePath(outputs, entered)], [1 / 30] * 30, ROUNDED * torch.finfo(torch.bfloat16).eps)
    assert moves is not None and not moves.is_euler


def test_moves_that_turn_are_not_eulers_on_a_flow() -> None:
    """As of DDIM on a model that predicts v: every step is a rotation, of first order though it is."""
    generator, angle = torch.Generator().manual_seed(0), 0.2
    outputs = torch.randn(6, 500, generator=generator)
    latents = [torch.randn(500, generator=generator)]
    for step in range(5):
        latents.append(math.cos(angle) * latents[-1] - math.sin(angle) * outputs[step])
    moves = sampler_moves([DensePath(outputs, torch.stack(latents))], [angle] * 6)
    assert moves is not None and moves.missed < 1e-4 and not moves.is_euler
    np.testing.assert_allclose(moves.back, -1 / math.tan(angle), rtol=1e-4)


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_the_second_order_path_is_nearer_to_a_converged_run(tuner: Tuner) -> None:
    assert tuner._steering is not None
    network, program = tuner.network, whole_program(tuner.evaluator.sessions[tuner.network])
    part = tuner.profile.networks[network]
    pair = tuner.pairs[0]
    calls = tuner.evaluator.calls[network]
    collector = FeatureCollector(calls, program.variants.latents, ())
    observed(tuner.evaluator, pair, [(program, collector)])
    shares = branch_shares(part.grams[STEP].present, part.branch_weights)
    dense = collector.path(shares)
    moves = sampler_moves([dense], part.step_widths)
    assert moves is not None and moves.is_euler
    finer = second_order(tuner.evaluator, program, calls, shares, moves, pair).path
    total = len(dense.latents)
    entered: list[Tensor] = []
    model = make_model()
    model.register_forward_pre_hook(lambda _, given: entered.append(given[0].flatten()))
    with torch.no_grad():
        euler(model, *pair, steps=16 * total)
    converged = torch.stack(entered[::16])
    missed = [(path.latents[-1] - converged[-1]).norm() for path in (dense, finer)]
    assert missed[1] < 0.3 * missed[0]
    torch.testing.assert_close(tuner.evaluator.paths[network][pair].latents, dense.latents)
    torch.testing.assert_close(tuner.evaluator.finer[pair].path.latents, finer.latents)


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_an_aimed_plan_is_nearer_to_the_second_order_samples(tuner: Tuner) -> None:
    plain = tuner._improve(solve_kept(tuner.problem, 6))
    aimed = tuner.aim(plain, 1.0)
    assert aimed is not None and aimed.kept == plain.kept
    before, after, dense = tuner.finer_of(plain), tuner.finer_of(aimed), tuner.finer_psnr
    assert before is not None and after is not None and dense is not None
    assert after > before + 1
    finer = [tuner.evaluator.finer[pair].sample for pair in tuner.pairs]
    tuner.evaluator.bind(aimed.rules)
    samples = [tuner.evaluator.adapter.checked_rollout(*pair) for pair in tuner.pairs]
    assert compare(samples, finer).psnr == pytest.approx(after, abs=0.05), "the compiled plan does what was promised"


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_a_plan_that_computes_every_step_is_aimed_too(tuner: Tuner) -> None:
    plain = solve_kept(tuner.problem, tuner.problem.steps)
    assert "are not known" in str(tuner.obstacle(plain))
    tuner._measure(plain.rules)
    assert not tuner.predicts(plain) and tuner.obstacle(plain) is None
    assert tuner.finer_of(plain) == pytest.approx(tuner.finer_psnr, abs=0.05), "it is the dense model"
    aimed = tuner.aim(plain, 0.0, 1.0)
    before, after = tuner.finer_of(plain), tuner.finer_of(aimed)
    assert aimed is not None and aimed.kept == plain.kept and before is not None and after is not None
    assert after > before + 1
    samples, _ = tuner.evaluator.samples(aimed.rules, tuner.pairs)
    assert samples is not None
    finer = [tuner.evaluator.finer[pair].sample for pair in tuner.pairs]
    assert compare(samples, finer).psnr == pytest.approx(after, abs=0.05), "the compiled plan does what was promised"


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_what_cannot_be_aimed_has_its_reason(tuner: Tuner) -> None:
    plain = solve_kept(tuner.problem, 6)
    ranged = replace(plain, draft=replace(plain.draft, ranges={"blocks.0..1": None}))  # type: ignore[dict-item]
    assert "predicts ranges of blocks" in str(tuner.obstacle(ranged))
    tuner._steering = None
    assert "fits are left out" in str(tuner.obstacle(plain)) and tuner.aim(plain, 0.5) is None


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_a_plan_that_would_need_too_many_graphs_is_not_aimed(tuner: Tuner) -> None:
    plain = tuner._improve(solve_kept(tuner.problem, 6))
    tuner.max_variants = plain.variants
    assert tuner.aim(plain, 0.5, 0.5) is None and tuner.aim(plain, 0.5) is not None


@pytest.mark.parametrize("tuner", [euler], indirect=True)
def test_prompts_far_from_the_second_order_samples_weigh_less(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Steering] = []

    def refit(steering: Steering, solution: Solution) -> Solution:
        seen.append(steering)
        return solution

    monkeypatch.setattr(tuner, "_refit", refit)
    finer, plain = tuner.evaluator.finer, solve_kept(tuner.problem, 6)
    for distances in ((1.0, 0.5, 0.0), (0.0, 0.0, 0.0)):
        for pair, distance in zip(tuner.pairs, distances, strict=False):
            finer[pair] = replace(finer[pair], sample=tuner.evaluator.references[pair] + distance)
        tuner.aim(plain, 1.0)
    first, second = ([steering.weights[pair] for pair in tuner.pairs[:3]] for steering in seen)
    assert first == pytest.approx([1.0, 4.0, 1 / NEAR**2])
    assert second[0] == second[1] == second[2] > 0


@pytest.mark.parametrize("tuner", [guided], indirect=True)
def test_a_loop_without_second_order_paths_is_not_aimed(tuner: Tuner) -> None:
    tuner.evaluator.finer.clear()
    plain = tuner._improve(solve_kept(tuner.problem, 6))
    assert tuner.aim(plain, 1.0) is None and tuner.finer_psnr is None


def with_seconds(tuner: Tuner, **seconds: float) -> None:
    """Let the tuner find other times in its profile."""
    part = tuner.profile.networks[tuner.network]
    tuner.profile.networks[tuner.network] = replace(part, seconds={**part.seconds, **seconds})


@pytest.mark.parametrize("tuner", [euler], indirect=True)
@pytest.mark.parametrize(
    ("target", "share", "dtype", "reason"),
    [
        (Target(min_psnr=20.0), 0.5, "bfloat16", "slower: a step takes"),
        (Target(speedup=2.0), 0.5, "bfloat16", "slower: a step takes"),
        (Target(min_psnr=20.0), 0.95, None, "hardly faster: a step takes"),
        (Target(min_psnr=90.0), 0.5, None, "too little to spare for {'min_psnr': 90.0}"),
    ],
)
def test_a_dtype_is_taken_where_it_is_faster_and_good_enough(
    tuner: Tuner, target: Target, share: float, dtype: str | None, reason: str
) -> None:
    full = tuner.profile.networks[tuner.network].seconds["full"]
    with_seconds(tuner, bfloat16=share * full)
    tuner.target, tuner.dtypes = target, ("bfloat16",)
    tuner._choose_dtype()
    assert tuner.problem.dtype == dtype and reason in tuner.problem.dtype_reason
    assert tuner.problem.seconds_full == pytest.approx(share * full if dtype else full)
    assert bool(tuner.tried) == (share < 0.9), "slower dtypes are not tried"
    solution = tuner._improve(solve_kept(tuner.problem, 6))
    assert [rule.do for rule in solution.rules].count(Dense(dtype="bfloat16")) == int(dtype is not None)
    explained = [each for each in solution.explanations if each.step is None and each.site == STEP]
    assert [each.chosen for each in explained] == ["as the model has it", dtype or "the model's dtype"]
    known = tuner._tried(solution)
    assert known is not None and known.seconds == pytest.approx(
        6 * tuner.problem.seconds_full + (tuner.problem.steps - 6) * (tuner.problem.seconds_predicted or 0)
    )
    promised = known.quality.psnr
    assert tuner.evaluator.quality(solution.rules, tuner.pairs)[0].psnr == pytest.approx(promised, abs=0.1)
