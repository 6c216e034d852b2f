"""What a person sees of long work: stages, a progress bar with an ETA, and the closing table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


class Reporter:
    """Prints to the terminal unless ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A progress bar of ``total`` units under ``title``."""
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
            yield Stage(progress, progress.add_task(title, total=total))

    def table(self, table: Table) -> None:
        """A table."""
        self.console.print(table)


class Stage:
    """One running progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, note: str = "") -> None:
        """One unit is done; ``note`` joins the title."""
        if note:
            title = str(self._progress.tasks[0].description).split(" | ")[0]
            self._progress.update(self._task, description=f"{title} | {note}")
        self._progress.advance(self._task)
