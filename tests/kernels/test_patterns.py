"""Sparse patterns: maps of blocks against the definition token by token, orders, text, names."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Integers, Pattern
from ditopt.kernels.patterns.band import Band
from ditopt.kernels.patterns.draft import OWN, Draft
from ditopt.kernels.patterns.orders import (
    ORDERS,
    TokenOrder,
    by_hilbert,
    by_pixel,
    by_tile,
    compact_tile,
    inverse,
    spread,
)
from ditopt.kernels.patterns.radial import Radial
from ditopt.kernels.patterns.registry import (
    DYNAMIC,
    PATTERNS,
    choice_from_data,
    pattern_from_data,
    pattern_to_data,
)
from ditopt.kernels.patterns.sink import Sink
from ditopt.kernels.patterns.spatial import Spatial
from ditopt.kernels.patterns.temporal import Temporal
from ditopt.kernels.patterns.union import Union
from ditopt.kernels.patterns.whole import Everything, Nothing
from ditopt.kernels.patterns.window import Window

Token = tuple[int, int, int]
Rule = Callable[[Any, Token, Token, Geometry], bool]


def raster(token: Token, geometry: Geometry, frame: bool = True) -> int:
    """The token's place in the video, or in its frame."""
    return ((token[0] * frame) * geometry.rows + token[1]) * geometry.columns + token[2]


def band(p: Band, q: Token, k: Token, g: Geometry) -> bool:
    return abs(raster(q, g) - raster(k, g)) <= p.width * g.columns + 1e-9


def spatial(p: Spatial, q: Token, k: Token, g: Geometry) -> bool:
    return abs(q[0] - k[0]) <= p.frames


def temporal(p: Temporal, q: Token, k: Token, g: Geometry) -> bool:
    return abs(q[1] - k[1]) <= p.rows and abs(q[2] - k[2]) <= p.columns


