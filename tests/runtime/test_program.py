"""A program under hand-written plans against a literal transcription in eager Python; state, threads and mismatches."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Dense, Fit, Forecast, Reuse
from ditopt.errors import PlanError, PlanMismatchError
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.runtime.program import Program
from ditopt.sites import STEP
from tests.tiny import tiny_wan
from tests.trace.models import compiled, interpreted

pytest.importorskip("diffusers")

STEPS = 8
INPUTS = Inputs(identity="encoder_hidden_states", forward=("hidden_states", "timestep", "encoder_hidden_states"))
Predict = Callable[[int, list[tuple[int, Tensor]], Tensor, Sequence[float]], Tensor | None]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found: nn.Module = tiny_wan(text_dim=12, num_layers=3, cross_attn_norm=True)
    return found


def embeds(seed: int) -> Tensor:
    return torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(seed))


def noise(seed: int = 0) -> Tensor:
    return torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def schedule(steps: int = STEPS) -> tuple[list[Tensor], list[float]]:
    """Timesteps (as pipelines pass them) and sigmas, the closing zero among them, of diffusers' flow-matching Euler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return list(scheduler.timesteps), [float(s) for s in scheduler.sigmas]


def make_plan(structure: str, *rules: Rule, steps: int = STEPS) -> Plan:
    timesteps, sigmas = schedule(steps)
    return Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure=structure, blocks=3),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=steps,
            timesteps={"transformer": tuple(float(t) for t in timesteps)},
            sigmas={"transformer": tuple(sigmas[:-1])},
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=INPUTS,
        rules=rules,
    )


@torch.no_grad()
def generate(
    forward: Callable[..., Any],
    prompt: Tensor,
    latents: Tensor,
    *,
    steps: int = STEPS,
    other: Tensor | None = None,
    spoil: bool = False,
    interval: range | None = None,
    stop: int | None = None,
) -> Tensor:
    """Euler steps; with ``other`` a second, guided branch (in the steps of ``interval``) by a call of its own."""
    timesteps, sigmas = schedule(steps)
    for i, t in enumerate(timesteps[:stop]):
        velocity = forward(
            hidden_states=latents, timestep=t.expand(1), encoder_hidden_states=prompt, return_dict=False
        )[0]
        kept = velocity.clone()
        if other is not None and (interval is None or i in interval):
            less = forward(hidden_states=latents, timestep=t.expand(1), encoder_hidden_states=other, return_dict=False)[
                0
            ]
            kept = less + 3.0 * (kept - less)
        if spoil:
            velocity.fill_(float("nan"))
        latents = latents + (sigmas[i + 1] - sigmas[i]) * kept
    return latents


