"""A target for speed is searched for until measured generations hold it, the floor of quality or the rounds end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditopt import aim, verify
from ditopt.adapters import DiffusersAdapter
from ditopt.console import Reporter
from ditopt.decisions import Dense, Reuse
from ditopt.outcome import Found
from ditopt.plan import Rule
from ditopt.quality import Quality
from ditopt.sites import STEP
from ditopt.target import Target
from ditopt.verify import VerifiedSearch


def rule_for(kept: int) -> Rule:
    """Of ten steps all but the first ``kept`` are predicted."""
    return Rule(sites=STEP, steps=tuple(range(kept, 10)), do=Reuse())


class FakeTuner:
    """Predicts the steps that the speed asked for needs of ten, each free of charge."""

    def __init__(self, network: str, profile: object, evaluator: object, target: Target, *rest: object) -> None:
        self.target, self.fixed, self.budget, self.refused = target, (), 4, 0
        seconds: Any = profile
        self.problem = SimpleNamespace(
            seconds_full=seconds.networks[network].seconds["full"],
            seconds_predicted=seconds.networks[network].seconds.get("predicted"),
            dtype=None,
            simplify=False,
        )
        self.asked: list[float] = []

    finer_psnr: float | None = None

    def finer_of(self, solution: object) -> float | None:
        return None

    def predicts(self, solution: object) -> bool:
        return True

    def obstacle(self, solution: object) -> str | None:
        return None

    def missing_db(self, solution: object) -> float:
        return 0.0

    def refuse(self, solution: object) -> None:
        self.refused += 1

    def find(self, margin: float) -> Any:
        if self.target.speedup is not None:
            self.asked.append(self.target.speedup)
        kept = 6 + self.refused if self.target.speedup is None else int(10 / self.target.speedup)
        if kept < 1:
            return None
        return SimpleNamespace(rules=(rule_for(kept),), kept=tuple(range(kept)), predicted_seconds=float(kept))


WHOLE_STEPS = {"full": 1.0, "predicted": 0.0}


def searching(
    evaluator: Any,
    target: Target,
    steps: int = 10,
    seconds: Mapping[str, float] = WHOLE_STEPS,
    networks: Sequence[str] = ("transformer",),
) -> VerifiedSearch:
    """A search of networks with as many steps, which take as many ``seconds``."""
    vars(evaluator).update(fits=lambda rules: True, reasons=[])  # no limit is set
    part = SimpleNamespace(timesteps=tuple(range(steps)), seconds=seconds)
    profile: Any = SimpleNamespace(networks=dict.fromkeys(networks, part))
    return VerifiedSearch(evaluator, profile, target, [("a", 0)], [("b", 1)], Reporter(quiet=True), 4, 8, ("reuse",))


def search(
    monkeypatch: pytest.MonkeyPatch,
    speedup: float,
    overhead: float,
    psnr: Mapping[int, float],
    seconds: Mapping[str, float] = WHOLE_STEPS,
    min_psnr: float | None = None,
) -> VerifiedSearch:
    """Ten steps of a second each and ``overhead`` seconds; ``psnr`` by the number of computed steps (else 40 dB)."""

    def quality(rules: Sequence[Rule], pairs: object) -> tuple[Quality, float]:
        value = psnr.get(10 - len(rules[0].steps), 40.0)
        return Quality(value, value, 0.0, (value,)), 0.0

    def time_in_turn(self: VerifiedSearch, rules: Sequence[Rule]) -> tuple[float, float]:
        return overhead + 10 - len(rules[0].steps), overhead + 10

    monkeypatch.setattr(verify, "Tuner", FakeTuner)
    monkeypatch.setattr(VerifiedSearch, "time_in_turn", time_in_turn)
    evaluator = SimpleNamespace(sessions={"transformer": SimpleNamespace(programs=[])}, quality=quality)
    return searching(evaluator, Target(min_psnr, speedup=speedup), seconds=seconds)


def kept(search: VerifiedSearch) -> int | None:
    found = search()
    return None if found is None else 10 - len(found.rules[0].steps)


def asked(search: VerifiedSearch) -> list[float]:
    """The speeds that were searched for."""
    (tuner,) = search._tuners.values()
    found: list[float] = tuner.asked  # type: ignore[attr-defined]
    return found


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
        "asked for 2x, measured 1.83x over whole generations; after 2 searches: the next plan had 31.0 dB, below the "
        "floor of 32 dB"
    ]


def test_a_shortfall_less_than_a_step_still_takes_a_step_away(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.3, 1.0, {})
    assert kept(one) == 3, "4 computed steps are 2.2x; 3 are 2.75x"
    assert len(asked(one)) == 2 and not one.reasons


def test_each_search_takes_no_more_steps_away_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    one = search(monkeypatch, 3.0, 2.0, {})
    measure = one.time_in_turn

    def time_in_turn(rules: Sequence[Rule]) -> tuple[float, float]:
        tried.append(10 - len(rules[0].steps))
        return measure(rules)

    monkeypatch.setattr(one, "time_in_turn", time_in_turn)
    assert kept(one) == 2 and tried == [3, 2], "12 s dense: 3 computed steps are 2.4x, 2 are 3x"


def test_no_search_follows_on_a_plan_below_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 1.0, {5: 20.0, 4: 19.0})
    assert kept(one) == 5 and asked(one) == [2.0]
    assert one.reasons == [
        "asked for 2x, measured 1.83x over whole generations; after 1 search: the search ends below the floor of 32 dB",
        "at this speed the held-out prompts have 20.0 dB, below 32 dB",
    ]


def test_a_search_that_finds_nothing_faster_is_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 9.0, 1.0, {})
    assert kept(one) == 1
    assert one.reasons == [
        "asked for 9x, measured 5.50x over whole generations; after 2 searches: no faster plan was found"
    ]


def test_ranges_that_stay_the_same_are_searched_on_and_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    one = search(monkeypatch, 2.3, 1.0, {}, {"full": 1.0, "blocks.0": 0.5})
    measure = one.time_in_turn

    def time_in_turn(rules: Sequence[Rule]) -> tuple[float, float]:
        timed.append(10 - len(rules[0].steps))
        return measure(rules)

    class Coarse(FakeTuner):
        def find(self, margin: float) -> Any:
            found = super().find(margin)
            count = max(len(found.kept), 4 if len(self.asked) < 3 else 0)  # the nearest plan there is
            return SimpleNamespace(rules=(rule_for(count),), kept=tuple(range(count)), predicted_seconds=float(count))

    monkeypatch.setattr(one, "time_in_turn", time_in_turn)
    one._tuners = {"transformer": Coarse("transformer", one.profile, one.evaluator, one.target)}  # type: ignore[dict-item]
    assert kept(one) == 3
    assert timed == [4, 3] and len(asked(one)) == 3
    assert asked(one)[2] > asked(one)[1]


def test_the_rounds_end_the_search_with_the_fastest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 1.2999, 30.0, {})
    assert kept(one) == 1, "40 s dense, 31 s with one computed step of seven, three, one"
    assert one.reasons == [
        "asked for 1.2999x, measured 1.29x over whole generations; after 3 searches: more searches are not made"
    ]


def test_a_fast_plan_below_the_floor_is_kept_and_said_if_there_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 0.0, {5: 20.0})
    assert kept(one) == 5
    assert one.reasons == ["at this speed the held-out prompts have 20.0 dB, below 32 dB"]


def test_a_speed_that_no_plan_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 20.0, 0.0, {})
    assert kept(one) is None
    assert one.reasons == ["no plan for 20x was found: even one computed step takes too long"]


def test_graph_breaks_are_not_blamed_on_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 20.0, 0.0, {}, {"full": 1.0, "blocks.0": 0.5})
    assert kept(one) is None
    assert one.reasons == ["no plan for 20x was found: too little can be predicted between graph breaks"]


def test_a_speed_that_misses_the_psnr_beside_it_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 4.0, 0.0, {2: 30.0, 6: 35.9, 7: 36.4}, min_psnr=36.0)
    assert kept(one) == 7 and asked(one) == [4.0]
    assert one.reasons == [
        "at this speed the held-out prompts have 30.0 dB, below 36 dB",
        "the fastest plan of 36 dB was taken",
    ]
    one = search(monkeypatch, 20.0, 0.0, {}, min_psnr=36.0)
    assert kept(one) == 6
    assert one.reasons == [
        "no plan for 20x was found: even one computed step takes too long",
        "the fastest plan of 36 dB was taken",
    ]


def test_a_speed_that_has_the_psnr_beside_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 4.0, 0.0, {2: 36.5}, min_psnr=36.0)
    assert kept(one) == 2 and not one.reasons


def test_no_search_follows_on_a_plan_below_the_psnr_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 4.0, 1.0, {2: 36.5, 1: 35.0}, min_psnr=36.0)
    assert kept(one) == 2 and len(asked(one)) == 2
    assert "the next plan had 35.0 dB, below the floor of 36 dB" in one.reasons[0]


def test_the_first_search_leaves_room_for_what_the_loop_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "Tuner", FakeTuner)
    one = searching(SimpleNamespace(sessions={"transformer": SimpleNamespace(programs=[])}), SPEED)
    networks = sum(verify._full_seconds(part) for part in one.profile.networks.values())
    assert one._of_networks(2.0) == pytest.approx(2.0)  # nothing is known of it
    one.dense_seconds = 1.04 * networks  # 2x of 1.04 is 0.52, of which the loop takes 0.04
    assert one._of_networks(2.0) == pytest.approx(1 / 0.48)
    one.dense_seconds = 2.0 * networks
    assert one._of_networks(2.0) == pytest.approx(2.0 / 0.95)


@pytest.mark.parametrize(("dense_seconds", "timed"), [(0.0, True), (21.3, True), (21.5, False)])
def test_what_is_clearly_fast_enough_is_timed_once(
    monkeypatch: pytest.MonkeyPatch, dense_seconds: float, timed: bool
) -> None:
    one = search(monkeypatch, 2.0, 0.0, {})
    quality, _ = one.evaluator.quality((rule_for(5),), ())
    monkeypatch.setattr(one.evaluator, "quality", lambda *_: (quality, 10.0))  # 2.14x and 2.15x of what dense took
    one.dense_seconds = dense_seconds
    found = one()
    assert found is not None and (found.seconds is not None) == timed


def test_a_speed_that_the_last_timing_misses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 1.0, {})
    solution: Any = SimpleNamespace(rules=(rule_for(5),))
    quality = Quality(40.0, 40.0, 0.0, (40.0,))
    slow = one.timed(Found(solution.rules, quality, {"transformer": solution}, one._tuners))
    assert slow.seconds == (6.0, 11.0)
    assert one.reasons == ["asked for 2x, measured 1.83x when it was timed at the end"]
    one.timed(replace(slow, rules=(rule_for(4),)))
    assert len(one.reasons) == 1


def test_what_is_asked_beyond_the_speed_costs_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(monkeypatch, 2.0, 0.0, {4: 20.0})
    one.dense_seconds = 10.4  # when the machine was slower
    assert kept(one) == 5 and asked(one) == [pytest.approx(10 / 4.8), 2.0]
    one = search(monkeypatch, 10.0, 0.0, {})
    one.dense_seconds = 10.4
    assert kept(one) == 1 and asked(one) == [pytest.approx(10 / 0.95), 10.0]


SPEED = Target(speedup=2.0)


class AimingTuner(FakeTuner):
    """Its plans come half a dB nearer to a finer solver's samples with each rung of ``AIMS``, from 38 dB."""

    finer_psnr: float | None = 38.0

    def aim(self, solution: Any, share: float, second_order: float) -> Any:
        rung = aim.AIMS.index((share, second_order)) + 1
        return SimpleNamespace(**{**vars(solution), "rung": rung, "rules": ("aimed", rung)})

    def finer_of(self, solution: Any) -> float | None:
        return 38.0 + getattr(solution, "rung", 0) / 2


