"""The step of the forward under way in a thread: the graph that sees the timestep tells those behind graph breaks.

A thread runs the graphs of one forward one after the other, so the newest moment is the one that a follower
belongs to; that each follower takes a moment once keeps one from following a forward that has ended.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from ditopt.runtime.slots import StreamState

Place = tuple[int, float] | str
"""The planned step and its sigma, or why the call is none."""


@dataclass(eq=False)
class Moment:
    """One forward: the leading program (whose structure is ``clock``), its stream and the step.

    Both are held weakly: a moment outlives its forward, and must not keep slots or a model alive.
    """

    clock: str
    leader: weakref.ref[Any]
    state: weakref.ref[StreamState]
    place: Place
    taken: set[int] = field(default_factory=set)


class _Here(threading.local):
    moment: Moment | None = None


_here = _Here()


def announce(moment: Moment) -> None:
    """Say which step this thread's forward is in."""
    _here.moment = moment


def take(clock: str, follower: int) -> Moment | None:
    """The moment of this thread's forward for the program with id ``follower``; None if it had it or there is none."""
    moment = _here.moment
    if moment is None or moment.clock != clock or follower in moment.taken:
        return None
    moment.taken.add(follower)
    return moment
