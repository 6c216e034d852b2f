"""Errors of heads whose tokens are in the order of clusters, against attention under the masks of their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.clusters import k_means
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.passes.sparse import ROUNDS
from ditopt.profiler import sample
from ditopt.profiler.cluster_errors import ClusterReader
from tests.profiler.attention_rig import operands, planted
from tests.profiler.test_pattern_errors import attend, heads_weight, measured, norm, of_video, total

BLOCK = 64


@pytest.fixture
def every_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No row is left out of the sample."""
    monkeypatch.setattr(sample, "ALL_ROWS", 2000)
    sample.sample_rows.cache_clear()
    yield
    sample.sample_rows.cache_clear()


@pytest.mark.parametrize(
    ("geometry", "heads"),
    [(Geometry(4, 16, 17), (2, 2)), (Geometry(2, 15, 34, text=68, text_first=True), (2, 1))],
    ids=["video alone", "text and shared keys"],
)
def test_errors_are_those_of_attention_under_the_tokens_masks(
    geometry: Geometry, heads: tuple[int, int], every_row: None
) -> None:
    x = operands(geometry.tokens, heads, sharp=1.2)
    captured = planted(x, None, heads, **({"enable_gqa": True} if heads[1] < heads[0] else {}))
    table = measured(captured, geometry)
    weight, video = heads_weight(captured, heads[0]), of_video(geometry)
    dense = attend(x, heads)[:, video]
    names = [str(name) for name in table.labels["candidate"] if json.loads(str(name)).get("order") == "clusters"]
    assert [SparseChoice.from_data(json.loads(name)).pattern for name in names] == [Draft(mass=0.9), Draft(keep=0.25)]
    blocks = -(-geometry.tokens // BLOCK)
    text = torch.zeros(blocks, dtype=torch.bool)
    text[: -(-geometry.text // BLOCK)] = True
    clusters = -(-geometry.video // BLOCK)
    for name in names:
        choice = SparseChoice.from_data(json.loads(name)).pattern
        assert isinstance(choice, Draft)
        masks, shares = [], []
        for head in range(heads[0]):
            q, k = x[0, head], x[0, heads[0] + head * heads[1] // heads[0]]
            orders = []
            for part in (q, k):
                order = torch.arange(geometry.tokens)
                order[video] = video.start + k_means(part[video], clusters, ROUNDS)[0].argsort(stable=True)
                orders.append(order)
            means = [
                torch.stack([part.mean(0) for part in each[order].split(BLOCK)])
                for each, order in zip((q, k), orders, strict=True)
            ]
            scores = means[0] @ means[1].T / 8**0.5
            kept = (text[:, None] | text).clone()
            for row in range(blocks):
                ranked = sorted(range(blocks), key=lambda one: (not kept[row, one], -float(scores[row, one])))
                mass, taken = 0.0, 0
                for one in ranked:
                    if taken >= choice.room(blocks) or (choice.mass is not None and mass >= choice.mass):
                        break
                    kept[row, one] = True
                    mass, taken = mass + float(scores[row].softmax(0)[one]), taken + 1
            shares.append(float(kept.float().mean()))
            places = [order.argsort() // BLOCK for order in orders]
            masks.append(kept[places[0]][:, places[1]])
        error = attend(x, heads, torch.stack(masks)[None])[:, video] - dense
        at = table.position("candidate", name)
        expected = norm(error, weight) / total(dense, weight)
        np.testing.assert_allclose(table["error"].values[0, 0, 0, :, at], expected, rtol=1e-3, atol=1e-4, err_msg=name)
        assert table["density"].values[at] == pytest.approx(np.mean(shares), abs=1e-5)


def test_short_sequences_and_those_of_text_alone_have_none() -> None:
    assert not ClusterReader(Geometry(2, 3, 4), 4).names
    assert not ClusterReader(Geometry(1, 1, 60, text=1000), 64).names
    assert len(ClusterReader(Geometry(4, 16, 16), 64).names) == 2
