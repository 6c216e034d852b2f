"""Which argument tells guidance branches apart, and what is refused because nothing does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
from torch import Tensor, nn

from ditopt.adapters.base import CallLog, watch_calls
from ditopt.calls import call_pattern
from ditopt.errors import RolloutError
from ditopt.runtime.streams import watch_contexts

diffusers: Any = untyped_diffusers

# diffusers hands numpy arrays of tensors around in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

Conditions = Callable[[int], Sequence[dict[str, Tensor]]]
ONE: Sequence[dict[str, Tensor]] = ({},)
SIGMAS = (1.0, 0.8, 0.5, 0.2)


class Network(diffusers.CacheMixin, nn.Module):  # type: ignore[misc]  # diffusers is untyped here
    """A linear velocity; all other arguments are looked at only."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return hidden_states * 0.1 + sum(each.double().mean() for each in conditions.values())


def record(rollout: Callable[[Any, Tensor], object]) -> CallLog:
    """The calls of a rollout from random latents ``[1, 4, 6]``."""
    model = Network()
    assert watch_contexts()
    with watch_calls({"transformer": model}) as log:
        rollout(model, torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)))
    return log


def sampled(scheduler: Any, conditions: Conditions, names: Sequence[str | None] = (None, None)) -> CallLog:
    """A diffusers loop that calls the network once for each of the conditions of a step, under ``names``."""

    def rollout(model: Any, latents: Tensor) -> None:
        scheduler.set_timesteps(4)
        for i, t in enumerate(scheduler.timesteps):
            total = torch.zeros_like(latents)
            for name, given in zip(names, conditions(i), strict=False):
                if name is None:
                    total += model(latents, t.expand(1), **given)
                else:
                    with model.cache_context(name):
                        total += model(latents, t.expand(1), **given)
            latents = scheduler.step(total, t, latents, return_dict=False)[0]

    return record(rollout)


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def text(value: float = 0.0) -> Tensor:
    return torch.full((1, 3, 5), value)


MASK = text(3)


def test_the_argument_that_differs_by_branch_goes_before_those_that_are_shared() -> None:
    ids, first, second, mask = text(), text(1), text(2), text(3)
    log = sampled(
        euler(), lambda i: [{"image_ids": ids, "text": e, "rest": mask, "fresh": text()} for e in (first, second)]
    )
    assert log.identity == "text"
    assert log.looked_at == ("image_ids", "text", "rest", "fresh")
    assert call_pattern(log, 4.0)["transformer"].calls == tuple((t, b) for t in range(4) for b in (0, 1))


def test_what_is_made_anew_for_every_step_is_no_identity_however_many_objects_it_has() -> None:
    first, second = text(1), text(2)
    rotary = [text() for _ in range(4)]
    log = sampled(euler(), lambda i: [{"rotary": rotary[i], "text": e} for e in (first, second)])
    assert log.identity == "text"


def test_labels_of_one_dimension_tell_branches_apart() -> None:
    first, second, scale = torch.tensor([3]), torch.tensor([10]), torch.tensor([4.0])
    log = sampled(euler(), lambda i: [{"guidance": scale, "class_labels": label} for label in (first, second)])
    assert log.identity == "class_labels"


def test_of_equals_a_tensor_of_two_dimensions_goes_first() -> None:
    scale, prompt = torch.tensor([4.0]), text(1)
    log = sampled(euler(), lambda i: [{"guidance": scale, "text": prompt, "ids": prompt}])
    assert log.identity == "text"


def test_a_branch_that_sits_out_some_steps() -> None:
    first, second = text(1), text(2)
    log = sampled(euler(), lambda i: [{"text": e} for e in ((first, second) if i == 2 else (first,))])
    assert log.identity == "text"
    assert call_pattern(log, 4.0)["transformer"].calls == ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))


@pytest.mark.parametrize("fresh", [True, False])
def test_contexts_tell_branches_apart_and_uncond_is_the_last(fresh: bool) -> None:
    prompt = text(1)
    log = sampled(euler(), lambda i: [{"text": text(1) if fresh else prompt}] * 2, ("uncond", "cond"))
    assert (log.identity, log.contexts) == (None if fresh else "text", ("uncond", "cond"))
    part = call_pattern(log, 4.0)["transformer"]
    assert part.calls == tuple((t, b) for t in range(4) for b in (1, 0))
    assert part.weights(4.0) == (4.0, -3.0) and part.branch_names == ("cond", "uncond")


def test_contexts_are_not_needed_where_the_conditioning_differs() -> None:
    first, second = text(1), text(2)
    log = sampled(euler(), lambda i: [{"text": first}, {"text": second}], ("cond", "uncond"))
    assert (log.identity, log.contexts) == ("text", None)
    assert call_pattern(log, 4.0)["transformer"].branches == 2


@pytest.mark.parametrize(
    ("conditions", "looked_at"),
    [
        (lambda i: [{}, {}], "there is no tensor besides timestep and latents"),
        (lambda i: [{"text": text(1), "mask": MASK}, {"text": text(2), "mask": MASK}], "text, mask"),
    ],
)
@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
@pytest.mark.parametrize("names", [(None, None), ("cond", "cond")])
def test_branches_that_nothing_tells_apart_are_refused(
    conditions: Conditions, looked_at: str, scheduler: str, names: tuple[str | None, str | None]
) -> None:
    log = sampled(getattr(diffusers, scheduler)(), conditions, names)
    with pytest.raises(
        RolloutError,
        match=rf"calls transformer twice at timestep 1000 with the same latents.*\(looked at: {looked_at}\).*"
        r"one conditioning tensor per branch.*cache_context\(\"cond\"\).*both branches in a batch",
    ):
        call_pattern(log, 4.0)


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
@pytest.mark.parametrize("conditions", [lambda i: ONE, lambda i: [{"text": MASK}]])
def test_solvers_that_evaluate_a_timestep_twice_are_one_branch(
    scheduler: str, settings: dict[str, Any], conditions: Conditions
) -> None:
    made = getattr(diffusers, scheduler)(**settings)
    part = call_pattern(sampled(made, conditions), 1.0)["transformer"]
    assert part.timesteps == tuple(float(t) for t in made.timesteps)
    assert part.calls == tuple((t, 0) for t in range(len(part.timesteps)))


def heun_in_place(model: nn.Module, x: Tensor) -> None:
    """Heun's method as the textbook has it, the state written to in place."""
    trial = torch.empty_like(x)
    for now, then in pairwise(SIGMAS):
        slope = model(x, torch.tensor([now]))
        trial.copy_(x).add_(slope, alpha=then - now)
        x.add_((slope + model(trial, torch.tensor([then]))) / 2, alpha=then - now)


def corrected(model: nn.Module, x: Tensor) -> None:
    """Every timestep is evaluated twice, the second time from latents that the first has moved in place."""
    for now in SIGMAS:
        for _ in range(2):
            x.sub_(model(x, torch.tensor([now])), alpha=0.1)


@pytest.mark.parametrize(("rollout", "calls"), [(heun_in_place, 6), (corrected, 8)])
def test_loops_that_write_into_the_latents_are_one_branch(
    rollout: Callable[[nn.Module, Tensor], None], calls: int
) -> None:
    part = call_pattern(record(rollout), 1.0)["transformer"]
    assert part.branches == 1 and len(part.timesteps) == calls
