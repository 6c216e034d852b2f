"""The overhead benchmark's figures and verdict, on seconds that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import dispatch_overhead
from benchmarks.dispatch_overhead import RULES, main, measure, overhead, planned, tiny
from ditopt._torch import forget_compiled_code
from tests.trace.models import interpreted


def test_overhead_is_a_share_and_microseconds() -> None:
    found = overhead([0.1] * 9, [0.102] * 9)
    assert found["share"] == pytest.approx(0.02) and found["microseconds"] == pytest.approx(2000)
    assert found["share_low"] == pytest.approx(0.02) and found["share_high"] == pytest.approx(0.02)


def test_the_interval_holds_the_truth_and_narrows_with_calls() -> None:
    def interval(calls: int) -> tuple[float, float]:
        noise = np.random.default_rng(1).exponential(0.01, (2, calls))
        found = overhead(list(0.1 + noise[0]), list(0.101 + noise[1]))
        assert found["share_low"] < found["share"] < found["share_high"]
        return found["share_low"], found["share_high"]

    (few_low, few_high), (low, high) = interval(20), interval(2000)
    truth = 0.001 / (0.1 + 0.01 * np.log(2))
    assert few_low < truth < few_high and low < truth < high
    assert high - low < (few_high - few_low) / 3


@pytest.mark.parametrize(("name", "recorded"), [("dense plan", ()), ("dense plan, recording", ("step",))])
def test_every_call_of_a_plan_is_dispatched_and_none_is_predicted(name: str, recorded: tuple[str, ...]) -> None:
    forget_compiled_code()  # of other tests: the same forward may be compiled eight times only
    torch.manual_seed(1)
    inputs = {"hidden_states": torch.randn(1, 4, 1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 16)}
    with interpreted():
        forward, program = planned(tiny().eval().requires_grad_(False), RULES[name], inputs)
        measure({name: forward}, 3, inputs)
    forget_compiled_code()
    assert program.bound is not None and program.bound.full.recorded == recorded
    (state,) = program._states
    assert state.last_value == dispatch_overhead.TIMES[2], "the calls went through streams and clock"
    assert len(state.history.get("step", [])) == 0 or recorded, "nothing is kept that is not recorded"
    counted = program.statistics
    assert (counted.calls, counted.generations) == (4, 1)
    assert (counted.predicted_calls, counted.cold_calls, counted.unplanned_calls) == (0, 0, 0)


@pytest.mark.parametrize(
    ("words", "added", "recording", "status"),
    [([], 0.005, 0.005, 0), ([], 0.005, 0.015, 0), ([], 0.015, 0.005, 1), (["--tiny"], 0.5, 0.5, 0)],
    ids=["within 1%", "recording is over 1%", "over 1%", "tiny has no bound"],
)
def test_the_verdict_is_printed_written_and_returned(
    words: list[str],
    added: float,
    recording: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(made: dict[str, Any], calls: int, inputs: object) -> dict[str, list[float]]:
        shares = {"inductor": 0.0, "dense plan": added, "dense plan, recording": recording}
        return {name: [0.1 * (1 + share)] * calls for name, share in shares.items()}

    monkeypatch.setattr(dispatch_overhead, "contenders", lambda model, inputs: {})
    monkeypatch.setattr(dispatch_overhead, "measure", measured)
    monkeypatch.setattr(dispatch_overhead, "shipped", lambda directory: dispatch_overhead.tiny())
    path = tmp_path / "out" / "dispatch.json"
    assert main([*words, "--calls", "5", "--json", str(path)]) == status
    figures = json.loads(path.read_text())
    assert figures["met"] == (status == 0) and figures["bound"] == (None if words else 0.01)
    assert figures["overhead"]["dense plan"]["share"] == pytest.approx(added)
    assert len(figures["seconds"]["inductor"]) == 5
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == (status == 1)
    assert ("is within it too" in printed) == (not words and recording <= 0.01)
    assert ("is over it" in printed) == (not words and recording > 0.01)
    assert figures["within_bound"]["dense plan, recording"] == (bool(words) or recording <= 0.01)
    assert f"{1e5 * added:+.0f} µs a call" in " ".join(printed.split())
