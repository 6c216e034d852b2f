"""Sites within sites: the step holds ranges of blocks, which overlap and hold components. What that means in a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ditopt.decisions import Dense, FeatureDecision, Predictor
from ditopt.passes._infra import Component
from ditopt.sites import STEP

Span = tuple[int, int]


@dataclass(frozen=True)
class Nesting:
    """The sites of a network: ``ranges`` by their first and last block, ``components`` of blocks."""

    ranges: Mapping[str, Span]
    components: Mapping[str, Component] = field(default_factory=dict)

    @property
    def sites(self) -> set[str]:
        """The step and all within."""
        return {STEP, *self.ranges, *self.components}

    def span(self, site: str) -> Span:
        """The first and last block of a range or component."""
        if site in self.components:
            block = self.components[site].block
            return block, block
        return self.ranges[site]

    def active(self, decisions: Mapping[str, FeatureDecision]) -> dict[str, Predictor]:
        """What is really predicted: a predicted step hides all within it, a range the ranges and components in it."""
        wanted = {site: decision for site, decision in decisions.items() if not isinstance(decision, Dense)}
        if STEP in wanted:
            return {STEP: wanted[STEP]}
        kept: dict[str, Predictor] = {}
        for site in sorted(wanted, key=self._size):
            if not any(self.touch(site, other) for other in kept):
                kept[site] = wanted[site]
        return kept

    def recorded(self, used: tuple[str, ...], active: Collection[str]) -> tuple[str, ...]:
        """The features that a step computes afresh: none in a predicted step, none that touches a predicted site."""
        if STEP in active:
            return ()
        return tuple(site for site in used if site == STEP or not any(self.touch(site, other) for other in active))

    def touch(self, one: str, two: str) -> bool:
        """Whether what is computed for one site (not the step) is changed or left out where the other is predicted."""
        if one in self.components and two in self.components:
            return one == two
        return overlap(self.span(one), self.span(two))

    def inside(self, block: str | None, site: str) -> bool:
        """Whether what is in a block (None: in none) is not computed where ``site`` is predicted, as a whole block."""
        if site == STEP or site in self.components:
            return site == STEP
        return block is not None and block in self.ranges and overlap(self.ranges[block], self.ranges[site])

    def owner(self, attention: str) -> str | None:
        """The component that an attention site is in; None if it is in none."""
        return next((site for site in self.components if f"{attention}.".startswith((f"{site}.", f"{site}#"))), None)

    def _size(self, site: str) -> tuple[bool, int]:
        """The largest first, components last."""
        first, last = self.span(site)
        return site in self.components, first - last


def overlap(one: Span, two: Span) -> bool:
    """Whether two inclusive ranges share a block."""
    return one[0] <= two[1] and two[0] <= one[1]
