"""A tiny compiled model under a plan with every kind of state, and loops over it that pause, break and interleave.

What must hold is said with ``alone``: the same generation where nothing was before and nothing is beside it. State is
dropped for that by binding the plan anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.backend import Session
from ditopt.decisions import Dense, Forecast, Hoist, Reuse
from ditopt.plan import Plan, Rule
from ditopt.runtime.program import Program
from ditopt.sites import STEP
from tests.runtime.test_sparse import TIMES, plan_of, rule, sparse
from tests.tiny import tiny_wan
from tests.trace.models import compiled, interpreted

SHAPE = (1, 4, 4, 32, 32)
RULES: tuple[Rule, ...] = (
    rule(STEP, "0-5", Dense(second_order=0.3)),
    rule(STEP, "0-2, 4-5", Hoist()),
    rule("blocks.0.attn1", "1-5", sparse("spatial", rest={"kept": "merge", "refresh": 3}), "0"),
    rule("blocks.1.attn1", "1-5", sparse("draft", keep=0.25, refresh=3), "1"),
    rule(STEP, "3", Forecast(order=1)),
    rule("blocks.1", "5", Reuse()),
)
"""Step 1 finds what 2 reads and 4 finds what 5 does; 3 is predicted from 1 and 2, a block in 5 from 4."""


def embeds(seed: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 6, 16, generator=torch.Generator().manual_seed(seed))


def noise(seed: int = 0, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@dataclass
class Loop:
    """A generation by Euler's method, step by step: the first is ``start`` of ``times``.

    ``hidden`` timesteps are made anew for every call; others are views of one tensor, which ``schedule`` may give.
    With ``other`` each step of ``interval`` has a second, guided branch.
    """

    forward: Callable[..., Any]
    prompt: Tensor
    latents: Tensor
    start: int = 0
    times: Sequence[float] = TIMES
    hidden: bool = False
    schedule: Tensor | None = None
    other: Tensor | None = None
    interval: range | None = None
    in_place: bool = False
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.schedule = torch.tensor(self.times) if self.schedule is None else self.schedule

    def velocity(self, prompt: Tensor, time: Tensor) -> Tensor:
        given = time.expand(len(self.latents))
        found: Tensor = self.forward(
            hidden_states=self.latents, timestep=given, encoder_hidden_states=prompt, return_dict=False
        )[0]
        return found

    @torch.no_grad()
    def step(self) -> None:
        assert self.schedule is not None
        at = self.start + self.done
        time = torch.tensor(float(self.schedule[at])) if self.hidden else self.schedule[at]
        velocity = self.velocity(self.prompt, time)
        if self.other is not None and (self.interval is None or at in self.interval):
            less = self.velocity(self.other, time)
            velocity = less + 3.0 * (velocity - less)
        if self.in_place:
            self.latents.add_(velocity, alpha=-0.15)
            velocity.fill_(float("nan"))
        else:
            self.latents = self.latents - 0.15 * velocity
        self.done += 1

    @property
    def left(self) -> int:
        assert self.schedule is not None
        return len(self.schedule) - self.start - self.done

    def run(self, steps: int | None = None) -> Tensor:
        """So many further steps, or all; the latents then."""
        for _ in range(self.left if steps is None else steps):
            self.step()
        return self.latents


@dataclass
class Bench:
    """The model with its compiled twin; ``loop`` makes a generation of either."""

    model: nn.Module
    forward: Callable[..., Any]
    session: Session
    plan: Plan

    @property
    def program(self) -> Program:
        return self.session.programs[0]

    @property
    def cold(self) -> int:
        return sum(program.statistics.cold_calls for program in self.session.programs)

    def fresh(self, on_mismatch: str = "error") -> None:
        """Nothing has run yet."""
        self.session.settle(on_mismatch, None)
        self.session.bind(self.plan)
        for program in self.session.programs:
            program.statistics = type(program.statistics)()

    def loop(self, prompt: Tensor, latents: Tensor | int = 0, **settings: Any) -> Loop:
        return Loop(self.forward, prompt, noise(latents) if isinstance(latents, int) else latents, **settings)

    def alone(self, prompt: Tensor, latents: Tensor | int = 0, steps: int | None = None, **settings: Any) -> Tensor:
        """What a generation gives where nothing else has run."""
        mode = self.session.on_mismatch
        self.fresh(mode)
        if settings.get("other") is not None:
            settings["other"] = settings["other"].clone()
        found = self.loop(prompt.clone(), latents, **settings).run(steps).clone()
        self.fresh(mode)
        return found


@contextmanager
def bench_of(model: nn.Module, *rules: Rule, **options: Any) -> Iterator[Bench]:
    """The model compiled under ``rules``, its graphs interpreted."""
    torch._dynamo.reset()
    with interpreted():
        session = Session(check_passes=True)
        forward = compiled(model, session=session)
        Loop(forward, embeds(), noise()).run(1)
        plan = plan_of(session.programs[0].variants.trace.structure, *rules)
        session.inputs = plan.inputs
        torch._dynamo.reset()
        session = Session(plan=plan, check_passes=True, **options)
        bench = Bench(model, compiled(model, session=session), session, plan)
        Loop(bench.forward, embeds(), noise()).run(1)
        bench.fresh(options.get("on_mismatch", "error"))
        yield bench
    torch._dynamo.reset()


def wan(seed: int = 0) -> nn.Module:
    found: nn.Module = tiny_wan(seed)
    return found
