"""Blocks of keys that every call finds for itself (DraftAttention, arXiv 2505.14708): no map of a geometry's."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.band import Band

OWN = Band(width=0)
"""What a head attends to whatever the scores: the blocks of the query's own tokens, and text as under any pattern."""
Share = Annotated[float, Field(gt=0, lt=1)]
Selector = Literal["means", "mass", "error"]
SELECTORS: tuple[Selector, ...] = get_args(Selector)
"""By what blocks are chosen; a head's code is the place of its selector here."""
COSTLY: tuple[Selector, ...] = ("mass",)
"""Selectors that score all pairs of queries and keys: only steps in which a head asks for one compute it."""


class Draft(BaseModel):
    """Of every block of queries the blocks of keys that score highest, those of ``OWN`` before all others.

    ``by`` says what scores them: the ``means`` of queries and keys; the true ``mass`` of attention (block sums of the
    map, as AdaSpa); or the ``error`` that is made where means stand for the block (as PISA and SVG-EAR). ``keep`` is
    their share of all blocks of keys, rounded up. Or they are as few as hold the share ``mass`` of the softmax of these
    scores, and no more than the share ``most`` of all blocks.
    """

    model_config = Pattern.model_config

    kind: Literal["draft"] = "draft"
    keep: Share | None = None
    mass: Share | None = None
    most: Annotated[float, Field(gt=0, le=1)] = 0.5
    by: Selector = "means"

    @model_validator(mode="after")
    def _one_of_two(self) -> Draft:
        if (self.keep is None) == (self.mass is None):
            raise ValueError("exactly one of keep and mass is needed, e.g. {pattern: draft, keep: 0.25}")
        if self.keep is not None and "most" in self.model_fields_set:
            raise ValueError("most is a limit for mass; keep is a share of blocks itself")
        return self

    def room(self, key_blocks: int) -> int:
        """How many of so many blocks of keys a block of queries attends to at most, but for those of ``OWN``."""
        share = self.most if self.keep is None else self.keep
        return max(1, math.ceil(share * key_blocks - 1e-9))

    def everything(self, key_blocks: int) -> bool:
        """Whether it keeps all of so many blocks, whatever the scores."""
        return self.mass is None and self.room(key_blocks) >= key_blocks
