"""What is kept between steps: in a run of computed steps with one decision, where it is found and where it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Use(Enum):
    """What a step has of something kept: nothing; it finds it, for itself and those that follow; it reads it."""

    NONE, FOUND, READ = range(3)


def uses(decisions: Iterable[T], period: Callable[[T], int | None]) -> tuple[Use, ...]:
    """The use of each of computed steps in a row, in which one head does ``decisions``.

    A run of steps with the same decision, whose ``period`` is N, finds in its first step and in every N-th behind that,
    and reads in the others; without a period nothing is kept. Steps in which a site is not computed are left out.

    >>> [each.name for each in uses("aaaab", {"a": 3}.get)]
    ['FOUND', 'READ', 'READ', 'FOUND', 'NONE']
    """
    found: list[Use] = []
    before: list[T] = []
    count = 0
    for each in decisions:
        count = count + 1 if before == [each] else 0
        before, every = [each], period(each)
        found.append(Use.NONE if every is None else Use.READ if count % every else Use.FOUND)
    return tuple(found)
