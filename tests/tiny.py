"""Small random diffusion transformers, quick to compile: one of our own with its sampling loop, and diffusers' Wan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.console import Stage

if TYPE_CHECKING:
    from ditopt.runtime.program import Program


def tiny_wan(seed: int = 0, **changed: Any) -> Any:
    """diffusers' Wan, two blocks of width 24 over four channels; ``changed`` are its other settings."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**settings | changed).eval().requires_grad_(False)


class Block(nn.Module):
    """Self-attention and a feed-forward layer, modulated by the timestep's features."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        b, n, c = x.shape
        one, two = self.gate(features).chunk(2, -1)
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.out(mixed) * one[:, None]
        out: Tensor = x + self.mlp(self.norm2(x)) * two[:, None]
        return out


class TinyDiT(nn.Module):
    """``[B, N, C]`` latents, ``[B]`` timesteps in 0..1000 and ``[B, width]`` prompt features -> ``[B, N, C]``."""

    def __init__(self, blocks: int = 4, width: int = 32, heads: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(channels, width), nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        angles = timestep[:, None] / 1000 * torch.arange(1, 9, device=timestep.device)
        features = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + encoder_hidden_states
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, features)
        velocity: Tensor = self.head(x) + hidden_states
        return velocity


def make_model(blocks: int = 4, width: int = 32) -> TinyDiT:
    """A seeded, random model in evaluation mode."""
    torch.manual_seed(0)
    return TinyDiT(blocks, width).eval()


def with_tangents(model: TinyDiT) -> TinyDiT:
    """The model with the approximation of GELU by a hyperbolic tangent, which is something to simplify."""
    for part in model.modules():
        if isinstance(part, nn.GELU):
            part.approximate = "tanh"
    return model


def narrow_products_are_faster(patch: pytest.MonkeyPatch) -> None:
    """Let products in 16 bits take half the time, as they do not on every processor."""

    def product_seconds(left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
        return 1.0 if dtype == torch.float32 else 0.5

    patch.setattr("ditopt.profiler.timing.product_seconds", product_seconds)


def prompt_features(prompt: str, width: int = 32) -> Tensor:
    """``[1, width]`` features that a prompt determines."""
    generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
    return torch.randn(1, width, generator=generator)


def euler(model: nn.Module, prompt: str, seed: int, steps: int = 12, tokens: int = 64) -> Tensor:
    """Euler's method on ``dx/dsigma = model(x, 1000 sigma)`` from seeded noise to a sample."""
    x = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))
    text = prompt_features(prompt)
    sigmas = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(sigmas):
        x = x + (then - now) * model(x, now[None] * 1000, text)
    return x


class Silent(Stage):
    """A stage that nobody sees."""

    def advance(self, note: str = "", units: float = 1.0) -> None:
        """Nothing."""


@contextmanager
def compiled_tiny(model: TinyDiT, generate: Callable[[TinyDiT], object]) -> Iterator[tuple[TinyDiT, Program]]:
    """The model, compiled by the backend and traced by one generation, with its program."""
    from ditopt.backend import Session, ditopt_backend
    from ditopt.plan import Inputs

    names = ("hidden_states", "timestep", "encoder_hidden_states")
    session = Session(inputs=Inputs(timestep=names[1], latents=names[0], identity=names[2], forward=names))
    model.compile(backend=ditopt_backend, options={"session": session})
    with torch.no_grad():
        generate(model)
    yield model, session.programs[0]
    torch._dynamo.reset()
