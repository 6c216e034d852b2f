"""Maps of changing tokens against plain loops, planted changes, and the bounds on what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry, cells_of
from ditopt.measures import Table
from ditopt.passes._infra import outputs
from ditopt.profiler import tokens
from ditopt.profiler.interpret import Moment, Seen
from ditopt.profiler.tokens import CELLS, TokenChange, pooled, relative_change, signed_sums, stream_of
from tests.profiler.watched_models import (
    BATCHED,
    INTERVAL,
    ONE,
    SEPARATE,
    STEPS,
    Full,
    Keeper,
    generate,
    kept_by,
    trace_of,
)

VIDEO, IMAGE = Geometry(2, 4, 4), Geometry(1, 4, 4, text=6)


def collect(name: str, calls: NetworkCalls, geometry: Geometry | None) -> tuple[dict[str, Table], dict[str, int], Full]:
    trace = trace_of(name)
    collector = TokenChange(trace, calls, geometry)
    streams = {stream for boundary in trace.boundaries for stream in boundary.streams}
    returned = {node.name for node in outputs(trace.gm) if node is not None}
    keeper = Keeper(frozenset(streams | returned))
    generate(name, calls, collector, keeper)
    return collector.tables(), collector.reasons, Full(trace, keeper)


def plain_map(now: Tensor, before: Tensor) -> list[float]:
    """Token by token and in raster order, for maps that need no pooling; ``now [B, S, C]``."""
    usual = float(torch.stack([token.square().sum() for row in now for token in row]).mean().sqrt())
    changes = []
    for token in range(now.shape[1]):
        squares = [float((row[token] - old[token]).square().sum()) for row, old in zip(now, before, strict=True)]
        changes.append((sum(squares) / len(squares)) ** 0.5 / usual)
    return changes


@pytest.mark.parametrize(
    ("name", "calls", "geometry"),
    [
        ("Wan", SEPARATE, VIDEO),
        ("Wan", INTERVAL, None),
        ("SD3", BATCHED, IMAGE),
        ("SD3", ONE, IMAGE),  # a batch of one branch
        ("Flux", INTERVAL, IMAGE),
        ("HunyuanVideo", ONE, VIDEO),
        ("PixArt", BATCHED, None),
        ("CogVideoX", ONE, Geometry(2, 4, 4, 6, True)),
    ],
)
def test_maps_are_those_of_the_full_features(name: str, calls: NetworkCalls, geometry: Geometry | None) -> None:
    tables, reasons, full = collect(name, calls, geometry)
    blocks = full.trace.blocks
    assert not reasons
    assert list(tables) == ["step", *dict.fromkeys(blocks[len(blocks) * quarter // 4] for quarter in (1, 2, 3))]
    ranges = {(0, len(blocks) - 1): "step"}
    for site, table in tables.items():
        change = table["change"]
        assert change.axes == ("prompt", "step", "branch", "cell") and change.partial
        assert change.values.dtype == np.float16
        span = next((each for each, found in full.ranges.items() if ranges.get(found) == site), site)
        for branch in range(calls.branches):
            for step in range(STEPS):
                now = full.parts(span, step, branch)
                before = full.parts(span, step - 1, branch) if step else None
                found = change.values[0, step, branch]
                if now is None or before is None:
                    assert np.isnan(found).all()
                    continue
                longest = max(range(len(now)), key=lambda part: now[part].shape[1])
                expected = plain_map(now[longest], before[longest])
                np.testing.assert_allclose(found, expected, rtol=2e-3)
        facts = {"frames": geometry.frames, "rows": 4, "columns": 4} if geometry else {"cells": len(found)}
        assert table.facts == facts


def test_a_stream_of_other_tokens_than_the_geometry_has_is_said() -> None:
    tables, reasons, _ = collect("Wan", ONE, Geometry(3, 4, 4))
    assert tables["step"].facts == {"cells": 32}
    assert "step: its stream has 32 tokens, which are not those of a geometry of 3 x 4 x 4 tokens" in reasons


@pytest.mark.parametrize(
    ("counts", "geometry", "expected"),
    [
        ([512, 32], VIDEO, 1),  # the video's, though the text is longer
        ([38, 6], Geometry(2, 4, 4, 6), 0),
        ([6, 38], None, 1),
        ([6, 38], Geometry(9, 9, 9), 1),
    ],
)
def test_the_stream_of_the_video_is_chosen(counts: list[int], geometry: Geometry | None, expected: int) -> None:
    assert stream_of(counts, [10 * count for count in counts], geometry) == expected


@pytest.mark.parametrize("text_first", [False, True])
def test_text_in_the_same_stream_is_left_out(text_first: bool) -> None:
    trace = trace_of("Wan")  # 32 tokens
    collector = TokenChange(trace, ONE, Geometry(1, 4, 7, text=4, text_first=text_first))
    order = [node for node in trace.gm.graph.nodes if node.name in collector.wanted]
    for step in range(2):
        for place, node in enumerate(order):
            value = torch.full((1, 32, 6), float(place))
            value[:, :4] += 100 * step * place  # the first four tokens move
            collector.see(Seen(Moment(step, (0,)), node, (), {}, value))
    change = collector.tables()["step"]["change"].values[0, 1, 0]
    assert change.shape == (28,)
    assert (change > 0).sum() == (0 if text_first else 4)


@pytest.mark.parametrize(
    ("geometry", "grid"),
    [
        (Geometry(6, 16, 16), (6, 16, 16)),
        (Geometry(1, 64, 64), (1, 32, 64)),
        (Geometry(21, 30, 52), (11, 8, 13)),
        (Geometry(1, 1, 5000), (1, 1, 1250)),
    ],
)
def test_grids_are_halved_until_they_are_small(geometry: Geometry, grid: tuple[int, int, int]) -> None:
    assert pooled(geometry) == grid
    cells = cells_of(geometry.sizes, grid).reshape(geometry.sizes)
    assert len(np.unique(cells)) == np.prod(grid) <= CELLS
    for frame, row, column in np.ndindex(*geometry.sizes):
        if (frame * 7 + row * 3 + column) % 11:
            continue  # some of many
        places = [
            at * cells_along // size
            for at, cells_along, size in zip((frame, row, column), grid, geometry.sizes, strict=True)
        ]
        assert cells[frame, row, column] == (places[0] * grid[1] + places[1]) * grid[2] + places[2]


def test_a_planted_change_is_seen_where_it_is() -> None:
    before = torch.ones(1, 3 * 4 * 8, 5)
    now = before.clone().reshape(1, 3, 4, 8, 5)
    now[:, 1, 2:, 4:] += 0.5
    found = relative_change(now.reshape(before.shape), before, cells_of((3, 4, 8), (3, 2, 2))).reshape(3, 2, 2)
    usual = np.sqrt(float(now.square().sum(-1).mean()))
    expected = np.zeros((3, 2, 2))
    expected[1, 1, 1] = 0.5 * np.sqrt(5) / usual
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    still = torch.zeros(1, 4, 5)
    assert relative_change(still, still, np.arange(4)).tolist() == [0, 0, 0, 0]


def test_signed_sums_keep_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(2, 50, 640, generator=torch.Generator().manual_seed(0))
    value[..., 3] *= 20  # an outlier channel
    other = value + 0.01 * torch.randn(2, 50, 640, generator=torch.Generator().manual_seed(1))
    assert torch.equal(signed_sums(value), value)
    monkeypatch.setattr(tokens, "KEPT", 2 * 50 * 256)
    one, two = signed_sums(value), signed_sums(other)
    assert one.shape == (2, 50, 256)
    kept = (one - two).square().sum(-1) / (value - other).square().sum(-1)
    assert kept.mean() == pytest.approx(1, abs=0.02)
    assert kept.std() < 1.5 * np.sqrt(2 / 256)
    assert torch.equal(signed_sums(value), one)


def test_nothing_as_large_as_a_value_is_kept() -> None:
    trace = trace_of("Wan")
    collector = TokenChange(trace, ONE, None)
    order = [node for node in trace.gm.graph.nodes if node.name in collector.wanted]
    values = torch.randn(2, 1, 4096, 1024, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        for place, node in enumerate(order):
            collector.see(Seen(Moment(step, (0,)), node, (), {}, values[step] * place))
    held = list(kept_by(collector))
    assert len(held) >= 8
    assert max(tensor.untyped_storage().nbytes() for tensor in held) <= 4 * tokens.KEPT < 4 * 4096 * 1024 / 4
    found = collector.tables()["step"]["change"].values[0, 1, 0]
    change = (values[1] - values[0]).square().sum(-1).reshape(CELLS, 2).mean(1).sqrt()
    expected = change / values[1].square().sum(-1).mean().sqrt()
    assert found.shape == (CELLS,)
    assert np.abs(found / expected.numpy() - 1).max() < 0.25  # 256 numbers for each cell
    assert np.abs((found / expected.numpy()).mean() - 1) < 0.01


def test_the_same_generation_gives_the_same_bits() -> None:
    one, two = (collect("Wan", INTERVAL, VIDEO)[0] for _ in range(2))
    for site, table in one.items():
        assert table["change"].values.tobytes() == two[site]["change"].values.tobytes()


def test_a_value_that_branches_cannot_share_is_skipped_by_name() -> None:
    trace = trace_of("Wan")
    collector = TokenChange(trace, BATCHED, VIDEO)
    node = next(node for node in trace.gm.graph.nodes if node.name in collector.wanted)
    collector.see(Seen(Moment(0, (0, 1)), node, (), {}, torch.ones(1, 32, 8)))
    assert list(collector.reasons) == [
        f"{node.name}: shape [1, 32, 8] does not divide into branches, tokens and channels"
    ]
    assert not collector.tables()
