"""Blocks that are chosen from sums of attention: against the rules written out, and laid over another geometry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.geometry import Geometry
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.listed import Listed, own_blocks, rescaled
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.kernels.patterns.registry import (
    DYNAMIC,
    FROM_FILE,
    PATTERNS,
    choice_from_data,
    pattern_from_data,
    pattern_to_data,
)
from ditopt.kernels.patterns.spatial import Spatial
from ditopt.kernels.patterns.temporal import Temporal


def literal(pattern: Listed, attention: np.ndarray, always: np.ndarray) -> list[list[bool]]:
    """Row by row: what is always kept, and then the largest one after the other for as long as the rule says."""
    rows, columns = attention.shape
    found = []
    for row in range(rows):
        values = attention.sum(0) if pattern.columns is not None else attention[row]
        share = pattern.columns or pattern.keep or pattern.most
        room = max(1, math.ceil(share * columns - 1e-9))
        taken: list[int] = []
        ranked = sorted(range(columns), key=lambda at: (-values[at], at))
        if pattern.columns is None:
            ranked = sorted(ranked, key=lambda at: not always[row, at])
        held = 0.0
        for at in ranked:
            enough = pattern.mass is not None and held >= pattern.mass * values.sum() * (1 - 1e-12)
            if len(taken) < room and not enough:
                taken.append(at)
                held += values[at]
        found.append([at in taken or bool(always[row, at]) for at in range(columns)])
    return found


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 12),
    seed=st.integers(0, 99),
    pattern=st.sampled_from(
        [Listed(keep=0.25), Listed(keep=0.5), Listed(mass=0.9), Listed(mass=0.6, most=0.3), Listed(columns=0.2)]
    ),
)
def test_blocks_are_chosen_as_the_rules_say(side: int, seed: int, pattern: Listed) -> None:
    """Block top-k, block top-p and stripes, with ties (whole numbers) and with what is kept in any case."""
    drawing = np.random.default_rng(seed)
    attention = drawing.integers(1, 6, (side, side)).astype(float) ** 2
    always = np.eye(side, dtype=bool) | (drawing.random((side, side)) < 0.1)
    found = pattern.choose(attention, always)
    assert found.tolist() == literal(pattern, attention, always)
    of_two = pattern.choose(np.stack([attention, attention.T]), always)
    assert of_two[0].tolist() == found.tolist() and of_two[1].tolist() == literal(pattern, attention.T, always)


def test_where_nothing_was_attended_to_the_first_blocks_are_taken() -> None:
    found = Listed(keep=0.5).choose(np.zeros((4, 4)), np.eye(4, dtype=bool))
    assert found.sum(1).tolist() == [2] * 4 and found[3].tolist() == [True, False, False, True]
    assert Listed(mass=0.9).choose(np.zeros((4, 4)), np.eye(4, dtype=bool)).any(1).all()


@pytest.mark.parametrize("data", [{"keep": 0.25}, {"mass": 0.9}, {"mass": 0.9, "most": 0.3}, {"columns": 0.125}])
def test_a_listed_pattern_has_its_map_from_a_file(data: dict[str, float]) -> None:
    written = {"pattern": "listed", **data}
    found = choice_from_data(written)
    assert (
        isinstance(found, Listed) and {"listed": Listed} == FROM_FILE and not FROM_FILE.keys() & {*PATTERNS, *DYNAMIC}
    )
    assert pattern_to_data(found) == written
    whole = {**written, "rest": {"pooled": 16}, "order": "tiles"}
    assert SparseChoice.from_data(whole).to_data() == whole
    with pytest.raises(ValueError, match="listed has a map for each head of its own; no union takes it"):
        pattern_from_data(written)
    with pytest.raises(ValueError, match=r"order clusters: .* listed, which is a pattern of places"):
        SparseChoice.from_data({**written, "order": "clusters"})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, r"exactly one of keep, mass and columns is needed, e\.g\. .*; listed has keep, mass, columns, most$"),
        ({"keep": 0.5, "columns": 0.5}, "exactly one of keep, mass and columns"),
        ({"keep": 0.5, "most": 0.5}, "most is a limit for mass; keep and columns are shares of blocks themselves"),
        ({"columns": 1.0}, "columns: Input should be less than 1"),
        ({"mass": math.nan}, "mass: Input should be a finite number"),
        ({"keep": 0.5, "entry": "a"}, "entry: Extra inputs are not permitted"),
    ],
)
def test_wrong_listed_patterns_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        choice_from_data({"pattern": "listed", **settings})


@pytest.mark.parametrize("order", [None, TokenOrder("tiles"), TokenOrder("hilbert")])
def test_maps_laid_over_the_same_geometry_are_as_they_were(order: TokenOrder | None) -> None:
    geometry = Geometry(4, 8, 8, text=5, text_first=True)
    own = own_blocks(geometry, 16, order)
    kept = (np.random.default_rng(0).random(own.shape) < 0.3) | own
    assert (rescaled(kept, geometry, 16, geometry, 16, order) == kept).all()


@pytest.mark.parametrize("pattern", [Spatial(), Temporal()])
def test_maps_laid_over_another_geometry_lie_where_they_lay_in_space(pattern: Spatial | Temporal) -> None:
    """What keeps whole frames, or the same rows of all frames, does so at twice the rows."""
    before, after = Geometry(4, 4, 16), Geometry(4, 8, 16)
    kept = pattern.block_map(before, 16)
    found = rescaled(kept, before, 16, after, 16)
    if isinstance(pattern, Spatial):
        assert (found == pattern.block_map(after, 16)).all()
    else:  # a block of before is two of now, which see each other
        assert (found == kept.repeat(2, 0).repeat(2, 1)).all()
    assert found.mean() == pytest.approx(kept.mean())


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 6),
    text=st.integers(0, 9),
    block=st.sampled_from([4, 16]),
    seed=st.integers(0, 9),
)
def test_maps_laid_over_any_geometry_keep_what_is_always_kept(
    sizes: tuple[int, ...], text: int, block: int, seed: int
) -> None:
    frames, rows, columns, *others = sizes
    before, after = Geometry(frames, rows, columns, text), Geometry(others[0], others[1], others[2], 2 * text)
    own = own_blocks(before, block)
    kept = (np.random.default_rng(seed).random(own.shape) < 0.3) | own
    found = rescaled(kept, before, block, after, 4)
    assert (found | ~own_blocks(after, 4)).all()
