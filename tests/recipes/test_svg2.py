"""``svg2``: our operators against the paper's steps (arXiv 2505.18875, and ``svg/kmeans_utils.py`` of its code).

K-means of queries and of keys of a head; tokens permuted so that clusters are contiguous; a map of centroids,
``P_ij = |K_j| exp(q_i . k_j / sqrt(d)) / sum``, of which each row keeps the largest until they hold p = 0.9; attention
of a cluster's queries to the clusters that are kept; the output put back by the queries' permutation.

Where ours departs:

- Blocks are of 64 tokens of the sorted sequence, the paper's are the clusters themselves, of whatever size. So means of
  blocks stand for centroids, and sizes do not weigh. Where every cluster is a block, both are the same; elsewhere a
  block holds parts of two clusters.
- As many clusters as blocks, of queries and of keys; the paper has 100 to 300 of queries and 500 to 1,000 of keys.
- Three rounds from tokens at even distances, anew in every call; the paper's start from the step before.
- At most half of all blocks are kept (``most``), where the paper keeps at least a tenth (``min_kc_ratio``).
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import ditopt.kernels.block_sparse_attention.cpu
import ditopt.kernels.block_sparse_attention.draft  # noqa: F401  # operators
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.clusters import k_means
from ditopt.kernels.ops import BLOCK_SPARSE_ATTENTION, CLUSTER_ORDER, DRAFT_LISTS
from ditopt.profiler.cluster_errors import ClusterReader
from ditopt.recipes import RECIPES
from tests.kernels.test_cluster_order import literal_k_means

BLOCK, CLUSTERS, DEPTH = 64, 7, 16
TOKENS = BLOCK * CLUSTERS


def clustered(spread: float, seed: int) -> Tensor:
    """``[TOKENS, DEPTH]``: token i is near the middle ``i % CLUSTERS``, so that clusters are as large as blocks."""
    generator = torch.Generator().manual_seed(seed)
    middles = 2.5 * torch.randn(CLUSTERS, DEPTH, generator=generator)
    return middles.repeat(BLOCK, 1) + spread * torch.randn(TOKENS, DEPTH, generator=generator)


def permuted(tokens: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
    """Centroids, the tokens of each cluster, and all of them cluster by cluster."""
    labels, centroids = literal_k_means(tokens, CLUSTERS, 3)
    members = [[at for at, label in enumerate(labels) if label == c] for c in range(CLUSTERS)]
    return centroids, members, torch.tensor([at for own in members for at in own])


def top_p(scores: Tensor, sizes: Tensor, p: float) -> Tensor:
    """``[Qc, Kc]``: of a row's clusters those that it takes, the largest first, until they hold ``p`` of the mass."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, of_row in enumerate(scores):
        weighed = sizes * (of_row - of_row.max()).exp()
        shares, held = weighed / weighed.sum(), 0.0
        for cluster in shares.argsort(descending=True).tolist():
            if held > p:
                break
            kept[row, cluster] = True
            held += float(shares[cluster])
    return kept


def semantic_attention(query: Tensor, key: Tensor, value: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The paper's output ``[S, E]`` float64 of one head, and its map of clusters."""
    query, key, value = query.double(), key.double(), value.double()
    (of_queries, query_members, order), (of_keys, key_members, _) = permuted(query), permuted(key)
    sizes = torch.tensor([float(len(own)) for own in key_members])
    kept = top_p(of_queries @ of_keys.T / math.sqrt(DEPTH), sizes, p)
    rows = []
    for cluster, own in enumerate(query_members):
        attended = [at for other in range(CLUSTERS) if kept[cluster, other] for at in key_members[other]]
        scores = query[own] @ key[attended].T / math.sqrt(DEPTH)
        rows.append(scores.softmax(-1) @ value[attended])
    sorted_output = torch.cat(rows)
    output = torch.empty_like(sorted_output)
    output[order] = sorted_output  # the inverse permutation
    return output, kept


def ours(query: Tensor, key: Tensor, value: Tensor, p: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operators of ``order: clusters`` with ``mass: p``: the output ``[S, E]``, and the lists with their counts."""
    q, k, v = (each[None, None] for each in (query, key, value))
    raster, heads = torch.arange(TOKENS)[None], torch.ones(1, dtype=torch.int32)
    of_queries, of_keys, back = CLUSTER_ORDER(q, k, raster, heads, 0, TOKENS, CLUSTERS, 3)
    q, k, v = (
        each.gather(2, order[..., None].expand_as(each))
        for each, order in ((q, of_queries), (k, of_keys), (v, of_keys))
    )
    empty = torch.zeros(1, 1, CLUSTERS, most, dtype=torch.int32), torch.zeros(1, 1, CLUSTERS, dtype=torch.int32)
    limits = torch.tensor([most], dtype=torch.int32), torch.tensor([p])
    lists = DRAFT_LISTS(q, k, *empty, *limits, BLOCK, BLOCK, DEPTH**-0.5)
    found, _ = BLOCK_SPARSE_ATTENTION(q, k, v, *lists, BLOCK, BLOCK, DEPTH**-0.5)
    return found.gather(2, back[..., None].expand_as(found))[0, 0], *lists


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_where_clusters_are_blocks_it_is_the_papers_attention(p: float) -> None:
    query, key, value = clustered(0.2, 0), clustered(0.2, 1), clustered(1.0, 2)
    expected, kept = semantic_attention(query, key, value, p)
    found, indices, counts = ours(query, key, value, p, CLUSTERS)
    for row in range(CLUSTERS):
        assert indices[0, 0, row, : counts[0, 0, row]].tolist() == kept[row].nonzero().view(-1).tolist()
    assert 0.1 < kept.float().mean() < 0.9
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_means_of_blocks_are_the_centroids_there() -> None:
    tokens = clustered(0.2, 0)
    labels, centroids = k_means(tokens, CLUSTERS, 3)
    means = tokens[labels.argsort(stable=True)].view(CLUSTERS, BLOCK, DEPTH).mean(1)
    torch.testing.assert_close(means, centroids)
    torch.testing.assert_close(centroids.double(), permuted(tokens.double())[0], rtol=1e-5, atol=1e-5)


def test_clusters_of_other_sizes_are_blocks_of_parts() -> None:
    """The departure: a third of the tokens moved to one cluster, blocks hold 64 all the same and lose little more."""
    query, key, value = clustered(0.2, 0), clustered(0.2, 1), clustered(1.0, 2)
    key[::3] = key[:1] + 0.2 * clustered(1.0, 3)[::3]
    dense = (query.double() @ key.double().T / DEPTH**0.5).softmax(-1) @ value.double()
    papers, _ = semantic_attention(query, key, value, 0.9)
    found, _, counts = ours(query, key, value, 0.9, CLUSTERS)
    errors = [float((each.double() - dense).norm() / dense.norm()) for each in (papers, found)]
    assert max(errors) < 0.15 and not torch.allclose(found.double(), papers, atol=1e-4)
    assert counts.float().mean() < CLUSTERS


def test_the_recipe_allows_what_profiles_have_of_it() -> None:
    svg2, tried = RECIPES["svg2"], ClusterReader(Geometry(6, 28, 28), 64).names
    (allowed,) = [name for name in tried if svg2.allows(name)]
    assert json.loads(allowed) == {"pattern": "draft", "mass": 0.9, "order": "clusters"}
    assert not svg2.missing(tried) and svg2.alike and svg2.dense_first == 0.3
