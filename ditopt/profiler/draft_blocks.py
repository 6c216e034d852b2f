"""Candidates whose blocks are found in every call: what they would keep of a head, in this step and under this prompt.

They are found as ``ditopt::draft_lists`` finds them, but in the profile's blocks; a mask of the model's does not count
in the choice. No map of all blocks is held for more than one head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.draft import draft_map, draft_scores
from ditopt.kernels.block_sparse_attention.lists import blocks
from ditopt.kernels.patterns.draft import OWN, Draft
from ditopt.kernels.patterns.registry import pattern_to_data
from ditopt.measures import Numbers
from ditopt.profiler.rows import Operands

TRIED = (Draft(keep=0.5), Draft(keep=0.25), Draft(keep=0.125), Draft(mass=0.9))


@dataclass(frozen=True)
class Drafts:
    """Dynamic patterns for a site: their names, and in blocks of ``block`` tokens what they keep.

    ``always`` ``[Qb, Kb]`` is kept in any case; ``keep`` and ``mass`` ``[D]`` are the limits that ``draft_map`` takes.
    """

    names: tuple[str, ...]
    block: int
    always: Tensor
    keep: Tensor
    mass: Tensor


@lru_cache(maxsize=8)
def drafts_of(geometry: Geometry, block: int) -> Drafts:
    """Those of ``TRIED`` that leave something out, and of those with room for as many blocks only the first."""
    count = blocks(geometry.tokens, block)
    always = torch.from_numpy(OWN.block_map(geometry, block))
    found: dict[tuple[int, bool], Draft] = {}
    for each in TRIED:
        if not (each.everything(count) or always.all()):
            found.setdefault((each.room(count), each.mass is None), each)
    names = tuple(json.dumps(pattern_to_data(each), sort_keys=True) for each in found.values())
    mass = [torch.inf if each.mass is None else each.mass for each in found.values()]
    return Drafts(names, block, always, torch.tensor([room for room, _ in found]), torch.tensor(mass))


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
            operands, index = self._call
            query, key = operands.query[index, head], operands.key[index, operands.group(head)]
            block = self.drafts.block
            scores = draft_scores(query[None, None], key[None, None], block, block, operands.scale)
            limits = (each.to(query.device) for each in (self.drafts.always, self.drafts.keep, self.drafts.mass))
            self._latest = head, draft_map(scores, *limits)[0].transpose(0, 1)
            self._shares.append(self._latest[1].float().mean((0, 2)).cpu())
        return self._latest[1]

    @property
    def density(self) -> Numbers:
        """``[D]``: the share of blocks that each keeps, mean over all heads seen; before any what it has room for."""
        if not self._shares:
            return np.asarray(self.drafts.keep.numpy() / self.drafts.always.shape[-1], dtype=np.float32)
        return np.asarray(torch.stack(self._shares).mean(0).numpy())
