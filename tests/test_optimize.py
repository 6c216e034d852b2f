"""``optimize`` on a bare module: the whole flow, its result in a new compile, and what bad input gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt import aim
from ditopt.backend import ditopt_backend
from ditopt.decisions import Dense
from ditopt.errors import InputError, RolloutError, TraceError
from ditopt.optimizer import Optimizer
from ditopt.outcome import Result
from ditopt.plan import Plan
from ditopt.profiler import timing
from ditopt.quality import psnr, relative_l2
from ditopt.report.explained import Explained, side_path
from ditopt.sites import STEP
from ditopt.target import Target
from ditopt.verify import VerifiedSearch
from tests.tiny import euler, make_model, narrow_products_are_faster, with_tangents

PROMPTS = ("one", "two", "three", "four")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()


def run(model: nn.Module, rollout: Any = euler, **settings: Any) -> Result:
    """``optimize`` with the parts that tests look at."""
    given: dict[str, Any] = {
        "target": Target(min_psnr=30.0),
        "budget": 4,
        "quiet": True,
        "techniques": ("reuse", "forecast", "fit"),
        **settings,
    }
    return Optimizer(model, PROMPTS, rollout=rollout, **given).run()


def assert_a_new_compile_repeats(model: nn.Module, rollout: Any, path: Path) -> None:
    """The plan file, compiled anew, generates what the optimised model does."""
    with torch.no_grad():
        planned = rollout(model, "one", 50)
        model._compiled_call_impl = None
        torch._dynamo.reset()
        fresh: Any = torch.compile(model, backend=ditopt_backend, fullgraph=True, options={"plan": str(path)})
        assert torch.equal(rollout(fresh, "one", 50), planned)


def test_flow_gives_a_plan_that_a_new_compile_repeats(tmp_path: Path) -> None:
    model = make_model(width=96)
    model.embed = nn.Linear(4, 96)
    path = tmp_path / "plan.yaml"

    def rollout(network: nn.Module, prompt: str, seed: int) -> Tensor:
        x = torch.randn(1, 1024, 4, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(1, 96, generator=torch.Generator().manual_seed(len(prompt)))
        for step in range(12):
            x = x - network(x, torch.tensor([1000 - 80.0 * step]), text) / 12
        return x

    with torch.no_grad():
        dense = [rollout(model, prompt, 50 + i) for i, prompt in enumerate(PROMPTS)]
    result = run(model, rollout, plan_path=path)
    assert result.plan is not None, result.reasons
    assert result.quality is not None
    assert result.quality.psnr >= 30
    assert Plan.load(path) == result.plan
    assert side_path(path).exists()
    kept = result.plan.kept_steps()
    assert 0 in kept
    assert len(kept) < 12
    with torch.no_grad():
        planned = [rollout(model, prompt, 50 + i) for i, prompt in enumerate(PROMPTS)]
        model._compiled_call_impl = None
        torch._dynamo.reset()
        fresh: Any = torch.compile(model, backend=ditopt_backend, fullgraph=True, options={"plan": str(path)})
        again = [rollout(fresh, prompt, 50 + i) for i, prompt in enumerate(PROMPTS)]
    for one, two, three in zip(planned, again, dense, strict=True):
        assert torch.equal(one, two)
        assert relative_l2(one, three) > 0
        assert psnr(one, three) > 25  # 30 was asked for on other seeds


def test_a_dtype_is_chosen_where_it_is_faster_and_a_new_compile_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_in_turn(variants: Mapping[str, timing.Timed]) -> dict[str, float]:
        measured = {name: run() for name, run in variants.items()}
        return measured | ({"bfloat16": measured["full"] / 2} if "bfloat16" in measured else {})

    def rollout(network: nn.Module, prompt: str, seed: int) -> Tensor:
        return euler(network, prompt, seed, 6, 64)

    monkeypatch.setattr(timing, "time_in_turn", time_in_turn)
    narrow_products_are_faster(monkeypatch)
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: (1.0, 2.0))
    path, model = tmp_path / "plan.yaml", make_model()
    result = run(model, rollout, plan_path=path, techniques=("reuse", "forecast", "precision"), budget=2)
    assert result.plan is not None, result.reasons
    assert Dense(dtype="bfloat16") in [rule.do for rule in result.plan.rules]
    assert_a_new_compile_repeats(model, rollout, path)


@pytest.mark.parametrize("left_out", [False, True])
def test_steps_are_simplified_where_that_is_faster_and_a_new_compile_repeats_it(
    left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_in_turn(variants: Mapping[str, timing.Timed]) -> dict[str, float]:
        measured = {name: run() for name, run in variants.items()}
        return measured | ({"simplified": measured["full"] / 2} if "simplified" in measured else {})

    def rollout(network: nn.Module, prompt: str, seed: int) -> Tensor:
        return euler(network, prompt, seed, 6, 64)

    monkeypatch.setattr(timing, "time_in_turn", time_in_turn)
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: (1.0, 2.0))
    path, model = tmp_path / "plan.yaml", with_tangents(make_model())
    techniques = ("reuse", "forecast", *(() if left_out else ("simplify",)))
    result = run(model, rollout, plan_path=path, techniques=techniques, budget=2)
    assert result.plan is not None, result.reasons
    assert (Dense(simplify=True) in [rule.do for rule in result.plan.rules]) is not left_out
    explained = Explained.load(side_path(path)).explanations["transformer"]
    (told,) = [each for each in explained if each.step is None and each.site == STEP]
    against = "nothing in the graph to simplify, or not among the techniques chosen"
    assert told.chosen == ("as the model has it" if left_out else "simplified")
    assert told.rivals[0].reason.startswith(against if left_out else "slower: a step takes")
    assert_a_new_compile_repeats(model, rollout, path)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_share_of_second_order_is_chosen_and_a_new_compile_repeats_it(
    left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: (1.0, 2.0))
    monkeypatch.setattr(aim, "AIMS", ((1.0, 1.0),))
    monkeypatch.setattr(aim, "AIM_SPARE_DB", 99.0)

    def rollout(network: nn.Module, prompt: str, seed: int) -> Tensor:
        return euler(network, prompt, seed, 12, 64)

    path, model = tmp_path / "plan.yaml", make_model()
    techniques = ("reuse", "forecast", "fit", *(() if left_out else ("second_order",)))
    target = Target.from_arguments(None, None, 10.0, 1.5)
    result = run(model, rollout, plan_path=path, techniques=techniques, target=target, budget=2)
    assert result.plan is not None, result.reasons
    assert result.plan.target == {"min_psnr": 10.0, "speedup": 1.5}
    shares = [rule.do.second_order for rule in result.plan.rules if isinstance(rule.do, Dense)]
    assert shares == ([] if left_out else [1.0])
    assert_a_new_compile_repeats(model, rollout, path)


def test_a_plan_that_is_no_faster_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: (2.0, 1.0))
    path = tmp_path / "plan.yaml"
    result = run(make_model(), plan_path=path, quiet=False, budget=2, target=Target(min_psnr=15.0))
    assert result.plan is None
    assert result.reasons[-1] == "the plan took 2.00 s a generation, dense 1.00 s"
    told = capsys.readouterr().out
    table = told[told.index("whole generations, prompts not used in calibration") :]
    assert all(row in table for row in ("dense, eager", "dense, compiled", "ditopt", "0.50x"))
    assert not Plan.load(path).rules


def test_a_target_that_no_plan_meets_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VerifiedSearch, "__call__", lambda self: None)
    result = run(make_model())
    assert result.plan is None
    assert result.reasons[-1] == "no plan met the target on the held-out prompts"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "0 calibration prompts"),
        ("one text", "is one text"),
        (("only",), "1 calibration prompts"),
        (("a", 3), "holds 3, a int"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ditopt.optimize(make_model(), prompts, rollout=euler, quiet=True)


def test_a_level_beside_a_speed_up_is_the_psnr_below_which_no_plan_is_taken() -> None:
    assert Target.from_arguments("high", None, None, 3.0) == Target(min_psnr=42.0, speedup=3.0)
    assert Target.from_arguments(None, None, None, 3.0) == Target(speedup=3.0)
    assert Target.from_arguments(None, None, None, None) == Target(min_psnr=36.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": "best"}, "quality='best' is unknown; use one of high"),
        ({"min_psnr": 40, "max_rel_error": 0.1}, "max_rel_error and min_psnr are given together"),
        ({"target_speedup": 2.0, "max_rel_error": 0.1}, "max_rel_error and target_speedup are given together"),
        ({"quality": "high", "min_psnr": 40}, "quality='high' and min_psnr are given together; give one of them"),
        ({"quality": "high", "max_rel_error": 0.1}, "quality='high' and max_rel_error are given together"),
        ({"quality": "exact", "target_speedup": 2.0}, "quality='exact' and target_speedup are given together"),
        ({"target_speedup": 0.5}, "target_speedup=0.5 makes no sense; give a number above 1"),
        (
            {"techniques": ["magic"]},
            r"techniques \['magic'\] are unknown; choose from ranges, simplify, precision, second_order, sparse, "
            r"hoist, reuse",
        ),
        ({"rollout": None}, "TinyDiT is a bare module: give rollout"),
        ({"rollout": 3}, "rollout=3 is not callable"),
        ({"pipe_kwargs": {"steps": 3}}, "pipe_kwargs= is for diffusers pipelines"),
        ({"plan_path": "/nowhere/at/all/plan.yaml"}, "folder /nowhere/at/all does not exist"),
        ({"plan_path": "."}, "is a folder; give the name of a plan file"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ditopt.optimize(make_model(), PROMPTS, **{"rollout": euler, "quiet": True, **settings})


def test_nowhere_to_keep_the_plan_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"plans cannot be kept in .*plans \(Not a directory\); give plan_path"):
        run(make_model(), rollout=lambda model, prompt, seed: pytest.fail("the work has begun"))


def test_neither_pipeline_nor_module() -> None:
    with pytest.raises(InputError, match=r"model is a dict; give a diffusers pipeline, or an nn\.Module"):
        ditopt.optimize({}, PROMPTS, quiet=True)


def test_rollout_that_never_calls_the_model() -> None:
    with pytest.raises(RolloutError, match="finished without calling the model"):
        run(make_model(), lambda model, prompt, seed: torch.zeros(3))


def test_rollout_that_returns_no_tensor() -> None:
    with pytest.raises(RolloutError, match=r"rollout returned list for prompt 'one'.*torch\.Tensor"):
        run(make_model(), lambda model, prompt, seed: euler(model, prompt, seed).tolist())


def test_rollout_that_ignores_its_seed() -> None:
    with pytest.raises(RolloutError, match=r"not deterministic.*seeded with the seed"):
        run(make_model(), lambda model, prompt, seed: euler(model, prompt, int(torch.randint(1 << 30, ()))))


def test_rollout_without_a_timestep() -> None:
    def fixed_time(model: nn.Module, prompt: str, seed: int) -> Tensor:
        x = torch.zeros(1, 8, 4)
        for _ in range(3):
            x = x + Positional()(x)
        return x

    class Positional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    module = Positional()
    with pytest.raises(RolloutError, match="no argument of the model tells the step"):
        run(module, lambda model, prompt, seed: model(model(torch.zeros(1, 8, 4))))


def test_nan_in_the_dense_output_is_counted() -> None:
    model = make_model()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(RolloutError, match=r"gave 256 NaN or infinite values of 256 for prompt 'one', seed 0"):
        run(model)


def test_prompt_of_another_length_is_named() -> None:
    def rollout(network: nn.Module, prompt: str, seed: int) -> Tensor:
        x = torch.randn(1, 16 + 8 * (prompt == "two"), 4, generator=torch.Generator().manual_seed(seed))
        for step in range(4):
            x = x - network(x, torch.tensor([1000 - 200.0 * step]), torch.ones(1, 32)) / 4
        return x

    with pytest.raises(RolloutError, match=r"prompt 'two' makes transformer be captured again: .*; pad prompts to one"):
        run(make_model(), rollout)


def test_model_without_blocks() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            out: Tensor = self.mix(hidden_states) * timestep.view(-1, 1, 1) / 1000
            return out

    with pytest.raises(TraceError, match="no attention inside numbered blocks was found in transformer"):
        run(Flat().eval())


def test_staying_dense_is_explained_beside_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    side_path(path).write_text("of a run before")
    result = run(make_model(), rollout=lambda model, prompt, seed: euler(model, prompt, seed, steps=1), plan_path=path)
    assert result.plan is None and not Plan.load(path).rules
    assert Explained.load(side_path(path)).reasons == tuple(result.reasons) != ()


def test_interrupted_profiling_resumes_and_leaves_the_model_as_it_was() -> None:
    model = make_model()
    seen: list[str] = []
    stop = {"at": 4}

    def counted(network: nn.Module, prompt: str, seed: int) -> Tensor:
        seen.append(prompt)
        if len(seen) == stop["at"]:
            raise KeyboardInterrupt
        return euler(network, prompt, seed)

    def interrupted() -> list[str]:
        seen.clear()
        torch._dynamo.reset()
        with pytest.raises(KeyboardInterrupt):
            run(model, counted)
        assert model._compiled_call_impl is None
        return list(seen)

    # Probe, compiled run, the first profiled prompt, and the second, which is stopped.
    assert interrupted() == ["one", "one", "one", "two"]
    # The first profiled prompt comes from its checkpoint; the second is profiled, the stop hits a planted error.
    assert interrupted() == ["one", "one", "two", "one"]
    stop["at"] = 3
    assert interrupted() == ["one", "one", "one"], "both profiled prompts come from their checkpoints"


def test_graph_breaks_leave_the_model_dense_and_are_named() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            half = self.inner(hidden_states, timestep, encoder_hidden_states)
            torch._dynamo.graph_break()
            out: Tensor = self.inner(half, timestep, encoder_hidden_states)
            return out

    result = run(Broken().eval())
    assert result.plan is None
    assert "captured as 2 graphs" in result.reasons[-1]
    assert "_dynamo.graph_break()" in result.reasons[-1].split("; breaks: ")[1]
