"""A plan is for one geometry: another is refused by default, whatever the batch; dense and re-targeted on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.backend import Session
from ditopt.errors import PlanMismatchError
from tests.test_backend import STEPS, TIMES, OwnModel, own_plan
from tests.trace.models import compiled, interpreted

Planned = Callable[..., tuple[Callable[..., Tensor], Session]]


@torch.no_grad()
def generate(forward: Callable[..., Tensor], batch: int = 1, tokens: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, prompt = (
        torch.randn(batch, tokens, 24, generator=generator),
        torch.randn(batch, 1, 24, generator=generator),
    )
    for time in TIMES:
        latents = latents - forward(latents, torch.full((1,), time), prompt) / STEPS
    return latents


@pytest.fixture
def planned() -> Iterator[Planned]:
    """A model under a plan for latents ``[1, 20, 24]``."""

    def make(**options: Any) -> tuple[Callable[..., Tensor], Session]:
        probe = Session()
        with torch.no_grad():
            generate(compiled(OwnModel(), session=probe))
        torch._dynamo.reset()
        plan = own_plan(probe.programs[0].variants.trace.structure)
        session = Session.from_options(
            {"plan": plan.model_copy(update={"geometry": {"transformer": (1, 20, 24)}}), **options}
        )
        return compiled(OwnModel(), session=session), session

    torch._dynamo.reset()
    with interpreted():
        yield make
    torch._dynamo.reset()


def test_another_size_is_refused_with_both_shapes_and_the_ways_out(planned: Planned) -> None:
    forward, _ = planned()
    with pytest.raises(
        PlanMismatchError,
        match=r"latents have shape \[1, 12, 24\], the plan was made for \[1, 20, 24\].*retarget.*dense",
    ):
        generate(forward, tokens=12)
    planned_size = generate(forward)
    assert not torch.allclose(planned_size, generate(OwnModel()), atol=1e-5), "the planned size still runs by the plan"


def test_another_batch_runs_by_the_plan(planned: Planned) -> None:
    forward, session = planned()
    generate(forward, batch=1)
    generate(forward, batch=3)
    assert sum(program.statistics.predicted_calls for program in session.programs) == 2 * 3
    assert sum(program.statistics.unplanned_calls for program in session.programs) == 0


@pytest.mark.parametrize(("on_mismatch", "predicted"), [("dense", 0), ("retarget", 3)])
def test_another_size_on_request(on_mismatch: str, predicted: int, planned: Planned) -> None:
    forward, session = planned(on_mismatch=on_mismatch)
    found = generate(forward, tokens=12)
    (program,) = session.programs
    assert program.statistics.predicted_calls == predicted
    assert torch.allclose(found, generate(OwnModel(), tokens=12), rtol=1e-5, atol=1e-5) == (predicted == 0)
