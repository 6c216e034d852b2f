"""Sparse heads chosen by ``optimize``: a Wan with 1,024 tokens, from prompts to a plan that runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from ditopt import store
from ditopt._torch import compile_counts, has_byte_dot_products
from ditopt.decisions import Sparse
from ditopt.measure import Evaluator
from ditopt.optimizer import Optimizer
from ditopt.outcome import Result
from ditopt.plan import Plan
from ditopt.profiler import take
from ditopt.profiler.attention_timing import attention_latency
from ditopt.quality import relative_l2
from ditopt.recipes import ANY, RECIPES, Form, Recipe, fits
from ditopt.report.explained import Explained, side_path
from ditopt.target import Target
from ditopt.techniques import LINEAR_REST
from ditopt.terminal import show_plan
from ditopt.verify import VerifiedSearch
from tests.literal_int8 import int8_scores
from tests.tiny import tiny_wan

pytest.importorskip("diffusers")

PROMPTS = ("one", "two", "three", "four")
STEPS = 5
FASTER, SLOWER = (1.0, 2.0), (2.0, 1.0)


def euler(model: nn.Module, prompt: str, seed: int) -> Tensor:
    """Latents of 4 frames of 32 x 32 cells: 4 x 16 x 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 4, 32, 32, generator=generator)
    text = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(sum(map(ord, prompt))))
    for now, then in pairwise(torch.linspace(1, 0, STEPS + 1)):
        moved = model(hidden_states=x, timestep=now[None] * 1000, encoder_hidden_states=text, return_dict=False)[0]
        x = x + (then - now) * (moved + x)
    return x


def measured_as(patch: pytest.MonkeyPatch, in_turn: tuple[float, float]) -> None:
    """Let attention take its density's share of time, and whole generations what is said; clocks here are noisy."""

    def latency(*given: Any) -> Any:
        tables, reasons = attention_latency(*given)
        for table in tables.values():
            table["dense"].values[:] = 1.0
            table["sparse"].values[:] = table.labels["density"]
            table["int8"].values[:] = 0.02 + 0.6 * table["sparse"].values
        return tables, reasons

    patch.setattr("ditopt.profiler.detail.attention_latency", latency)
    patch.setattr(Evaluator, "time_in_turn", lambda self, *given: list(in_turn))
    patch.setattr(VerifiedSearch, "time_in_turn", lambda self, rules: FASTER)


def optimized(path: Path, model: nn.Module, target: Target) -> tuple[Result, Optimizer]:
    techniques = ("reuse", "sparse")
    made = Optimizer(model, PROMPTS, target, euler, path, techniques=techniques, budget=4, resume=False, quiet=True)
    return made.run(), made


def heads_of(plan: Plan | None) -> Sequence[Any]:
    return [] if plan is None else [rule for rule in plan.rules if isinstance(rule.do, Sparse)]


