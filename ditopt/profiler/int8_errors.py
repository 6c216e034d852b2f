"""Candidates with int8 scores: which patterns are tried with them, and the errors of these in some rows.

They are against dense attention as it is: of what a pattern leaves out and of what rounding moves, together. Rows are
quantised as kernels do it (``rows``); patterns take the sums of their blocks from these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.kernels.patterns.choice import INT8, QK, SparseChoice
from ditopt.kernels.patterns.whole import Everything
from ditopt.measures import Numbers
from ditopt.profiler.moments import Compensated, compensated_of, error_moments
from ditopt.profiler.rows import Part

NOT_TRIED = ("skip",)
"""Patterns without int8 scores: they multiply no keys, or those of text alone."""


@dataclass(frozen=True)
class Int8Candidates:
    """Those without a rest: their names, and the places of what they keep among the patterns that they are made of.

    ``dense``: the first one attends to all blocks, and is made of none. ``compensated`` are those of them with means.
    """

    own: tuple[str, ...]
    which: tuple[int, ...]
    dense: bool
    compensated: Compensated | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all, those with means last."""
        return (*self.own, *(self.compensated.names if self.compensated is not None else ()))

    def density(self, of_patterns: Numbers) -> Numbers:
        """``[C]``: those of the patterns, and of means; quantising has a price of its own."""
        found = of_patterns[[*self.which]]
        if self.dense:
            found = np.append(np.float32(1), found)
        return found if self.compensated is None else np.append(found, self.compensated.density(found))

    def moments(self, part: Part, kept: Tensor, weights: Tensor) -> Tensor:
        """``[C, E, E]``: ``error_moments`` of some rows; ``kept`` ``[q, ..., Kb]`` is what the patterns keep."""
        assert part.sums is not None and part.int8 is not None
        found = kept[:, [*self.which]]
        if self.dense:
            found = torch.cat([found.new_ones(len(found), 1, found.shape[2]), found], 1)
        pooled = linear = None
        if self.compensated is not None and part.pooled is not None and part.linear is not None:
            pooled, linear = (part.pooled, self.compensated.which), (part.linear, self.compensated.linear)
        return error_moments(part.int8, found, weights, pooled, linear, part.sums)


def int8_of(names: Sequence[str], dense: bool, block: int, pool: int, first_order: bool) -> Int8Candidates:
    """Of candidates called ``names``, without a rest, those that are tried with int8 scores.

    ``dense``: attention to all blocks is, too. Those with means of ``pool`` tokens (0: none) are of the same patterns
    as without int8 scores (``compensated_of``).
    """
    settings = [json.loads(name) for name in names]
    which = tuple(at for at, each in enumerate(settings) if each["pattern"] not in NOT_TRIED)
    tried = [SparseChoice(Everything()).to_data()] if dense else []
    own = tuple(pattern_text({**each, QK: INT8}) for each in (*tried, *(settings[at] for at in which)))
    found = compensated_of(own, block, pool, first_order) if pool else None
    return Int8Candidates(own, which, dense, found)
