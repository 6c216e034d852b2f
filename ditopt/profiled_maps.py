"""The block maps that a profile chooses for listed heads: what a plan's file may hold. Numpy, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ditopt.geometry import Geometry
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import Listed, own_blocks
from ditopt.measures import Numbers, Table
from ditopt.plan_tensors import BlockMaps, PlanTensors, is_listed, map_text
from ditopt.profile import NetworkProfile

SUMS = "mass", "mass_ordered"
"""The measures of ``patterns`` with sums of attention: of blocks in raster order, and in another one."""


def profiled_maps(name: str, network: NetworkProfile) -> PlanTensors:
    """The maps of every listed candidate, site and head of a network called ``name``, by all prompts of its profile."""
    found: list[BlockMaps] = []
    for site, table in network.tables.get("patterns", {}).items():
        geometry = _geometry(network, table)
        if geometry is not None:
            found += _of_site(name, site, table, geometry)
    return PlanTensors(tuple(found))


def _of_site(name: str, site: str, table: Table, geometry: Geometry) -> Iterator[BlockMaps]:
    labels = map(str, table.labels.get("candidate", ()))
    for pattern in dict.fromkeys(map_text(label) for label in labels if is_listed(label)):
        choice = SparseChoice.from_data(json.loads(pattern))
        measure = SUMS[choice.order is not None]
        if not isinstance(choice.pattern, Listed) or measure not in table.measures:
            continue
        block = int(table.facts["block_queries"])
        sums: Numbers = table[measure].values.sum(0, dtype=np.float32)
        always = own_blocks(geometry, block, choice.order)
        kept = np.stack([[choice.pattern.choose(head, always) for head in period] for period in sums])
        starts = tuple(int(start) for start in table.labels["period"])
        heads = tuple(range(kept.shape[1]))
        yield BlockMaps.of(kept, name, site, pattern, heads, starts, geometry, block)


def _geometry(network: NetworkProfile, table: Table) -> Geometry | None:
    """How the tokens of a site lie: with the text of the network, or without; None where neither makes its tokens."""
    known = network.geometry
    if known is None or "tokens" not in table.facts:
        return None
    return next((each for each in (known, replace(known, text=0)) if each.tokens == table.facts["tokens"]), None)
