"""``ditopt::cluster_order``: k-means against the definition, orders, text, shared keys, numbers that are none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_sparse_attention.clusters import k_means
from ditopt.kernels.ops import CLUSTER_ORDER


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raster(heads: int, tokens: int) -> Tensor:
    return torch.arange(tokens).expand(heads, tokens).contiguous()


def literal_k_means(tokens: Tensor, clusters: int, rounds: int) -> tuple[list[int], Tensor]:
    """Labels and centroids, token by token in float64: nearest centroid, then the mean of each one's tokens."""
    points = tokens.double()
    centroids = torch.stack([points[c * len(points) // clusters] for c in range(clusters)])
    for turn in range(rounds + 1):
        labels = [int(torch.stack([(x - c).square().sum() for c in centroids]).argmin()) for x in points]
        if turn < rounds:
            for c in range(clusters):
                own = [x for x, label in zip(points, labels, strict=True) if label == c]
                if own:
                    centroids[c] = torch.stack(own).mean(0)
    return labels, centroids


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 4), st.integers(1, 8), st.integers(0, 99))
def test_k_means_is_what_its_definition_says(tokens: int, clusters: int, rounds: int, depth: int, seed: int) -> None:
    points, clusters = drawn(tokens, depth, seed=seed), min(clusters, tokens)
    labels, centroids = k_means(points, clusters, rounds)
    expected, of_definition = literal_k_means(points, clusters, rounds)
    assert labels.tolist() == expected
    torch.testing.assert_close(centroids.double(), of_definition, rtol=1e-4, atol=1e-5)


def test_a_cluster_without_tokens_stays_where_it_was() -> None:
    points = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 5.2])[:, None]
    labels, centroids = k_means(points, 3, 2)  # from 0, 0 and 5: of equally near ones the first
    assert labels.tolist() == [0, 0, 0, 0, 2, 2] and centroids[1] == 0


def test_tokens_of_a_cluster_stand_together_and_text_stays() -> None:
    query, key = drawn(2, 3, 40, 8), drawn(2, 3, 40, 8, seed=1)
    clustered = torch.tensor([1, 0, 1], dtype=torch.int32)
    order = torch.stack([raster(1, 40)[0], torch.cat([torch.arange(4), torch.arange(4, 40).flip(0)]), raster(1, 40)[0]])
    of_queries, of_keys, back = CLUSTER_ORDER(query, key, order, clustered, 4, 40, 5, 3)
    for sample in range(2):
        assert torch.equal(of_queries[sample, 1], order[1]) and torch.equal(of_keys[sample, 1], order[1])
        for head in (0, 2):
            for found, tokens in ((of_queries, query), (of_keys, key)):
                places = found[sample, head]
                assert torch.equal(places[:4], torch.arange(4)) and sorted(places.tolist()) == list(range(40))
                labels = k_means(tokens[sample, head, 4:], 5, 3)[0][places[4:] - 4]
                assert (labels.diff() >= 0).all(), "sorted by cluster"
                same = labels.diff() == 0
                assert (places[4:].diff()[same] > 0).all(), "inside a cluster as they stood"
    assert torch.equal(of_queries.gather(2, back), torch.arange(40).expand(2, 3, 40))
    assert not torch.equal(of_queries[0, 0], of_keys[0, 0])


def test_heads_that_share_keys_have_them_in_one_order() -> None:
    query, key = drawn(1, 4, 32, 8), drawn(1, 2, 32, 8, seed=1)
    clustered = torch.tensor([0, 1, 1, 1], dtype=torch.int32)
    of_queries, of_keys, _ = CLUSTER_ORDER(query, key, raster(4, 32), clustered, 0, 32, 4, 2)
    assert torch.equal(of_keys[0, 2], of_keys[0, 3]) and not torch.equal(of_queries[0, 2], of_queries[0, 3])
    assert torch.equal(of_keys[0, 0], torch.arange(32)) and not torch.equal(of_keys[0, 1], torch.arange(32))
    alone = CLUSTER_ORDER(query[:, 1:2], key[:, :1], raster(1, 32), clustered[1:2], 0, 32, 4, 2)
    assert torch.equal(alone[1][0, 0], of_keys[0, 1])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_in_the_order_as_any_token(number: float) -> None:
    query, key = drawn(1, 1, 32, 8), drawn(1, 1, 32, 8, seed=1)
    query[0, 0, 0, 3] = key[0, 0, 9, 2] = number  # the first token is where a cluster starts
    clustered = torch.ones(1, dtype=torch.int32)
    for places in CLUSTER_ORDER(query, key, raster(1, 32), clustered, 0, 32, 4, 3):
        assert sorted(places[0, 0].tolist()) == list(range(32))
    labels = k_means(query[0, 0], 4, 3)[0]
    assert len(set(labels.tolist())) == 4, "others are clustered as if it were 0"


def test_the_fake_is_the_operator() -> None:
    given = (drawn(2, 4, 20, 8), drawn(2, 2, 20, 8), raster(4, 20), torch.tensor([1, 0, 1, 1], dtype=torch.int32))
    torch.library.opcheck(CLUSTER_ORDER, (*given, 3, 20, 4, 2), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": drawn(1, 2, 21, 8)}, "20 queries and 21 keys"),
        ({"key": drawn(1, 2, 20, 4)}, "heads, tokens or channels do not match"),
        ({"order": torch.arange(20)}, r"order is \[20\] of torch.int64, not \[2, 20\]"),
        ({"clustered": torch.ones(2)}, r"clustered is \[2\] of torch.float32, not \[2\] of torch.int32"),
        ({"last": 21}, "tokens from 0 up to 21 are to be ordered, of 20"),
        ({"clusters": 21}, "21 clusters of 20 tokens"),
        ({"clusters": 0}, "0 clusters"),
    ],
)
def test_operands_that_do_not_fit_are_told(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "query": drawn(1, 2, 20, 8), "key": drawn(1, 2, 20, 8), "order": raster(2, 20),
        "clustered": torch.ones(2, dtype=torch.int32), "first": 0, "last": 20, "clusters": 4, "rounds": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^ditopt::cluster_order: .*{message}"):
        CLUSTER_ORDER(*(given | change).values())
