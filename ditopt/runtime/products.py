"""Which heads of a site multiply queries and keys as int8, in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ditopt.decisions import HeadDecision
from ditopt.errors import PlanMismatchError
from ditopt.kernels.ops import int8_refusal
from ditopt.runtime.choices import Heads, choice_of


def is_int8(decision: HeadDecision) -> bool:
    """Whether a head has int8 scores."""
    choice = choice_of(decision)
    return choice is not None and choice.qk is not None


def int8_flags(decided: Mapping[int, Heads]) -> dict[int, tuple[int, ...]]:
    """By step 1 for heads that have int8 scores, 0 for others; in all steps if in one, for a graph serves them all."""
    flags = {heads: tuple(int(is_int8(do)) for do in heads) for heads in dict.fromkeys(decided.values())}
    return {step: flags[heads] for step, heads in decided.items()} if any(map(any, flags.values())) else {}


def int8_heads(site: str, decided: Mapping[int, Heads], device: torch.device) -> dict[int, Tensor]:
    """``int8_flags`` as ``[H]`` int32.

    Raises:
        PlanMismatchError: some head is to have them on a device that has no kernel for it.
    """
    flags = int8_flags(decided)
    refused = int8_refusal(device) if flags else None
    if refused is not None:
        raise PlanMismatchError(f"{site}: {refused}; leave qk out")
    known = {each: torch.tensor(each, dtype=torch.int32, device=device) for each in set(flags.values())}
    return {step: known[each] for step, each in flags.items()}
