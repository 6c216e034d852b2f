"""Models with graph breaks: each graph has its own decisions under one plan, and all follow one step clock."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.backend import Session
from ditopt.decisions import Forecast, Reuse
from ditopt.errors import PlanMismatchError
from ditopt.optimizer import Optimizer
from ditopt.outcome import Result
from ditopt.plan import Breaks, DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.quality import psnr
from ditopt.report.explained import side_path
from ditopt.sites import STEP
from ditopt.target import Target
from tests.tiny import TinyDiT
from tests.trace.models import compiled, interpreted

STEPS = 8
TIMES = tuple(1000 - 120.0 * step for step in range(STEPS))
PROMPTS = ("one", "two", "three", "four")


class Split(TinyDiT):
    """Breaks behind its second block; ``between`` runs there, in eager Python."""

    between: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        features = self.features(timestep, encoder_hidden_states)
        # As in many models, names of arguments come to mean something else before the break.
        hidden_states = self.embed(hidden_states)
        timestep = features
        for block in self.blocks[:2]:
            hidden_states = block(hidden_states, timestep)
        torch._dynamo.graph_break()
        self.pause()
        for block in self.blocks[2:]:
            hidden_states = block(hidden_states, timestep)
        velocity: Tensor = self.head(hidden_states)
        return velocity

    def features(self, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        angles = timestep[:, None] / 1000 * torch.arange(1, 9, device=timestep.device)
        found: Tensor = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + encoder_hidden_states
        return found

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def pause(self) -> None:
        type(self).between()


class Loop(Split):
    """Breaks in the loop over its blocks: Dynamo leaves the loop alone and compiles one block for all."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        features = self.features(timestep, encoder_hidden_states)
        hidden_states = self.embed(hidden_states)
        for number, block in enumerate(self.blocks):
            if number == 2:
                torch._dynamo.graph_break()
            hidden_states = block(hidden_states, features)
        velocity: Tensor = self.head(hidden_states)
        return velocity


class Cut(Split):
    """Runs a part of its second block again behind the break."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        features = self.features(timestep, encoder_hidden_states)
        x = self.blocks[0](self.embed(hidden_states), features)
        x = self.blocks[1](x, features)
        torch._dynamo.graph_break()
        x = x + self.blocks[1].get_submodule("mlp")(x)
        for block in self.blocks[2:]:
            x = block(x, features)
        velocity: Tensor = self.head(x)
        return velocity


def make(kind: type[TinyDiT]) -> TinyDiT:
    torch.manual_seed(0)
    return kind(width=64).eval()


@torch.no_grad()
def generate(
    model: Callable[..., Tensor], text: Tensor, seed: int = 0, tokens: int = 64, stop: int | None = None
) -> Tensor:
    x = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))
    for time in TIMES[:stop]:
        x = x - model(x, torch.tensor([time]), text) / STEPS
    return x


def features_of(prompt: str) -> Tensor:
    return torch.randn(1, 64, generator=torch.Generator().manual_seed(sum(map(ord, prompt))))


def rollout(model: nn.Module, prompt: str, seed: int) -> Tensor:
    return generate(model, features_of(prompt), seed, tokens=256)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder and a Dynamo of its own; variants are interpreted."""
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with interpreted():
        yield
    torch._dynamo.reset()


def optimise(model: nn.Module, **settings: Any) -> Result:
    given: dict[str, Any] = {"target": Target(min_psnr=25.0), "budget": 4, "quiet": True, **settings}
    return Optimizer(model, PROMPTS, rollout=rollout, **given).run()


