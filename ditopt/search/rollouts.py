"""Measured plans: a budget of real rollouts, none spent twice on the same rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditopt.plan import Rule
from ditopt.search.solution import Solution


@dataclass(frozen=True)
class Measurement:
    """What real rollouts of a plan gave: ``error`` (smaller is better, any metric), ``seconds`` a generation."""

    error: float
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A plan and what it measured."""

    solution: Solution
    measurement: Measurement


Measure = Callable[[Sequence[Rule]], Measurement]
Improve = Callable[[Solution], Solution]
Progress = Callable[[Trial, int, int], None]
"""Called after each rollout with the trial, the number of rollouts so far and the budget."""


class Rollouts:
    """Measures plans through ``measure`` until ``budget`` calls are spent; remembers what it measured.

    ``improve`` may put a better plan of the same schedule in the place of each before it is measured.
    """

    def __init__(
        self, measure: Measure, budget: int, progress: Progress | None = None, improve: Improve | None = None
    ) -> None:
        self._measure, self.budget, self._progress, self._improve = measure, budget, progress, improve
        self._known: dict[tuple[str, ...], Trial] = {}
        self._spent = 0

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Everything measured, in order."""
        return tuple({id(trial): trial for trial in self._known.values()}.values())

    @property
    def left(self) -> int:
        """Rollouts that may still be made."""
        return self.budget - self._spent

    def knows(self, solution: Solution) -> bool:
        """Whether a plan with the same rules was measured."""
        return rules_key(solution.rules) in self._known

    def trial(self, solution: Solution) -> Trial | None:
        """The measured plan; None if it is unknown and the budget is spent."""
        key = rules_key(solution.rules)
        if key not in self._known:
            if self.left <= 0:
                return None
            better = self._improve(solution) if self._improve else solution
            self._known[key] = self._known[rules_key(better.rules)] = Trial(better, self._measure(better.rules))
            self._spent += 1
            if self._progress:
                self._progress(self._known[key], self._spent, self.budget)
        return self._known[key]


def rules_key(rules: Sequence[Rule]) -> tuple[str, ...]:
    """What two plans with the same rules have in common."""
    return tuple(rule.model_dump_json() for rule in rules)
