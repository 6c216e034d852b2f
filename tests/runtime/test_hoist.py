"""What is computed ahead of the steps equals what steps compute, whatever changes in between; stale is never read."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Forecast, Hoist
from ditopt.errors import PlanMismatchError
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.runtime.program import Program
from ditopt.runtime.prologue import hoisted_work
from ditopt.runtime.schedule import bind
from ditopt.sites import STEP
from tests.trace.models import CASES, compiled, interpreted

pytest.importorskip("diffusers")

STEPS = 6
TIMES = tuple(float(torch.tensor(900.0 - 140.0 * step)) for step in range(STEPS))
HOIST = Rule(sites=STEP, steps=tuple(range(STEPS)), do=Hoist())
Forward = Callable[..., Any]


def make_plan(*rules: Rule, times: Sequence[float] = TIMES, structure: str = "sha256:00ff", **inputs: Any) -> Plan:
    return Plan(
        model=ModelPrint(class_name="Model", structure=structure, blocks=1),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=len(times),
            timesteps={"transformer": tuple(times)},
            sigmas={"transformer": tuple(time / 1000 for time in times)},
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(**{"identity": "encoder_hidden_states", **inputs}),
        rules=rules,
    )


@dataclass
class Bench:
    """A model with its compiled twin; ``close`` compares what both give for the same call."""

    model: nn.Module
    forward: Forward
    session: Session
    shape: tuple[int, ...] = (1, 4, 2, 8, 8)

    @property
    def program(self) -> Program:
        return self.session.programs[0]

    @property
    def runs(self) -> int:
        """How often something was computed ahead so far."""
        return sum(program._prologues.counts.runs for program in self.session.programs)

    def noise(self, seed: int = 0) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def close(self, latents: Tensor, time: float, prompt: Tensor, **more: Any) -> Tensor:
        """One call of both; checks the compiled one and returns what it gave."""
        timestep = torch.full((latents.shape[0],), time)
        given = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": prompt, **more}
        found, expected = (call(**given, return_dict=False)[0] for call in (self.forward, self.model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert isinstance(found, Tensor)
        return found

    def generate(
        self,
        *prompts: Tensor,
        seed: int = 0,
        times: Sequence[float] = TIMES,
        before: Callable[[int], None] | None = None,
    ) -> Tensor:
        """A generation, with a branch for each prompt; every call is checked. ``before`` runs before each step."""
        latents = self.noise(seed)
        for step, time in enumerate(times):
            if before is not None:
                before(step)
            latents = latents - 0.1 * sum(self.close(latents, time, prompt) for prompt in prompts)
        return latents


def work_of(program: Program) -> list[dict[str, Any]]:
    assert program.bound is not None
    return hoisted_work(program.variants, program.bound.variants)


def embeds(seed: int) -> Tensor:
    return torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def captured() -> Iterator[Bench]:
    """One capture for all tests, its graphs interpreted."""
    torch._dynamo.reset()
    model, _ = CASES["Wan"].make()
    with interpreted():
        session = Session(plan=make_plan(HOIST), check_passes=True)
        found = Bench(model, compiled(model, session=session), session)
        found.generate(embeds(0), times=TIMES[:1])
        yield found
    torch._dynamo.reset()


@pytest.fixture
def bench(captured: Bench) -> Iterator[Bench]:
    """The same with nothing kept, and its weights put back afterwards."""
    weights = {name: value.clone() for name, value in captured.model.state_dict().items()}
    captured.session.bind(make_plan(HOIST))
    yield captured
    captured.model.load_state_dict(weights)


PARTS = 3
"""Of the model's prologues: what the timestep decides, what the prompt decides, and rotary tables."""


def test_a_generation_computes_ahead_once(bench: Bench) -> None:
    prompt = embeds(1)
    before = compile_counts()
    bench.generate(prompt)
    assert bench.runs == PARTS
    bench.generate(prompt, seed=1)
    assert bench.runs == 2 * PARTS, "a generation trusts no earlier one"
    assert compile_counts() == before, "nothing is compiled again"
    (variant,) = (bench.program.variants.get(plan) for plan in bench.program.bound.variants)  # type: ignore[union-attr]
    assert [prologue.rows for prologue in variant.prologues].count(STEPS) == 1, "one table for the schedule"
    tables = work_of(bench.program)
    assert {tuple(each["arguments"]) for each in tables} == {("timestep",), ("encoder_hidden_states",), ()}


