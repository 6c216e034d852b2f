"""By what the heads of a site choose the blocks that they find in a call, and what its graph computes for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ditopt.decisions import HeadDecision
from ditopt.kernels.patterns.draft import COSTLY, SELECTORS, Draft, Selector
from ditopt.runtime.choices import choice_of


def selectors_of_steps(
    decided: Mapping[int, tuple[HeadDecision, ...]],
) -> dict[int, tuple[tuple[Selector, ...], Tensor]]:
    """By step the selectors that a site's graph computes, and each head's code ``[H]`` int32.

    They are all that some head asks for in any of the steps, so that a graph serves them all; but for ``COSTLY`` ones,
    which are computed in the steps alone whose heads ask for them.
    """
    asked = {heads: tuple(map(_selector, heads)) for heads in dict.fromkeys(decided.values())}
    everywhere = {by for each in asked.values() for by in each} - {*COSTLY}
    found = {}
    for heads, of_heads in asked.items():
        here: list[Selector] = [by for by in SELECTORS if by in everywhere or by in of_heads] or ["means"]
        codes = [SELECTORS.index(here[0] if by is None else by) for by in of_heads]
        found[heads] = tuple(here), torch.tensor(codes, dtype=torch.int32)
    return {step: found[heads] for step, heads in decided.items()}


def _selector(decision: HeadDecision) -> Selector | None:
    """By what a head finds its blocks; None where its lists are given."""
    choice = choice_of(decision)
    return choice.pattern.by if choice is not None and isinstance(choice.pattern, Draft) else None
