"""Progress of long work: plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from ditopt import console
from ditopt.console import Reporter


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def lines_of(work: Callable[[Reporter], None], *, quiet: bool = False) -> list[str]:
    """What ``work`` prints where the output is no terminal."""
    reporter = Reporter(quiet)
    reporter.console = Console(file=io.StringIO(), force_terminal=False, quiet=quiet, width=120)
    try:
        work(reporter)
    finally:
        found = reporter.console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # the StringIO above
    return [line.rstrip() for line in found]


def test_without_a_terminal_a_stage_tells_begin_every_quarter_and_end(clock: Clock) -> None:
    def work(reporter: Reporter) -> None:
        with reporter.stage("profile", 8) as stage:
            for _ in range(8):
                clock.now += 2
                stage.advance()

    assert lines_of(work) == [
        "profile: begun, 8 to do",
        "profile: 2/8, ETA 0:00:12",
        "profile: 4/8, ETA 0:00:08",
        "profile: 6/8, ETA 0:00:04",
        "profile: done in 16.0 s",
    ]


def test_slow_units_are_told_every_half_minute(clock: Clock) -> None:
    def work(reporter: Reporter) -> None:
        with reporter.stage("search", 100) as stage:
            for _ in range(5):
                clock.now += 20
                stage.advance("37.5 dB")

    assert lines_of(work) == [
        "search: begun, 100 to do",
        "search: 2/100, ETA 0:32:40 | 37.5 dB",
        "search: 4/100, ETA 0:32:00 | 37.5 dB",
        "search: done in 100.0 s",
    ]


def test_parts_of_a_unit_add_up(clock: Clock) -> None:
    def work(reporter: Reporter) -> None:
        with reporter.stage("search", 2) as stage:
            for _ in range(4):
                clock.now += 1
                stage.advance(units=0.5)

    assert lines_of(work) == [
        "search: begun, 2 to do",
        "search: 0/2, ETA 0:00:03",
        "search: 1/2, ETA 0:00:02",
        "search: 1/2, ETA 0:00:01",
        "search: done in 4.0 s",
    ]


def test_an_error_is_no_success(clock: Clock) -> None:
    def fail(reporter: Reporter) -> None:
        with reporter.stage("bench", 3) as stage:
            clock.now += 1.5
            stage.advance()
            raise RuntimeError("on purpose")

    def work(reporter: Reporter) -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            fail(reporter)

    printed = lines_of(work)
    assert printed[-1] == "bench: stopped at 1/3 after 1.5 s"
    assert not any("done" in line for line in printed)


def test_quiet_is_quiet() -> None:
    def work(reporter: Reporter) -> None:
        reporter.say("text")
        with reporter.stage("bench", 2) as stage:
            stage.advance()

    assert lines_of(work, quiet=True) == []


def test_a_terminal_gets_a_bar() -> None:
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=120)
    with reporter.stage("profile", 2) as stage:
        stage.advance("one")
        stage.advance("two")
    printed = reporter.console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    assert "profile | two" in printed and "2/2" in printed
    assert "begun" not in printed