def test_branches_share_what_their_prompts_do_not_decide(bench: Bench) -> None:
    bench.generate(embeds(1), embeds(2))
    assert bench.runs == PARTS + 1, "the second branch has a prompt of its own, and nothing else"


def test_another_prompt_in_mid_generation(bench: Bench) -> None:
    prompts = [embeds(1), embeds(2)]
    latents = bench.noise()
    for step, time in enumerate(TIMES):
        latents = latents - 0.1 * bench.close(latents, time, prompts[step >= 3])


def test_a_prompt_written_to_in_mid_generation(bench: Bench) -> None:
    prompt = embeds(1)
    runs: list[int] = []

    def before(step: int) -> None:
        runs.append(bench.runs)
        if step in (2, 4):
            prompt.mul_(-1.5)

    bench.generate(prompt, before=before)
    assert runs == [0, PARTS, PARTS, PARTS + 1, PARTS + 1, PARTS + 2], "what else was computed ahead stays"


@pytest.mark.parametrize("name", ["blocks.1.attn2.to_k.weight", "condition_embedder.time_proj.weight"])
@pytest.mark.parametrize("way", ["in place", "through a view", "other memory", "another parameter"])
def test_a_weight_changed_in_mid_generation(bench: Bench, name: str, way: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner = bench.model.get_submodule(path)
    prompt = embeds(1)
    counted: list[int] = []

    @torch.no_grad()
    def before(step: int) -> None:
        counted.append(bench.runs)
        if step != 3:
            return
        weight = getattr(owner, leaf)
        changed = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * 0.2
        if way == "in place":
            weight.add_(changed)
        elif way == "through a view":
            weight[::2].add_(changed[::2])
        elif way == "other memory":
            weight.data = weight.data + changed
        else:
            setattr(owner, leaf, nn.Parameter(weight + changed, requires_grad=False))

    bench.generate(prompt, before=before)
    assert counted[3] == PARTS and counted[4] == PARTS + 1, "exactly what depends on it is computed anew"


def test_weights_written_through_data_between_generations(bench: Bench) -> None:
    """Adapters are fused so; no version tells it, but a generation trusts no earlier one."""
    prompt = embeds(1)
    bench.generate(prompt)
    for name in ("blocks.0.attn2.to_v.weight", "condition_embedder.time_proj.weight"):
        bench.model.get_parameter(name).data.mul_(1.7)
    bench.generate(prompt)


def test_an_exception_in_mid_generation(bench: Bench) -> None:
    prompt = embeds(1)

    def fail(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.generate(prompt, before=fail)
    bench.model.get_parameter("blocks.0.attn2.to_v.weight").data.mul_(1.7)
    bench.generate(prompt)


@pytest.mark.parametrize(
    "times",
    [
        TIMES[2:],
        TIMES[:3],
        (TIMES[0], TIMES[0], *TIMES[1:]),
        tuple(time for time in TIMES for _ in range(2)),
        TIMES[::2],
        (801.5, 702.25, 333.125, 12.5),
        tuple(torch.linspace(990, 10, 11).tolist()),
        tuple(reversed(TIMES)),
        (TIMES[3],),
    ],
    ids=["from the middle", "cut short", "first twice", "all twice", "every other", "others", "more", "rising", "one"],
)  # fmt: skip
def test_any_schedule(bench: Bench, times: tuple[float, ...]) -> None:
    prompt = embeds(1)
    for seed in range(2):
        bench.generate(prompt, seed=seed, times=times)


def test_a_schedule_that_nobody_planned_is_computed_at_once_from_the_second_time_on(bench: Bench) -> None:
    times = (801.5, 702.25, 333.125, 12.5)
    prompt = embeds(1)
    bench.generate(prompt, times=times)
    assert bench.runs == PARTS + len(times) - 1
    before = bench.runs
    bench.generate(prompt, times=times)
    assert bench.runs == before + PARTS


def test_interleaved_generations(bench: Bench) -> None:
    prompts = [embeds(1), embeds(2), embeds(1)]
    latents = [bench.noise(seed) for seed in range(3)]
    order = [(turn - late, who) for turn in range(STEPS + 4) for who, late in enumerate((0, 2, 4))]
    for step, who in order:
        if 0 <= step < STEPS:
            latents[who] = latents[who] - 0.1 * bench.close(latents[who], TIMES[step], prompts[who])


def test_two_threads(bench: Bench) -> None:
    failed: list[BaseException] = []
    gate = threading.Barrier(2)

    def work(seed: int) -> None:
        try:
            gate.wait()
            bench.generate(embeds(seed), seed=seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_was_computed_ahead_goes_with_its_prompt(bench: Bench) -> None:
    prompt = embeds(1)
    bench.generate(prompt)
    assert len(bench.program._prologues._living) == PARTS
    del prompt
    gc.collect()
    assert len(bench.program._prologues._living) == 0
    for seed in range(3):
        bench.generate(embeds(seed))
    gc.collect()
    assert len(bench.program._prologues._living) == 0, "no generation leaves anything"


def test_another_batch_and_another_size(bench: Bench) -> None:
    prompt, latents = embeds(1), bench.noise()
    for time in TIMES[:3]:
        bench.close(latents, time, prompt)
        bench.close(torch.cat([latents, -latents]), time, torch.cat([prompt, prompt]))
        bench.close(latents[..., :4], time, prompt)
        bench.close(torch.cat([latents, -latents]), time, torch.cat([prompt, prompt]))
    assert len(bench.session.programs) == 3


def test_tensors_whose_writes_are_not_counted_are_refused(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        prompt = embeds(1)
    with caplog.at_level(logging.WARNING, "ditopt"):
        bench.generate(prompt)
        with torch.inference_mode():
            prompt.mul_(2.0)
        bench.generate(prompt)
    assert bench.runs == 0
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("nothing is computed ahead of the steps: an input was made in torch.inference_mode")


def test_a_timestep_for_each_sample_is_refused(bench: Bench) -> None:
    given = {"hidden_states": torch.cat([bench.noise()] * 2), "encoder_hidden_states": torch.cat([embeds(1)] * 2)}
    with pytest.raises(PlanMismatchError, match=r"holds different values in one call \(20 to 900\)"), torch.no_grad():
        bench.forward(**given, timestep=torch.tensor([900.0, 20.0]), return_dict=False)


def test_forecasts_beside_it(bench: Bench) -> None:
    """The same plan with and without: what is predicted, recorded and kept is alike."""
    structure = bench.program.variants.trace.structure
    rules = [Rule(sites=STEP, steps=(3, 5), do=Forecast()), Rule(sites="blocks.1..2", steps=(4,), do=Forecast())]
    found = []
    for hoisted in ((), (Rule(sites=STEP, steps=(0, 1, 2, 4), do=Hoist()),)):
        bench.session.bind(make_plan(*rules, *hoisted, structure=structure))
        prompts, latents = (embeds(1), embeds(2)), bench.noise()
        with torch.no_grad():
            for time in TIMES:
                for prompt in prompts:
                    (out,) = bench.forward(
                        hidden_states=latents,
                        timestep=torch.tensor([time]),
                        encoder_hidden_states=prompt,
                        return_dict=False,
                    )
                    latents = latents - 0.1 * out
        found.append(latents)
        read = [bench.program.variants.get(step.variant).prologues for step in bench.program.bound.steps]  # type: ignore[union-attr]
        assert [bool(each) for each in read] == [bool(hoisted) and step not in (3, 5) for step in range(STEPS)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert bench.runs > 0


def test_graph_breaks_refuse_it() -> None:
    with pytest.raises(PlanMismatchError, match="graph breaks cut into several graphs; hoisting needs the whole"):
        bind(make_plan(HOIST), "transformer", {}, partial=True)


@pytest.mark.parametrize("family", [name for name in CASES if name != "Wan"])
def test_every_family(family: str) -> None:
    model, inputs = CASES[family].make()
    kind = inputs["timestep"].dtype
    times = TIMES if float(inputs["timestep"].flatten()[0]) > 1 else tuple(time / 1000 for time in TIMES)
    times = tuple(float(torch.tensor(time).to(kind)) for time in times)
    identity = "encoder_hidden_states" if "encoder_hidden_states" in inputs else None
    torch._dynamo.reset()
    with interpreted(), torch.no_grad():
        session = Session(plan=make_plan(HOIST, times=times, identity=identity), check_passes=True)
        forward = compiled(model, session=session)
        for time in (*times, *times):
            given = {**inputs, "timestep": torch.full_like(inputs["timestep"], time)}
            found, expected = (call(**given, return_dict=False)[0] for call in (forward, model))
            assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6
    (program,) = session.programs
    work = work_of(program)
    assert any(each["steps"] == STEPS for each in work) and not any("hoist" in why for why in program.variants.reasons)
    assert program._prologues.counts.runs == 2 * len(work)
    torch._dynamo.reset()


class Planted(nn.Module):
    """A model with what could mislead an analysis of its text, by name."""

    count: Tensor

    def __init__(self, plant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plant = plant
        self.text, self.time, self.out = nn.Linear(12, 8), nn.Linear(1, 8), nn.Linear(8, 8)
        self.scale = 1.0
        self.down, self.up = (nn.Parameter(torch.randn(shape) * 0.3) for shape in ((12, 2), (2, 8)))
        self.register_buffer("count", torch.zeros(8))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        context = self.text(encoder_hidden_states)
        shown = context
        if self.plant == "writes into an argument":
            encoder_hidden_states.add_(0.1)
        elif self.plant == "writes into a view":
            view = context[:, :2]
            view.mul_(hidden_states.mean())
        elif self.plant == "writes into a buffer":
            self.count.add_(1.0)
            context = context + self.count
        elif self.plant == "returns a view":
            shown = context.transpose(0, 1)
        elif self.plant == "draws at random":
            context = context + torch.rand_like(context)
        elif self.plant == "drops out":
            context = F.dropout(context, 0.5, training=True)
        elif self.plant == "adapter":
            context = context + self.scale * (encoder_hidden_states @ self.down @ self.up)
        features = self.time(timestep[:, None] / 1000)
        return self.out(hidden_states * features[:, None] + context.mean(1, keepdim=True)), shown


def planted(plant: str) -> Bench:
    torch._dynamo.reset()
    model = Planted(plant).eval().requires_grad_(False)
    session = Session(plan=make_plan(HOIST), check_passes=True)
    return Bench(model, compiled(model, session=session), session, (1, 5, 8))


PLANTS = ["writes into an argument", "writes into a view", "writes into a buffer", "returns a view"]


@pytest.mark.parametrize("plant", PLANTS)
@torch.no_grad()
def test_mutation_and_aliasing_in_the_model(plant: str) -> None:
    """The compiled model and a twin of it see the same calls, and their callers write into what they were given."""
    with interpreted():
        bench, twin = planted(plant), Planted(plant).eval().requires_grad_(False)
        for _ in range(2):
            prompts = [embeds(1), embeds(1)]
            for time in TIMES:
                given = {"hidden_states": bench.noise(), "timestep": torch.tensor([time])}
                found = bench.forward(**given, encoder_hidden_states=prompts[0])
                expected = twin(**given, encoder_hidden_states=prompts[1])
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
                    one.fill_(float("nan"))
                torch.testing.assert_close(*prompts)
        torch.testing.assert_close(bench.model.count, twin.count)
    assert bench.runs > 0


@pytest.mark.parametrize("plant", ["draws at random", "drops out"])
@torch.no_grad()
def test_chance_is_not_computed_ahead(plant: str) -> None:
    with interpreted():
        bench = planted(plant)
        prompt, given = embeds(1), {"hidden_states": bench.noise(), "timestep": torch.tensor([900.0])}
        one, two = (bench.forward(**given, encoder_hidden_states=prompt)[0] for _ in range(2))
    assert not torch.allclose(one, two)


@torch.no_grad()
def test_an_adapter_scaled_written_and_exchanged_in_mid_generation() -> None:
    with interpreted():
        bench = planted("adapter")
        model = bench.model
        assert isinstance(model, Planted)

        def call(time: float, prompt: Tensor) -> None:
            given = {"hidden_states": bench.noise(), "timestep": torch.tensor([time]), "encoder_hidden_states": prompt}
            torch.testing.assert_close(bench.forward(**given)[0], model(**given)[0], rtol=1e-5, atol=1e-5)

        prompt = embeds(1)
        for step, time in enumerate(TIMES):
            if step == 1:
                model.scale = 0.25
            elif step == 2:
                model.up.mul_(3.0)
            elif step == 4:
                model.down = nn.Parameter(torch.randn(12, 2), requires_grad=False)
            call(time, prompt)