def window(p: Window, q: Token, k: Token, g: Geometry) -> bool:
    return all(abs(q[a] // p.tile[a] - k[a] // p.tile[a]) <= p.reach[a] for a in range(3))


def radial(p: Radial, q: Token, k: Token, g: Geometry) -> bool:
    away, reach = max(abs(q[0] - k[0]), 1), p.width * g.rows * g.columns
    while away >= 2:
        away, reach = away // 2, reach / 2
    return abs(raster(q, g, False) - raster(k, g, False)) <= reach + 1e-9


def sink(p: Sink, q: Token, k: Token, g: Geometry) -> bool:
    sizes = (g.frames, g.rows, g.columns)
    places = [
        tuple(math.floor(share * size + 1e-9) for share, size in zip(place, sizes, strict=True)) for place in p.places
    ]
    return k[0] < p.frames or k in places


def union(p: Union, q: Token, k: Token, g: Geometry) -> bool:
    return any(RULES[type(part)](part, q, k, g) for part in p.of)


RULES: dict[type[Pattern], Rule] = {
    Band: band,
    Spatial: spatial,
    Temporal: temporal,
    Window: window,
    Radial: radial,
    Sink: sink,
    Union: union,
    Everything: lambda *_: True,
    Nothing: lambda *_: False,
}

small = st.integers(0, 2)
simple: st.SearchStrategy[Pattern] = st.one_of(
    st.builds(Band, width=st.floats(0, 3)),
    st.builds(Spatial, frames=small),
    st.builds(Temporal, rows=small, columns=small),
    st.builds(Window, tile=st.tuples(*3 * [st.integers(1, 3)]), reach=st.tuples(*3 * [st.integers(0, 1)])),
    st.builds(Radial, width=st.floats(0.05, 1)),
    st.builds(Sink, frames=small, places=st.lists(st.tuples(*3 * [st.floats(0, 0.99)]), max_size=2).map(tuple)),
    st.just(Everything()),
    st.just(Nothing()),
)
patterns = st.one_of(simple, st.builds(Union, of=st.tuples(simple, simple)))
geometries = st.builds(
    Geometry,
    frames=st.integers(1, 11),
    rows=st.integers(1, 3),
    columns=st.integers(1, 6),
    text=st.integers(0, 5),
    text_first=st.booleans(),
)


def by_tokens(pattern: Pattern, g: Geometry, query_block: int, key_block: int, order: Integers | None) -> np.ndarray:
    """The map by asking of every pair of tokens."""
    tokens: list[Token | None] = list(itertools.product(range(g.frames), range(g.rows), range(g.columns)))
    tokens = tokens if order is None else [tokens[place] for place in order]
    text: list[Token | None] = [None] * g.text
    tokens = text + tokens if g.text_first else tokens + text
    found = np.zeros((-(-len(tokens) // query_block), -(-len(tokens) // key_block)), dtype=bool)
    for (i, q), (j, k) in itertools.product(enumerate(tokens), enumerate(tokens)):
        if q is None or k is None or RULES[type(pattern)](pattern, q, k, g):
            found[i // query_block, j // key_block] = True
    return found


@settings(max_examples=150, deadline=None)
@given(
    pattern=patterns,
    geometry=geometries,
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    order=st.sampled_from(["raster", "pixel", "tile"]),
)
def test_maps_are_what_the_definition_says(
    pattern: Pattern, geometry: Geometry, blocks: tuple[int, int], order: str
) -> None:
    permutation = {"raster": None, "pixel": by_pixel(geometry), "tile": by_tile(geometry, (2, 2, 3))}[order]
    found = pattern.block_map(geometry, *blocks, permutation)
    np.testing.assert_array_equal(found, by_tokens(pattern, geometry, *blocks, permutation))


@given(geometry=geometries, tile=st.tuples(*3 * [st.integers(1, 3)]), block=st.sampled_from([4, 16, 64]))
def test_orders_are_permutations_that_leave_text_where_it_is(
    geometry: Geometry, tile: tuple[int, int, int], block: int
) -> None:
    for order in (TokenOrder("tiles", tile), *map(TokenOrder, ORDERS)):
        video, sequence = order.of_video(geometry, block), order.of_sequence(geometry, block)
        np.testing.assert_array_equal(np.sort(video), np.arange(geometry.video))
        np.testing.assert_array_equal(video[inverse(video)], np.arange(geometry.video))
        text = slice(0, geometry.text) if geometry.text_first else slice(geometry.video, None)
        np.testing.assert_array_equal(sequence[text], np.arange(geometry.tokens)[text])
        before = geometry.text if geometry.text_first else 0
        np.testing.assert_array_equal(sequence[before : before + geometry.video], before + video)


def steps_between(order: Integers, geometry: Geometry) -> Integers:
    """How far apart, along all axes together, neighbours in the sequence are."""
    found: Integers = np.abs(np.diff(np.stack(np.unravel_index(order, geometry.sizes)), axis=1)).sum(0)
    return found


@pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 16, 16), (4, 4, 1), (1, 1, 32), (2, 1, 2), (1, 1, 1)])
def test_neighbours_on_a_hilbert_curve_touch(sizes: tuple[int, int, int]) -> None:
    assert (steps_between(by_hilbert(Geometry(*sizes)), Geometry(*sizes)) == 1).all()


@pytest.mark.parametrize("sizes", [(6, 28, 28), (21, 30, 52), (5, 7, 11)])
def test_a_hilbert_curve_keeps_its_order_where_it_leaves_the_geometry(sizes: tuple[int, int, int]) -> None:
    """What is left is the enclosing cube's curve, and nearly all neighbours touch."""
    geometry, side = Geometry(*sizes), 1 << (max(sizes) - 1).bit_length()
    cube = Geometry(side, side, side)
    whole = np.stack(np.unravel_index(by_hilbert(cube), cube.sizes))
    inside = whole[:, (whole < np.reshape(sizes, (3, 1))).all(0)]
    found = by_hilbert(geometry)
    np.testing.assert_array_equal(np.stack(np.unravel_index(found, sizes)), inside)
    assert (steps_between(found, geometry) > 1).mean() < 0.1


@given(geometry=geometries, tile=st.tuples(*3 * [st.integers(1, 3)]))
def test_tiles_are_whole_and_walked_to_and_fro(geometry: Geometry, tile: tuple[int, int, int]) -> None:
    places = np.stack(np.unravel_index(by_tile(geometry, tile), geometry.sizes)) // np.reshape(tile, (3, 1))
    moves = np.abs(np.diff(places, axis=1)).sum(0)
    counts = [-(-size // extent) for size, extent in zip(geometry.sizes, tile, strict=True)]
    assert moves.max(initial=0) <= 1 and moves.sum() == np.prod(counts) - 1, "every tile once, the next one beside it"


@pytest.mark.parametrize(
    ("geometry", "tile"),
    [
        (Geometry(6, 28, 28), (4, 4, 4)),
        (Geometry(1, 64, 64), (1, 8, 8)),
        (Geometry(2, 32, 32), (2, 4, 8)),
        (Geometry(1, 1, 4096), (1, 1, 64)),
        (Geometry(1, 1, 9), (1, 1, 64)),
    ],
)
def test_a_tile_is_as_near_to_cubic_as_the_geometry_allows(geometry: Geometry, tile: tuple[int, int, int]) -> None:
    found = compact_tile(geometry, 64)
    assert sorted(found) == sorted(tile) and found[0] == tile[0]
    order = TokenOrder("tiles").of_video(geometry, 64)
    np.testing.assert_array_equal(order, by_tile(geometry, found))


def test_spread_is_the_mean_squared_distance_to_the_middle_of_a_block() -> None:
    geometry = Geometry(2, 3, 4, text=3, text_first=True)
    order = by_hilbert(geometry)
    places = np.stack(np.unravel_index(order, geometry.sizes)).T
    blocks = [places[:5], places[5:13], places[13:21], places[21:]]  # of 8, three of the first are text
    squares = [((each - each.mean(0)) ** 2).sum() for each in blocks]
    assert spread(order, geometry, 8) == pytest.approx(sum(squares) / 24)


def test_orders_make_patterns_contiguous() -> None:
    geometry = Geometry(frames=8, rows=16, columns=16)
    temporal, window = Temporal(rows=1, columns=1), Window(tile=(2, 4, 8), reach=(0, 0, 0))
    in_raster, in_pixels = (temporal.block_map(geometry, 64, order=order) for order in (None, by_pixel(geometry)))
    assert in_pixels.mean() < 0.6 * in_raster.mean()
    in_raster, in_tiles = (
        window.block_map(geometry, 64, order=order) for order in (None, by_tile(geometry, (2, 4, 8)))
    )
    assert in_tiles.mean() < 0.6 * in_raster.mean()


@settings(max_examples=30, deadline=None)
@given(geometry=geometries, block=st.integers(1, 9), data=st.data())
def test_wider_parameters_attend_to_no_less(geometry: Geometry, block: int, data: Any) -> None:
    low, high = sorted(data.draw(st.tuples(small, small)))
    for narrow, wide in (
        (Spatial(frames=low), Spatial(frames=high)),
        (Temporal(rows=low, columns=1), Temporal(rows=high, columns=1)),
        (Band(width=low), Band(width=high)),
        (Radial(width=(1 + low) / 3), Radial(width=(1 + high) / 3)),
    ):
        assert not (narrow.block_map(geometry, block) & ~wide.block_map(geometry, block)).any()


@pytest.mark.parametrize("size", [3, 9, 29, 100])
def test_a_place_is_found_again_where_it_was_measured(size: int) -> None:
    geometry = Geometry(frames=1, rows=1, columns=size)
    for column in range(size):
        found = Sink(frames=0, places=((0.0, 0.0, column / size),)).block_map(geometry, 1)
        assert np.flatnonzero(found[0]).tolist() == [column]


def test_what_makes_no_map_is_told() -> None:
    geometry = Geometry(frames=1, rows=2, columns=2)
    with pytest.raises(InputError, match="blocks of 0 queries and 0 keys: both have to be at least 1"):
        Spatial().block_map(geometry, 0)
    for order in ([0, 1, 2], [0, 1, 2, 2]):
        with pytest.raises(InputError, match="the order is no permutation of the 4 tokens of geometry of 1 x 2 x 2"):
            Spatial().block_map(geometry, 2, order=np.array(order))


def test_unions_of_separable_patterns_are_separable() -> None:
    assert Union(of=(Temporal(), Sink())).separable and not Union(of=(Temporal(), Band(width=1))).separable


def test_a_long_sequence_takes_seconds() -> None:
    geometry = Geometry(frames=33, rows=45, columns=80, text=256)
    began = time.perf_counter()
    found = Radial(width=0.5).block_map(geometry, 128)
    assert time.perf_counter() - began < 60
    assert found.shape == (931, 931) and 0.05 < found.mean() < 0.6


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_name_and_parameters_make_a_pattern(name: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "band": {"width": 1.5},
        "union": {"of": ["dense", {"pattern": "union", "of": [{"pattern": "spatial", "frames": 2}, "skip"]}]},
    }
    pattern = pattern_from_data({"pattern": name, **settings.get(name, {})})
    assert type(pattern) is PATTERNS[name] and type(pattern) in RULES
    assert pattern_from_data(pattern_to_data(pattern)) == pattern
    assert hash(pattern) == hash(pattern_from_data(pattern_to_data(pattern)))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("spacial", "pattern 'spacial' is unknown; write one of band, dense"),
        ({"frames": 1}, "is unknown"),
        ({"pattern": "spatial", "rows": 1}, r"rows: Extra inputs are not permitted; spatial has frames$"),
        ({"pattern": "skip", "rows": 1}, r"skip has no parameters$"),
        ({"pattern": "spatial", "frames": -1}, "greater than or equal to 0"),
        ({"pattern": "union", "of": ["dense"]}, "at least 2"),
        ({"pattern": "window", "tile": [0, 1, 1]}, "greater than or equal to 1"),
        (3, "is unknown"),
        ({"pattern": ["spatial"]}, "is unknown"),
        ({"pattern": "union", "of": "dense"}, "'of' has to be a list of patterns"),
    ],
)
def test_wrong_patterns_are_told(data: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pattern_from_data(data)


@pytest.mark.parametrize(
    ("settings", "rooms"),
    [({"keep": 0.25}, (1, 2, 4, 25)), ({"mass": 0.9}, (1, 4, 8, 50)), ({"mass": 0.9, "most": 0.3}, (1, 3, 5, 30))],
)
def test_a_draft_is_a_pattern_without_a_map(settings: dict[str, float], rooms: tuple[int, ...]) -> None:
    data = {"pattern": "draft", **settings}
    found = choice_from_data(data)
    assert isinstance(found, Draft) and {"draft": Draft} == DYNAMIC and not DYNAMIC.keys() & PATTERNS.keys()
    assert pattern_to_data(found) == data and choice_from_data(pattern_to_data(found)) == found
    assert tuple(found.room(blocks) for blocks in (1, 8, 16, 100)) == rooms
    with pytest.raises(
        ValueError, match="draft finds its blocks anew in every call; it has no map, and no union takes"
    ):
        pattern_from_data(data)
    with pytest.raises(ValueError, match="draft finds its blocks anew in every call"):
        choice_from_data({"pattern": "union", "of": ["skip", data]})


def test_a_draft_that_has_room_for_all_keeps_everything() -> None:
    assert Draft(keep=0.9).everything(8) and not Draft(keep=0.9).everything(10)
    assert not Draft(mass=0.9, most=1.0).everything(8), "as few as hold the mass"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, r"^pattern {.*}: exactly one of keep and mass is needed, e\.g\. .*; draft has keep, mass, most, by$"),
        ({"keep": 0.5, "mass": 0.5}, "exactly one of keep and mass is needed"),
        ({"keep": 0}, "keep: Input should be greater than 0; draft has"),
        ({"keep": 1}, "keep: Input should be less than 1"),
        ({"keep": "much"}, "keep: Input should be a valid number"),
        ({"keep": math.nan}, "keep: Input should be a finite number"),
        ({"mass": 1.5}, "mass: Input should be less than 1"),
        ({"mass": 0.5, "most": 0}, "most: Input should be greater than 0"),
        ({"mass": 0.5, "most": 2}, "most: Input should be less than or equal to 1"),
        ({"keep": 0.5, "most": 0.5}, "most is a limit for mass; keep is a share of blocks itself"),
        ({"keep": 0.5, "top": 3}, "top: Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_wrong_drafts_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        choice_from_data({"pattern": "draft", **settings})


@settings(max_examples=30, deadline=None)
@given(geometry=geometries, sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_draft_always_keeps_text_and_the_blocks_of_the_own_tokens(geometry: Geometry, sizes: tuple[int, int]) -> None:
    own = np.eye(geometry.tokens, dtype=bool)
    text = slice(0, geometry.text) if geometry.text_first else slice(geometry.video, None)
    own[text], own[:, text] = True, True
    expected = [
        [own[row : row + sizes[0], column : column + sizes[1]].any() for column in range(0, geometry.tokens, sizes[1])]
        for row in range(0, geometry.tokens, sizes[0])
    ]
    assert OWN.block_map(geometry, *sizes).tolist() == expected


def test_a_geometry_says_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="0 x 2 x 2 tokens: frames, rows and columns have to be at least 1"):
        Geometry(frames=0, rows=2, columns=2)
    with pytest.raises(InputError, match="at least 0"):
        Geometry(frames=1, rows=2, columns=2, text=-1)
    geometry = Geometry(frames=2, rows=3, columns=4, text=5)
    geometry.expect(29)
    with pytest.raises(InputError, match="2 x 3 x 4 tokens with 5 text tokens makes 29 tokens, the sequence has 30"):
        geometry.expect(30)
