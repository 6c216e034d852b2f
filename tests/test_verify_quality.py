"""A target for quality is searched for until the held-out prompts hold it, with no more to spare than pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ditopt import verify
from ditopt.console import Reporter
from ditopt.decisions import Reuse
from ditopt.plan import Rule
from ditopt.quality import Quality
from ditopt.search import solve_kept
from ditopt.search.refine import with_further_step
from ditopt.sites import STEP
from ditopt.target import Target
from ditopt.verify import VerifiedSearch
from tests.search.problems import random_problem

TUNED = {9: 48.0, 8: 45.0, 7: 43.0, 6: 41.0, 5: 38.0, 4: 35.0}
"""dB on the tuning prompts by the number of computed steps."""


class FakeTuner:
    """Takes the fewest computed steps whose dB on the tuning prompts are enough, and that were not refused."""

    def __init__(self, network: str, profile: object, evaluator: object, target: Target, *rest: object) -> None:
        self.target, self.fixed, self.budget, self.refused = target, (), 4, -math.inf
        self.margins: list[float] = []

    finer_psnr: float | None = None

    def finer_of(self, solution: object) -> float | None:
        return None

    def predicts(self, solution: object) -> bool:
        return True

    def obstacle(self, solution: object) -> str | None:
        return None

    def find(self, margin: float) -> Any:
        self.margins.append(margin)
        assert self.target.min_psnr is not None
        enough = [k for k, db in TUNED.items() if db >= self.target.min_psnr + margin and db > self.refused]
        if not enough:
            return None
        kept = min(enough)
        rules = (Rule(sites=STEP, steps=tuple(range(kept, 10)), do=Reuse()),)
        return SimpleNamespace(rules=rules, kept=tuple(range(kept)), predicted_seconds=float(kept), db=TUNED[kept])

    def missing_db(self, solution: Any) -> float:
        assert self.target.min_psnr is not None
        return self.target.min_psnr - float(solution.db)

    def refuse(self, solution: Any) -> None:
        self.refused = max(self.refused, solution.db)


def search(monkeypatch: pytest.MonkeyPatch, held_out: dict[int, float]) -> tuple[int | None, FakeTuner]:
    """Computed steps of the plan found for 42 dB; ``held_out`` is the held-out prompts' dB by computed steps."""

    def quality(rules: Sequence[Rule], pairs: object) -> tuple[Quality, float]:
        value = held_out[10 - len(rules[0].steps)]
        return Quality(value, value, 0.0, (value,)), 0.0

    monkeypatch.setattr(verify, "Tuner", FakeTuner)
    evaluator: Any = SimpleNamespace(sessions={"transformer": SimpleNamespace(programs=[])}, quality=quality)
    vars(evaluator).update(fits=lambda rules: True, reasons=[])  # no limit is set
    profile: Any = SimpleNamespace(networks={})
    one = VerifiedSearch(
        evaluator, profile, Target(min_psnr=42.0), [("a", 0)], [("b", 1)], Reporter(quiet=True), 4, 8, ("reuse",)
    )
    found = one()
    (tuner,) = one._tuners.values()
    return None if found is None else 10 - len(found.rules[0].steps), tuner  # type: ignore[return-value]


def test_a_plan_that_just_holds_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, tuner = search(monkeypatch, {7: 42.4})
    assert kept == 7 and tuner.margins == [0.0]


def test_decibels_to_spare_buy_a_faster_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, tuner = search(monkeypatch, {7: 45.0, 6: 42.5})
    assert kept == 6 and tuner.margins[1] < 0


def test_a_faster_plan_that_misses_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = search(monkeypatch, {7: 44.0, 6: 41.9})
    assert kept == 7


def test_a_refused_plan_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, tuner = search(monkeypatch, {7: 41.99, 8: 44.9, 9: 48.0})
    assert kept == 8, "8 computed steps exceed the target; 7 were refused, however little they missed"
    assert tuner.refused == TUNED[7]


def test_a_miss_in_every_round_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = search(monkeypatch, dict.fromkeys(TUNED, 30.0))
    assert kept is None


def test_a_further_step_lowers_the_predicted_error() -> None:
    problem = random_problem(3, 12)
    plan = solve_kept(problem, 5)
    grown = with_further_step(problem, plan)
    assert len(grown.kept) == 6 and set(plan.kept) < set(grown.kept)
    assert grown.predicted_error < plan.predicted_error


class AimingTuner(FakeTuner):
    """Its plans come 2 dB nearer to a finer solver's samples with every quarter of the way, from 38 dB."""

    finer_psnr: float | None = 40.0

    def finer_of(self, solution: Any) -> float | None:
        return 38.0 + 8 * getattr(solution, "share", 0.0)


@pytest.mark.parametrize(
    ("held_out", "share"),
    [
        ({0.0: 42.4, 0.1: 42.3, 0.25: 42.3, 0.5: 42.2, 0.75: 42.1}, 0.5),  # 42 dB to the finer samples, dense has 40
        ({0.0: 42.4, 0.1: 42.3, 0.25: 42.1, 0.5: 41.9}, 0.25),  # the target holds no further
        ({0.0: 42.4, 0.1: 41.9}, 0.0),
    ],
)
def test_what_is_to_spare_is_spent_on_samples_nearer_to_a_finer_solvers(
    monkeypatch: pytest.MonkeyPatch, held_out: dict[float, float], share: float
) -> None:
    asked: list[float] = []

    def aim(self: AimingTuner, solution: Any, share: float, second_order: float) -> Any:
        asked.append(share)
        return SimpleNamespace(**{**vars(solution), "share": share})

    def quality(rules: Sequence[Rule], pairs: object) -> tuple[Quality, float]:
        value = held_out.get(asked[-1] if asked else 0.0, 30.0)
        return Quality(value, value, 0.0, (value,)), 0.0

    monkeypatch.setattr(AimingTuner, "aim", aim, raising=False)
    monkeypatch.setattr(verify, "Tuner", AimingTuner)
    evaluator: Any = SimpleNamespace(sessions={"transformer": SimpleNamespace(programs=[])}, quality=quality)
    vars(evaluator).update(fits=lambda rules: True, reasons=[])  # no limit is set
    profile: Any = SimpleNamespace(networks={})
    found = VerifiedSearch(
        evaluator, profile, Target(min_psnr=42.0), [("a", 0)], [("b", 1)], Reporter(quiet=True), 4, 8, ("reuse",)
    )()
    assert found is not None
    assert getattr(found.solutions["transformer"], "share", 0.0) == share
    assert found.quality.psnr == held_out[share]