class Literal:
    """The same in plain Python: calls the eager model, keeps what ``site`` gave, and predicts it by ``predict``.

    Computed steps answer with ``share`` of Adams and Bashforth's formula.
    """

    def __init__(
        self, model: nn.Module, predict: Predict, site: tuple[int, int] | None = None, share: float = 0.0
    ) -> None:
        self.model, self.predict, self.site, self.share = model, predict, site, share
        self.held: dict[int, list[tuple[int, Tensor]]] = {}
        self.before: dict[int, tuple[int, Tensor]] = {}

    def __call__(
        self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        held = self.held.setdefault(id(encoder_hidden_states), [])
        step = next(i for i, t in enumerate(schedule()[0]) if float(t) == float(timestep))
        sigmas = schedule()[1]
        if step == 0:
            held.clear()
            self.before.pop(id(encoder_hidden_states), None)
        found = self.predict(step, held, hidden_states, sigmas)
        if self.site is None:
            output = found if found is not None else self._model(hidden_states, timestep, encoder_hidden_states)
            feature = output
        else:
            output, feature = self._with_range(found, hidden_states, timestep, encoder_hidden_states)
        if found is None:
            held.insert(0, (step, feature.clone()))
        if found is not None and self.site is None:
            return (output,)
        earlier = self.before.get(id(encoder_hidden_states))
        self.before[id(encoder_hidden_states)] = (step, output)
        if earlier is None or step + 1 == STEPS:
            return (output,)
        ahead, behind = sigmas[step + 1] - sigmas[step], sigmas[step] - sigmas[earlier[0]]
        return (output + self.share * ahead / (2 * behind) * (output - earlier[1]),)

    def _model(self, *arguments: Tensor) -> Tensor:
        output: Tensor = self.model(*arguments, return_dict=False)[0]
        return output

    def _with_range(self, found: Tensor | None, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks first..last add ``found`` to the stream; where it is None, what they do add is returned."""
        assert self.site is not None
        first, last = self.site
        blocks: list[nn.Module] = list(self.model.blocks[first : last + 1])  # type: ignore[index]
        seen: list[Tensor] = []
        if found is not None:
            for block in blocks:
                block.forward = lambda stream, *rest: stream
            blocks[0].forward = lambda stream, *rest: stream + found
        hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
        hooks += [blocks[-1].register_forward_hook(lambda _, inputs, output: seen.append(output))]
        try:
            output = self._model(*arguments)
        finally:
            for hook in hooks:
                hook.remove()
            for block in blocks:
                vars(block).pop("forward", None)
        return output, seen[-1] - seen[0]


def polynomial(steps: Sequence[int], order: int) -> Predict:
    """Extrapolate in the given steps by Lagrange's formula, written out."""

    def predict(step: int, held: list[tuple[int, Tensor]], latents: Tensor, sigmas: Sequence[float]) -> Tensor | None:
        if step not in steps:
            return None
        nodes = [sigmas[source] for source, _ in held[: order + 1]]
        total = torch.zeros_like(held[0][1])
        for i, (_, value) in enumerate(held[: order + 1]):
            weight = float(
                np.prod([(sigmas[step] - other) / (nodes[i] - other) for j, other in enumerate(nodes) if j != i])
            )
            total += weight * value
        return total

    return predict


FITTED: dict[int, tuple[float, ...]] = {3: (1.4, -0.5, 0.02), 4: (1.7, -0.9, -0.03), 6: (1.2, -0.1, 0.01)}


def fitted(step: int, held: list[tuple[int, Tensor]], latents: Tensor, sigmas: Sequence[float]) -> Tensor | None:
    if step not in FITTED:
        return None
    newest, older, current = FITTED[step]
    return newest * held[0][1] + older * held[1][1] + current * latents


FIT = Fit(history=2, latents=True, coefficients=FITTED, sources={3: (2, 1), 4: (2, 1), 6: (5, 2)})

PLANS: dict[str, tuple[Rule, Predict, tuple[int, int] | None]] = {
    "reuse": (Rule(sites=STEP, steps=(2, 3, 6), do=Reuse()), polynomial((2, 3, 6), 0), None),
    "order 1": (Rule(sites=STEP, steps=(2, 4, 5, 7), do=Forecast(order=1)), polynomial((2, 4, 5, 7), 1), None),
    "order 2": (Rule(sites=STEP, steps=(3, 5, 6), do=Forecast(order=2)), polynomial((3, 5, 6), 2), None),
    "fit": (Rule(sites=STEP, steps=tuple(FITTED), do=FIT), fitted, None),
    "range reuse": (Rule(sites="blocks.1..2", steps=(1, 3, 4), do=Reuse()), polynomial((1, 3, 4), 0), (1, 2)),
    "range order 1": (Rule(sites="blocks.0..1", steps=(2, 4, 5), do=Forecast()), polynomial((2, 4, 5), 1), (0, 1)),
    "block order 1": (Rule(sites="blocks.1", steps=(2, 3, 6), do=Forecast()), polynomial((2, 3, 6), 1), (1, 1)),
}


@pytest.fixture(scope="module")
def bench(model: nn.Module) -> Iterator[SimpleNamespace]:
    """One capture for all plans, its variants interpreted (test_inductor_* compile theirs)."""
    torch._dynamo.reset()
    with interpreted():
        session = Session(inputs=INPUTS, check_passes=True)
        forward = compiled(model, session=session)
        generate(forward, embeds(1), noise(), stop=1)
        (program,) = session.programs
        yield SimpleNamespace(
            model=model, session=session, forward=forward, program=program, structure=program.variants.trace.structure
        )
    torch._dynamo.reset()


@pytest.fixture
def bound(bench: SimpleNamespace) -> Iterator[Callable[..., Program]]:
    """Bind a plan made of rules; undone after the test."""

    def bind(*rules: Rule, steps: int = STEPS, on_mismatch: str = "error") -> Program:
        bench.program.on_mismatch = on_mismatch
        bench.session.bind(make_plan(bench.structure, *rules, steps=steps))
        bench.program.statistics = type(bench.program.statistics)()
        found: Program = bench.program
        return found

    yield bind
    bench.program.on_mismatch = "error"
    bench.session.bind(None)


@pytest.mark.parametrize("name", PLANS)
def test_a_generation_equals_its_literal_transcription(
    name: str, bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    rule, predict, site = PLANS[name]
    program = bound(rule)
    prompt = embeds(1)
    expected = generate(Literal(bench.model, predict, site), prompt, noise())
    torch.testing.assert_close(generate(bench.forward, prompt, noise()), expected, rtol=1e-5, atol=1e-5)
    assert (program.statistics.predicted_calls, program.statistics.cold_calls) == (len(rule.steps), 0)
    assert not torch.allclose(expected, generate(bench.model, prompt, noise()), atol=1e-4), "the plan does something"


WITH_SECOND_ORDER = Rule(sites=STEP, steps=tuple(range(STEPS)), do=Dense(second_order=0.6))


@pytest.mark.parametrize("name", ["order 1", "fit", "range order 1", "nothing predicted"])
def test_computed_steps_with_a_share_of_second_order(
    name: str, bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    rule, predict, site = PLANS.get(name, (None, polynomial((), 0), None))
    rules = [WITH_SECOND_ORDER] if rule is None else [WITH_SECOND_ORDER, rule]
    prompt, other = embeds(1), embeds(2)
    for interval in (None, range(3, 6)) if rule is None else (None,):
        program = bound(*rules)
        literal = Literal(bench.model, predict, site, share=0.6)
        expected = generate(literal, prompt, noise(), other=other, interval=interval)
        found = generate(bench.forward, prompt, noise(), other=other, interval=interval)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert program.statistics.cold_calls == 0
        if interval is None:  # the second branch does not end early
            assert all(state.held_bytes == 0 for state in program._states), "nothing is held behind the last reader"
        plain = generate(Literal(bench.model, predict, site), prompt, noise(), other=other, interval=interval)
        assert not torch.allclose(expected, plain, atol=1e-4), "the share does something"


def test_a_share_of_second_order_is_for_whole_steps(bench: SimpleNamespace) -> None:
    wrong = WITH_SECOND_ORDER.model_copy(update={"sites": "blocks.1"})
    with pytest.raises(PlanMismatchError, match=r"blocks\.1 with second_order, which .* write sites: step"):
        bench.session.bind(make_plan(bench.structure, wrong))
    bench.session.bind(None)


def test_other_step_counts_have_no_share_of_second_order(bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    """How far the sampler goes from there is not in the plan."""
    prompt, found = embeds(1), []
    rule = Rule(sites=STEP, steps=PREDICTED, do=Forecast())
    for rules in ([WITH_SECOND_ORDER.model_copy(update={"steps": tuple(range(30))}), rule], [rule]):
        bound(*rules, steps=30, on_mismatch="retarget")
        found.append(generate(bench.forward, prompt, noise(), steps=20))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_loop_that_passes_planned_steps_over_has_no_share_of_second_order(
    bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    """It meets planned sigmas alone, and goes twice as far on each."""
    bound(WITH_SECOND_ORDER, Rule(sites=STEP, steps=(1, 3, 5), do=Reuse()), on_mismatch="retarget")
    prompt, latents = embeds(1), noise()
    for t in schedule()[0][:6:2]:
        given = {"hidden_states": latents, "timestep": t.expand(1), "encoder_hidden_states": prompt}
        found, expected = (model(**given, return_dict=False)[0] for model in (bench.forward, bench.model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        latents = latents - 0.1 * expected


@pytest.mark.parametrize("name", ["order 1", "range order 1"])
def test_two_branches_by_separate_calls(name: str, bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    rule, predict, site = PLANS[name]
    bound(rule)
    prompt, other = embeds(1), embeds(2)
    expected = generate(Literal(bench.model, predict, site), prompt, noise(), other=other)
    torch.testing.assert_close(generate(bench.forward, prompt, noise(), other=other), expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def guided_by_name(bench: SimpleNamespace, names: Sequence[str | None], *prompts: Tensor, steps: int = STEPS) -> Tensor:
    """Two guidance branches of ``prompts`` (of one tensor, written to before each call, if ``names`` are given)."""
    shared, latents = torch.empty_like(prompts[0]), noise()
    timesteps, sigmas = schedule()
    for i, t in enumerate(timesteps[:steps]):
        velocities = []
        for name, prompt in zip(names, prompts, strict=True):
            text = prompt if name is None else shared.copy_(prompt)
            with bench.model.cache_context(name) if name is not None else nullcontext():
                velocities += bench.forward(
                    hidden_states=latents, timestep=t.expand(1), encoder_hidden_states=text, return_dict=False
                )
        velocity, less = velocities
        latents = latents + (sigmas[i + 1] - sigmas[i]) * (less + 3.0 * (velocity - less))
    return latents


@pytest.mark.parametrize("name", ["order 1", "range order 1"])
def test_two_branches_that_share_the_conditioning_object_are_told_by_their_contexts(
    name: str, bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    program = bound(PLANS[name][0])
    prompts = embeds(1), embeds(2)
    expected = guided_by_name(bench, (None, None), *prompts)
    before = compile_counts()
    for names in (("cond", "uncond"), ("a", "b"), ("cond", "uncond")):
        assert torch.equal(guided_by_name(bench, names, *prompts), expected)
    assert compile_counts() == before, "a name neither breaks nor guards a graph"
    assert program.statistics.cold_calls == 0


def test_a_plan_that_needs_names_refuses_calls_without(bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    program = bound(PLANS["order 1"][0])
    plan = bench.session.plan.model_copy(
        update={"inputs": INPUTS.model_copy(update={"identity": None, "contexts": ("cond", "uncond")})}
    )
    bench.session.bind(plan)
    program.positions = replace(program.positions, identity=None)
    try:
        generate(bench.forward, embeds(1), noise(), stop=1)  # the first call of all may be one that nobody heard of
        with pytest.raises(PlanMismatchError, match=r"by the contexts cond, uncond, and this call is in none"):
            generate(bench.forward, embeds(1), noise())
        program.on_mismatch = "dense"
        dense = generate(bench.model, embeds(1), noise())
        torch.testing.assert_close(generate(bench.forward, embeds(1), noise()), dense, rtol=1e-5, atol=1e-5)
    finally:
        program.positions = replace(
            program.positions, identity=program.variants.trace.arguments["encoder_hidden_states"]
        )


def test_a_guidance_interval_starts_the_second_branch_afresh(
    bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    program = bound(Rule(sites=STEP, steps=(2, 4, 5, 7), do=Forecast()))
    prompt, other = embeds(1), embeds(2)
    interval = range(3, 6)
    literal = Literal(
        bench.model, lambda step, held, *rest: polynomial((2, 4, 5, 7), 1)(step, held, *rest) if len(held) > 1 else None
    )
    expected = generate(literal, prompt, noise(), other=other, interval=interval)
    found = generate(bench.forward, prompt, noise(), other=other, interval=interval)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert program.statistics.cold_calls == 1, "step 4 of the second branch has but one computed step before it"


def test_two_threads_give_what_they_give_one_after_the_other(
    bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    bound(PLANS["order 1"][0])
    prompts = [embeds(1), embeds(2)]
    alone = [generate(bench.forward, prompt, noise(i)) for i, prompt in enumerate(prompts)]
    together: list[Tensor | None] = [None, None]
    gate = threading.Barrier(2)

    def work(i: int) -> None:
        gate.wait()
        together[i] = generate(bench.forward, prompts[i], noise(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, both in zip(alone, together, strict=True):
        assert both is not None and torch.equal(one, both)


def test_the_same_prompt_in_two_threads_is_two_streams(bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    bound(PLANS["order 1"][0])
    prompt = embeds(1)
    alone = [generate(bench.forward, prompt, noise(i)) for i in range(2)]
    together: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: generate(bench.forward, prompt, noise(i))}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, together[i]) for i, one in enumerate(alone))


@pytest.mark.parametrize("same_prompt", [False, True])
def test_an_aborted_generation_leaves_no_trace(
    same_prompt: bool, bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    bound(PLANS["order 1"][0])
    prompt = embeds(1)
    fresh = generate(bench.forward, prompt, noise())
    bound(PLANS["order 1"][0])
    generate(bench.forward, prompt if same_prompt else embeds(2), noise(5), stop=4)
    assert torch.equal(generate(bench.forward, prompt, noise()), fresh)


def test_interleaved_generations_do_not_meet(bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    bound(PLANS["range order 1"][0])
    prompts = [embeds(1), embeds(2)]
    alone = [generate(bench.forward, prompt, noise(i)) for i, prompt in enumerate(prompts)]
    timesteps, sigmas = schedule()
    latents = [noise(0), noise(1)]
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            for which, prompt in enumerate(prompts):
                velocity = bench.forward(
                    hidden_states=latents[which], timestep=t.expand(1), encoder_hidden_states=prompt, return_dict=False
                )[0]
                latents[which] = latents[which] + (sigmas[i + 1] - sigmas[i]) * velocity
    assert all(torch.equal(one, other) for one, other in zip(alone, latents, strict=True))


def test_what_the_caller_writes_into_an_output_is_not_remembered(
    bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    bound(PLANS["order 1"][0])
    prompt = embeds(1)
    assert torch.equal(generate(bench.forward, prompt, noise(), spoil=True), generate(bench.forward, prompt, noise()))


@pytest.mark.parametrize("dies", ["conditioning", "schedule"])
@torch.no_grad()
def test_slots_die_with_what_they_belong_to(dies: str, bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    program = bound(PLANS["order 1"][0])
    belongs: dict[str, Any] = {"conditioning": embeds(1), "schedule": schedule()[0]}
    for t in belongs["schedule"][:3]:
        bench.forward(
            hidden_states=noise(),
            timestep=t.expand(1),
            encoder_hidden_states=belongs["conditioning"],
            return_dict=False,
        )
    del t
    assert [state.held_bytes > 0 for state in program._states] == [True]
    del belongs[dies]
    gc.collect()
    assert not program._streams.live() and not list(program._states)


@pytest.mark.parametrize("name", PLANS)
def test_slots_take_what_liveness_asks_for(name: str, bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    rule, _, site = PLANS[name]
    program = bound(rule)
    prompt, other = embeds(1), embeds(2)
    generate(bench.forward, prompt, noise(), other=other)
    assert all(state.held_bytes == 0 for state in program._states), "nothing is held behind the last reader"
    computed = [t for t in range(STEPS) if t not in rule.steps]
    reads = {t: [s for s in computed if s < t][-rule.do.history :] for t in rule.steps}  # type: ignore[union-attr]
    needed = [sum(any(s in reads[u] for u in rule.steps if u >= t) for s in computed if s <= t) for t in range(STEPS)]
    feature = (noise().numel() if site is None else 32 * 24) * 4
    assert 0 < program.statistics.peak_slot_bytes <= 1.3 * 2 * max(needed) * feature


def test_an_unplanned_step_count_names_the_numbers(bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    bound(PLANS["reuse"][0])
    with pytest.raises(
        PlanMismatchError,
        match=rf"timestep \d+.* is not among the {STEPS} planned.*the plan is for {STEPS} steps of FlowMatch",
    ):
        generate(bench.forward, embeds(1), noise(), steps=5)


def test_an_unplanned_step_count_runs_dense_on_request(bench: SimpleNamespace, bound: Callable[..., Program]) -> None:
    program = bound(Rule(sites=STEP, steps=(3,), do=Reuse()), on_mismatch="dense")
    prompt = embeds(1)
    found = generate(bench.forward, prompt, noise(), steps=5)
    torch.testing.assert_close(found, generate(bench.model, prompt, noise(), steps=5), rtol=1e-5, atol=1e-5)
    assert program.statistics.unplanned_calls == 3, "all but the first timestep and the last, which all schedules share"


class Retargeted(Literal):
    """Every call is the nearest of 30 planned steps; distances are those of the calls themselves."""

    def __init__(self, model: nn.Module, steps: int, predicted: Sequence[int], order: int) -> None:
        super().__init__(model, polynomial(predicted, order))
        self.predicted, self.order = predicted, order
        self.planned = [float(t) for t in schedule(30)[0]]
        self.sigmas = {float(t): sigma for t, sigma in zip(schedule(steps)[0], schedule(steps)[1], strict=False)}
        self.kept: list[tuple[float, Tensor]] = []

    def __call__(
        self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        value = float(timestep)
        step = min(range(30), key=lambda i: abs(self.planned[i] - value))
        if step in self.predicted and len(self.kept) > self.order:
            nodes = self.kept[: self.order + 1]
            at = self.sigmas[value]
            weights = [float(np.prod([(at - b) / (a - b) for b, _ in nodes if b != a])) for a, _ in nodes]
            return (sum((w * f for w, (_, f) in zip(weights, nodes, strict=True)), torch.zeros_like(hidden_states)),)
        output = self._model(hidden_states, timestep, encoder_hidden_states)
        self.kept.insert(0, (self.sigmas[value], output))
        return (output,)


PREDICTED = tuple(t for t in range(3, 30) if t % 3)
NEVER_RIGHT = Fit(  # coefficients that must not be used off the planned schedule
    history=2,
    latents=True,
    coefficients=dict.fromkeys(PREDICTED, (5.0, 5.0, 5.0)),
    sources={t: (t - t % 3, max(t - t % 3 - 3, 2)) for t in PREDICTED},
)


@pytest.mark.parametrize("steps", [20, 45])
@pytest.mark.parametrize("decision", [Forecast(order=1), Reuse(), NEVER_RIGHT], ids=["order 1", "reuse", "fit"])
def test_other_step_counts_are_retargeted_by_sigma(
    steps: int, decision: Forecast | Reuse | Fit, bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    program = bound(Rule(sites=STEP, steps=PREDICTED, do=decision), steps=30, on_mismatch="retarget")
    prompt = embeds(1)
    for _ in range(2):  # the second time with the same conditioning: a new generation all the same
        literal = Retargeted(bench.model, steps, PREDICTED, 0 if isinstance(decision, Reuse) else 1)
        expected = generate(literal, prompt, noise(), steps=steps)
        found = generate(bench.forward, prompt, noise(), steps=steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)
    assert program.statistics.predicted_calls > 0.8 * 2 * steps / 3 and program.statistics.unplanned_calls >= 2 * 10
    if not isinstance(decision, Fit):  # it comes near the dense result, as a plan should
        dense = generate(bench.model, prompt, noise(), steps=steps)
        assert float((found - dense).norm() / dense.norm()) < 0.1


def test_retargeting_leaves_the_planned_schedule_as_it_is(
    bench: SimpleNamespace, bound: Callable[..., Program]
) -> None:
    prompt = embeds(1)
    for rules in ([PLANS["fit"][0]], [PLANS["range order 1"][0]], [WITH_SECOND_ORDER, PLANS["fit"][0]]):
        bound(*rules)
        planned = generate(bench.forward, prompt, noise())
        program = bound(*rules, on_mismatch="retarget")
        assert torch.equal(generate(bench.forward, prompt, noise()), planned)
        assert program.statistics.unplanned_calls == 0


def _first_call(model: nn.Module, **options: Any) -> None:
    torch._dynamo.reset()
    with interpreted():
        forward = compiled(model, **options)
        generate(forward, embeds(1), noise(), stop=1)


def test_a_plan_for_another_model_is_refused_at_the_first_call(model: nn.Module) -> None:
    with pytest.raises(PlanMismatchError, match="plan was made for WanTransformer3DModel with structure sha256:0"):
        _first_call(model, plan=make_plan("sha256:0"))


def test_a_plan_with_sites_that_the_model_lacks_is_refused(bench: SimpleNamespace) -> None:
    with pytest.raises(PlanMismatchError, match=r"blocks\.7.*blocks\.0 to blocks\.2"):
        bench.session.bind(make_plan(bench.structure, Rule(sites="blocks.7", steps=(3,), do=Reuse())))
    bench.session.bind(None)


def test_a_fit_for_other_sources_is_refused(bench: SimpleNamespace) -> None:
    wrong = FIT.model_copy(update={"sources": {3: (2, 0), 4: (2, 1), 6: (5, 2)}})
    with pytest.raises(
        PlanMismatchError, match=r"step 3: fit of step was made for the steps \[2, 0\], .* are \[2, 1\]"
    ):
        bench.session.bind(make_plan(bench.structure, Rule(sites=STEP, steps=tuple(FITTED), do=wrong)))
    bench.session.bind(None)


def test_a_missing_plan_file_is_named_at_the_first_call(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.yaml: no such plan file"):
        _first_call(model, plan=tmp_path / "nowhere.yaml")


def test_without_a_plan_it_runs_dense_and_says_so_once(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path))
    torch._dynamo.reset()
    prompt = embeds(1)
    with interpreted(), caplog.at_level(logging.WARNING, "ditopt"):
        forward = compiled(model)
        found = generate(forward, prompt, noise(), stop=2)
        with torch.no_grad():  # another resolution is another graph, not another model
            forward(torch.randn(1, 4, 2, 6, 6), torch.tensor([5.0]), prompt)
    torch.testing.assert_close(found, generate(model, prompt, noise(), stop=2), rtol=1e-5, atol=1e-5)
    assert [record.message.split(" (")[0] for record in caplog.records] == ["no plan for this model"]
    torch._dynamo.reset()


def test_inductor_runs_the_plan_without_recompiling(model: nn.Module) -> None:
    """One plan through the compiler: the interpreter's numbers, and nothing compiled after the first generation."""
    torch._dynamo.reset()
    session = Session(inputs=INPUTS)
    forward = compiled(model, session=session)
    prompt = embeds(1)
    generate(forward, prompt, noise(), stop=1)
    rules = [Rule(sites="blocks.0..1", steps=(2, 4, 5), do=Forecast()), Rule(sites=STEP, steps=(6, 7), do=Reuse())]
    session.bind(make_plan(session.programs[0].variants.trace.structure, *rules))
    with interpreted():
        reference = Session(inputs=INPUTS, plan=session.plan)
        plain = compiled(model, session=reference)
        expected = generate(plain, prompt, noise())
    torch.testing.assert_close(generate(forward, prompt, noise()), expected, rtol=1e-5, atol=1e-5)
    before, variants = compile_counts(), set(session.programs[0].variants.compiled)
    for seed in (2, 3):
        generate(forward, embeds(seed), noise(seed), other=embeds(9))
    assert compile_counts() == before
    assert set(session.programs[0].variants.compiled) == variants
    torch._dynamo.reset()