@pytest.mark.parametrize(
    ("found", "held_out", "rung", "target"),
    [
        (43.5, (42.5, 41.5), 1, SPEED),  # 42 dB, a level of quality that it had, is not given up
        (41.0, (40.0, 38.5, 37.9), 2, SPEED),  # nor are more than 3 dB
        (33.0, (31.9,), 0, SPEED),  # nor the floor
        (54.0, (52.0, 48.0, 46.9), 2, SPEED),  # but where 9 dB more than dense has (38) are left, more are
        (44.0, (42.0, 39.0, 36.9), 2, Target(36.0, speedup=2.0)),  # 36 dB by a standard error
        (37.5, (36.9,), 0, Target(36.0)),
        (37.5, (37.1, 36.9), 1, Target(36.0)),
        (50.0, (50.0, 49.0, 48.0, 47.0, 46.9), 4, SPEED),  # with 2 dB more than dense it is near enough
    ],
)
def test_a_plan_is_aimed_within_bounds(
    monkeypatch: pytest.MonkeyPatch, found: float, held_out: Sequence[float], rung: int, target: Target
) -> None:
    def quality(rules: Any, pairs: object) -> tuple[Quality, float]:
        value = held_out[rules[1] - 1] if rules[1] <= len(held_out) else 30.0
        return Quality(value, value - 1, 0.0, (value - 1, value + 1)), 0.0  # their mean has a standard error of 1 dB

    monkeypatch.setattr(verify, "Tuner", AimingTuner)
    one = searching(SimpleNamespace(sessions={"transformer": SimpleNamespace(programs=[])}, quality=quality), target)
    solution: Any = SimpleNamespace(rules=("plain", 0))
    before = Found(solution.rules, Quality(found, found, 0.0, (found,)), {"transformer": solution}, one._tuners)
    after = one._aim(before)
    assert getattr(after.solutions["transformer"], "rung", 0) == rung
    assert after.quality.psnr == (held_out[rung - 1] if rung else found)


