"""Candidates whose blocks are found in every call: what they would keep of a head, in this step and under this prompt.

They are found as ``ditopt::draft_lists`` finds them, under a mask of the model's too, but in the profile's blocks. No
map of all blocks is held for more than one head, but for those that are kept between steps, eight blocks in a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.draft import block_bias, draft_map
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
KEPT = (Draft(by="mass", keep=0.25), Draft(by="mass", keep=0.125))
REFRESH = (4, 8, 16)
"""Those by mass find their blocks in every so many steps: in every second one that would cost more than it saves. What
others find anew in every call costs next to nothing."""
KEPT_BYTES = 64 << 20
"""What a site may hold of kept blocks in one order; where it would be more, none are tried."""


@dataclass(frozen=True)
class Drafts:
    """Dynamic patterns for a site: their names, and in blocks of ``block`` tokens what they keep.

    ``always`` ``[Qb, Kb]`` is kept in any case; ``keep`` and ``mass`` ``[D]`` are the limits that ``draft_map`` takes;
    ``by`` are what scores them. What the last of them find, in the steps that are multiples of their ``refresh``, they
    have in the steps up to the next of these; the others have none.
    """

    names: tuple[str, ...]
    block: int
    always: Tensor
    keep: Tensor
    mass: Tensor
    by: tuple[Selector, ...]
    refresh: tuple[int | None, ...]

    def bytes_kept(self, heads: int, branches: int) -> int:
        """What is held between steps for so many heads."""
        return heads * branches * len([*filter(None, self.refresh)]) * -(-self.always.numel() // 8)


@lru_cache(maxsize=8)
def drafts_of(geometry: Geometry, block: int, order: TokenOrder | None = None, steps: int = 1) -> Drafts:
    """Those of ``TRIED`` that leave something out, and of those with room for as many blocks only the first.

    And those of ``KEPT``, with each ``REFRESH`` that is no more than ``steps``. Blocks are of tokens in an order, None:
    raster.
    """
    count = blocks(geometry.tokens, block)
    there = None if order is None else order.of_video(geometry, block)
    always = torch.from_numpy(OWN.block_map(geometry, block, order=there))
    kept = [(each, every) for every in REFRESH if every <= steps for each in KEPT]
    found: dict[tuple[int, bool, Selector, int | None], Draft] = {}
    for each, every in (*((each, None) for each in TRIED), *kept):
        if not (each.everything(count) or always.all()):
            found.setdefault((each.room(count), each.mass is None, each.by, every), each)
    refresh = tuple(every for *_, every in found)
    choices = (
        SparseChoice(each, order=order, refresh=every) for each, every in zip(found.values(), refresh, strict=True)
    )
    mass = [torch.inf if each.mass is None else each.mass for each in found.values()]
    rooms = torch.tensor([room for room, *_ in found])
    names = tuple(pattern_text(each.to_data()) for each in choices)
    return Drafts(names, block, always, rooms, torch.tensor(mass), tuple(each.by for each in found.values()), refresh)


class DraftReader:
    """What drafts keep at a site, call by call and head by head."""

    def __init__(self, drafts: Drafts) -> None:
        self.drafts = drafts
        self._call: tuple[Operands, int] | None = None
        self._latest: tuple[int, Tensor] | None = None
        self._shares: list[Tensor] = []
        self._held: dict[tuple[int, int, int], tuple[int, Tensor]] = {}

    def start(self, operands: Operands, index: int) -> None:
        """The heads of a sample's call are asked for from now on."""
        self._call, self._latest = (operands, index), None

    def finish(self) -> None:
        """Let go of the call."""
        self._call = self._latest = None

    def kept(self, head: int, step: int, branch: int) -> Tensor:
        """``[Qb, D, Kb]`` boolean: the blocks of a head, which are those of the call of a ``branch`` in a ``step``."""
        assert self._call is not None, "no call was started"
        if self._latest is None or self._latest[0] != head:
            self._latest = head, self._find(*self._call, head, step, branch)
            self._shares.append(self._latest[1].float().mean((0, 2)).cpu())
        return self._latest[1]

    def _find(self, operands: Operands, index: int, head: int, step: int, branch: int) -> Tensor:
        group, drafts = operands.group(head), self.drafts
        parts = (operands.query[index, head], *(each[index, group] for each in (operands.key, operands.value)))
        query, key, value = (part[None, None] for part in parts)
        always = drafts.always.to(query.device)
        bias = torch.zeros((), device=query.device)
        if operands.mask is not None:
            samples, of_heads = operands.mask.shape[:2]
            mask = operands.mask[index if samples > 1 else 0, head if of_heads > 1 else 0]
            bias = block_bias(mask, drafts.block, drafts.block, query.shape[2], key.shape[2])[0, 0]
            always = (always & (bias != -torch.inf)).contiguous()
        found = [always.new_empty(1, 0, *always.shape)]
        kinds = [*zip(drafts.by, drafts.refresh, strict=True)]

        @cache
        def scores(by: Selector) -> Tensor:
            return draft_scores(query, key, drafts.block, drafts.block, operands.scale, value, None, (by,)) + bias

        for (by, every), places in groupby(range(len(kinds)), kinds.__getitem__):
            here = [*places]
            if every is not None:
                began, packed = self._held.get((branch, head, every), (-1, always))
                if began == step - step % every:
                    found.append(_unpacked(packed, always))
                    continue
            limits = (each[here].to(query.device) for each in (drafts.keep, drafts.mass))
            found.append(draft_map(scores(by), always, *limits))
            if every is not None:
                self._held[branch, head, every] = step - step % every, _packed(found[-1])
        return torch.cat(found, 1)[0].transpose(0, 1)

    @property
    def density(self) -> Numbers:
        """``[D]``: the share of blocks that each keeps, mean over all heads seen; before any what it has room for."""
        if not self._shares:
            return np.asarray(self.drafts.keep.numpy() / self.drafts.always.shape[-1], dtype=np.float32)
        return np.asarray(torch.stack(self._shares).mean(0).numpy())


def _packed(kept: Tensor) -> Tensor:
    """Booleans, eight in a byte."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy()))


def _unpacked(packed: Tensor, always: Tensor) -> Tensor:
    """``[1, D, Qb, Kb]`` boolean, of what was packed; ``always`` has its last two dimensions."""
    bits = np.unpackbits(packed.numpy())
    whole = bits[: len(bits) // always.numel() * always.numel()]
    return torch.from_numpy(whole.reshape(1, -1, *always.shape)).bool().to(always.device)