def test_heads_are_sparse_where_that_is_faster_and_a_new_compile_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    measured_as(monkeypatch, FASTER)
    path = tmp_path / "wan.plan.yaml"
    model = tiny_wan()
    result, made = optimized(path, model, Target(min_psnr=40))
    assert heads_of(result.plan), made.reasons
    plan = Plan.load(path)
    assert plan.tokens["transformer"].sizes == (4, 16, 16)
    assert plan.rules == result.plan.rules  # type: ignore[union-attr]  # there is one
    assert plan.measured["psnr"] >= 40
    assert plan.predicted["seconds"] < STEPS * 2.0, "attention is said to take a second in each of two blocks"
    explained = Explained.load(side_path(path))
    said = [one for one in explained.explanations["transformer"] if one.site.endswith("attn1")]
    chosen = [one for one in said if not one.chosen.endswith("dense")]
    assert len(chosen) == sum(len(rule.heads or ()) for rule in heads_of(plan))
    assert all(one.rivals and all(rival.reason for rival in one.rivals) for one in said)
    sample = euler(model, "five", 9)
    torch._dynamo.reset()
    again = tiny_wan()
    again.compile(backend="ditopt", options={"plan": str(path)}, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(euler(again, "five", 9), sample, atol=1e-5)
        before = compile_counts()
        euler(again, "six", 10)
        assert compile_counts() == before, "nothing is compiled after the first generation"
    torch._dynamo.reset()


@pytest.mark.parametrize("target", [Target(min_psnr=40), Target(speedup=1.1)], ids=["quality", "speed"])
def test_under_a_recipe_heads_are_what_it_allows_and_every_step_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    measured_as(monkeypatch, FASTER)
    path = tmp_path / "wan.plan.yaml"
    made = Optimizer(tiny_wan(), PROMPTS, target, euler, path, budget=4, resume=False, quiet=True, recipe="radial")
    result = made.run()
    assert heads_of(result.plan) and heads_of(result.plan) == list(result.plan.rules), made.reasons  # type: ignore[union-attr]  # there is one
    plan = Plan.load(path)
    assert plan.recipe == "radial" and len(plan.kept_steps()) == STEPS and plan.target == target.to_data()
    assert all(rule.heads == (0, 1) and 0 not in rule.steps for rule in plan.rules), "alike, and the first step dense"
    assert {rule.do.settings["pattern"] for rule in heads_of(plan)} <= {"radial", "union"}
    told = Explained.load(side_path(path)).reasons
    assert any(reason.startswith("recipe radial (Radial Attention, arXiv 2506.19852)") for reason in told)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", [{"pattern": "listed", "keep": ANY}, {"pattern": ANY, "rest": "linear"}])
def test_what_profiled_prompts_gave_stands_beside_the_plan_and_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    """From prompts to a plan with listed heads, or linear rests, alone, and from its two files to the same sample."""
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RECIPES, "lists", Recipe("lists", "Lists", "none", forms=(form,)))
    monkeypatch.setattr(take, "SPARSE_TABLES", (*take.SPARSE_TABLES, LINEAR_REST))
    measured_as(monkeypatch, FASTER)
    path = tmp_path / "wan.plan.yaml"
    model = tiny_wan()
    made = Optimizer(model, PROMPTS, Target(min_psnr=30), euler, path, budget=4, resume=False, quiet=True,
                     recipe="lists")  # fmt: skip
    result = made.run()
    assert heads_of(result.plan) and heads_of(result.plan) == list(result.plan.rules), made.reasons  # type: ignore[union-attr]  # there is one
    plan = Plan.load(path)
    assert plan.tensors is not None and (tmp_path / plan.tensors.file).exists()
    assert all(fits(form, rule.do.settings) for rule in heads_of(plan))
    assert {each.heads for each in plan.beside.entries} <= {(0,), (1,), (0, 1)}
    assert bool(plan.beside.maps) != bool(plan.beside.projections) == ("rest" in form)
    shares = {rule.do.pattern: rule.do.settings.get("keep", 0.0) for rule in heads_of(plan)}
    for maps in plan.beside.maps:
        share = shares[maps.pattern]
        for head in maps.heads:
            assert share <= maps.kept(head, 0).mean() <= share + 1 / 16, "the share of blocks of keys, and the own one"
    kept = store.find_plan(plan.model.structure.split()[0])
    assert kept is not None and kept.beside == plan.beside
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(show_plan(plan, 200))
    assert f"in {plan.tensors.file} beside the plan" in shown.export_text()
    sample = euler(model, "five", 9)
    torch._dynamo.reset()
    again = tiny_wan()
    again.compile(backend="ditopt", options={"plan": str(path)}, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(euler(again, "five", 9), sample, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.skipif(not has_byte_dot_products(), reason="no dot products of bytes (avx512_vnni)")
def test_int8_scores_are_measured_chosen_and_run_as_the_numbers_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From prompts to a plan whose heads have int8 scores, against the eager model with them in float64."""
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    form: Form = {"pattern": "dense", "qk": "int8"}
    monkeypatch.setitem(RECIPES, "int8", Recipe("int8", "Int8", "none", forms=(form,)))
    measured_as(monkeypatch, FASTER)
    path = tmp_path / "wan.plan.yaml"
    model = tiny_wan()
    made = Optimizer(model, PROMPTS, Target(min_psnr=40), euler, path, budget=4, resume=False, quiet=True,
                     recipe="int8")  # fmt: skip
    assert heads_of(made.run().plan), made.reasons
    plan = Plan.load(path)
    assert {rule.do.settings["qk"] for rule in heads_of(plan)} == {"int8"}
    with torch.no_grad():
        sample = euler(model, "five", 9)
    torch._dynamo.reset()
    decided = [plan.head_decisions(f"blocks.{block}.attn1") for block in range(2)]
    calls, whole = 0, torch.nn.functional.scaled_dot_product_attention

    def written_out(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        nonlocal calls
        found = whole(query, key, value, **named)
        if query.shape[2] != key.shape[2]:
            return found
        step, block = divmod(calls, 2)
        calls += 1
        for head, do in enumerate(decided[block][step].of(query.shape[1])):
            if isinstance(do, Sparse):
                scores = int8_scores(query[0, head], key[0, head], 64) * query.shape[-1] ** -0.5
                found[0, head] = (scores.softmax(-1) @ value[0, head].double()).to(found.dtype)
        return found

    eager = tiny_wan()
    with torch.no_grad():
        dense = euler(eager, "five", 9)
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", written_out)
        expected = euler(eager, "five", 9)
    assert calls == 2 * STEPS, "self-attention of two blocks"
    moved = relative_l2(expected, dense)
    assert moved > 1e-6 and relative_l2(sample, expected) < 0.2 * moved
    assert plan.predicted["relative_error"] / 4 < plan.measured["rel_l2"] < 4 * plan.predicted["relative_error"]


@pytest.mark.parametrize(
    ("in_turn", "error", "told"),
    [
        (SLOWER, None, "a generation takes 2 s with these heads, 1 s without"),
        (FASTER, 1e6, "no choice of heads is faster at the target"),
    ],
)
def test_heads_that_are_slower_or_err_too_much_stay_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_turn: tuple[float, float], error: float | None, told: str
) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    measured_as(monkeypatch, in_turn)
    if error is not None:
        monkeypatch.setattr(
            "ditopt.search.sparse.squared_errors", lambda *given: np.full((len(given[-2]), len(given[-1])), error)
        )
    result, made = optimized(tmp_path / "plan.yaml", tiny_wan(), Target(min_psnr=40))
    assert not heads_of(result.plan)
    assert any(told in reason for reason in made.reasons), made.reasons
    torch._dynamo.reset()


def test_where_attention_takes_little_nothing_is_measured_of_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(take, "attention_share", lambda network: (0.01, "a quarter of all blocks would save 1%"))
    model = tiny_wan()
    result, made = optimized(tmp_path / "plan.yaml", model, Target(min_psnr=40))
    assert "sparse: a quarter of all blocks would save 1%" in made.reasons
    assert not heads_of(result.plan)
    torch._dynamo.reset()
