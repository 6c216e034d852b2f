"""Faults in what is compiled: other weights, adapters, dtypes, offloading, copies, and models beside each other.

Each equals, bit for bit, the same where nothing was before, or is refused.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ditopt.backend import Session
from ditopt.errors import PlanMismatchError
from tests.runtime.faults.bench import RULES, Bench, Loop, bench_of, embeds, noise, wan
from tests.runtime.test_sparse import TIMES
from tests.trace.models import compiled, interpreted

pytest.importorskip("diffusers")

Change = Callable[[nn.Module], object]
WEIGHTS = ("blocks.0.attn1.to_v.weight", "blocks.1.ffn.net.2.weight", "condition_embedder.time_proj.weight")


@pytest.fixture(scope="module")
def captured() -> Iterator[Bench]:
    with bench_of(wan(), *RULES) as found:
        yield found


@pytest.fixture
def bench(captured: Bench) -> Iterator[Bench]:
    """Its weights are put back afterwards."""
    weights = {name: value.clone() for name, value in captured.model.state_dict().items()}
    captured.fresh()
    yield captured
    captured.model.load_state_dict(weights)


def others(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, some of them changed."""
    drawing = torch.Generator().manual_seed(5)
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=drawing) if name in WEIGHTS else value.clone()
        for name, value in model.state_dict().items()
    }


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for name, value in others(model).items():
        if name in WEIGHTS:
            model.get_parameter(name).copy_(value)


def other_memory(model: nn.Module) -> None:
    for name, value in others(model).items():
        if name in WEIGHTS:
            model.get_parameter(name).data = value


def other_parameters(model: nn.Module) -> None:
    for name, value in others(model).items():
        if name in WEIGHTS:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def fused(model: nn.Module) -> None:
    """An adapter of rank 2 is added to what it adapts, as ``fuse_lora`` does."""
    weight = model.get_parameter(WEIGHTS[0])
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((2, 24), (24, 2)))
    weight.add_(0.5 * up @ down)


