"""Second moments of the errors that patterns make in a head's output, also where what they skip counts by means.

A pattern's output is a sum over the blocks of keys that it keeps, and of what means give over those that it does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.kernels.patterns.choice import REST, Pooled
from ditopt.measures import Numbers

WITH_REST = ("skip", "spatial", "temporal", "window", "band", "draft", "listed")
"""Patterns that are tried with a rest as well."""
TO_FIRST_ORDER = ({"pattern": "skip"}, {"pattern": "draft", "by": "error"})
"""Those of them that are tried with a rest to first order, too: they have these settings."""
NOTHING = 1e-30
"""A row of which a pattern keeps less mass is taken to have lost all of it: its output is 0."""


@dataclass(frozen=True)
class Compensated:
    """Candidates whose rest counts by means of ``pool`` tokens: names, and ``which`` of those without one they are.

    The last ``linear`` of them count it to first order.
    """

    pool: int
    names: tuple[str, ...]
    which: tuple[int, ...]
    linear: int = 0

    def density(self, of_patterns: Numbers) -> Numbers:
        """``[C]``: what they cost, a pair of a query and a group for each group of the sequence beside their blocks."""
        return np.asarray(np.minimum(of_patterns[[*self.which]] + np.float32(1 / self.pool), np.float32(1)))


@lru_cache(maxsize=16)
def compensated_of(names: tuple[str, ...], block: int, pool: int, first_order: bool = True) -> Compensated:
    """Of candidates called ``names``, in blocks of so many keys, those of ``WITH_REST`` with a rest.

    Behind them those of ``TO_FIRST_ORDER`` with one to first order, if there is a kernel for it.
    """
    settings = [json.loads(name) for name in names]
    which = [at for at, each in enumerate(settings) if each["pattern"] in WITH_REST]
    further = [
        at for at in which if first_order and any(each.items() <= settings[at].items() for each in TO_FIRST_ORDER)
    ]
    rests = (Pooled(None if pool == block else pool, first_order=order).to_data() for order in (False, True))
    found = [
        pattern_text({**settings[at], REST: rest})
        for rest, places in zip(rests, (which, further), strict=True)
        for at in places
    ]
    return Compensated(pool, tuple(found), (*which, *further), len(further))


def error_moments(
    sums: Tensor,
    kept: Tensor,
    weights: Tensor,
    pooled: tuple[Tensor, Sequence[int]] | None = None,
    linear: tuple[Tensor, int] | None = None,
    exact: Tensor | None = None,
) -> Tensor:
    """``[C, E, E]``: weighted second moments of the errors that patterns make in a head's output.

    ``sums`` ``[Kb, q * r, E + 1]`` are of q blocks of r rows (``Part.sums``), ``kept`` ``[q, C, Kb]``, ``weights``
    ``[q, r]``. What a pattern keeps of a row is scaled to sum to one. ``pooled``, sums as those of
    ``Part.pooled``, is what some of the patterns have of the blocks that they do not keep: further errors behind ``C``.
    ``linear``, ``[q * r, E]`` as in ``Part``, is what the last so many of these have, times the mass of that.
    ``exact`` are sums by block from which the right output follows, None: these.
    """
    width, blocks = sums.shape[-1], len(kept)
    right = (sums if exact is None else exact).sum(0)
    picked = kept.to(sums.device, torch.float32)
    found = [torch.bmm(picked, _by_query_block(sums, blocks))]
    if pooled is not None:
        of_groups, which = pooled
        at = torch.tensor(which, device=sums.device)
        rests = torch.bmm(1 - picked[:, at], _by_query_block(of_groups, blocks))
        if linear is not None:
            behind = rests[:, len(which) - linear[1] :].view(blocks, linear[1], -1, width)
            behind[..., :-1] += behind[..., -1:] * linear[0].view(blocks, 1, -1, width - 1)
        found.append(rests.add_(found[0][:, at]))
    shape = (sum(each.shape[1] for each in found), blocks, sums.shape[1] // blocks, width - 1)
    outputs, begin = torch.empty(shape, device=sums.device), 0
    for each in found:
        end = begin + each.shape[1]
        parts = each.view(blocks, end - begin, -1, width).transpose(0, 1)
        scale = weights.sqrt()[..., None] / parts[..., -1:].clamp(min=NOTHING)
        torch.mul(parts[..., :-1], scale, out=outputs[begin:end])
        begin = end
    of_right = (weights.sqrt().view(-1, 1) / right[:, -1:].clamp(min=NOTHING)) * right[:, :-1]
    rows = outputs.view(len(outputs), -1, width - 1).sub_(of_right)
    return torch.bmm(rows.transpose(1, 2), rows)


def _by_query_block(sums: Tensor, blocks: int) -> Tensor:
    """``[Kb, q * r, E + 1]`` -> ``[q, Kb, r * (E + 1)]``."""
    return sums.view(len(sums), blocks, -1).transpose(0, 1)
