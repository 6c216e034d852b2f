"""State slots: the features that live across steps, owned by one stream of one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ditopt.runtime.clock import StepClock

Held = tuple[int, tuple[Tensor, ...]]


@dataclass
class StreamState:
    """What one guidance branch of one generation carries from call to call; newest features first."""

    clock: StepClock
    history: dict[str, list[Held]] = field(default_factory=dict)
    peak_bytes: int = 0
    cold_steps: int = 0

    def reset(self) -> None:
        """Forget all features: a new generation begins."""
        self.history.clear()

    def store(self, site: str, step: int, tensors: Iterable[Tensor]) -> None:
        """Keep the feature that ``site`` had in ``step``."""
        self.history.setdefault(site, []).insert(0, (step, tuple(tensors)))

    def retain(self, wanted: Callable[[str, int], bool]) -> None:
        """Drop every feature (site, step) that is not ``wanted`` any more, after noting the peak."""
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        for site, held in self.history.items():
            self.history[site] = [(step, tensors) for step, tensors in held if wanted(site, step)]

    def bytes(self) -> int:
        """Memory of all features held, in bytes."""
        return sum(t.numel() * t.element_size() for held in self.history.values() for _, tensors in held for t in tensors)
