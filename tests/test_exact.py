"""``quality="exact"``: what is computed ahead is kept where generations are faster so, and dropped with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ditopt
from ditopt.backend import ditopt_backend
from ditopt.cli import app
from ditopt.decisions import Hoist
from ditopt.errors import InputError
from ditopt.measure import Evaluator
from ditopt.plan import Plan, Rule
from ditopt.report.explained import Explained, side_path
from ditopt.verify import VerifiedSearch
from tests.tiny import TinyDiT, euler, make_model
from tests.trace.models import interpreted

STEPS = 5
PROMPTS = ["a", "b", "c", "d"]
LONGER = 12


def longer(model: Any, prompt: str, seed: int) -> Tensor:
    return euler(model, prompt, seed, LONGER, 16)


def rollout(model: nn.Module, prompt: str, seed: int) -> Tensor:
    return euler(model, prompt, seed, STEPS, 16)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with interpreted():
        yield
    torch._dynamo.reset()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let generations take so many seconds with what is computed ahead, and one without."""

    def set_to(seconds: float) -> None:
        def in_turn(self: Evaluator, contenders: Sequence[Sequence[Rule]], *rest: Any) -> list[list[float]]:
            hoisted = [any(isinstance(rule.do, Hoist) for rule in rules) for rules in contenders]
            return [[seconds if ahead else 1.0] * 3 for ahead in hoisted]

        monkeypatch.setattr(Evaluator, "times_in_turn", in_turn)

    return set_to


def optimised(path: Path, **more: Any) -> TinyDiT:
    model = make_model()
    found: TinyDiT = ditopt.optimize(
        model, PROMPTS, rollout=rollout, quality="exact", plan_path=path, quiet=True, **more
    )
    return found


def test_what_pays_becomes_a_plan_that_other_runs_take_up(tmp_path: Path, clock: Callable[[float], None]) -> None:
    clock(0.8)
    path = tmp_path / "exact.yaml"
    model = optimised(path)
    plan = Plan.load(path)
    assert plan.is_exact and [rule.steps for rule in plan.rules] == [tuple(range(STEPS))]
    assert plan.target == {"quality": "exact"} and plan.measured["speedup"] == 1.25
    assert plan.measured["max_rel_error"] < 1e-5 and plan.measured["ahead_mib"] > 0
    eager = rollout(make_model(), "z", 9)
    torch.testing.assert_close(rollout(model, "z", 9), eager, rtol=1e-5, atol=1e-5)
    again = make_model()
    again.compile(backend="ditopt", options={"plan": str(path)}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(rollout(again, "z", 9), eager, rtol=1e-5, atol=1e-5)
        other = euler(again, "z", 9, 2 * STEPS + 1, 16)  # another schedule is as exact
    torch.testing.assert_close(other, euler(make_model(), "z", 9, 2 * STEPS + 1, 16), rtol=1e-5, atol=1e-5)
    side = Explained.load(side_path(path))
    assert {tuple(each.arguments): each.steps for each in side.hoisted["transformer"]} == {
        ("timestep", "encoder_hidden_states"): STEPS
    }


def test_it_is_shown_and_explained(tmp_path: Path, clock: Callable[[float], None]) -> None:
    clock(0.8)
    path = tmp_path / "exact.yaml"
    optimised(path)
    shown = CliRunner().invoke(app, ["show", str(path)])
    assert shown.exit_code == 0 and "what is the same in many computed ahead" in " ".join(shown.output.split())
    told = CliRunner().invoke(app, ["explain", str(path)])
    text = " ".join(told.output.split())
    assert told.exit_code == 0 and "computed ahead of the steps, for 5 of them at once" in text
    page = tmp_path / "page.html"
    made = CliRunner().invoke(app, ["report", str(path), "-o", str(page)])
    assert made.exit_code == 0, made.output
    assert "computed ahead" in page.read_text()


@pytest.mark.parametrize("seconds", [0.8, 1.2])
def test_a_plan_that_predicts_steps_has_it_beside_them_where_it_pays(
    seconds: float, tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(seconds)
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: (1.0, 2.0))
    path, model = tmp_path / "both.yaml", make_model()
    settings: dict[str, Any] = {"techniques": ("reuse", "forecast", "hoist"), "min_psnr": 25.0, "budget": 2}
    ditopt.optimize(model, PROMPTS, rollout=longer, plan_path=path, quiet=True, **settings)
    plan, side = Plan.load(path), Explained.load(side_path(path))
    kept = plan.kept_steps()
    assert len(kept) < LONGER and not plan.is_exact
    if seconds > 1:
        assert not plan.hoisted_steps() and "ahead_mib" not in plan.measured
        assert any(reason.startswith("hoist: no faster by more than 0.5%") for reason in side.reasons)
        return
    assert plan.hoisted_steps() == set(kept) and plan.measured["ahead_mib"] > 0 and side.hoisted["transformer"]
    assert any("reads what is computed ahead" in name for name in side.kernels["transformer"])
    planned = longer(model, "z", 9)
    torch._dynamo.reset()
    with torch.no_grad():
        found = []
        for rules in (plan.rules, tuple(rule for rule in plan.rules if not isinstance(rule.do, Hoist))):
            again = make_model()
            options: dict[str, Any] = {"plan": plan.model_copy(update={"rules": rules})}
            found.append(longer(torch.compile(again, backend=ditopt_backend, fullgraph=True, options=options), "z", 9))
    assert torch.equal(planned, found[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_what_does_not_pay_is_dropped_and_that_is_told(tmp_path: Path, clock: Callable[[float], None]) -> None:
    clock(0.999)
    path = tmp_path / "exact.yaml"
    optimised(path)
    plan = Plan.load(path)
    assert not plan.rules
    assert "no faster by more than 0.5%: a generation takes 0.999 s with it, 1 s without" in plan.measured["dense"]


def test_a_graph_that_is_not_exact_is_not_taken(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditopt.runtime.prologue import Prologues

    clock(0.5)
    true = Prologues.inputs

    def stale(self: Prologues, *given: Any) -> dict[str, Tensor]:
        return {name: value * 1.05 for name, value in true(self, *given).items()}

    monkeypatch.setattr(Prologues, "inputs", stale)
    path = tmp_path / "exact.yaml"
    optimised(path)
    assert "a sample differs by" in Plan.load(path).measured["dense"]


def test_a_rule_for_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hoist is decided for whole steps; write sites: step, not blocks\.1"):
        Rule(sites="blocks.1", steps=(0,), do=Hoist())


def test_levels_are_named_where_one_is_unknown() -> None:
    with pytest.raises(InputError, match=r"is unknown; use one of high \(42 dB\), .*, exact, or give"):
        ditopt.optimize(make_model(), PROMPTS, rollout=rollout, quality="precise")