EXCELLENT = Quality(60.0, 60.0, 0.0, (60.0,))


def with_much_to_spare() -> VerifiedSearch:
    """A search for speed whose plans have 60 dB, whatever they are."""
    sessions = {"transformer": SimpleNamespace(programs=[])}
    return searching(SimpleNamespace(sessions=sessions, quality=lambda *_: (EXCELLENT, 0.0)), SPEED)


def aimed(one: VerifiedSearch) -> Found:
    """What comes of aiming a plan of 60 dB."""
    solution: Any = SimpleNamespace(rules=("plain", 0))
    return one._aim(Found(solution.rules, EXCELLENT, {"transformer": solution}, one._tuners))


@pytest.mark.parametrize(
    ("reached", "rung"),
    [
        ((38.0, 38.5, 37.0, 39.5, 40.0, 40.5, 41.0, 41.5), 4),  # one that comes no nearer is passed over
        ((38.0, 38.5, 39.0, 38.2, 37.0, 36.0, 35.0, 34.0), 2),  # what leads away is not gone beyond
    ],
)
def test_rungs_need_not_come_nearer_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, reached: Sequence[float], rung: int
) -> None:
    class Uneven(AimingTuner):
        def finer_of(self, solution: Any) -> float | None:
            return reached[getattr(solution, "rung", 0)]

    monkeypatch.setattr(verify, "Tuner", Uneven)
    one = with_much_to_spare()
    after = aimed(one)
    assert getattr(after.solutions["transformer"], "rung", 0) == rung


