"""Rests that heads keep from an earlier step, as inputs of a site's graphs: in which steps anew, of which blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.decisions import HeadDecision
from ditopt.kept import Use
from ditopt.kernels.block_sparse_attention.kept import NO_REST, other_blocks
from ditopt.kernels.block_sparse_attention.lists import BlockLists, longest_list
from ditopt.passes.kept import REST, readers_name
from ditopt.passes.kept_rest import forms_name, other_names, resting_name
from ditopt.runtime.choices import Heads, choice_of
from ditopt.runtime.kept import KeptRead, KeptSteps, kept_steps

Lists = Mapping[int, BlockLists]


def every_of(decision: HeadDecision) -> int | None:
    """N, where a head is dense and keeps its rest anew in every N-th step of a run; None: it keeps none."""
    choice = choice_of(decision)
    return None if choice is None or choice.kept is None else choice.kept.refresh


def form_of(decision: HeadDecision) -> int:
    """What a head keeps, as a number of a graph's input."""
    choice = choice_of(decision)
    return NO_REST if choice is None or choice.kept is None else choice.kept.code


@dataclass(frozen=True)
class KeptRests:
    """Of one site: by step which heads keep and read, their forms, and lists of all other blocks where some keep.

    ``room`` is how many of these a block of queries has at most, in all steps; ``heads`` ``[K]`` are those that slots
    are of, None: of all.
    """

    steps: KeptSteps
    forms: Mapping[int, Tensor]
    others: Lists
    room: int
    heads: Tensor | None = None

    def keeps(self, step: int) -> tuple[str, ...]:
        """The kind, where some head is dense and hands its rest on."""
        return (REST,) if step in self.others else ()

    def reads(self, step: int) -> tuple[KeptRead, ...]:
        """The slot, where some head reads it."""
        return self.steps.reads(step)

    def resting(self, step: int) -> int:
        """How many heads slots are of, where a step keeps or reads some and they are not of all; else 0."""
        used = self.keeps(step) or self.reads(step)
        return len(self.heads) if used and self.heads is not None else 0

    def inputs(self, site: str, step: int) -> dict[str, Tensor]:
        """What the graph of a step is given for it, by name."""
        if step not in self.forms:
            return {}
        found = {forms_name(site): self.forms[step]}
        found |= {} if self.heads is None else {resting_name(site): self.heads}
        lists = self.others.get(step)
        if lists is not None:
            found |= zip(other_names(site), (lists.indices, lists.counts), strict=True)
        if lists is not None and self.reads(step):
            readers = torch.tensor(self.steps.readers(step), device=lists.indices.device)
            found[readers_name(REST, site)] = readers
        return found


def kept_rests(
    site: str,
    computed: Sequence[int],
    decided: Mapping[int, Heads],
    lists: Lists,
    key_blocks: int,
    widths: int,
    known: dict[object, BlockLists],
) -> KeptRests:
    """The rests that a site keeps in the steps of ``decided``, of the blocks that ``lists`` leave out.

    Lists of these have room for a multiple of ``widths`` blocks, or for all ``key_blocks``; ``known`` are those of
    sites that have the same ``lists``.
    """
    steps = kept_steps(REST, site, computed, decided, every_of)
    forms: dict[Heads, Tensor] = {}
    maps: dict[tuple[Heads, tuple[Use, ...]], Tensor] = {}
    for step, heads in decided.items():
        uses, own = steps.uses[step], lists[step]
        if any(use is not Use.NONE for use in uses) and heads not in forms:
            codes = torch.tensor([*map(form_of, heads)], dtype=torch.int32)
            forms[heads] = codes.to(own.indices.device)
        if Use.FOUND in uses and (heads, uses) not in maps:
            due = torch.tensor([use is Use.FOUND for use in uses])
            maps[heads, uses] = other_blocks(own.to_map(key_blocks).cpu(), due)
    longest = max(map(longest_list, maps.values()), default=1)
    room = min(key_blocks, -(-longest // widths) * widths)
    others: dict[int, BlockLists] = {}
    for step, heads in decided.items():
        uses, own = steps.uses[step], lists[step]
        if Use.FOUND in uses:
            key = ("others", own, uses, room)
            if key not in known:
                made = BlockLists.from_map(maps[heads, uses], own.query_block, own.key_block, room)
                known[key] = made.to(own.indices.device)
            others[step] = known[key]
    of_steps = {step: forms[heads] for step, heads in decided.items() if heads in forms}
    return KeptRests(steps, of_steps, others, room, _resting(steps, lists))


def _resting(steps: KeptSteps, lists: Lists) -> Tensor | None:
    """Which heads keep a rest in some step, None where all do: the same in all steps, so that these share graphs."""
    of_heads = [*zip(*steps.uses.values(), strict=True)]
    found = [head for head, uses in enumerate(of_heads) if any(use is not Use.NONE for use in uses)]
    if not found or len(found) == len(of_heads):
        return None
    return torch.tensor(found, device=next(iter(lists.values())).indices.device)
