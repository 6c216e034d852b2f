"""What is computed ahead of the steps, for whom, and until when it is good.

A prologue's results are kept by the stream that they were computed for, and read while every input of the prologue is
the *same object* as then, unchanged (``runtime.stamps``). Anything else, and every new generation, computes them anew;
so nothing is read that another prompt, schedule or weight made. A write through ``.data`` is noticed at the next
generation.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ditopt.passes._infra import StepPlan
from ditopt.runtime.stamps import Stamped
from ditopt.runtime.variants import Prologue, Variant, VariantCache

log = logging.getLogger("ditopt")


class Kept:
    """The results of a prologue, and what they were computed from; ``rows`` says which timestep has which row."""

    __slots__ = ("__weakref__", "_inputs", "rows", "values")

    def __init__(self, inputs: Sequence[Tensor], values: Sequence[Tensor], rows: dict[float, int]) -> None:
        self._inputs = Stamped(inputs)
        self.values = tuple(values)
        self.rows = rows

    def is_of(self, inputs: Sequence[Tensor]) -> bool:
        """Whether ``inputs`` are what it was computed from, unchanged."""
        return self._inputs.is_of(inputs)

    @property
    def bytes(self) -> int:
        """What the results take."""
        return sum(value.nbytes for value in self.values)


class Coming:
    """Which timesteps follow one, so that they can be computed with it: the plan's, else those of the run before."""

    def __init__(self, planned: Sequence[float]) -> None:
        self._planned = tuple(dict.fromkeys(planned))
        self._before: tuple[float, ...] = ()
        self._seen: dict[float, None] = {}

    def begin(self) -> None:
        """A generation begins."""
        if self._seen:
            self._before, self._seen = tuple(self._seen), {}

    def after(self, value: float, count: int) -> list[float]:
        """``value`` and at most ``count - 1`` that are expected behind it."""
        if value not in self._planned:
            self._seen[value] = None
        for known in (self._planned, self._before):
            if value in known:
                at = known.index(value)
                return list(known[at : at + count])
        return [value]


@dataclass
class HoistCounts:
    """How often prologues ran, and the most that their results took (bytes)."""

    runs: int = 0
    peak_bytes: int = 0


@dataclass(eq=False)
class Prologues:
    """Computes what a program's variants read, once for each generation.

    Guidance branches share what does not depend on their prompts: a stream that begins with the very latents that
    another has just begun with takes what was computed for that one, where its inputs are the same.
    """

    coming: Coming
    counts: HoistCounts = field(default_factory=HoistCounts)
    told: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: Stamped | None = None
        self._shared: dict[tuple[str, ...], Kept] = {}
        self._living: weakref.WeakSet[Kept] = weakref.WeakSet()

    def begin(self, latents: Tensor | None) -> None:
        """A generation begins in some stream, with these latents."""
        with self._lock:
            told = latents is not None and not latents.is_inference()
            if latents is None or not told or self._begun is None or not self._begun.is_of([latents]):
                self._shared.clear()
                self.coming.begin()
                self._begun = Stamped([latents]) if latents is not None and told else None

    def goes_on(self) -> None:
        """A stream is behind its first step: what was computed for the first one is shared no more."""
        if self._begun is not None:
            with self._lock:
                self._begun = None
                self._shared.clear()

    def ahead(
        self,
        variants: VariantCache,
        does: StepPlan,
        arguments: Sequence[Any],
        kept: dict[tuple[str, ...], Kept],
        value: float,
    ) -> tuple[Variant, dict[str, Tensor]]:
        """The variant of a call and what it reads of its prologues; that without any where nothing can be kept."""
        variant = variants.get(does)
        if not variant.prologues:
            return variant, {}
        why = refused(variant.prologues, arguments)
        if why is None:
            return variant, self.inputs(variant.prologues, arguments, kept, value)
        if not self.told:
            self.told = True
            log.warning("nothing is computed ahead of the steps: %s", why)
        return variants.get(replace(does, hoist=0)), {}

    def inputs(
        self,
        needed: Sequence[Prologue],
        arguments: Sequence[Any],
        kept: dict[tuple[str, ...], Kept],
        value: float,
    ) -> dict[str, Tensor]:
        """What a variant reads of its prologues in a call with ``arguments`` at timestep ``value``.

        ``kept`` is what the call's stream holds, which is added to.
        """
        found: dict[str, Tensor] = {}
        for prologue in needed:
            given = [arguments[position] for position in prologue.inputs]
            known = [tensor for number, tensor in enumerate(given) if number != prologue.clock]
            held = kept.get(prologue.outputs)
            if held is None or not held.is_of(known) or (prologue.rows and value not in held.rows):
                held = kept[prologue.outputs] = self._take(prologue, given, known, value)
            values = held.values
            if prologue.rows:
                row = held.rows[value]
                values = tuple(each[row] for each in values)
            found.update(zip(prologue.outputs, values, strict=True))
        return found

    def _take(self, prologue: Prologue, given: list[Tensor], known: Sequence[Tensor], value: float) -> Kept:
        with self._lock:
            shared = self._shared.get(prologue.outputs)
            if shared is not None and shared.is_of(known) and (not prologue.rows or value in shared.rows):
                return shared
            made = self._run(prologue, given, known, value)
            if self._begun is not None:
                self._shared[prologue.outputs] = made
            self._living.add(made)
            self.counts.runs += 1
            self.counts.peak_bytes = max(self.counts.peak_bytes, sum(each.bytes for each in self._living))
        return made

    def _run(self, prologue: Prologue, given: list[Tensor], known: Sequence[Tensor], value: float) -> Kept:
        rows: dict[float, int] = {}
        if prologue.clock is not None and prologue.timestep is not None:
            values = self.coming.after(value, prologue.rows)
            rows = {each: row for row, each in enumerate(values)}
            filled = values + values[-1:] * (prologue.rows - len(values))
            like, shape = given[prologue.clock], tuple(map(int, prologue.timestep.shape))
            column = torch.tensor(filled, dtype=like.dtype).to(like.device)
            given[prologue.clock] = column.view(-1, *(1 for _ in shape)).expand(-1, *shape).contiguous()
        with torch.no_grad():
            return Kept(known, prologue.run(given), rows)


def refused(needed: Sequence[Prologue], arguments: Sequence[Any]) -> str | None:
    """Why what a call's prologues give could not be kept safely; None if it can."""
    for prologue in needed:
        for number, position in enumerate(prologue.inputs):
            if number != prologue.clock and arguments[position].is_inference():
                return (
                    "an input was made in torch.inference_mode, where writes are not counted: generate under "
                    "torch.no_grad() instead"
                )
    return None


def hoisted_work(variants: VariantCache, plans: Sequence[StepPlan]) -> list[dict[str, Any]]:
    """What is computed ahead of these steps, each once: from which ``arguments``, how many ``values``.

    ``steps`` is for how many steps at once, 0 where the timestep is not among the arguments; ``operations`` counts
    those of the graph that computes it, ``bytes`` what its results take.
    """
    names = {position: name for name, position in variants.trace.arguments.items()}
    return [
        {
            "arguments": [names[position] for position in each.inputs if position in names],
            "values": len(each.outputs),
            "steps": each.rows,
            "operations": each.nodes,
            "bytes": each.bytes,
        }
        for each in dict.fromkeys(prologue for plan in plans for prologue in variants.get(plan).prologues)
    ]
