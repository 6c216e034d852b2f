"""Roles of blocks: whether they look at what changes from step to step. Data only; numpy, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ditopt.errors import InputError
from ditopt.geometry import Geometry, cells_of
from ditopt.measures import PROMPT, Numbers, Table, nanmean

BLOCK_ROLES = ("foreground", "background", "even")
CHANGING_SHARE = 0.25
"""The share of cells, those that change most, that are the foreground."""
FOCUS = 1.25
"""Foreground cells that gather so many times their share, or a block's one over it, make a block's role."""
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class BlockRole:
    """Whether a block looks at what changes.

    ``score``: the mass that foreground cells gather over their share of cells, 1 where attention does not care;
    ``confidence`` how far ``log(score)`` is from the nearer threshold, in units of ``log(FOCUS)``, at most 1;
    ``over_steps`` the share of ``by_step`` (the steps at which masses were kept) with the same role.
    """

    role: str
    score: float
    confidence: float
    over_steps: float
    by_step: tuple[str, ...]


def block_role(attention: Table, tokens: Table, geometry: Geometry | None = None) -> BlockRole | None:
    """The role of a block, from its self-attention's table and the table ``tokens`` of the site ``step``.

    The foreground is, for each prompt, the quarter of cells that change most on average over the middle half of the
    steps. What keys gather is spread evenly over the tokens of its cells and summed over the cells of changes anew;
    ``geometry`` says where text stands, which is left out. None: nothing gathers, or nothing changes.

    Raises:
        InputError: the tables are of other numbers of prompts, or of other tokens than the geometry.
    """
    change = tokens["change"].ordered(PROMPT, "step", "branch", "cell").astype(float)
    gathered = attention["gathered"].ordered(PROMPT, "anchor", "branch", "key_cell").astype(float)
    if len(change) != len(gathered):
        raise InputError(f"cells change over {len(change)} prompts, attention was measured over {len(gathered)}")
    steps, cells = change.shape[1], change.shape[-1]
    middle = slice(steps // 4, max(steps // 4 + 1, steps - steps // 4))
    moved = nanmean(change[:, middle], (1, 2))
    spread = _video(_spread(nanmean(gathered, (2,)), int(attention.facts["keys"])), geometry)
    cell = _cells(tokens, spread.shape[-1], geometry)
    mass = np.stack([spread[..., cell == i].sum(-1) for i in range(cells)], -1)
    total = np.nansum(mass, -1)
    if not (np.nansum(moved) > 0 and total.sum() > 0):
        return None
    count = max(1, round(CHANGING_SHARE * cells))
    chosen = np.argsort(-np.nan_to_num(moved), axis=-1, kind="stable")[:, :count]
    share = np.bincount(cell, minlength=cells)[chosen].sum(-1) / len(cell)  # of tokens
    held = np.take_along_axis(mass, chosen[:, None], -1).sum(-1)
    with np.errstate(all="ignore"):
        focus = held / np.where(total > 0, total, np.nan) / share[:, None]  # [P, anchor]
    score = float(nanmean(focus, (0, 1)))
    by_step = tuple(_block_role(float(value)) for value in nanmean(focus, (0,)) if not np.isnan(value))
    role = _block_role(score)
    apart = abs(abs(np.log(max(score, 1e-9))) / np.log(FOCUS) - 1)
    return BlockRole(role, score, min(1.0, float(apart)), by_step.count(role) / len(by_step), by_step)


def _block_role(score: float) -> str:
    return "foreground" if score >= FOCUS else "background" if score <= 1 / FOCUS else "even"


def _spread(mass: Numbers, keys: int) -> Numbers:
    """``[..., cells]`` of as many neighbouring keys each (the last may have fewer) as ``[..., keys]``."""
    size = -(-keys // mass.shape[-1])
    cell = np.arange(keys) // size
    return np.asarray(mass[..., cell] / np.bincount(cell)[cell])


def _video(values: Numbers, geometry: Geometry | None) -> Numbers:
    """``[..., S]`` without text."""
    if geometry is None or values.shape[-1] == geometry.video:
        return values
    geometry.expect(values.shape[-1])
    first = geometry.text if geometry.text_first else 0
    return values[..., first : first + geometry.video]


def _cells(tokens: Table, count: int, geometry: Geometry | None) -> Indices:
    """The cell of each of ``count`` tokens, as the collector of changes pools them."""
    grid = tuple(int(tokens.facts[name]) for name in ("frames", "rows", "columns", "cells") if name in tokens.facts)
    sizes = (count,) if geometry is None else geometry.sizes
    if len(grid) != len(sizes):
        raise InputError(f"changes are told by cells of {grid}, which do not divide tokens of {sizes}")
    return cells_of(sizes, grid)
