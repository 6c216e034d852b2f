"""What a person sees of long work: stages with an ETA (a bar on a terminal, else plain lines), the closing table."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

LINE_PERCENT = 25
LINE_SECONDS = 30.0


class Reporter:
    """Prints to the standard output unless ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A stage of ``total`` units: a progress bar where it can move, else lines of plain text."""
        if not (self.console.is_interactive or self.console.is_jupyter):
            with _lines(self, title, total) as stage:
                yield stage
            return
        with Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
        ) as progress:
            yield _BarStage(progress, progress.add_task(title, total=total))

    def table(self, table: Table) -> None:
        """A table."""
        self.console.print(table)


class Stage(ABC):
    """One running stage."""

    @abstractmethod
    def advance(self, note: str = "", units: float = 1.0) -> None:
        """So many units are done; ``note`` joins the title."""


class _BarStage(Stage):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, note: str = "", units: float = 1.0) -> None:
        if note:
            title = str(self._progress.tasks[0].description).split(" | ")[0]
            self._progress.update(self._task, description=f"{title} | {note}")
        self._progress.advance(self._task, units)


class _LineStage(Stage):
    """A line whenever ``LINE_PERCENT`` more is done or ``LINE_SECONDS`` have passed since the last line."""

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self.done, self._told = 0.0, 0.0
        self._began = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._began

    def advance(self, note: str = "", units: float = 1.0) -> None:
        self.done += units
        now = time.monotonic()
        further = 100 * (self.done - self._told) >= LINE_PERCENT * self._total
        if self.done >= self._total or not (further or now - self._last >= LINE_SECONDS):
            return
        self._told, self._last = self.done, now
        left = self.seconds / self.done * (self._total - self.done)
        text = f"{self._title}: {int(self.done)}/{self._total}, ETA {timedelta(seconds=round(left))}"
        self._reporter.say(f"{text} | {note}" if note else text)


@contextmanager
def _lines(reporter: Reporter, title: str, total: int) -> Iterator[_LineStage]:
    stage = _LineStage(reporter, title, total)
    reporter.say(f"{title}: begun, {total} to do")
    try:
        yield stage
    except BaseException:
        reporter.say(f"{title}: stopped at {int(stage.done)}/{total} after {stage.seconds:.1f} s")
        raise
    reporter.say(f"{title}: done in {stage.seconds:.1f} s")
