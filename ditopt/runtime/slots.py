"""State slots: the features that live across steps, owned by one stream of one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ditopt.runtime.clock import StepClock
from ditopt.runtime.prologue import Kept


@dataclass(frozen=True, slots=True)
class Held:
    """A feature: the planned step that it was computed in (or nearest to), its sigma, and its tensors."""

    step: int
    time: float
    tensors: tuple[Tensor, ...]


@dataclass(eq=False)
class StreamState:
    """What one guidance branch of one generation carries from call to call; newest features first.

    ``held_bytes`` is the memory of all features held; ``last_value`` and ``last_step`` are those of the latest call;
    ``hoisted`` is what was computed ahead of the steps, ``first_value`` that of the generation's first call, and
    ``begun`` whether the next call is that.
    """

    clock: StepClock
    history: dict[str, list[Held]] = field(default_factory=dict)
    held_bytes: int = 0
    first_value: float | None = None
    last_value: float | None = None
    last_step: int | None = None
    hoisted: dict[tuple[str, ...], Kept] = field(default_factory=dict)
    begun: bool = True

    def reset(self) -> None:
        """Forget all features: a new generation begins."""
        self.history.clear()
        self.hoisted.clear()
        self.begun = True
        self.held_bytes = 0

    def store(self, site: str, step: int, time: float, tensors: Iterable[Tensor]) -> None:
        """Keep the feature that ``site`` had in ``step``, at sigma ``time``."""
        self.history.setdefault(site, []).insert(0, Held(step, time, tuple(tensors)))
        self._count()

    def retain(self, wanted: Callable[[str, int], bool]) -> None:
        """Drop every feature (site, step) that is not ``wanted`` any more."""
        for site, held in self.history.items():
            self.history[site] = [found for found in held if wanted(site, found.step)]
        self._count()

    def retain_newest(self, depth: int, sites: Iterable[str]) -> None:
        """Drop all but the newest ``depth`` features of each of ``sites``."""
        for site in sites:
            del self.history.get(site, [])[depth:]
        self._count()

    def _count(self) -> None:
        self.held_bytes = sum(
            t.numel() * t.element_size() for held in self.history.values() for found in held for t in found.tensors
        )
