"""Attention maps per layer and head as small pictures: layers across, heads down, a frame in the role's colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditopt.measures import Table
from ditopt.profile import NetworkProfile
from ditopt.report.figures import share, with_upper
from ditopt.report.png import heat_levels, heat_uri, resized, strip
from ditopt.report.profiled import (
    ATTENTION,
    ATTENTION_KINDS,
    PATTERNS,
    average,
    good_patterns,
    masses,
    roles_of,
    sites_of,
    upper,
)
from ditopt.roles import HeadRole

MAX_PIXELS = 1_500_000
"""Of all maps of a page: about as many bytes in it, at most."""
EDGES = (48, 32, 24, 16, 12)
ANCHORS = (6, 4, 3, 2, 1)
"""How large maps are and at how many steps, the first that fits being taken."""
OCTAVES = (-2.0, 4.0)
"""Dark is a quarter of what uniform attention would give a block, bright 16 times as much."""


@dataclass(frozen=True)
class Tile:
    """One head of one layer: a strip of maps (one per anchor step and branch), and what is known of the head."""

    uri: str
    name: str
    role: HeadRole | None
    tip: str


@dataclass(frozen=True)
class Column:
    """One layer; ``label`` is its number."""

    site: str
    label: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class MapGroup:
    """All layers of one kind of attention; ``edge`` is how large a tile is drawn, in CSS pixels."""

    kind: str
    title: str
    columns: tuple[Column, ...]
    edge: int


@dataclass(frozen=True)
class Maps:
    """All maps of a network: at which steps, of which branches, and what was left out to keep the page small."""

    groups: tuple[MapGroup, ...]
    anchors: tuple[int, ...]
    branches: tuple[str, ...]
    left_out: str = ""

    @property
    def frames(self) -> int:
        """Maps in a tile's strip."""
        return len(self.anchors) * len(self.branches)


def attention_maps(part: NetworkProfile, room: int = MAX_PIXELS) -> Maps | None:
    """The maps of a network, within ``room`` pixels; None where none were measured."""
    found = {kind: sites_of(part, ATTENTION, kind) for kind in ATTENTION_KINDS}
    tables = [table for group in found.values() for table in group.values() if "map" in table.measures]
    if not tables:
        return None
    steps = [int(label) for label in tables[0].labels["anchor"]]
    heads = sum(table["map"].size("head") for table in tables)
    branches = tables[0]["map"].size("branch")
    edge, anchors, branches_shown = _fitting(heads, len(steps), branches, room)
    shown = sorted(set(np.linspace(0, len(steps) - 1, anchors).round().astype(int).tolist()))
    groups = tuple(
        MapGroup(kind, ATTENTION_KINDS[kind], _columns(part, group, edge, shown, branches_shown), _drawn_edge(group))
        for kind, group in found.items()
        if group
    )
    hidden = [str(step) for i, step in enumerate(steps) if i not in shown]
    left = [f"steps {', '.join(hidden)}"] if hidden else []
    left += ["the other guidance branches"] if branches_shown < branches else []
    names = branch_names(part, branches)[:branches_shown]
    return Maps(groups, tuple(steps[i] for i in shown), names, " and ".join(left))


def branch_names(part: NetworkProfile, count: int) -> tuple[str, ...]:
    """What the guidance branches are called."""
    known = next((gram.branches for gram in part.grams.values()), ())
    return known if len(known) == count else tuple(f"branch {i}" for i in range(count))


def _fitting(heads: int, anchors: int, branches: int, room: int) -> tuple[int, int, int]:
    """Edge, number of anchors and number of branches of the best maps that fit."""
    for shown in dict.fromkeys((branches, 1)):
        for edge in EDGES[:2]:
            if heads * min(anchors, ANCHORS[0]) * shown * edge**2 <= room:
                return edge, min(anchors, ANCHORS[0]), shown
    for count in ANCHORS:
        for edge in EDGES[1:]:
            if count <= anchors and heads * count * edge**2 <= room:
                return edge, count, 1
    return EDGES[-1], 1, 1


def _drawn_edge(group: dict[str, Table]) -> int:
    return max(20, min(84, 1040 // max(len(group), 1) - 8))


def _columns(
    part: NetworkProfile, group: dict[str, Table], edge: int, shown: Sequence[int], branches: int
) -> tuple[Column, ...]:
    columns = []
    for i, (site, table) in enumerate(group.items()):
        patterns = part.tables.get(PATTERNS, {}).get(site)
        tiles = tuple(
            Tile(_strip(table, head, edge, shown, branches), f"{site}, head {head}", role, tip)
            for head, (role, tip) in enumerate(zip(roles_of(part, site), _tips(table, patterns), strict=True))
        )
        numbers = [word for word in site.split(".") if word.isdecimal()]
        columns.append(Column(site, numbers[0] if numbers else str(i), tiles))
    return tuple(columns)


def _strip(table: Table, head: int, edge: int, shown: Sequence[int], branches: int) -> str:
    """A head's maps under each other, branch by branch."""
    if "map" not in table.measures:
        return heat_uri(np.zeros((edge * len(shown) * branches, edge), dtype=np.uint8))
    values = table["map"].at(head=head).mean("prompt").ordered("branch", "anchor", "query_block", "key_block")
    values = values[:branches][:, list(shown)].astype(float)
    with np.errstate(divide="ignore"):
        octaves = np.log2(resized(values, edge, edge) * values.shape[-1])
    return heat_uri(strip(list(heat_levels(octaves, *OCTAVES).reshape(-1, edge, edge))))


def _tips(table: Table, patterns: Table | None) -> list[str]:
    """What is shown of each head on hover: entropy, masses, the sparsest pattern that is good enough."""
    good = good_patterns(patterns) if patterns is not None and "error" in patterns.measures else None
    tips, of_heads = [], masses(table)
    entropies = zip(average(table["entropy"], "head"), upper(table["entropy"], "head"), strict=True)
    for head, (value, high) in enumerate(entropies):
        told = [f"entropy {with_upper(value, high, '{:.2f}'.format)} of 1"]
        for name, mass in of_heads.items():
            if np.isfinite(mass.mean[head]) and (mass.uniform or mass.mean[head] > 0):
                uniform = "" if mass.uniform is None else f", uniform {share(mass.uniform)}"
                told.append(f"{name}: {with_upper(mass.mean[head], mass.upper[head], share)}{uniform}")
        if good is not None:
            told.append(f"sparsest pattern under 2% error: {good[head] or 'none'}")
        tips.append("\n".join(told))
    return tips
