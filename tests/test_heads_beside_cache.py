"""What sparse heads add to cached plans: curves with known answers, and the plans of an interrupted run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.heads_beside_cache import Point, gains, keep_plans, plans_in
from ditopt.decisions import Reuse, Sparse
from ditopt.plan import Rule
from tests.test_plan import make


def point(family: str, target: float, psnr: float, seconds: float) -> Point:
    return Point(family, target, psnr, psnr - 1, 0.01, seconds, 6, 3 if family == "heads" else 0)


CACHED = [point("cached", 30, 30, 1.0), point("cached", 34, 34, 4.0), point("cached", 38, 38, 16.0)]


def test_what_heads_add_is_read_between_the_cached_plans() -> None:
    (gain,) = gains([*CACHED, point("heads", 34, 36, 4.0)])
    assert gain.seconds_at_db == pytest.approx(8.0) and gain.saved == pytest.approx(0.5)
    assert gain.db_at_seconds == pytest.approx(34.0) and gain.more_db == pytest.approx(2.0)


def test_heads_that_are_worth_nothing_are_told_as_a_loss() -> None:
    (gain,) = gains([*CACHED, point("heads", 34, 32, 4.0)])
    assert gain.saved == pytest.approx(-1.0) and gain.more_db == pytest.approx(-2.0)


def test_nothing_is_read_beyond_the_ends() -> None:
    above, below = gains([*CACHED, point("heads", 38, 39, 15.0), point("heads", 30, 31, 0.5)])
    assert above.saved is None and above.more_db == pytest.approx(39 - 34 - 4 * math.log(15 / 4) / math.log(4))
    assert below.saved is not None and below.more_db is None


def test_a_cached_plan_that_another_beats_in_both_is_no_part_of_the_curve() -> None:
    worse = point("cached", 32, 33, 5.0)  # slower than the one of 34 dB
    assert gains([*CACHED, worse, point("heads", 34, 36, 4.0)]) == gains([*CACHED, point("heads", 34, 36, 4.0)])


def test_the_plans_of_an_interrupted_run_are_read_again(tmp_path: Path) -> None:
    plans = {
        "cached": (Rule(sites="step", steps=(1,), do=Reuse()),),
        "heads": (Rule(sites="blocks.0.attn1", steps=(0,), heads=(1,), do=Sparse(pattern='{"pattern": "skip"}')),),
    }
    folder = tmp_path / "plans"
    assert plans_in(folder, 36.0) is None
    keep_plans(folder, make(), 36.0, plans)
    assert plans_in(folder, 36.0) == plans and plans_in(folder, 33.0) is None
    keep_plans(folder, make(), 33.0, {"cached": plans["cached"]})
    assert plans_in(folder, 33.0) == {"cached": plans["cached"]}
