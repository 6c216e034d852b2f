"""What heads find in a call: how many blocks at most, and by which selectors, as inputs of a site's graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ditopt.decisions import Dense, HeadDecision
from ditopt.kept import Use
from ditopt.kernels.patterns.draft import COSTLY, SELECTORS, Draft, Selector
from ditopt.runtime.choices import Heads, choice_of
from ditopt.runtime.kept import KeptSteps, refresh_of


def draft_of(decision: HeadDecision) -> Draft | None:
    """The dynamic pattern of a head; None under a static one."""
    choice = choice_of(decision)
    return choice.pattern if choice is not None and isinstance(choice.pattern, Draft) else None


def room_of(decision: HeadDecision, key_blocks: int) -> int:
    """How many of so many blocks a head finds at most; 0 where its lists are given."""
    draft = draft_of(decision)
    return 0 if draft is None or draft.everything(key_blocks) else draft.room(key_blocks)


def finding(heads: Heads, uses: tuple[Use, ...]) -> Heads:
    """What heads are to find in a step: those that read what an earlier one found are as good as dense."""
    return tuple(Dense() if use is Use.READ else do for do, use in zip(heads, uses, strict=True))


def limits_of_steps(
    decided: Mapping[int, Heads], kept: KeptSteps, key_blocks: int, device: torch.device
) -> dict[int, tuple[Tensor, Tensor]]:
    """By step what heads find in a call: ``keep`` ``[H]`` int32 and ``mass`` ``[H]`` float32.

    Where some head finds blocks in every call, it is for all steps: a graph serves them all, and static heads find
    nothing. But a step is left out in which no head finds and some read what was kept, or none ever finds in a call.
    """
    anew = any(room_of(do, key_blocks) and refresh_of(do) is None for heads in {*decided.values()} for do in heads)
    found: dict[Heads, tuple[Tensor, Tensor]] = {}
    limits = {}
    for step, heads in decided.items():
        here = finding(heads, kept.uses[step])
        rooms = [room_of(do, key_blocks) for do in here]
        if any(rooms) or (anew and step not in kept.sources):
            if here not in found:
                keep = torch.tensor(rooms, dtype=torch.int32, device=device)
                found[here] = keep, torch.tensor(list(map(_mass, here)), dtype=torch.float32, device=device)
            limits[step] = found[here]
    return limits


def _mass(decision: HeadDecision) -> float:
    draft = draft_of(decision)
    return math.inf if draft is None or draft.mass is None else draft.mass


def selectors_of_steps(decided: Mapping[int, Heads]) -> dict[int, tuple[tuple[Selector, ...], Tensor]]:
    """By step the selectors that a site's graph computes, and each head's code ``[H]`` int32.

    They are all that some head asks for in any of the steps, so that a graph serves them all; but for ``COSTLY`` ones,
    and those of heads that keep their lists, which are computed in the steps alone whose heads ask for them.
    """
    asked = {heads: tuple(map(_selector, heads)) for heads in dict.fromkeys(decided.values())}
    everywhere = {_selector(do) for heads in asked for do in heads if refresh_of(do) is None} - {*COSTLY}
    found = {}
    for heads, of_heads in asked.items():
        here: list[Selector] = [by for by in SELECTORS if by in everywhere or by in of_heads] or ["means"]
        codes = [SELECTORS.index(here[0] if by is None else by) for by in of_heads]
        found[heads] = tuple(here), torch.tensor(codes, dtype=torch.int32)
    return {step: found[heads] for step, heads in decided.items()}


def _selector(decision: HeadDecision) -> Selector | None:
    """By what a head finds its blocks; None where its lists are given."""
    draft = draft_of(decision)
    return None if draft is None else draft.by
