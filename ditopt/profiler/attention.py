"""Where attention goes: entropy, masses of regions, pooled maps, and how maps change over steps and branches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Numbers, Table
from ditopt.profiler.interpret import Collector, Seen
from ditopt.profiler.maps import by_distance, mass_in, pooled_keys, pooled_rows, top_blocks
from ditopt.profiler.pattern_errors import PatternCollector
from ditopt.profiler.regions import DISTANCES, REGIONS, Regions
from ditopt.profiler.rows import Part, Place, Reads, RowReader, SharedRows, anchor_steps
from ditopt.techniques import LINEAR_REST
from ditopt.trace import Trace

SINKS = 100
"""Sinks are the keys that gather most, one of so many."""
REACH = 2047
"""Mass is told by distance in raster order up to so many tokens to either side."""
CELLS = 2048
"""What keys gather is told for so many cells at most."""
_PER_HEAD = ("step", "branch", "head")
AXES = {
    **dict.fromkeys(("entropy", "lse_mean", "lse_std", *REGIONS, "mass_sinks"), _PER_HEAD),
    "mass_near": (*_PER_HEAD, "distance"),
    "map": ("anchor", "branch", "head", "query_block", "key_block"),
    "by_distance": ("anchor", "branch", "distance_bin"),
    "gathered": ("anchor", "branch", "key_cell"),
    "recall": (*_PER_HEAD, "anchor"),
    "recall_blocks": ("branch", "head", "anchor"),
    "between_branches": ("step", "head"),
}
"""What is measured, along what; ``prompt`` comes first everywhere."""
HISTORY = 256 << 20
"""Bytes of maps of all steps that are kept, over all sites; with more, a map is compared with earlier anchors only."""


def _unrounded(maps: Tensor) -> Tensor:
    """Float16 maps with rows that sum to one again."""
    found = maps.float()
    return found / found.sum(-1, keepdim=True)


class _Sums:
    """What adds up over the rows of one branch's call: a line per head, but of mass by distance."""

    def __init__(self, site: _Site, device: torch.device) -> None:
        heads, rows = site.place.entry.site.heads, site.place.sample.rows.numel()
        self.rows = torch.zeros(heads, 2 + site.regions, rows, device=device)
        self.columns = torch.zeros(heads, site.place.entry.site.keys, device=device)
        self.maps = torch.zeros(heads, *site.map_size, device=device)
        self.distance = np.zeros(2 * site.reach + 1, dtype=np.float32)


