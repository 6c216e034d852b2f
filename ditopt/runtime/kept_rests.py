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
from ditopt.passes.kept_rest import forms_name, other_names
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

    ``room`` is how many of these a block of queries has at most, in all steps.
    """

    steps: KeptSteps
    forms: Mapping[int, Tensor]
    others: Lists
    room: int

    def keeps(self, step: int) -> tuple[str, ...]:
        """The kind, where some head is dense and hands its rest on."""
        return (REST,) if step in self.others else ()

    def reads(self, step: int) -> tuple[KeptRead, ...]:
        """The slot, where some head reads it."""
        return self.steps.reads(step)

    def inputs(self, site: str, step: int) -> dict[str, Tensor]:
        """What the graph of a step is given for it, by name."""
        if step not in self.forms:
            return {}
        found = {forms_name(site): self.forms[step]}
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
    return KeptRests(steps, {step: forms[heads] for step, heads in decided.items() if heads in forms}, others, room)