@pytest.mark.usefixtures("fresh")
def test_both_graphs_get_rules_that_a_fresh_model_repeats(tmp_path: Path) -> None:
    model, path = make(Split), tmp_path / "plan.yaml"
    with torch.no_grad():
        dense = rollout(model, "five", 70)
    result = optimise(model, plan_path=path)
    assert result.plan is not None, result.reasons
    assert result.quality is not None and result.quality.psnr >= 25
    assert {rule.sites for rule in result.plan.rules} == {"blocks.0..1", "blocks.2..3"}
    (broken,) = result.plan.breaks.values()
    assert len(broken.at) == 1 and "test_graph_breaks.py:" in broken.at[0] and "graph_break()" in broken.at[0]
    assert any("graph break at" in reason and "test_graph_breaks.py:" in reason for reason in result.reasons)
    assert "graph breaks cut the network" in side_path(path).read_text()
    planned = rollout(model, "five", 70)
    torch._dynamo.reset()
    again = rollout(ditopt.apply(make(Split), path), "five", 70)
    assert torch.equal(planned, again)
    assert 20 < psnr(again, dense) < 100
    torch._dynamo.reset()
    named: Any = torch.compile(make(Split), backend="ditopt", options={"plan": str(path)})
    assert torch.equal(rollout(named, "five", 70), again), "each graph reads the plan by itself here"
    torch._dynamo.reset()
    stored: Any = torch.compile(make(Split), backend="ditopt")
    assert torch.equal(rollout(stored, "five", 70), again), "each graph finds the plan in the user's folder"


@pytest.mark.usefixtures("fresh")
def test_speed_is_searched_for_among_ranges() -> None:
    result = optimise(make(Split), target=Target(speedup=1.2))
    assert result.plan is not None, result.reasons
    assert result.plan.predicted["seconds"] < result.rows[1].seconds


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [(Loop, {}, "ran 32 times in 8 calls"), (Split, {"techniques": ("reuse",)}, "techniques leave 'ranges' out")],
)
@pytest.mark.usefixtures("fresh")
def test_what_cannot_be_decided_stays_dense_with_the_reason(
    kind: type[TinyDiT], settings: dict[str, Any], message: str
) -> None:
    result = optimise(make(kind), **settings)
    assert result.plan is None
    assert message in result.reasons[-1] and "graph_break()" in result.reasons[-1].split("; breaks: ")[1]


@pytest.mark.usefixtures("fresh")
def test_a_block_that_a_break_cuts_is_left_out() -> None:
    result = optimise(make(Cut))
    assert any("blocks.1 is in several graphs: left dense" in reason for reason in result.reasons)
    assert result.plan is not None, result.reasons
    assert {rule.sites for rule in result.plan.rules} <= {"blocks.0", "blocks.2..3"}
    assert result.plan.breaks["transformer"].blocks == (("blocks.0",), ("blocks.2", "blocks.3"))


RULES = (
    Rule(sites="blocks.0..1", steps=(2, 4, 5), do=Forecast()),
    Rule(sites="blocks.2..3", steps=(1, 3, 4, 7), do=Reuse()),
)


STACKS = (("blocks.0", "blocks.1"), ("blocks.2", "blocks.3"))


def hand_written(session: Session, *rules: Rule, geometry: tuple[int, ...] = ()) -> Plan:
    structures = [program.variants.trace.structure for program in session.programs]
    return Plan(
        model=ModelPrint(class_name="Split", structure=" ".join(structures), blocks=4),
        sampler=SamplerPrint(
            class_name="Euler", steps=STEPS, timesteps={"transformer": TIMES}, sigmas={"transformer": TIMES}
        ),
        geometry={"transformer": geometry} if geometry else {},
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(identity="encoder_hidden_states", forward=("hidden_states", "timestep", "encoder_hidden_states")),
        breaks={"transformer": Breaks(clock=structures[0], blocks=STACKS)},
        rules=rules,
    )


INPUTS = Inputs(identity="encoder_hidden_states", forward=("hidden_states", "timestep", "encoder_hidden_states"))


