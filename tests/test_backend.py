"""``torch.compile(model, backend="ditopt")`` as users call it: by name, with options and breaks, in a new process."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt import store
from ditopt._torch import break_reasons, compile_counts
from ditopt.backend import Session, ditopt_backend
from ditopt.decisions import Forecast, Reuse
from ditopt.errors import InputError, PlanError
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.sites import AttentionSite, LinearSite
from tests.tiny import make_model
from tests.trace.models import compiled, interpreted

STEPS = 6
TIMES = tuple(1.0 - i / STEPS for i in range(STEPS))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        query, key, value = self.qkv(F.layer_norm(x + shift, (24,))).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + mixed


class OwnModel(nn.Module):
    """Somebody's own transformer, which prints in the middle where ``noisy``."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.layers, self.noisy = nn.Linear(1, 24), nn.ModuleList(Block() for _ in range(4)), noisy

    def forward(self, tokens: Tensor, when: Tensor, prompt: Tensor) -> Tensor:
        shift = self.time(when[:, None, None]) + prompt
        for layer in self.layers[:2]:
            tokens = layer(tokens, shift)
        if self.noisy:
            torch._dynamo.graph_break("the user prints here")
        for layer in self.layers[2:]:
            tokens = layer(tokens, shift)
        return tokens


