"""A network of one block that attends to what it is given, models, and attention statistics of full maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry
from ditopt.measures import Table
from ditopt.profiler.attention import AttentionCollector
from ditopt.profiler.interpret import Collector, WatchedCalls
from ditopt.trace import Trace
from tests.trace.models import CASES, Captured, capture, interpreted

SITE = "blocks.0.attn"
PLAIN = Geometry(2, 3, 4)
BEHIND = Geometry(2, 3, 4, text=5)
BEFORE = Geometry(2, 3, 4, text=5, text_first=True)


class _Attend(nn.Module):
    """Attention whose queries, keys and values stand in its input ``[B, H + 2 Hkv, S, D]``."""

    def __init__(self, heads: tuple[int, int], projected: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.settings = heads, settings
        self.to_out = nn.Linear(heads[0] * 8, 24) if projected else nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = x.split((self.heads[0], self.heads[1], self.heads[1]), 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.settings)
        found: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return found


class _Block(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.attn = _Attend(*args)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self.attn(x, mask)
        return found


class Planted(nn.Module):
    """A network of one block, ``blocks.0.attn``, that attends to what it is given."""

    def __init__(self, heads: tuple[int, int], projected: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(heads, projected, settings)])

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, mask: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.blocks[0](hidden_states, mask) + timestep,)


def operands(tokens: int, heads: tuple[int, int] = (2, 2), batch: int = 1, seed: int = 0, sharp: float = 2.0) -> Tensor:
    """``[B, H + 2 Hkv, S, 8]``: random queries, keys and values."""
    return torch.randn(batch, heads[0] + 2 * heads[1], tokens, 8, generator=torch.Generator().manual_seed(seed)) * sharp


def planted(
    x: Tensor,
    mask: Tensor | None = None,
    heads: tuple[int, int] = (2, 2),
    projected: bool = True,
    **settings: Any,
) -> Captured:
    """The captured network with these inputs."""
    like = (tuple(mask.shape), mask.dtype) if mask is not None else None
    found = _planted(tuple(x.shape), like, heads, projected, tuple(settings.items()))
    trace, arguments = trace_of(found), list(found.arguments)
    arguments[trace.roots[0]] = x
    if mask is not None:
        arguments[trace.arguments["mask"]] = mask
    return replace(found, arguments=arguments)


@lru_cache
def _planted(
    shape: tuple[int, ...],
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    heads: tuple[int, int],
    projected: bool,
    settings: tuple[tuple[str, Any], ...],
) -> Captured:
    torch.manual_seed(0)
    model = Planted(heads, projected, dict(settings)).eval().requires_grad_(False)
    inputs = {"hidden_states": torch.randn(shape), "timestep": torch.tensor([0.5])}
    if mask is not None:
        inputs["mask"] = torch.ones(mask[0], dtype=mask[1])
    with interpreted():
        return capture(model, inputs)


def trace_of(captured: Captured) -> Trace:
    return captured.program.variants.trace


def steps(count: int, branches: int = 1, batched: bool = False) -> NetworkCalls:
    """Calls of ``count`` steps, branch 0 first in each."""
    calls = [(step, branch) for step in range(count) for branch in range(1 if batched else branches)]
    return NetworkCalls(tuple(float(count - step) for step in range(count)), tuple(calls), branches, batched)


def run(captured: Captured, calls: NetworkCalls, collectors: Sequence[Collector], *inputs: Tensor) -> None:
    """Show a generation to collectors, whose calls have these latents (the last ones for the rest)."""
    trace = trace_of(captured)
    watched = WatchedCalls(trace, calls, collectors)
    for number in range(len(calls.calls)):
        arguments = list(captured.arguments)
        if inputs:
            arguments[trace.roots[0]] = inputs[min(number, len(inputs) - 1)]
        watched(arguments, lambda *_: pytest.fail("the model is not to be called"))
    assert watched.complete


def measured(
    captured: Captured, geometry: Geometry | None, *inputs: Tensor, calls: NetworkCalls | None = None, side: int = 128
) -> Table:
    """The table ``attention`` of the planted site."""
    calls = calls or steps(1)
    collector = AttentionCollector(trace_of(captured), calls, geometry, side)
    run(captured, calls, [collector], *inputs)
    assert not collector.reasons
    return collector.tables()[SITE]


def full_scores(x: Tensor, heads: tuple[int, int], mask: Tensor | None, causal: bool = False) -> Tensor:
    """``[H, S, S]`` float64 of the first sample."""
    query, key, _ = x[0].double().split((heads[0], heads[1], heads[1]), 0)
    key = key.repeat_interleave(heads[0] // heads[1], 0)
    scores: Tensor = query @ key.transpose(1, 2) / math.sqrt(8)
    if mask is not None:
        whole = torch.broadcast_to(mask, (1, *scores.shape))[0]
        scores = scores.masked_fill(~whole, -math.inf) if mask.dtype == torch.bool else scores + whole.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -math.inf)
    return scores


def reference(scores: Tensor, geometry: Geometry, block: int) -> dict[str, np.ndarray]:
    """Every statistic of one call by its definition, from the full map."""
    tokens = geometry.tokens
    first = geometry.text if geometry.text_first else 0
    video = np.arange(tokens) - first
    is_video = (video >= 0) & (video < geometry.video)
    where = np.stack(np.unravel_index(video.clip(0, geometry.video - 1), geometry.sizes))
    apart = np.abs(where[:, :, None] - where[:, None])
    both = is_video[:, None] & is_video[None]
    regions = {
        "mass_text": np.broadcast_to(~is_video, (tokens, tokens)),
        "mass_first_frame": np.broadcast_to(is_video & (where[0] == 0), (tokens, tokens)),
        "mass_in_frame": both & (apart[0] == 0),
        "mass_same_pixel": both & (apart[1:].max(0) == 0),
        "mass_self": np.eye(tokens, dtype=bool),
        "mass_near_pixel": both & (apart[0] > 0) & (apart[1:].max(0) <= 1),
    }
    maps = scores.softmax(-1).numpy()
    some = maps[:, is_video]
    entropy = -(some * np.log(np.where(some > 0, some, 1))).sum(-1).mean(-1)
    lse = scores.logsumexp(-1).numpy()[:, is_video]
    found = {name: (some * region[is_video]).sum(-1).mean(-1) for name, region in regions.items()}
    found["mass_near"] = np.stack(
        [(some * (both & (apart.max(0) <= far))[is_video]).sum(-1).mean(-1) for far in (1, 2, 4)], -1
    )
    columns = some.mean(1)
    found |= {"entropy": entropy / math.log(tokens), "lse_mean": lse.mean(-1), "lse_std": lse.std(-1)}
    found["mass_sinks"] = np.sort(columns, -1)[:, -max(1, tokens // 100) :].sum(-1)
    found["gathered"] = columns.mean(0)
    starts = np.arange(0, tokens, block)
    sizes = np.diff([*starts, tokens])
    found["map"] = np.add.reduceat(np.add.reduceat(maps, starts, 1) / sizes[:, None], starts, 2)
    in_video = maps[:, is_video][:, :, is_video].mean(0)
    found["by_distance"] = np.array(
        [np.trace(in_video, offset) / geometry.video for offset in range(1 - geometry.video, geometry.video)]
    )
    return found


def compare(table: Table, expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    for name, values in expected.items():
        found = table[name].values[0, 0, 0]
        np.testing.assert_allclose(found, values, atol=1e-3 if found.dtype == np.float16 else atol, err_msg=name)


@lru_cache
def model(name: str) -> Captured:
    """A captured tiny model of diffusers."""
    with interpreted():
        return capture(*CASES[name].make())
