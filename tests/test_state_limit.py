"""``optimize(max_state_bytes=...)``: no plan whose slots take more is tried or returned, and that is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditopt.errors import InputError
from ditopt.optimizer import Optimizer
from ditopt.outcome import Result
from ditopt.target import Target
from tests.tiny import euler, make_model
from tests.trace.models import interpreted

OUTPUT = 1024 * 4 * 4
"""Bytes of the model's output: what a step that is read again takes."""


def rollout(network: nn.Module, prompt: str, seed: int) -> Tensor:
    return euler(network, prompt, seed, tokens=1024)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()


def optimised(limit: int | None) -> Result:
    with interpreted():
        return Optimizer(
            make_model(blocks=2),
            ("one", "two"),
            rollout=rollout,
            target=Target(min_psnr=25.0),
            budget=3,
            quiet=True,
            techniques=("reuse", "forecast", "fit"),
            max_state_bytes=limit,
        ).run()


def test_plans_stay_within_what_slots_may_take() -> None:
    result = optimised(OUTPUT)
    assert any("fit into max_state_bytes" in reason for reason in result.reasons), result.reasons
    if result.plan is not None:
        assert result.plan.predicted["state_mib"] <= round(OUTPUT / 2**20, 3)
        assert abs(result.plan.measured["state_mib"] - result.plan.predicted["state_mib"]) <= 0.002


def test_nothing_is_predicted_where_nothing_may_be_held() -> None:
    result = optimised(0)
    assert result.plan is None or not any(rule.do.kind in ("reuse", "forecast", "fit") for rule in result.plan.rules)
    assert any("of its features 0 fit" in reason for reason in result.reasons)


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="max_state_bytes=-1: give the most bytes that slots may take"):
        Optimizer(make_model(), ("one", "two"), rollout=rollout, target=Target(min_psnr=25.0), max_state_bytes=-1)