@torch.no_grad()
def generate(forward: Callable[..., Tensor], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens, prompt = torch.randn(1, 20, 24, generator=generator), torch.randn(1, 1, 24, generator=generator)
    for time in TIMES:
        tokens = tokens - forward(tokens, torch.full((1,), time), prompt) / STEPS
    return tokens


def own_plan(structure: str) -> Plan:
    return Plan(
        model=ModelPrint(class_name="OwnModel", structure=structure, blocks=4),
        sampler=SamplerPrint(
            class_name="Euler", steps=STEPS, timesteps={"transformer": TIMES}, sigmas={"transformer": TIMES}
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(timestep="when", latents="tokens", identity="prompt", forward=("tokens", "when", "prompt")),
        rules=(Rule(sites="layers.1..2", steps=(2, 3), do=Forecast()), Rule(sites="step", steps=(5,), do=Reuse())),
    )


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def structure_of(model: nn.Module) -> str:
    session = Session()
    with interpreted():
        generate(compiled(model, fullgraph=False, session=session))
    torch._dynamo.reset()
    return session.programs[0].variants.trace.structure


def test_graph_breaks_are_tolerated_and_each_graph_has_its_sites() -> None:
    model = OwnModel(noisy=True)
    expected = generate(OwnModel())
    before = compile_counts()
    session = Session()
    found = generate(compiled(model, fullgraph=False, session=session))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    traces = [program.variants.trace for program in session.programs]
    assert [trace.index for trace in traces] == [0, 1]
    attention = [[site.name for site in trace.sites if isinstance(site, AttentionSite)] for trace in traces]
    assert attention == [["layers.0", "layers.1"], ["layers.2", "layers.3"]]
    linears = [site.name for trace in traces for site in trace.sites if isinstance(site, LinearSite)]
    assert {name for name in linears if name != "time"} == {
        f"layers.{i}.{part}" for i in range(4) for part in ("qkv", "out")
    }
    assert all(site.graph == trace.index for trace in traces for site in trace.sites)
    assert compile_counts().breaks == before.breaks + 1
    assert any("the user prints here" in reason for reason in break_reasons())


def test_the_backend_goes_by_name() -> None:
    names = [entry.name for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")]
    if "ditopt" not in names:
        pytest.skip("ditopt is not installed here; tests/test_packaging.py looks for the name in a wheel")
    model = OwnModel()
    with interpreted():
        torch.testing.assert_close(
            generate(torch.compile(model, backend="ditopt")), generate(model), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paln": "x.yaml"}, "options paln are unknown to the ditopt backend; known are plan, network"),
        ({"on_mismatch": "guess"}, "option on_mismatch='guess' is unknown; use one of error, dense, retarget"),
        ({"plan": 3}, "option plan=3 should be the path of a plan file"),
    ],
)
def test_options_that_are_wrong_are_named(options: dict[str, Any], message: str) -> None:
    with interpreted(), pytest.raises(InputError, match=message):
        generate(compiled(OwnModel(), **options))


def test_an_ignored_mode_is_told() -> None:
    with interpreted(), pytest.warns(UserWarning, match="mode='max-autotune' is ignored by the ditopt backend"):
        generate(torch.compile(OwnModel(), backend=ditopt_backend, mode="max-autotune"))


CHILD = """
import hashlib, torch
from ditopt.backend import ditopt_backend
from tests.test_backend import OwnModel, generate
forward = torch.compile(OwnModel(), backend=ditopt_backend, fullgraph=True, options={options})
print(hashlib.sha256(generate(forward).numpy().tobytes()).hexdigest())
"""


def test_a_plan_gives_the_same_numbers_in_a_new_process(
    tmp_path: Path, root: Path, run_python: Callable[..., str]
) -> None:
    model = OwnModel()
    plan = own_plan(structure_of(model))
    path = tmp_path / "plan.yaml"
    plan.save(path)
    here = generate(compiled(model, plan=plan))
    assert not torch.allclose(here, generate(model), atol=1e-5), "the plan does something"
    told = run_python(CHILD.format(options={"plan": str(path)}), cwd=root, path=(root,))
    assert told.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_a_stored_plan_is_found_by_the_structure_of_the_model(tmp_path: Path) -> None:
    model = OwnModel()
    plan = own_plan(structure_of(model))
    plan.save(tmp_path / "plan.yaml")
    store.keep_plan(tmp_path / "plan.yaml", plan.model.structure)
    with interpreted():
        named = generate(compiled(model, plan=plan))
        torch._dynamo.reset()
        assert torch.equal(generate(compiled(model)), named)


@pytest.fixture
def stored() -> Path:
    """A plan for ``OwnModel`` in the user's folder."""
    plan = own_plan(structure_of(OwnModel()))
    path = store.plan_path(plan.model.structure)
    path.parent.mkdir(parents=True)
    plan.model_copy(update={"measured": {"psnr": 37.94}}).save(path)
    return path


def test_a_stored_plan_tells_once_that_it_is_taken(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    with interpreted(), caplog.at_level(logging.WARNING, "ditopt"):
        for _ in range(2):
            torch._dynamo.reset()
            generate(compiled(OwnModel()))
    assert caplog.messages == [
        f"this model runs by the plan stored in {stored}, made for {STEPS} steps of Euler, guidance 1.0, measured at "
        '37.94 dB PSNR; to run dense delete the file or pass options={"plan": None}'
    ]


def test_a_stored_plan_tells_once_that_it_does_not_fit(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = OwnModel()
    tokens, prompt = torch.randn(1, 20, 24), torch.randn(1, 1, 24)
    with interpreted(), torch.no_grad(), caplog.at_level(logging.WARNING, "ditopt"):
        forward = compiled(model)
        for time in (0.93, 0.71):
            found = forward(tokens, torch.full((1,), time), prompt)
            torch.testing.assert_close(found, model(tokens, torch.full((1,), time), prompt), rtol=1e-5, atol=1e-5)
    _, told = caplog.messages
    assert told.startswith(f"the plan stored in {stored} is not for this call, which runs dense: timestep 0.93")
    assert f"the plan is for {STEPS} steps of Euler" in told


def test_a_stored_plan_is_retargeted_on_request(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the complaint of one that does not fit offers as a way out."""
    session = Session.from_options({"on_mismatch": "retarget"})
    with interpreted(), torch.no_grad(), caplog.at_level(logging.WARNING, "ditopt"):
        forward = compiled(OwnModel(), session=session)
        prompt = torch.randn(1, 1, 24)
        for time in (1.0, 0.8, 0.6, 0.4, 0.2):
            forward(torch.randn(1, 20, 24), torch.full((1,), time), prompt)
    assert session.programs[0].statistics.predicted_calls > 0
    assert len(caplog.messages) == 1, "it was taken, and no call ran dense"


def test_a_stored_plan_for_another_network_is_not_taken(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    with interpreted(), caplog.at_level(logging.WARNING, "ditopt"):
        generate(compiled(OwnModel(), network="transformer_2"))
    assert [message.split(":")[0] for message in caplog.messages] == ["no plan for this model (structure sha256"]
    assert "network transformer_2" in caplog.messages[0]


def test_a_stored_plan_that_is_malformed_is_named_at_the_first_call() -> None:
    model = OwnModel()
    path = store.plan_path(structure_of(model))
    path.parent.mkdir(parents=True)
    path.write_text("ditopt: 1\nrules: 7\n")
    with interpreted(), pytest.raises(PlanError, match=r"sha256-.*\.yaml, line 2, field rules"):
        generate(compiled(model))


def test_every_shape_has_a_graph_of_its_own() -> None:
    """With Dynamo's default, which takes sizes that change for dynamic, and graphs that are really compiled."""
    torch._dynamo.reset()
    model, session = make_model(), Session()
    expected = make_model()
    model.compile(backend=ditopt_backend, options={"session": session})
    with torch.no_grad():
        for batch, tokens in ((1, 16), (2, 16), (3, 24), (1, 16)):
            given = torch.randn(batch, tokens, 4), torch.full((batch,), 500.0), torch.randn(batch, 32)
            torch.testing.assert_close(model(*given), expected(*given), rtol=1e-4, atol=1e-5)
    assert len(session.programs) == 3
    assert len({program.variants.trace.structure for program in session.programs}) == 1
    assert all(len(program.variants.trace.blocks) == 4 for program in session.programs)
