"""A target for speed is searched for until measured generations hold it, the floor of quality or the rounds end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ditopt import verify
from ditopt.console import Reporter
from ditopt.decisions import Reuse
from ditopt.plan import Rule
from ditopt.quality import Quality
from ditopt.sites import STEP
from ditopt.target import Target
from ditopt.verify import VerifiedSearch


class FakeTuner:
    """Predicts the steps that the speed asked for needs of ten, each free of charge."""

    def __init__(self, network: str, profile: object, evaluator: object, target: Target, *rest: object) -> None:
        self.target, self.fixed, self.budget = target, (), 4
        self.asked: list[float] = []

    def find(self, margin: float) -> Any:
        assert self.target.speedup is not None
        self.asked.append(self.target.speedup)
        kept = int(10 / self.target.speedup)
        if kept < 1:
            return None
        return SimpleNamespace(rules=(Rule(sites=STEP, steps=tuple(range(kept, 10)), do=Reuse()),))


def search(
    monkeypatch: pytest.MonkeyPatch, speedup: float, overhead: float, psnr: Mapping[int, float]
) -> VerifiedSearch:
    """Ten steps of a second each and ``overhead`` seconds; ``psnr`` by the number of computed steps (else 40 dB)."""

    def quality(rules: Sequence[Rule], pairs: object) -> tuple[Quality, float]:
        value = psnr.get(10 - len(rules[0].steps), 40.0)
        return Quality(value, value, 0.0, (value,)), 0.0

    def time_in_turn(self: VerifiedSearch, rules: Sequence[Rule]) -> tuple[float, float]:
        return overhead + 10 - len(rules[0].steps), overhead + 10

    monkeypatch.setattr(verify, "Tuner", FakeTuner)
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", time_in_turn)
    evaluator: Any = SimpleNamespace(sessions={"transformer": None}, quality=quality)
    nothing: Any = None
    return VerifiedSearch(
        evaluator, nothing, Target(speedup=speedup), [("a", 0)], [("b", 1)], Reporter(quiet=True), 4, 8, ("reuse",)
    )


def kept(search: VerifiedSearch) -> int | None:
    found = search()
    return None if found is None else 10 - len(found.rules[0].steps)


def test_a_shortfall_is_searched_again_with_a_tighter_target(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 1.0, {})
    assert kept(one) == 4, "11 s dense, 5 s by the plan; 5 computed steps (6 s) were short of 2x"
    (tuner,) = one._tuners.values()
    assert tuner.asked[0] == 2.0 and 2.0 < tuner.asked[1] < 2.5  # type: ignore[attr-defined]
    assert not one.reasons


def test_a_plan_that_holds_at_once_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 0.0, {})
    assert kept(one) == 5
    (tuner,) = one._tuners.values()
    assert tuner.asked == [2.0]  # type: ignore[attr-defined]


def test_the_floor_of_quality_ends_the_search_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 1.0, {5: 33.0, 4: 31.0})
    assert kept(one) == 5
    assert one.reasons == [
        "asked for 2x, measured 1.83x over whole generations: it cannot be met at 32 dB or better within 3 searches"
    ]


def test_the_rounds_end_the_search_with_the_fastest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 3.0, 5.0, {})
    assert kept(one) == 1
    assert one.reasons[0].startswith("asked for 3x, measured 2.50x over whole generations")


def test_a_fast_plan_below_the_floor_is_kept_and_said_if_there_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 0.0, {5: 20.0})
    assert kept(one) == 5
    assert one.reasons == ["at this speed the held-out prompts have 20.0 dB, below 32 dB"]


def test_a_speed_that_no_plan_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 20.0, 0.0, {})
    assert kept(one) is None
    assert one.reasons == ["no plan for 20x was found: predicted steps alone take too long"]