@pytest.fixture(scope="module")
def captured() -> Iterator[tuple[Session, Callable[..., Tensor]]]:
    """One capture for all hand-written plans, its variants interpreted."""
    torch._dynamo.reset()
    with interpreted():
        session = Session(inputs=INPUTS, check_passes=True)
        forward = compiled(make(Split), fullgraph=False, session=session)
        generate(forward, features_of("one"), stop=1)
        yield session, forward
    torch._dynamo.reset()


@pytest.fixture
def planned(captured: tuple[Session, Callable[..., Tensor]]) -> Iterator[tuple[Session, Callable[..., Tensor]]]:
    """A session and a model that runs by ``RULES``."""
    session, forward = captured
    for program in session.programs:
        program.statistics = type(program.statistics)()
    session.bind(hand_written(session, *RULES))
    yield session, forward
    session.settle("error", None)
    session.bind(None)


@torch.no_grad()
def literally(model: TinyDiT, text: Tensor, seed: int = 0) -> Tensor:
    """``RULES`` in plain Python."""
    assert isinstance(model, Split)
    x = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(seed))
    held: dict[int, list[tuple[float, Tensor]]] = {0: [], 2: []}

    def add(first: int, stream: Tensor, features: Tensor, predicted: Sequence[int], step: int) -> Tensor:
        past = held[first]
        if step not in predicted:
            out = stream
            for block in model.blocks[first : first + 2]:
                out = block(out, features)
            past.insert(0, (TIMES[step], out - stream))
            return out
        if first == 2:
            return stream + past[0][1]
        (new, one), (old, two) = past[:2]
        return stream + one + (TIMES[step] - new) / (new - old) * (one - two)

    for step, time in enumerate(TIMES):
        features = model.features(torch.tensor([time]), text)
        stream = add(0, model.embed(x), features, (2, 4, 5), step)
        stream = add(2, stream, features, (1, 3, 4, 7), step)
        x = x - model.head(stream) / STEPS
    return x


