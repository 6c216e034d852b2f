"""What a profile has for the file beside a plan: maps of listed heads, projections of linear rests. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ditopt.geometry import Geometry
from ditopt.head_tensors import BlockMaps, Projections
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import Listed, own_blocks
from ditopt.measures import Numbers, Table
from ditopt.plan_tensors import PlanTensors
from ditopt.profile import NetworkProfile

SUMS = "mass", "mass_ordered"
"""The measures of ``patterns`` with sums of attention: of blocks in raster order, and in another one."""
GRAM, CROSS = ("linear_gram", "linear_gram_ordered"), ("linear_cross", "linear_cross_ordered")
"""Those with moments of linear rests: of the regressors, and of these with what patterns lose; alike in two orders."""
LINEAR_AXES = "linear", "linear_ordered"
"""The labels of what they are of: candidates with a linear rest."""
RIDGE = 10.0
"""What is added to each second moment of the regressors, in units of their mean: less fits one prompt alone."""


def profiled_tensors(name: str, network: NetworkProfile) -> PlanTensors:
    """What every listed candidate and linear rest of a network called ``name`` has, by all prompts of its profile."""
    maps: list[BlockMaps] = []
    projections: list[Projections] = []
    for site, table in network.tables.get("patterns", {}).items():
        projections += _projections(name, site, table)
        geometry = _geometry(network, table)
        if geometry is not None:
            maps += _of_site(name, site, table, geometry)
    return PlanTensors(tuple(maps), tuple(projections))


def summed(tables: Sequence[Table], measure: str) -> Numbers | None:
    """A measure of a site summed over the prompts of some tables; None where none has it."""
    known = [table[measure].values.sum(0, dtype=np.float32) for table in tables if measure in table.measures]
    return sum(known[1:], known[0]) if known else None


def fitted_projections(gram: Numbers, cross: Numbers) -> npt.NDArray[np.float32]:
    """``[..., E, E]``: the projections of (ridge) least squares by moments of that shape."""
    size = gram.shape[-1]
    ridge = RIDGE * np.trace(gram, axis1=-2, axis2=-1)[..., None, None] / size + 1e-12
    return np.asarray(np.linalg.solve(gram + ridge * np.eye(size), cross), dtype=np.float32)


def _projections(name: str, site: str, table: Table) -> Iterator[Projections]:
    for gram, cross, label in zip(GRAM, CROSS, LINEAR_AXES, strict=True):
        sums = summed([table], gram), summed([table], cross)
        if sums[0] is None or sums[1] is None:
            continue
        found = fitted_projections(sums[0], sums[1]).astype(np.float16)
        starts = tuple(int(start) for start in table.labels["period"])
        heads = tuple(range(found.shape[1]))
        for at, pattern in enumerate(table.labels[label]):
            yield Projections(name, site, str(pattern), heads, starts, found[:, :, at])


def _of_site(name: str, site: str, table: Table, geometry: Geometry) -> Iterator[BlockMaps]:
    labels = map(str, table.labels.get("candidate", ()))
    for pattern in filter(None, dict.fromkeys(map(BlockMaps.text_of, labels))):
        choice = SparseChoice.from_data(json.loads(pattern))
        sums = summed([table], SUMS[choice.order is not None])
        if not isinstance(choice.pattern, Listed) or sums is None:
            continue
        block = int(table.facts["block_queries"])
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
    return known.of_tokens(int(table.facts["tokens"]))
