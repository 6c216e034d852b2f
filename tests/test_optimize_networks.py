"""``optimize`` on tiny Wans in loops of several networks, branches and solvers; a plan gives the same when applied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
from torch import Tensor

import ditopt
from ditopt._torch import compile_counts
from ditopt.decisions import Forecast
from ditopt.errors import RolloutError
from ditopt.optimizer import Optimizer
from ditopt.outcome import Result
from ditopt.plan import Plan, Rule
from ditopt.quality import relative_l2
from ditopt.sites import STEP
from ditopt.target import Target
from tests.conftest import RunPython
from tests.tiny import tiny_wan
from tests.trace.models import interpreted

diffusers: Any = untyped_diffusers

# diffusers hands numpy arrays of tensors around in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

PROMPTS = ("one", "two", "three", "four")
SHAPE = (1, 4, 3, 24, 24)


class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped here
    """The loop of WanPipeline without text encoder and decoder.

    Timesteps at or above ``boundary`` (0..1000) go to ``transformer``, the others to ``transformer_2``.
    ``branches`` says what tells the guidance branches apart: a tensor for each (``objects``), the names
    around their calls (``names``; they share one tensor, which is written to), or nothing (``nothing``).
    """

    def __init__(
        self, transformer: Any, transformer_2: Any, scheduler: Any, boundary: float = 0.0, branches: str = "objects"
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)
        self.boundary, self.branches = boundary, branches

    @torch.no_grad()
    def __call__(
        self, prompt: str, generator: torch.Generator, num_inference_steps: int = 8, guidance_scale: float = 1.0
    ) -> SimpleNamespace:
        seeds = (sum(map(ord, prompt)), 0)[: 1 if guidance_scale == 1.0 else 2]
        texts = [torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        shared = torch.empty_like(texts[0])
        latents = torch.randn(SHAPE, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            network = self.transformer if float(t) >= self.boundary else self.transformer_2
            found = []
            for name, text in zip(("cond", "uncond"), texts, strict=False):
                with nullcontext() if self.branches == "nothing" else network.cache_context(name):
                    found += network(
                        hidden_states=latents,
                        timestep=t.expand(1),
                        encoder_hidden_states=text if self.branches == "objects" else shared.copy_(text),
                        return_dict=False,
                    )
            velocity = found[0] if len(found) == 1 else found[1] + guidance_scale * (found[0] - found[1])
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return SimpleNamespace(frames=latents)


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def pipeline(scheduler: Any, *, networks: int = 1, **settings: Any) -> Pipeline:
    return Pipeline(tiny_wan(0, ffn_dim=48), tiny_wan(1, ffn_dim=48) if networks == 2 else None, scheduler, **settings)


def sample(pipe: Pipeline, **settings: Any) -> Tensor:
    found: Tensor = pipe("a prompt", torch.Generator().manual_seed(5), **settings).frames
    return found


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plans of others, nothing compiled before or after; graphs are interpreted, which is quicker here."""
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with interpreted():
        yield
    torch._dynamo.reset()


def optimised(pipe: Pipeline, path: Path, **settings: Any) -> Result:
    return Optimizer(
        pipe,
        PROMPTS,
        target=Target(min_psnr=25.0),
        plan_path=path,
        pipe_kwargs=settings,
        budget=2,
        techniques=("reuse", "forecast"),
        quiet=True,
    ).run()


def same_applied(pipe: Pipeline, plan: Path | Plan, settings: dict[str, Any]) -> Tensor:
    """What a pipeline that runs by a plan gives; the plan applied anew gives the same numbers without recompiling."""
    planned = sample(pipe, **settings)
    for network in (pipe.transformer, pipe.transformer_2):
        if network is not None:
            network._compiled_call_impl = None
    torch._dynamo.reset()
    before = compile_counts()
    assert torch.equal(sample(ditopt.apply(pipe, plan), **settings), planned)
    warm = compile_counts()
    assert torch.equal(sample(pipe, **settings), planned)
    assert compile_counts() == warm and warm.breaks == before.breaks
    return planned


def test_two_networks_by_boundary(tmp_path: Path) -> None:
    pipe = pipeline(euler(), networks=2, boundary=800.0)
    settings = {"num_inference_steps": 12, "guidance_scale": 3.0}
    dense = sample(pipe, **settings)
    result = optimised(pipe, tmp_path / "plan.yaml", **settings)
    assert result.plan is not None, result.reasons
    steps = {name: len(values) for name, values in result.plan.sampler.timesteps.items()}
    assert sum(steps.values()) == 12 and set(steps) == {"transformer", "transformer_2"}
    assert {rule.network for rule in result.plan.rules} == set(steps)
    assert all(len(result.plan.kept_steps(name)) < steps[name] for name in steps)
    assert result.quality is not None and result.quality.psnr >= 25.0
    assert 0 < relative_l2(same_applied(pipe, tmp_path / "plan.yaml", settings), dense) < 0.2


def test_heun_evaluates_timesteps_twice(tmp_path: Path) -> None:
    pipe = pipeline(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0))
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0}
    dense = sample(pipe, **settings)
    result = optimised(pipe, tmp_path / "plan.yaml", **settings)
    assert result.plan is not None, result.reasons
    assert len(result.plan.sampler.timesteps["transformer"]) == 11
    assert len(result.plan.kept_steps()) < 11
    assert 0 < relative_l2(same_applied(pipe, tmp_path / "plan.yaml", settings), dense) < 0.2


def test_branches_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    pipe = pipeline(euler(), branches="nothing")
    with pytest.raises(
        RolloutError,
        match=r"calls transformer twice at timestep 1000 .*looked at: encoder_hidden_states.*cache_context",
    ):
        optimised(pipe, tmp_path / "plan.yaml", guidance_scale=3.0)
    optimised_settings = {"num_inference_steps": 4}
    assert sample(pipe, **optimised_settings).shape == SHAPE, "the pipeline is left as it was"


CHILD = """
from diffusers import WanTransformer3DModel
from tests.test_optimize_networks import digest, euler, interpreted, pipeline, sample
from ditopt.backend import ditopt_backend
pipe = pipeline(euler(), branches="names")
with interpreted():
    pipe.transformer.compile(backend=ditopt_backend, fullgraph=True, options={{"plan": {path!r}}})
    print(digest(sample(pipe, **{settings})))
"""


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_branches_that_share_their_tensor_are_told_by_their_contexts(
    tmp_path: Path, root: Path, run_python: RunPython
) -> None:
    settings = {"num_inference_steps": 8, "guidance_scale": 3.0}
    dense = sample(pipeline(euler()), **settings)
    named = pipeline(euler(), branches="names")
    assert torch.equal(sample(named, **settings), dense)
    result = optimised(named, tmp_path / "plan.yaml", **settings)
    assert result.plan is not None, result.reasons
    planned = same_applied(named, tmp_path / "plan.yaml", settings)
    apart = pipeline(euler())
    assert torch.equal(sample(ditopt.apply(apart, result.plan), **settings), planned)
    forecast = Rule(sites=STEP, steps=(2, 4, 5), do=Forecast())
    for rules in ((), (forecast,)):
        plan = result.plan.model_copy(update={"rules": rules})
        numbers = [sample(ditopt.apply(pipe, plan), **settings) for pipe in (named, apart)]
        assert torch.equal(*numbers)
        assert (relative_l2(numbers[0], dense) < 1e-5) == (not rules)
    plan.save(tmp_path / "forecast.yaml")
    told = run_python(CHILD.format(path=str(tmp_path / "forecast.yaml"), settings=settings), cwd=root, path=(root,))
    assert told.strip() == digest(numbers[0])