def test_a_generation_equals_its_literal_transcription(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    session, forward = planned
    text = features_of("one")
    expected = literally(make(Split), text)
    for _ in range(2):
        torch.testing.assert_close(generate(forward, text), expected, rtol=1e-5, atol=1e-5)
    assert [program.statistics.predicted_calls for program in session.programs] == [6, 8]
    assert [program.statistics.cold_calls for program in session.programs] == [0, 0]
    assert not torch.allclose(expected, generate(make(Split), text), atol=1e-4), "the plan does something"
    leader = session.programs[0]
    assert all(state.held_bytes == 0 for state in leader._states), "features of both graphs die at their last reader"
    assert 0 < leader.statistics.peak_slot_bytes <= 3 * 64 * 64 * 4


def test_two_threads_follow_their_own_steps(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    _, forward = planned
    texts = [features_of("one"), features_of("two")]
    alone = [generate(forward, text, seed) for seed, text in enumerate(texts)]
    together: dict[int, Tensor] = {}
    turn = threading.Barrier(2, timeout=60)

    def in_step() -> None:
        turn.wait()

    def work(seed: int) -> None:
        together[seed] = generate(forward, texts[seed], seed)

    Split.between = staticmethod(in_step)  # both threads are between their graphs at once
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        Split.between = staticmethod(lambda: None)
    assert [torch.equal(one, together[seed]) for seed, one in enumerate(alone)] == [True, True]


def test_interleaved_generations_follow_their_own_steps(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    _, forward = planned
    texts = [features_of("one"), features_of("two")]
    alone = [generate(forward, text, seed) for seed, text in enumerate(texts)]
    latents = [torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.no_grad():
        for step in range(STEPS + 3):  # the second is three steps behind
            for which, at in ((0, step), (1, step - 3)):
                if 0 <= at < STEPS:
                    velocity = forward(latents[which], torch.tensor([TIMES[at]]), texts[which])
                    latents[which] = latents[which] - velocity / STEPS
    assert all(torch.equal(one, other) for one, other in zip(alone, latents, strict=True))


class Stop(Exception):
    """What ends a generation in these tests."""


@pytest.mark.parametrize("at", [1, 4, STEPS])
@pytest.mark.parametrize("same_prompt", [False, True])
def test_a_generation_aborted_between_its_graphs_leaves_no_trace(
    at: int, same_prompt: bool, planned: tuple[Session, Callable[..., Tensor]]
) -> None:
    session, forward = planned
    text = features_of("one")
    fresh = generate(forward, text)
    session.bind(session.plan)
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Stop

    Split.between = staticmethod(stop)
    try:
        with pytest.raises(Stop):
            generate(forward, text if same_prompt else features_of("two"), 5)
    finally:
        Split.between = staticmethod(lambda: None)
    assert torch.equal(generate(forward, text), fresh)


def test_a_graph_without_the_one_before_it_is_refused(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    session, forward = planned
    generate(forward, features_of("one"), stop=3)
    with pytest.raises(PlanMismatchError, match="behind a graph break ran without the one before it"):
        session.programs[1]([])


def test_calls_that_the_plan_is_not_for_run_dense_in_all_graphs(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    session, forward = planned
    text = features_of("one")
    x = torch.randn(1, 64, 4)
    with pytest.raises(PlanMismatchError, match="timestep 555 is not among the 8 planned"), torch.no_grad():
        forward(x, torch.tensor([555.0]), text)
    session.settle("dense", None)
    with torch.no_grad():
        found = forward(x, torch.tensor([555.0]), text)
        torch.testing.assert_close(found, make(Split)(x, torch.tensor([555.0]), text), rtol=1e-5, atol=1e-5)
    assert [program.statistics.unplanned_calls for program in session.programs] == [1, 1]


def test_another_geometry_is_refused_by_all_graphs_and_can_be_run_dense(
    planned: tuple[Session, Callable[..., Tensor]],
) -> None:
    session, forward = planned
    session.bind(hand_written(session, *RULES, geometry=(2, 48, 4)))
    text = features_of("one")
    with pytest.raises(PlanMismatchError, match=r"latents have shape \[1, 64, 4\], the plan was made for \[2, 48, 4\]"):
        generate(forward, text)
    session.settle("dense", None)
    torch.testing.assert_close(generate(forward, text), generate(make(Split), text), rtol=1e-5, atol=1e-5)
    session.settle("retarget", None)
    torch.testing.assert_close(generate(forward, text), literally(make(Split), text), rtol=1e-5, atol=1e-5)


def test_whole_steps_of_a_broken_network_are_refused(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    session, _ = planned
    with pytest.raises(PlanMismatchError, match="plan decides whole steps of transformer, which graph breaks cut"):
        session.bind(hand_written(session, Rule(sites=STEP, steps=(3,), do=Reuse())))


@pytest.mark.parametrize("site", ["blocks.1..2", "blocks.7", "layers.*"])
def test_a_site_that_no_graph_has_is_refused(planned: tuple[Session, Callable[..., Tensor]], site: str) -> None:
    session, _ = planned
    message = re.escape(f"lacks: {site}; the model has ranges within blocks.0..1, blocks.2..3")
    with pytest.raises(PlanMismatchError, match=message):
        session.bind(hand_written(session, *RULES, Rule(sites=site, steps=(3,), do=Reuse())))


def test_a_block_that_a_break_cuts_is_no_site(planned: tuple[Session, Callable[..., Tensor]]) -> None:
    session, _ = planned
    plan = hand_written(session, Rule(sites="blocks.1", steps=(3,), do=Reuse()))
    cut = Breaks(clock=plan.breaks["transformer"].clock, blocks=(("blocks.0",), ("blocks.2", "blocks.3")))
    with pytest.raises(PlanMismatchError, match=r"lacks: blocks\.1; the model has ranges within blocks\.0, blocks\.2"):
        session.bind(plan.model_copy(update={"breaks": {"transformer": cut}}))
