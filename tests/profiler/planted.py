"""Attention heads with a planted role: queries and keys that look at one thing, with noise; and a model of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.calls import NetworkCalls
from ditopt.geometry import Geometry
from ditopt.profiler.attention import attention_collectors
from ditopt.profiler.interpret import Collector, WatchedCalls
from ditopt.runtime.variants import VariantCache
from tests.trace.models import capture, interpreted

LOGIT = 12.0
"""What a planted pair of query and key scores; others score about 0."""
SINKS = 3
"""Columns of a planted stripe."""


def planted(
    role: str, geometry: Geometry, head_dim: int = 64, seed: int = 0, noise: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[S, head_dim]`` so that ``softmax(q k^T / sqrt(head_dim))`` has a role of ``ditopt.roles``.

    Text tokens score nothing but where the role is ``text``; ``idle`` looks at everything, and its values have to be
    planted (small). ``noise`` is the standard deviation of what is added to queries and keys.
    """
    generator = torch.Generator().manual_seed(seed)
    width = head_dim**0.25 * LOGIT**0.5  # of a code: a pair of equal ones scores LOGIT
    query, key = torch.zeros(2, geometry.tokens, head_dim)
    video = video_part(geometry)
    if role in ("stripe", "text"):
        columns = torch.ones(geometry.tokens, dtype=torch.bool)
        columns[video] = False
        if role == "stripe":
            columns = video.start + torch.randperm(geometry.video, generator=generator)[:SINKS]
        query[:, 0] = key[columns, 0] = width
    elif role not in ("global", "idle"):
        query[video] = key[video] = _code(role, geometry, head_dim, generator) * width
    added = noise * torch.randn(2, geometry.tokens, head_dim, generator=generator)
    return query + added[0], key + added[1]


def video_part(geometry: Geometry) -> slice:
    """Where the video's tokens stand."""
    first = geometry.text if geometry.text_first else 0
    return slice(first, first + geometry.video)


def _code(role: str, geometry: Geometry, head_dim: int, generator: torch.Generator) -> Tensor:
    """``[video, head_dim]``: one vector of length 1 per token; those that a head is to bring together are alike."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in geometry.sizes))  # frame, row, column
    if role == "spatial":
        frames: Tensor = torch.eye(geometry.frames, head_dim)[places[:, 0]]
        return frames
    if role == "temporal":
        pixel = places[:, 1] * geometry.columns + places[:, 2]
        signs = torch.randint(0, 2, (geometry.rows * geometry.columns, head_dim), generator=generator) * 2.0 - 1
        pixels: Tensor = signs[pixel] / head_dim**0.5
        return pixels
    if role == "local":  # random Fourier features of a Gaussian
        angles = places.float() @ torch.randn(3, head_dim // 2, generator=generator) / 1.5
        features: Tensor = torch.cat([angles.cos(), angles.sin()], 1) / (head_dim / 2) ** 0.5
        return features
    raise ValueError(f"no head is planted for {role!r}")


class Heads(nn.Module):
    """A block whose queries, keys and values are its input ``[B, S, 3 * H * D]``, so that they can be planted."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.out = nn.Linear(heads * width, 3 * heads * width)

    def forward(self, x: Tensor) -> Tensor:
        """One attention with projection and residual."""
        query, key, value = x.unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = x + self.out(found.transpose(1, 2).flatten(2))
        return result


class Model(nn.Module):
    """One block of planted heads."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Heads(heads, width)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """As diffusers' models do."""
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states * (1 + 0 * timestep[:, None, None]),)


def watched(
    roles: Sequence[str], geometry: Geometry, known: Geometry | None, steps: int = 3
) -> tuple[VariantCache, list[Collector]]:
    """A captured model of planted heads, and the collectors of attention after some steps with other noise each.

    ``known`` is the geometry that the collectors are told. The one site is ``blocks.0``.
    """
    width = 64

    def latents(seed: int) -> Tensor:
        pairs = [planted(role, geometry, width, seed + 7 * i) for i, role in enumerate(roles)]
        noise = torch.randn(geometry.tokens, len(roles), width, generator=torch.Generator().manual_seed(seed))
        size = torch.tensor([1e-3 if role == "idle" else 1.0 for role in roles])
        query, key = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
        return torch.stack([query, key, size[:, None] * (1 + 0.5 * noise)], 1).flatten(1)[None]

    torch.manual_seed(0)
    model = Model(len(roles), width).eval().requires_grad_(False)
    with interpreted():
        captured = capture(model, {"hidden_states": latents(0), "timestep": torch.ones(1)})
    variants = captured.program.variants
    assert variants.latents is not None
    calls = NetworkCalls(tuple(float(t) for t in range(steps)), tuple((t, 0) for t in range(steps)), 1, batched=False)
    collectors = attention_collectors(variants.trace, calls, known)
    watch = WatchedCalls(variants.trace, calls, collectors)
    for step in range(steps):
        arguments = list(captured.arguments)
        arguments[variants.latents] = latents(100 * step)
        watch(arguments, lambda values: values)
    return variants, collectors
