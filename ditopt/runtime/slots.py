"""State slots: the features that live across steps, owned by one guidance branch of one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ditopt.errors import StateError
from ditopt.runtime.clock import StepClock
from ditopt.runtime.prologue import Kept
from ditopt.runtime.stamps import Ingredients, Made


@dataclass(frozen=True, slots=True)
class Held:
    """A feature: the planned step that it was computed in (or nearest to), its sigma, and its tensors."""

    step: int
    time: float
    tensors: tuple[Tensor, ...]


@dataclass(eq=False)
class StreamState:
    """What one guidance branch of one generation carries from call to call; newest features first.

    ``held_bytes`` is the memory of all features held; ``last_value`` and ``last_step`` are those of the latest call,
    ``whole`` whether all planned steps up to that have run, so that nothing that they made may be missing;
    ``hoisted`` is what was computed ahead of the steps, ``first_value`` that of the generation's first call, and
    ``begun`` whether the next call is that.
    """

    clock: StepClock
    history: dict[str, list[Held]] = field(default_factory=dict)
    held_bytes: int = 0
    first_value: float | None = None
    last_value: float | None = None
    last_step: int = -1
    whole: bool = True
    hoisted: dict[tuple[str, ...], Kept] = field(default_factory=dict)
    begun: bool = True
    _made: dict[int, Made] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget all features: a new generation begins."""
        self.forget()
        self.hoisted.clear()
        self.begun = True

    def forget(self) -> None:
        """Forget all features, and of which weights they are."""
        self.history.clear()
        self._made.clear()
        self.held_bytes = 0
        self.whole = False

    def enter(self, step: int) -> bool:
        """Step ``step`` runs now, of whichever graph; whether it is the one behind the latest."""
        in_turn = step == self.last_step + 1
        self.whole = self.whole and (in_turn or step == self.last_step)
        self.last_step = step
        return in_turn

    def end(self) -> None:
        """Nothing can go on with this generation any more."""
        self.reset()
        self.clock.reset()
        self.last_value = None

    def made_of(self, graph: int, which: Ingredients, arguments: Sequence[Any]) -> bool:
        """Whether what is held was made by the weights that a call of ``graph`` has."""
        made = self._made.get(graph)
        return made is None or which.are(made, arguments)

    def note(self, graph: int, which: Ingredients, arguments: Sequence[Any]) -> None:
        """What is held was made by the weights of this call of ``graph``; noted once, while something is held."""
        if not self.held_bytes:
            self._made.clear()
        elif graph not in self._made:
            self._made[graph] = which.of(arguments)

    def newest(self, site: str, count: int = 1) -> tuple[Held, ...]:
        """The ``count`` newest features of ``site``, or as many as are held."""
        return tuple(self.history.get(site, ())[:count])

    def read(self, site: str, step: int) -> Held:
        """The feature that ``site`` had in ``step``.

        Raises:
            StateError: it has not been stored, or has been dropped.
        """
        for held in self.history.get(site, ()):
            if held.step == step:
                return held
        told = ", ".join(str(each.step) for each in self.history.get(site, ())) or "none"
        raise StateError(f"slot {site} of step {step} is read, but is not there: of this slot steps held are {told}")

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
