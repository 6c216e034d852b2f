"""Which generation a call belongs to, where several have one prompt, schedule and thread: told by their latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.runtime.slots import StreamState

SAMPLED = 4096
"""Of a call's latents so many values are remembered, evenly spread."""
OPEN = 4
"""So many generations of one stream may be under way; of more, the one called longest ago is forgotten."""


@dataclass(eq=False)
class _Open:
    """A generation under way: its state, values of its latest latents, and the numbers of its first and latest call."""

    state: StreamState
    latents: Tensor | None
    began: int
    called: int
    ended: bool = False


class Generations:
    """The generations under way in one stream.

    A call goes on with the one that waits for it; where several do, with the one whose latents were nearest, as a step
    moves latents less than they are apart. Where none does, a generation begins; one that was given up is not told from
    one that waits, and is forgotten when a later one has come to its end.
    """

    def __init__(self, make: Callable[[], StreamState]) -> None:
        self._make = make
        self._open: list[_Open] = []
        self._calls = 0

    @property
    def newest(self) -> StreamState | None:
        """The state of the generation that was called last."""
        return max(self._open, key=lambda each: each.called).state if self._open else None

    def of(self, latents: Tensor | None, waits: Callable[[StreamState], bool]) -> StreamState:
        """The state of the generation that a call with ``latents`` belongs to; ``waits`` says which may go on so."""
        sample = None if latents is None else _sample(latents)
        self._calls += 1
        found = [each for each in self._open if waits(each.state)]
        if len(found) > 1:
            found = [] if sample is None else [min(found, key=lambda each: _apart(each.latents, sample))]
        if found:
            (chosen,) = found
            chosen.latents, chosen.called = sample, self._calls
        else:
            chosen = _Open(self._make(), sample, self._calls, self._calls)
            under_way = sorted((each for each in self._open if not each.ended), key=lambda each: each.called)
            self._open = [*under_way[1 - OPEN :], chosen]
        return chosen.state

    def end(self, state: StreamState) -> None:
        """A generation has had its last call: those that were last called before it began were given up."""
        (ended,) = (each for each in self._open if each.state is state)
        ended.ended = True
        self._open = [each for each in self._open if each.called >= ended.began]


def _sample(latents: Tensor) -> Tensor:
    flat = latents.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].clone()


def _apart(one: Tensor | None, other: Tensor) -> float:
    return float("inf") if one is None else float(torch.dist(one.float(), other.float()))
