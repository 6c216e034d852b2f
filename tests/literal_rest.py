"""Attention to kept blocks and to the means of the others, written out query block by query block in float64."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ditopt.profiler.head_edits import BlockMask
from ditopt.profiler.interpret import Edit


def mean_of_outer(key: Tensor, value: Tensor, pool: int) -> Tensor:
    """``[D, E]``: mean over keys ``[L, D]`` of ``(k - mean of its group) v^T``, group by group and key by key."""
    found = torch.zeros(key.shape[1], value.shape[1], dtype=key.dtype)
    for keys, values in zip(key.split(pool), value.split(pool), strict=True):
        for one, other in zip(keys, values, strict=True):
            found += torch.outer(one - keys.mean(0), other)
    return found / len(key)


def under_blocks_and_means(masks: Mapping[int, tuple[BlockMask, int]], first_order: Collection[int] = ()) -> Edit:
    """Computes heads anew: on the keys that a mask keeps and, where the number beside it is not 0, on the means of
    groups of so many of the others, each of which counts as often as it has tokens. Heads of ``first_order`` add the
    share of these times what keys and values have together in groups, as PISA does.
    """

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        query, key, values = (each.double() for each in given[:3])
        scale = given[6] if len(given) > 6 and given[6] is not None else query.shape[-1] ** -0.5
        found = value.clone()
        for head, (mask, pool) in masks.items():
            of_head = head * key.shape[1] // query.shape[1]
            for block, row in enumerate(mask.kept):
                rows = slice(block * mask.query_block, (block + 1) * mask.query_block)
                keys, means, counts, skipped = [], [], [], []
                for place, kept in enumerate(row):
                    first = place * mask.key_block
                    last = min(first + mask.key_block, key.shape[2])
                    for start in range(first, last, 1 if kept else pool or mask.key_block):
                        stop = min(start + (1 if kept else pool), last)
                        if stop > start:
                            keys.append(key[:, of_head, start:stop].mean(1))
                            means.append(values[:, of_head, start:stop].mean(1))
                            counts.append(stop - start)
                            skipped.append(not kept)
                if not keys:
                    found[:, head, rows] = 0
                    continue
                scores = scale * query[:, head, rows] @ torch.stack(keys, -1)
                mass = scores.exp() * torch.tensor(counts)
                shares = mass / mass.sum(-1, keepdim=True)
                made = shares @ torch.stack(means, 1)
                if head in first_order:
                    parts = zip(key[:, of_head], values[:, of_head], strict=True)
                    moments = torch.stack([mean_of_outer(*part, pool) for part in parts])
                    rest = shares[..., torch.tensor(skipped)].sum(-1, keepdim=True)
                    made = made + rest * scale * query[:, head, rows] @ moments
                found[:, head, rows] = made.to(value.dtype)
        return found

    return edit
