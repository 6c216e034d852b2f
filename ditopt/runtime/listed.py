"""Heads whose blocks stand in the file beside the plan, bound to a site: the maps of each step, and their proof."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import ConfigDict
from torch import Tensor

from ditopt.decisions import HeadDecision, Sparse
from ditopt.errors import AuditError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.head_tensors import BlockMaps
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import rescaled
from ditopt.plan import Plan, Rule
from ditopt.runtime.choices import Heads

Sizes = tuple[int, int]
"""Tokens of a block of queries, and of keys."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """``[Qb, Kb]`` boolean: the blocks that a head attends to in a period of the schedule; equal to itself alone."""

    kept: Tensor


class BoundList(Sparse):
    """A decision whose pattern is ``listed``, with the map that the file has of the head in the step's period."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    bound: HeadMap


def _is_listed(do: Sparse) -> bool:
    return BlockMaps.text_of(do.pattern) is not None


class ListedHeads:
    """What the file beside a plan says of the heads of one network.

    ``retarget``: maps of another geometry are laid over the one that is there; else they are refused.
    """

    def __init__(self, plan: Plan, network: str, retarget: bool) -> None:
        self.beside, self.network, self.retarget = plan.beside, network, retarget
        self._proven: set[tuple[str, Heads]] = set()

    def check(self, rule: Rule, told: str, site: str, heads: int) -> None:
        """Check that the file has what a rule reads of a site with so many heads.

        Raises:
            PlanMismatchError: it has not.
        """
        if not isinstance(rule.do, Sparse) or not _is_listed(rule.do):
            return
        maps = self._find(rule.do, site)
        wanted = range(heads) if rule.heads is None else rule.heads
        missing = [head for head in wanted if maps is None or head not in maps.heads]
        if missing:
            known = [each.place for each in self.beside.maps if each.site == site and each.network == self.network]
            has = "; ".join(known[:4]) or "no lists of this site"
            of_heads = "" if maps is None else f" of head {missing[0]}, only of {', '.join(map(str, maps.heads))}"
            raise PlanMismatchError(
                f"{told}: {site}: the file beside the plan has no lists for {rule.do.pattern}{of_heads}; it has {has}. "
                "Lists are chosen from a profile, by `ditopt optimize` or `ditopt search`"
            )

    def bind(
        self, site: str, geometry: Geometry | None, sizes: Sizes, decided: Mapping[int, Heads], notes: dict[str, None]
    ) -> dict[int, Heads]:
        """The decisions of a site by step, listed ones with their maps; of one period and head always the same.

        Raises:
            PlanMismatchError: the file's maps are for other tokens, and are not to be laid over these.
        """
        known: dict[tuple[HeadDecision, int, int], BoundList] = {}

        def bound(do: HeadDecision, head: int, step: int) -> HeadDecision:
            if not isinstance(do, Sparse) or not _is_listed(do):
                return do
            maps = self._of(do, site)
            key = do, head, maps.period(step)
            if key not in known:
                found = HeadMap(self._map(maps, do, head, step, geometry, sizes, notes))
                known[key] = BoundList(pattern=do.pattern, bound=found)
            return known[key]

        return {step: tuple(bound(do, head, step) for head, do in enumerate(heads)) for step, heads in decided.items()}

    def audit(self, site: str, geometry: Geometry | None, heads: Heads, step: int, lists: BlockLists) -> None:
        """Prove that the lists of a step, as its graph reads them, are the file's for each head that has some there.

        Raises:
            AuditError: one is not.
        """
        listed = [head for head, do in enumerate(heads) if isinstance(do, BoundList)]
        if not listed or geometry is None or (site, heads) in self._proven:  # alike, they have the same lists
            return
        self._proven.add((site, heads))
        sizes = lists.query_block, lists.key_block
        read = lists.to_map(blocks(geometry.tokens, lists.key_block))[0].cpu()
        for head in listed:
            do = heads[head]
            assert isinstance(do, Sparse)
            wanted = self._map(self._of(do, site), do, head, step, geometry, sizes, {})
            if not torch.equal(read[head], wanted):
                apart = int((read[head] != wanted).sum())
                raise AuditError(
                    f"{site}: head {head} in step {step} is to attend to the lists of the file beside the plan, but "
                    f"{apart} of {wanted.numel()} blocks that its graph reads differ"
                )

    def _find(self, do: Sparse, site: str) -> BlockMaps | None:
        return self.beside.maps_for(self.network, site, do.pattern)

    def _of(self, do: Sparse, site: str) -> BlockMaps:
        found = self._find(do, site)
        assert found is not None, "checked before"
        return found

    def _map(
        self,
        maps: BlockMaps,
        do: Sparse,
        head: int,
        step: int,
        geometry: Geometry | None,
        sizes: Sizes,
        notes: dict[str, None],
    ) -> Tensor:
        assert geometry is not None, "listed heads are of self-attention alone"
        queries, block = sizes
        if queries != block:
            raise PlanMismatchError(
                f"{maps.site}: {geometry.tokens} tokens are too few for lists of a file: kernels take blocks of "
                f"{queries} queries and {block} keys there, lists are for blocks alike; it takes 1,024 tokens"
            )
        kept = maps.kept(head, step)
        if (maps.geometry, maps.block) == (geometry, block):
            return torch.from_numpy(kept)
        told = f"{maps.site}: its lists were chosen for the {maps.geometry} in blocks of {maps.block}"
        if not self.retarget:
            raise PlanMismatchError(
                f"{told}, here are the {geometry} in blocks of {block}; make a plan at this size, or lay them over it "
                '(options={"on_mismatch": "retarget"})'
            )
        notes[f"{told}, and are laid over the {geometry} in blocks of {block}"] = None
        order = SparseChoice.from_data(json.loads(do.pattern)).order
        return torch.from_numpy(rescaled(kept, maps.geometry, maps.block, geometry, block, order))
