"""How features move over steps, drawn: similarity curves per kind of site, errors by lag, token-change maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from ditopt.measures import Numbers, Table
from ditopt.profile import NetworkProfile
from ditopt.report import charts
from ditopt.report.png import heat_levels, heat_uri, resized
from ditopt.report.profiled import SITE_KINDS, TOKENS, average, lag_errors, similarity, sites_of

FAINT_LINES = 60
"""The most sites of one kind that have a line of their own."""
SHOWN_STEPS = 6
MAX_TILE = 48
WAYS = {
    "plain": "as it was",
    "affine": "scaled and shifted per channel",
    "affine_shared": "the same, fitted on another prompt",
}


@dataclass(frozen=True)
class LagRow:
    """One kind of site and one way of prediction; ``errors`` by lag, mean and upper quantile over prompts."""

    kind: str
    way: str
    errors: tuple[tuple[float | None, float | None], ...]


@dataclass(frozen=True)
class ChangeMap:
    """Which tokens of a site change: one picture per step, its frames side by side; ``high`` is what is brightest."""

    site: str
    pictures: tuple[tuple[int, str], ...]
    frames: int
    width: int
    height: int
    high: float
    note: str


def similarity_panels(part: NetworkProfile) -> list[tuple[str, Markup]]:
    """A panel per kind of site: the mean in front, the sites behind it; all with the same upright axis."""
    found = similarity(part)
    known = [value for of_kind in found.values() for line in of_kind.values() for value in line if np.isfinite(value)]
    panels = []
    for kind, of_kind in found.items():
        sites = list(of_kind)[:: max(1, -(-len(of_kind) // FAINT_LINES))] if len(of_kind) > 1 else []
        drawn = [charts.Line(of_kind[s], s, f"faint d{_depth(i, len(sites))}", True) for i, s in enumerate(sites)]
        mean = np.nanmean(np.array([line[1:] or [np.nan] for line in of_kind.values()]), axis=0)
        title = f"{SITE_KINDS.get(kind, kind)} ({len(of_kind)} {'site' if len(of_kind) == 1 else 'sites'})"
        drawn.append(charts.Line([np.nan, *mean.tolist()], "mean" if sites else ""))
        panels.append((title, charts.lines(drawn, "step", "cosine to the step before", size=charts.PANEL, also=known)))
    return panels


def _depth(position: int, count: int) -> int:
    """0 (first layers) to 4 (last ones): which shade a line has."""
    return position * 5 // max(count, 1)


def lag_rows(part: NetworkProfile) -> tuple[tuple[int, ...], list[LagRow]]:
    """The lags, and a row of mean relative errors per kind of site and way of prediction."""
    found = lag_errors(part)
    lags = tuple(sorted({lag for ways in found.values() for errors in ways.values() for lag in errors}))
    order = [*SITE_KINDS, *sorted(found.keys() - SITE_KINDS)]
    return lags, [
        LagRow(SITE_KINDS.get(kind, kind), WAYS[way], tuple(errors.get(lag, (None, None)) for lag in lags))
        for kind in order
        if kind in found
        for way, errors in found[kind].items()
    ]


def change_maps(part: NetworkProfile) -> list[ChangeMap]:
    """A map per site of how much each token changes from the step before, at a few steps."""
    return [_change_map(site, table) for site, table in sites_of(part, TOKENS).items()]


def _change_map(site: str, table: Table) -> ChangeMap:
    change = average(table["change"], "step", "cell").astype(float)
    steps = _shown(change)
    high = float(np.nanquantile(change[steps], 0.99)) if len(steps) else 1.0
    facts = table.facts
    if all(isinstance(facts.get(axis), int) for axis in ("frames", "rows", "columns")):
        grid, note = change.reshape(len(change), facts["frames"], facts["rows"], facts["columns"]), ""
    else:
        grid, note = change[:, None, None, :], "the geometry is not known: cells in the order of the sequence"
    rows, columns = (min(MAX_TILE, grid.shape[2]), min(MAX_TILE if not note else 512, grid.shape[3]))
    grid = resized(grid, rows, columns)
    pictures = tuple((step, heat_uri(_side_by_side(heat_levels(grid[step], 0.0, high)))) for step in steps)
    frames = grid.shape[1]
    scale = 4 if note else max(1, 72 // columns)
    width = (columns * frames + frames - 1) * (1 if note else scale)
    return ChangeMap(site, pictures, frames, width, 12 if note else rows * scale, high, note)


def _shown(change: Numbers) -> list[int]:
    """A few steps, evenly over those at which there was a step before."""
    known = [step for step, row in enumerate(change) if np.isfinite(row).any()]
    positions = np.linspace(0, len(known) - 1, min(SHOWN_STEPS, len(known))).round().astype(int)
    return [known[i] for i in sorted(set(positions.tolist()))]


def _side_by_side(frames: Any) -> Any:
    """``[F, H, W]`` levels as one row, a dark line between two frames."""
    gap = np.zeros((frames.shape[1], 1), dtype=np.uint8)
    parts: Sequence[Any] = [part for frame in frames for part in (gap, frame)][1:]
    return np.concatenate(parts, axis=1)