class _Site:
    """Where a site's numbers go, and the maps that others are compared with."""

    def __init__(self, place: Place, calls: NetworkCalls, anchors: tuple[int, ...], side: int) -> None:
        self.place, self.side = place, side
        entry, sample = place.entry.site, place.sample
        self.weights = sample.weights(*place.video).view(-1)
        self.line = place.line
        self.reach = min(REACH, self.line[1] - self.line[0] - 1) if self.line is not None else 0
        self.regions = len(REGIONS) + len(DISTANCES) if place.geometry is not None else 0
        self.pool = -(-sample.blocks // side)
        key_blocks = -(-entry.keys // place.key_block)
        self.key_pool = -(-key_blocks // side)
        self.map_size = (-(-sample.blocks // self.pool), -(-key_blocks // self.key_pool))
        self.sinks = max(1, entry.keys // SINKS)
        self.sums: dict[int, _Sums] = {}
        self.tops: dict[tuple[int, int], Tensor] = {}
        self.latest: dict[int, tuple[int, Tensor]] = {}
        self.history: dict[int, list[tuple[int, Tensor]]] = {}
        self.values: dict[str, tuple[tuple[str, ...], Numbers]] = {}
        sizes = {
            "step": len(calls.timesteps),
            "branch": calls.branches,
            "head": entry.heads,
            "anchor": len(anchors),
            "distance": len(DISTANCES),
            "query_block": self.map_size[0],
            "key_block": self.map_size[1],
            "distance_bin": 2 * self.reach + 1,
            "key_cell": -(-entry.keys // -(-entry.keys // CELLS)),
        }
        for name, axes in AXES.items():
            if name != "by_distance" or self.line is not None:
                dtype = np.float16 if name in ("map", "gathered") else np.float32
                found = np.full((1, *(sizes[axis] for axis in axes)), np.nan, dtype=dtype)
                self.values[name] = (("prompt", *axes), found)
        self.history_bytes = 2 * sizes["step"] * sizes["branch"] * sizes["head"] * self.map_size[0] * self.map_size[1]

    def put(self, name: str, at: tuple[int | slice, ...], values: Tensor | Numbers) -> None:
        """Write what was measured."""
        self.values[name][1][(0, *at)] = values.cpu().numpy() if isinstance(values, Tensor) else values

    def add_to_map(self, maps: Tensor, part: Part) -> None:
        """Pool some rows' mass by block of keys into the map ``[Q, K]`` of their head."""
        sample = self.place.sample
        real = sample.real[part.blocks].to(maps.device)
        mass = part.mass.unflatten(0, (-1, sample.each))
        rows = pooled_keys(pooled_rows(mass, real), self.side)
        number = torch.arange(sample.blocks)[part.blocks]
        into = number // self.pool
        size = self.pool * sample.block
        tokens = (sample.tokens - number * sample.block).clamp(max=sample.block)
        share = tokens / (sample.tokens - into * size).clamp(max=size)
        maps.index_add_(0, into.to(maps.device), rows * share.to(maps.device)[:, None])

    def compare(self, step: int, branch: int, anchors: tuple[int, ...], maps: Tensor, history: bool) -> None:
        """Measure what maps ``[H, Q, K]`` (float16) of a step share with other steps' and the other branch's."""
        mine = _unrounded(maps)
        if history:
            self.history.setdefault(branch, []).append((step, maps))
        if step in anchors:
            anchor = anchors.index(step)
            top = self.tops[branch, anchor] = top_blocks(mine)
            self.put("recall_blocks", (branch, slice(None), anchor), top.float().mean((-2, -1)))
            for earlier, theirs in self.history.get(branch, ()):
                self.put("recall", (earlier, branch, slice(None), anchor), mass_in(_unrounded(theirs), top))
        for (of, anchor), top in self.tops.items():
            if of == branch:
                self.put("recall", (step, branch, slice(None), anchor), mass_in(mine, top))
        if branch < 2:
            self.latest[branch] = (step, mine)
            pair = [self.latest.get(of) for of in (0, 1)]
            if pair[0] is not None and pair[1] is not None and pair[0][0] == pair[1][0]:
                self.put("between_branches", (step,), mass_in(pair[1][1], top_blocks(pair[0][1])))


class AttentionCollector(RowReader):
    """What heads look at, per step and branch; the table ``attention``.

    Probabilities are exact, of sampled rows of queries. Entropies, masses and what keys gather are means over the
    video's rows; maps have those of text, too. Of a batch the first sample of each guidance branch is looked at. What
    needs a geometry is NaN at a site whose tokens have another one, and in cross-attention. ``rows`` is what other
    collectors of the generation read, too.

    Raises:
        InputError: maps of less than 1 or of more than 128 blocks per side are asked for.
    """

    name = "attention"

    def __init__(
        self,
        trace: Trace,
        calls: NetworkCalls,
        geometry: Geometry | None,
        map_side: int = 128,
        rows: SharedRows | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= map_side <= 128:
            raise InputError(f"maps of {map_side} blocks per side: 1 to 128 are kept")
        self.rows = SharedRows(trace, geometry) if rows is None else rows
        self.rows.readers.append(self)
        self.anchors = anchor_steps(len(calls.timesteps))
        places = self.rows.places.values()
        self._sites = {place.name: _Site(place, calls, self.anchors, map_side) for place in places}
        self._regions: dict[tuple[Geometry, int, torch.device], Regions] = {}
        self._history = sum(site.history_bytes for site in self._sites.values()) <= HISTORY
        for name, site in self._sites.items():
            entry = site.place.entry
            if site.place.geometry is None and not entry.cross:
                sizes = f"{entry.site.queries} queries and {entry.site.keys} keys"
                self.skip(f"{name}: {sizes} do not fit the {geometry}; masses of regions are not measured")
        self.wanted = frozenset(self.rows.places)

    def see(self, seen: Seen) -> None:
        """Read the rows of an attention node."""
        self.rows.read(seen)

    def reads(self, place: Place) -> Reads:
        """Probabilities, everywhere, in raster order."""
        return Reads.PROBABILITIES if place.order is None else Reads.NOTHING

    def take(self, place: Place, part: Part) -> None:
        """Reduce some rows of one head."""
        site = self._sites[place.name]
        device = part.probabilities.device
        if part.branch not in site.sums:
            site.sums[part.branch] = _Sums(site, device)
        sums = site.sums[part.branch]
        probabilities = part.probabilities[:, : place.entry.site.keys]
        weights = site.weights[part.where].to(device)
        rows = sums.rows[part.head, :, part.where]
        rows[0], rows[1] = part.entropy, part.lse
        if place.geometry is not None:
            rows[2:] = self._regions_of(place, place.geometry, device).masses(probabilities, part.where)
        sums.columns[part.head] += weights @ probabilities
        site.add_to_map(sums.maps[part.head], part)
        if part.step in self.anchors and site.line is not None:
            first, last = site.line
            places = (place.sample.rows.view(-1)[part.where] - first).tolist()
            sums.distance += by_distance(probabilities[:, first:last], places, weights, site.reach)

    def finish(self, place: Place, step: int, branch: int) -> None:
        """Write down a branch's call."""
        site = self._sites[place.name]
        sums = site.sums.pop(branch)
        weights = site.weights.to(sums.rows.device)
        at, keys = (step, branch), place.entry.site.keys
        means = sums.rows @ weights
        site.put("entropy", at, means[:, 0].clamp(min=0) / max(math.log(keys), 1e-30))
        site.put("lse_mean", at, means[:, 1])
        site.put("lse_std", at, ((sums.rows[:, 1] - means[:, 1:2]).square() @ weights).sqrt())
        if place.geometry is not None:
            for number, name in enumerate(REGIONS, 2):
                site.put(name, at, means[:, number])
            site.put("mass_near", at, means[:, 2 + len(REGIONS) :])
        site.put("mass_sinks", at, sums.columns.topk(site.sinks).values.sum(-1))
        maps = sums.maps.cpu().half()
        if step in self.anchors:
            anchor = (self.anchors.index(step), branch)
            site.put("map", anchor, maps)
            site.put("gathered", anchor, pooled_keys(sums.columns.mean(0), CELLS))
            if site.line is not None:
                site.put("by_distance", anchor, sums.distance / place.entry.site.heads)
        site.compare(step, branch, self.anchors, maps, self._history)

    def tables(self) -> dict[str, Table]:
        """One table per attention site."""
        return {name: self._table(site) for name, site in self._sites.items()}

    def _table(self, site: _Site) -> Table:
        place, entry = site.place, site.place.entry.site
        uniform: dict[str, Any] = {"mass_sinks": site.sinks / entry.keys}
        if place.geometry is not None:
            uniform |= self._regions_of(place, place.geometry, torch.device("cpu")).uniform(site.weights)
        labels: dict[str, tuple[int, ...]] = {"anchor": self.anchors, "distance": DISTANCES}
        if site.line is not None:
            labels["distance_bin"] = tuple(range(-site.reach, site.reach + 1))
        facts = {
            "heads": entry.heads,
            "queries": entry.queries,
            "keys": entry.keys,
            "kind": place.kind,
            "block": place.sample.block * site.pool,
            "key_block": place.key_block * site.key_pool,
            "rows": int(place.sample.real.sum()),
            "masked": entry.masked,
            "recall_of": "all steps" if self._history else "steps from the anchor on",
            "uniform": uniform,
        }
        return Table({name: Measure(axes, found, True) for name, (axes, found) in site.values.items()}, labels, facts)

    def _regions_of(self, place: Place, geometry: Geometry, device: torch.device) -> Regions:
        """Sites of one geometry share them: they are as large as a few rows of probabilities."""
        key = (geometry, place.sample.block, device)
        if key not in self._regions:
            self._regions[key] = Regions(geometry, place.sample.rows.view(-1).to(device))
        return self._regions[key]


def attention_collectors(
    trace: Trace,
    calls: NetworkCalls,
    geometry: Geometry | None,
    *,
    map_side: int = 128,
    names: Sequence[str] = ("attention", "patterns"),
    before: Mapping[str, Sequence[Table]] | None = None,
) -> list[Collector]:
    """The collectors of one generation that look at attention, by the names of their tables; they share what they read.

    ``before`` are the tables ``patterns`` of earlier prompts, by site. Asked for ``linear_rest``, too, these hold fits.

    Raises:
        InputError: a name is unknown, or ``map_side`` is not from 1 to 128.
    """
    unknown = sorted(set(names) - {"attention", "patterns", LINEAR_REST})
    if unknown:
        raise InputError(
            f"collectors {', '.join(unknown)} do not look at attention; choose from attention, patterns, {LINEAR_REST}"
        )
    rows = SharedRows(trace, geometry)
    found: list[Collector] = []
    if "attention" in names:
        found.append(AttentionCollector(trace, calls, geometry, map_side, rows))
    if "patterns" in names:
        found.append(PatternCollector(trace, calls, geometry, rows, before, LINEAR_REST in names))
    return found
