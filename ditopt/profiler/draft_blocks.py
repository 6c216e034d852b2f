"""Candidates whose blocks are found in every call: what they would keep of a head, in this step and under this prompt.

They are found as ``ditopt::draft_lists`` finds them, but in the profile's blocks; a mask of the model's does not count
in the choice. No map of all blocks is held for more than one head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.draft import draft_map
from ditopt.kernels.block_sparse_attention.lists import blocks
from ditopt.kernels.block_sparse_attention.selectors import draft_scores
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import OWN, Draft, Selector
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.measures import Numbers
from ditopt.profiler.rows import Operands

TRIED = (
    *(Draft(keep=0.5), Draft(keep=0.25), Draft(keep=0.125), Draft(mass=0.9)),
    *(Draft(by="error", keep=0.5), Draft(by="error", keep=0.25), Draft(by="error", keep=0.125)),
)
"""None by mass: found anew in every call, its blocks cost as much as attention to all of them."""


@dataclass(frozen=True)
class Drafts:
    """Dynamic patterns for a site: their names, and in blocks of ``block`` tokens what they keep.

    ``always`` ``[Qb, Kb]`` is kept in any case; ``keep`` and ``mass`` ``[D]`` are the limits that ``draft_map`` takes;
    ``by`` are what scores them.
    """

    names: tuple[str, ...]
    block: int
    always: Tensor
    keep: Tensor
    mass: Tensor
    by: tuple[Selector, ...]


@lru_cache(maxsize=8)
def drafts_of(geometry: Geometry, block: int, order: TokenOrder | None = None) -> Drafts:
    """Those of ``TRIED`` that leave something out, and of those with room for as many blocks only the first.

    Blocks are of tokens in an order, None: raster.
    """
    count = blocks(geometry.tokens, block)
    there = None if order is None else order.of_video(geometry, block)
    always = torch.from_numpy(OWN.block_map(geometry, block, order=there))
    found: dict[tuple[int, bool, Selector], Draft] = {}
    for each in TRIED:
        if not (each.everything(count) or always.all()):
            found.setdefault((each.room(count), each.mass is None, each.by), each)
    names = tuple(pattern_text(SparseChoice(each, order=order).to_data()) for each in found.values())
    mass = [torch.inf if each.mass is None else each.mass for each in found.values()]
    rooms = torch.tensor([room for room, _, _ in found])
    return Drafts(names, block, always, rooms, torch.tensor(mass), tuple(each.by for each in found.values()))


class DraftReader:
    """What drafts keep at a site, call by call and head by head."""

    def __init__(self, drafts: Drafts) -> None:
        self.drafts = drafts
        self._call: tuple[Operands, int] | None = None
        self._latest: tuple[int, Tensor] | None = None
        self._shares: list[Tensor] = []

    def start(self, operands: Operands, index: int) -> None:
        """The heads of a sample's call are asked for from now on."""
        self._call, self._latest = (operands, index), None

    def finish(self) -> None:
        """Let go of the call."""
        self._call = self._latest = None

    def kept(self, head: int) -> Tensor:
        """``[Qb, D, Kb]`` boolean: the blocks of a head."""
        assert self._call is not None, "no call was started"
        if self._latest is None or self._latest[0] != head:
            self._latest = head, self._find(*self._call, head)
            self._shares.append(self._latest[1].float().mean((0, 2)).cpu())
        return self._latest[1]

    def _find(self, operands: Operands, index: int, head: int) -> Tensor:
        group, drafts = operands.group(head), self.drafts
        parts = (operands.query[index, head], *(each[index, group] for each in (operands.key, operands.value)))
        query, key, value = (part[None, None] for part in parts)
        always = drafts.always.to(query.device)
        found = [always.new_empty(1, 0, *always.shape)]
        for by, places in groupby(range(len(drafts.by)), drafts.by.__getitem__):
            here = [*places]
            limits = (each[here].to(query.device) for each in (drafts.keep, drafts.mass))
            scores = draft_scores(query, key, drafts.block, drafts.block, operands.scale, value, None, (by,))
            found.append(draft_map(scores, always, *limits))
        return torch.cat(found, 1)[0].transpose(0, 1)

    @property
    def density(self) -> Numbers:
        """``[D]``: the share of blocks that each keeps, mean over all heads seen; before any what it has room for."""
        if not self._shares:
            return np.asarray(self.drafts.keep.numpy() / self.drafts.always.shape[-1], dtype=np.float32)
        return np.asarray(torch.stack(self._shares).mean(0).numpy())