CHANGES: dict[str, Change] = {
    "load_state_dict": lambda model: model.load_state_dict(others(model)),
    "written in place": in_place,
    "other memory": other_memory,
    "other parameters": other_parameters,
    "an adapter fused": fused,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_weights_changed(name: str, at: int, bench: Bench) -> None:
    """Before step ``at``: what other weights made is not read."""
    prompt, before = embeds(), {key: value.clone() for key, value in bench.model.state_dict().items()}
    bench.loop(prompt).run()
    first = bench.alone(prompt, steps=at)
    CHANGES[name](bench.model)
    expected = bench.alone(prompt, first, start=at)
    bench.model.load_state_dict(before)
    bench.fresh()
    schedule = torch.tensor(TIMES)
    bench.loop(prompt, 3, schedule=schedule).run()
    loop = bench.loop(prompt, schedule=schedule)
    loop.run(at)
    CHANGES[name](bench.model)
    assert torch.equal(loop.run(), expected)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as ``peft`` wraps one."""

    def __init__(self, base: nn.Module, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        drawing = torch.Generator().manual_seed(3)
        self.down, self.up = (
            nn.Parameter(torch.randn(shape, generator=drawing), requires_grad=False) for shape in ((2, 24), (24, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.scale * (x @ self.down.T @ self.up.T)
        return out


def test_an_adapter_loaded_is_refused_and_the_model_without_it_runs_on(bench: Bench) -> None:
    """It has weights that the plan was not made for."""
    prompt = embeds()
    expected = bench.alone(prompt)
    attention: Any = bench.model.get_submodule("blocks.0.attn1")
    plain = attention.to_v
    loop = bench.loop(prompt)
    loop.run(2)
    attention.to_v = Adapted(plain, 0.5)
    with pytest.raises(PlanMismatchError, match=r"plan was made for Model with structure .*this model has structure"):
        loop.step()
    attention.to_v = plain
    assert torch.equal(bench.loop(prompt).run(), expected)


def test_an_adapter_scaled_in_mid_generation() -> None:
    """A model that had it when the plan was made: with another scale it is another model."""
    model = wan()
    attention: Any = model.get_submodule("blocks.0.attn1")
    attention.to_v = Adapted(attention.to_v, 0.5)
    with bench_of(model, *RULES) as bench:
        prompt = embeds()
        first = bench.alone(prompt, steps=2)
        attention.to_v.scale = 0.25
        expected = bench.alone(prompt, first, start=2)
        attention.to_v.scale = 0.5
        loop = bench.loop(prompt)
        loop.run(2)
        attention.to_v.scale = 0.25
        assert torch.equal(loop.run(), expected)


@pytest.mark.parametrize("how", ["torch.compile of each", "compile() of each"])
def test_two_models_of_one_class_with_one_plan(how: str, bench: Bench) -> None:
    """With equal options Dynamo lets them share what it compiled; they share the prompt and the schedule as well."""
    prompt, models = embeds(), [copy.deepcopy(bench.model) for _ in range(2)]
    in_place(models[1])
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": bench.plan}
    with interpreted():
        if how == "compile() of each":
            for model in models:
                model.compile(backend="ditopt", options=options)
            forwards: list[Any] = [*models]
        else:
            forwards = [torch.compile(model, backend="ditopt", options=options) for model in models]
        expected = [Loop(forward, prompt.clone(), noise()).run() for forward in forwards]
        assert float((expected[0] - expected[1]).abs().max()) > 1e-3
        schedule = torch.tensor(TIMES)
        loops = [Loop(forward, prompt, noise(), schedule=schedule) for forward in forwards]
        for _ in TIMES:
            for loop in loops:
                loop.step()
    torch._dynamo.reset()
    assert all(torch.equal(loop.latents, each) for loop, each in zip(loops, expected, strict=True))


def test_a_plan_compiled_twice(bench: Bench) -> None:
    """The second program begins where the first is in the middle of a generation."""
    prompt, schedule = embeds(), torch.tensor(TIMES)
    expected = [bench.alone(prompt, seed) for seed in range(2)]
    session = Session(plan=bench.plan)
    again = compiled(bench.model, session=session)
    loops = [bench.loop(prompt, schedule=schedule), Loop(again, prompt, noise(1), schedule=schedule)]
    for _ in TIMES:
        for loop in loops:
            loop.step()
    assert all(torch.equal(loop.latents, each) for loop, each in zip(loops, expected, strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_compiled_model(how: str, bench: Bench) -> None:
    """It is not compiled, and has nothing of the other's state; compiled, it runs as that."""
    prompt, schedule = embeds(), torch.tensor(TIMES)
    expected, dense = bench.alone(prompt), Loop(bench.model, prompt, noise()).run()
    model, options = copy.deepcopy(bench.model), cast(dict[str, Any], {"plan": bench.plan})
    model.compile(backend="ditopt", options=options)
    with interpreted():
        half = Loop(model, prompt, noise(), schedule=schedule)
        half.run(3)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        assert torch.equal(Loop(twin, prompt, noise(), schedule=schedule).run(), dense)
        twin.compile(backend="ditopt", options=options)
        other = Loop(twin, prompt, noise(), schedule=schedule)
        for _ in range(3):
            other.step()
            half.step()
        assert torch.equal(other.run(), expected)
    assert torch.equal(half.latents, expected)


def test_another_dtype(bench: Bench) -> None:
    """It is another graph, with state of its own, also in mid-generation; the plan does not know its weights."""
    prompt = embeds()
    expected = bench.alone(prompt)
    loop = bench.loop(prompt)
    loop.run(2)
    bench.model.to(torch.float64)
    with pytest.raises(PlanMismatchError, match=r"plan was made for .*this model has structure"):
        bench.loop(prompt.double(), noise().double()).step()
    bench.model.to(torch.float32)
    assert torch.equal(bench.loop(prompt).run(), expected)


@pytest.mark.parametrize("what", ["train", "grad"])
def test_training_mode_and_gradients(what: str, bench: Bench) -> None:
    """A model in training mode, and calls that ask for gradients, are other graphs; they get the same values."""
    prompt, schedule = embeds(), torch.tensor(TIMES)
    expected = bench.alone(prompt)
    loop = bench.loop(prompt, schedule=schedule)
    loop.run(2)
    if what == "train":
        bench.model.train()
        found = bench.loop(prompt, schedule=schedule).run()
        bench.model.eval()
    else:
        with torch.enable_grad():
            wanted = noise().requires_grad_()
            out = bench.forward(
                hidden_states=wanted, timestep=schedule[:1], encoder_hidden_states=prompt, return_dict=False
            )[0]
            assert not out.requires_grad, "programs give no gradients"
        found = bench.loop(prompt, schedule=schedule).run()
    assert torch.equal(found, expected)
    assert torch.equal(loop.run(), expected), "what was under way goes on"