def test_fits_alone_are_aimed_where_second_order_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float | None]] = []

    class Alone(AimingTuner):
        def aim(self, solution: Any, share: float, second_order: float | None) -> Any:
            asked.append((share, second_order))
            return super().aim(solution, *next(each for each in aim.AIMS if each[0] == share))

    monkeypatch.setattr(verify, "Tuner", Alone)
    one = with_much_to_spare()
    one.second_order = False
    aimed(one)
    assert asked == [(0.6, None), (0.25, None), (0.5, None)]  # bisected: 0.6 is near enough, less is not


def test_a_plan_without_room_for_second_order_is_aimed_by_its_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(AimingTuner):
        def aim(self, solution: Any, share: float, second_order: float | None) -> Any:
            fits = second_order is None and share < 0.75
            return super().aim(solution, share, dict(aim.AIMS)[share]) if fits else None

    monkeypatch.setattr(verify, "Tuner", Full)
    monkeypatch.setattr(aim, "AIMS", aim.AIMS[3:])
    one = with_much_to_spare()
    after = aimed(one)
    assert getattr(after.solutions["transformer"], "rung", 0) == 2
    (reason,) = one.reasons
    assert "not refitted 0.75 of the way to a second-order path: more than 8 graphs would be needed" in reason


def test_a_plan_that_cannot_be_aimed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(AimingTuner):
        def obstacle(self, solution: object) -> str | None:
            return "of a reason"

    monkeypatch.setattr(verify, "Tuner", Plain)
    one = searching(SimpleNamespace(sessions={"transformer": SimpleNamespace(programs=[])}), Target(speedup=2.0))
    solution: Any = SimpleNamespace(rules=())
    before = Found((), Quality(40.0, 40.0, 0.0, (40.0,)), {"transformer": solution}, one._tuners)
    assert one._aim(before) is before
    assert one.reasons == ["not refitted towards a second-order path: of a reason"]


