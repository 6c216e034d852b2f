"""Candidates whose tokens are in the order of clusters: sums by blocks of that order, and what they keep of them.

A row's probabilities are there already; they are put into the keys' order and added up anew, once for all candidates.
Below 1,024 tokens none is tried. A mask of the model's does not count in the choice of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.clusters import cluster_order
from ditopt.kernels.block_sparse_attention.draft import draft_map
from ditopt.kernels.block_sparse_attention.lists import blocks
from ditopt.kernels.block_sparse_attention.selectors import draft_scores
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.orders import CLUSTERS, TokenOrder
from ditopt.kernels.patterns.whole import Nothing
from ditopt.measures import Numbers
from ditopt.passes.sparse import ROUNDS
from ditopt.profiler.rows import Operands, Part
from ditopt.profiler.sample import Sample

TRIED = (Draft(mass=0.9), Draft(keep=0.25))
LEAST_BLOCK = 64
"""Sequences in smaller blocks are too short for the kernels."""


@dataclass(frozen=True)
class _Found:
    """Of one head: which key stands at each place (filled up behind), the block of each query, and what is kept.

    ``kept`` is ``[Qb, C, Kb]`` boolean.
    """

    head: int
    of_keys: Tensor
    of_queries: Tensor
    kept: Tensor


class ClusterReader:
    """The candidates of a site with clusters, call by call and head by head; ``names`` are theirs."""

    def __init__(self, geometry: Geometry, block: int) -> None:
        self.geometry, self.block = geometry, block
        self.always = torch.from_numpy(Nothing().block_map(geometry, block))
        self.tried: Sequence[Draft] = TRIED if block >= LEAST_BLOCK and not self.always.all() else ()
        order = TokenOrder(CLUSTERS)
        self.names = tuple(pattern_text(SparseChoice(each, order=order).to_data()) for each in self.tried)
        self._call: tuple[Operands, int] | None = None
        self._latest: _Found | None = None
        self._shares: list[Tensor] = []

    def start(self, operands: Operands, index: int) -> None:
        """The heads of a sample's call are asked for from now on."""
        self._call, self._latest = (operands, index), None

    def finish(self) -> None:
        """Let go of the call."""
        self._call = self._latest = None

    def sums(self, part: Part, sample: Sample) -> tuple[Tensor, Tensor]:
        """``[Kb, r, E + 1]`` and ``[r, C, Kb]``: sums as ``Part.sums`` by blocks of the order, and what rows keep."""
        assert self._call is not None, "no call was started"
        operands, index = self._call
        if self._latest is None or self._latest.head != part.head:
            self._latest = self._find(operands, index, part.head)
            self._shares.append(self._latest.kept.float().mean((0, 2)).cpu())
        found = self._latest
        value = operands.value[index, operands.group(part.head)].float()
        whole = F.pad(F.pad(value, (0, 1), value=1.0), (0, 0, 0, len(found.of_keys) - len(value)))
        by_block = whole[found.of_keys].view(-1, self.block, whole.shape[1])
        shares = part.probabilities[:, found.of_keys].view(len(part.probabilities), -1, self.block)
        rows = sample.rows.view(-1).to(found.of_queries.device)[part.where]
        return torch.bmm(shares.transpose(0, 1), by_block), found.kept[found.of_queries[rows]]

    def _find(self, operands: Operands, index: int, head: int) -> _Found:
        group = operands.group(head)
        query, key = operands.query[index, head][None, None], operands.key[index, group][None, None]
        tokens, device = query.shape[2], query.device
        first = self.geometry.text if self.geometry.text_first else 0
        of_queries, of_keys, back = (
            each[0, 0]
            for each in cluster_order(
                query,
                key,
                torch.arange(tokens, device=device)[None],
                torch.ones(1, dtype=torch.int32, device=device),
                first,
                first + self.geometry.video,
                blocks(self.geometry.video, self.block),
                ROUNDS,
            )
        )
        query, key = query[:, :, of_queries], key[:, :, of_keys]
        scores = draft_scores(query, key, self.block, self.block, operands.scale)
        rooms = torch.tensor([each.room(scores.shape[-1]) for each in self.tried], device=device)
        masses = torch.tensor([each.mass or torch.inf for each in self.tried], device=device)
        kept = draft_map(scores, self.always.to(device), rooms, masses)[0].transpose(0, 1)
        filled = torch.cat([of_keys, torch.arange(tokens, scores.shape[-1] * self.block, device=device)])
        return _Found(head, filled, back // self.block, kept)

    @property
    def density(self) -> Numbers:
        """``[C]``: shares of blocks that each keeps, mean over what was seen; what finding clusters takes is timed."""
        if not self._shares:
            return np.ones(len(self.tried), dtype=np.float32)
        return np.asarray(torch.stack(self._shares).mean(0).numpy())
