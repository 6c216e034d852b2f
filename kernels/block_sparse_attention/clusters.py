"""``ditopt::cluster_order``: tokens of queries and of keys by clusters that are found in the call.

As SVG2 (arXiv 2505.18875): k-means by squared distance, of each head's queries and of its keys, with the same start and
as many rounds in every call; tokens of a cluster then stand together, so that blocks are of tokens that look alike.
Plain torch, for any device; nothing waits for a GPU. (SVG2 starts from the centroids of the step before.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.ops import LIBRARY, cluster_refusal

SLAB = 1 << 22
"""So many distances are held at once."""


def k_means(tokens: Tensor, clusters: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Labels ``[N]`` int64 of tokens ``[N, D]`` and centroids ``[C, D]`` float32.

    The start are tokens at even distances; a round takes every token to the nearest centroid (of equally near ones the
    first) and makes centroids the means of theirs. One without tokens stays. What is not finite counts as 0.
    """
    known = tokens.float()
    known = known.masked_fill(~known.isfinite(), 0.0)
    counted = F.pad(known, (0, 1), value=1.0)
    centroids = known[torch.arange(clusters, device=tokens.device) * len(tokens) // clusters]
    for _ in range(rounds):
        sums = _sums(counted, _nearest(counted, centroids), clusters)
        count = sums[:, -1:]
        centroids = torch.where(count > 0, sums[:, :-1] / count.clamp(min=1), centroids)
    return _nearest(counted, centroids), centroids


def _nearest(counted: Tensor, centroids: Tensor) -> Tensor:
    """``[N]``: the nearest of ``[C, D]`` to each of ``[N, D + 1]``, whose last column is 1."""
    against = torch.cat([centroids, -0.5 * centroids.square().sum(1, keepdim=True)], 1)
    parts = counted.split(max(1, SLAB // len(centroids)))
    return torch.cat([(against @ part.T).max(0).indices for part in parts])


def _sums(counted: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """``[C, D + 1]``: sums by label, added up in one order whatever the device."""
    sums = counted.new_zeros(clusters, counted.shape[1])
    if counted.device.type == "cpu":
        return sums.index_add_(0, labels, counted)
    numbers = torch.arange(clusters, device=counted.device)[:, None]
    step = max(1, SLAB // clusters)
    for part, of_part in zip(counted.split(step), labels.split(step), strict=True):
        sums += (numbers == of_part).float() @ part
    return sums


def cluster_order(
    query: Tensor, key: Tensor, order: Tensor, clustered: Tensor, first: int, last: int, clusters: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which query and which key stands at each place, and what undoes the order of queries: ``[B, H, S]`` int64 each.

    ``[B, H, S, D]`` and ``[B, Hkv, S, D]``; of heads that are ``clustered`` ``[H]`` (int32, not 0) the tokens from
    ``first`` up to ``last`` are sorted by cluster, inside one as they stood; the others, and other heads', are in the
    ``order`` ``[H, S]`` (int64).

    Raises:
        ValueError: shapes, dtypes or sizes do not fit.
    """
    refused = cluster_refusal(query, key, order, clustered, first, last, clusters, rounds)
    if refused is not None:
        raise ValueError(f"ditopt::cluster_order: {refused}")
    group = query.shape[1] // key.shape[1]
    of_queries = order.expand(query.shape[:3]).clone()
    of_keys = of_queries.clone()
    wanted = clustered.tolist() if clustered.device.type == "cpu" else [1] * query.shape[1]

    def sort(tokens: Tensor, *found: tuple[Tensor, int]) -> None:
        places = first + k_means(tokens[first:last], clusters, rounds)[0].argsort(stable=True)
        for each, head in found:
            each[first:last] = torch.where(clustered[head] != 0, places, each[first:last])

    for sample in range(query.shape[0]):
        for shared in range(key.shape[1]):
            heads = [head for head in range(shared * group, (shared + 1) * group) if wanted[head]]
            for head in heads:
                sort(query[sample, head], (of_queries[sample, head], head))
            if heads:
                sort(key[sample, shared], *((of_keys[sample, head], head) for head in heads))
    back = torch.empty_like(of_queries)
    back.scatter_(2, of_queries, torch.arange(query.shape[2], device=query.device).expand_as(of_queries))
    return of_queries, of_keys, back


LIBRARY.impl("cluster_order", cluster_order, "CompositeExplicitAutograd")
