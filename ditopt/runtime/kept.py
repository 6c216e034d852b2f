"""What steps keep for later ones, from heads' decisions: which heads find it in which step, and who reads it where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ditopt.decisions import Dense, HeadDecision
from ditopt.kept import Use, uses
from ditopt.passes.kept import kept_names, slot_of
from ditopt.runtime.choices import Heads, choice_of
from ditopt.runtime.slots import StreamState

Period = Callable[[HeadDecision], int | None]
"""N, where a head finds something in every N-th step of a run; None: it is not kept."""


@dataclass(frozen=True)
class KeptRead:
    """A slot that a step reads: its name, the step that it has to be of, and the graph's inputs for its tensors."""

    slot: str
    source: int
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class KeptSteps:
    """Of one kind of slot of a site: by step the use of every head, and the step of which those that read have it.

    What a step finds and what it reads make one slot, so that one is read by the next steps whichever heads found anew.
    """

    kind: str
    site: str
    uses: Mapping[int, tuple[Use, ...]]
    sources: Mapping[int, int]

    def keeps(self, step: int) -> tuple[str, ...]:
        """The kind, where some head finds what later steps read."""
        return (self.kind,) if self.sources and Use.FOUND in self.uses[step] else ()

    def reads(self, step: int) -> tuple[KeptRead, ...]:
        """What some head reads."""
        if step not in self.sources:
            return ()
        return (KeptRead(slot_of(self.kind, self.site), self.sources[step], kept_names(self.kind, self.site)),)

    def readers(self, step: int) -> list[bool]:
        """Which heads read."""
        return [use is Use.READ for use in self.uses[step]]


def kept_steps(
    kind: str, site: str, computed: Sequence[int], decided: Mapping[int, Heads], period: Period
) -> KeptSteps:
    """Who finds and who reads in the steps of ``decided``; others that are ``computed``, as all is dense, end runs."""
    heads = len(next(iter(decided.values()), ()))
    dense: Heads = (Dense(),) * heads
    of_heads = [uses([decided.get(step, dense)[head] for step in computed], period) for head in range(heads)]
    found = {step: tuple(each[at] for each in of_heads) for at, step in enumerate(computed) if step in decided}
    sources: dict[int, int] = {}
    latest = -1
    for step, of_step in found.items():
        if Use.READ in of_step:
            sources[step] = latest
        if Use.FOUND in of_step:
            latest = step
    return KeptSteps(kind, site, found, sources)


def kept_inputs(
    step: int, reads: Sequence[KeptRead], state: StreamState, times: Sequence[float], *, any_time: bool
) -> dict[str, Tensor] | KeptRead:
    """The slots that a step reads; or the first that the stream has not of the step that is planned, at its sigma.

    ``times`` are planned; at ``any_time``: what ran nearest to the planned step serves as well. Where a step runs more
    than once, its own slot has what it read beside what it found.
    """
    found: dict[str, Tensor] = {}
    for read in reads:
        held = next(iter(state.newest(read.slot)), None)
        if held is None or held.step not in (read.source, step) or not (any_time or held.time == times[held.step]):
            return read
        found |= zip(read.inputs, state.read(read.slot, held.step).tensors, strict=True)
    return found


def refresh_of(decision: HeadDecision) -> int | None:
    """N, where a head finds its lists in every N-th step of a run; None: in each, or they are given."""
    choice = choice_of(decision)
    return None if choice is None else choice.refresh