class Computes(AimingTuner):
    """Its plans compute every step, so a rung is a share of the formula alone."""

    def predicts(self, solution: object) -> bool:
        return False

    def aim(self, solution: Any, share: float, second_order: float) -> Any:
        assert share == 0.0
        return super().aim(solution, *next(each for each in aim.AIMS if each[1] == second_order))


@pytest.mark.parametrize("second_order", [True, False])
def test_a_plan_that_computes_every_step_is_aimed_by_the_formula_alone(
    monkeypatch: pytest.MonkeyPatch, second_order: bool
) -> None:
    monkeypatch.setattr(verify, "Tuner", Computes)
    one = with_much_to_spare()
    one.second_order = second_order
    after = aimed(one)
    assert getattr(after.solutions["transformer"], "rung", 0) == (4 if second_order else 0)
    if not second_order:
        (reason,) = one.reasons
        assert "every step is computed, and techniques leave 'second_order' out" in reason


class Pipeline(DiffusersAdapter):
    """Notes with how many steps it is asked to generate."""

    def __init__(self) -> None:
        self.settings, self.accepted, self.asked = {"num_inference_steps": 30}, {"num_inference_steps": None}, []  # type: ignore[assignment,var-annotated]

    def checked_rollout(self, prompt: str, seed: int, **settings: Any) -> torch.Tensor:
        self.asked.append(settings["num_inference_steps"])
        return torch.zeros(2)


def test_the_rival_computes_in_the_dtype_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two networks the second runs at half its time: a generation at three quarters. Rivals are not simplified."""
    monkeypatch.setattr(verify, "Tuner", FakeTuner)
    done: list[Any] = []
    adapter = Pipeline()
    evaluator = SimpleNamespace(
        sessions={"one": None, "two": None},
        adapter=adapter,
        references={("b", 1): torch.ones(2)},
        bind=lambda rules: done.append([rule.do for rule in rules]),
        retarget=done.append,
    )
    seconds = {**WHOLE_STEPS, "bfloat16": WHOLE_STEPS["full"] / 2}
    one = searching(evaluator, Target(speedup=4.0), 15, seconds, networks=("one", "two"))
    cast: Any = one._tuners["two"]
    cast.problem.seconds_full, cast.problem.dtype, cast.problem.simplify = 0.1, "bfloat16", True
    rules = (Rule(sites=STEP, steps=(0,), do=Dense(dtype="bfloat16")), Rule(sites=STEP, steps=(1,), do=Reuse()))
    solutions: Any = {"one": SimpleNamespace(rules=()), "two": SimpleNamespace(rules=rules)}
    quality = Quality(40.0, 40.0, 0.0, (40.0,))
    (row,) = one.fewer_steps(Found(rules, quality, solutions, one._tuners, seconds=(1.5, 6.0)))
    assert adapter.asked == [10] and row.evaluations == 10, "30 steps take 4.5 s in this dtype"
    assert row.name == "dense, 10 steps, bfloat16" and row.dtype == "bfloat16"
    assert done == [[Dense(dtype="bfloat16")], True, False]
