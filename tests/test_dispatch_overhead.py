"""The overhead benchmark's figures and verdict, on seconds that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import dispatch_overhead
from benchmarks.dispatch_overhead import main, overhead


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


@pytest.mark.parametrize(
    ("words", "added", "status"),
    [([], 0.005, 0), ([], 0.015, 1), (["--tiny"], 0.5, 0)],
    ids=["within 1%", "over 1%", "tiny has no bound"],
)
def test_the_verdict_is_printed_written_and_returned(
    words: list[str],
    added: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(made: dict[str, Any], calls: int, inputs: object) -> dict[str, list[float]]:
        plain = [0.1] * calls
        ours = [0.1 * (1 + added)] * calls
        return {"inductor": plain, "dense plan": ours, "dense plan, recording": ours}

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
    assert f"{1e5 * added:+.0f} µs a call" in " ".join(printed.split())
