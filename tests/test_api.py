"""``ditopt.apply`` and the pipeline's scheduler: another than the plan's is refused, and seen when it is set later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ditopt
from ditopt.backend import Session
from ditopt.decisions import Reuse
from ditopt.errors import PlanMismatchError
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.sites import STEP
from tests.tiny import tiny_wan
from tests.trace.models import compiled, interpreted

diffusers: Any = pytest.importorskip("diffusers")

# diffusers hands numpy arrays of tensors around in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

STEPS = 4


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler()


def dpm() -> Any:
    """Other weights on the very timesteps of ``unipc``."""
    return diffusers.DPMSolverMultistepScheduler()


class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped here
    """A loop over one network, without text encoder and decoder."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self) -> None:
        latents, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 6, 16)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            velocity = self.transformer(
                hidden_states=latents, timestep=t.expand(1), encoder_hidden_states=text, return_dict=False
            )[0]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with interpreted():
        yield
    torch._dynamo.reset()


@pytest.fixture
def plan() -> Plan:
    """A plan for the pipeline with ``unipc``."""
    session = Session(inputs=Inputs())
    Pipeline(compiled(tiny_wan(), session=session), unipc())()
    scheduler = unipc()
    scheduler.set_timesteps(STEPS)
    return Plan(
        model=ModelPrint(
            class_name="WanTransformer3DModel", structure=session.programs[0].variants.trace.structure, blocks=2
        ),
        sampler=SamplerPrint(
            class_name="UniPCMultistepScheduler",
            steps=STEPS,
            timesteps={"transformer": tuple(map(float, scheduler.timesteps))},
            sigmas={"transformer": tuple(map(float, scheduler.sigmas[:-1]))},
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        rules=(Rule(sites=STEP, steps=(2,), do=Reuse()),),
    )


def test_another_scheduler_than_the_plans_is_refused(plan: Plan) -> None:
    with pytest.raises(
        PlanMismatchError,
        match="plan was made for UniPCMultistepScheduler, the pipeline samples with DPMSolverMultistepScheduler; "
        "set that scheduler, make a plan for this one, or pass on_mismatch=",
    ):
        ditopt.apply(Pipeline(tiny_wan(), dpm()), plan)


def test_another_scheduler_is_retargeted_on_request(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Session] = []
    from_options = Session.from_options

    def noted(options: Any) -> Session:
        made.append(from_options(options))
        return made[-1]

    monkeypatch.setattr(Session, "from_options", noted)
    pipe = Pipeline(tiny_wan(), dpm())
    assert ditopt.apply(pipe, plan, on_mismatch="retarget") is pipe
    pipe()
    (session,) = {id(each): each for each in made}.values()
    assert session.programs[0].statistics.predicted_calls == 1


def test_a_scheduler_set_later_is_told_once(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    pipe = ditopt.apply(Pipeline(tiny_wan(), unipc()), plan)
    with caplog.at_level(logging.WARNING, "ditopt"):
        pipe()
        assert not caplog.messages
        pipe.scheduler = dpm()
        pipe()
        pipe()
    (told,) = caplog.messages
    assert told.startswith("the plan was made for UniPCMultistepScheduler, this generation samples with DPMSolverMulti")
