"""Diffusers' transformers with a few tiny layers each, inputs for them, and ways to run captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from ditopt.backend import Session, ditopt_backend
from ditopt.passes._infra import Prediction, StepPlan
from ditopt.passes.combine import factors_name, slot_name
from ditopt.runtime.program import Program


@dataclass(frozen=True)
class Case:
    """A tiny model. ``blocks`` are its stacks in call order; ``streams`` what crosses an edge between blocks."""

    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    blocks: tuple[str, ...]
    streams: int = 1

    def make(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode with weights that let every block matter, and keyword arguments for it."""
        torch.manual_seed(0)
        model, inputs = self.build()
        model.eval().requires_grad_(False)
        for parameter in model.parameters():  # zero-initialised gates would make blocks invisible
            if parameter.ndim == 1 or not parameter.abs().max():
                parameter.normal_(0.0, 0.05).add_(0.1 if parameter.ndim == 1 else 0.0)
        return model, inputs


def dit() -> tuple[nn.Module, dict[str, Any]]:
    """Class-conditional image model; attention and MLP only."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    """Text cross-attention with a mask; learned sigma."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    mask = torch.ones(2, 6)
    mask[1, 3:] = 0
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 6, 12),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """Two streams through joint attention."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 6, 12),
        "pooled_projections": torch.randn(2, 10),
    }


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """Double-stream blocks, then single-stream ones; complex rotary embeddings."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return model, {
        "hidden_states": torch.randn(1, 16, 4),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
        "pooled_projections": torch.randn(1, 10),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
    }


def wan() -> tuple[nn.Module, dict[str, Any]]:
    """Video: 3-D self-attention, text cross-attention."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
    }


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    """Video with text tokens in the same attention."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=12,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )
    return model, {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
    }


def ltx() -> tuple[nn.Module, dict[str, Any]]:
    """Video tokens given as a sequence; sizes as plain numbers; a mask."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=12,
    )
    mask = torch.ones(1, 6)
    mask[:, 4:] = 0
    return model, {
        "hidden_states": torch.randn(1, 2 * 4 * 4, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
        "encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def hunyuan_video(channels: int = 10, axes: tuple[int, ...] = (2, 4, 4)) -> tuple[nn.Module, dict[str, Any]]:
    """Token refiner, double-stream blocks, single-stream blocks, masks."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=channels,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=axes,
    )
    mask = torch.ones(1, 6)
    mask[:, 4:] = 0
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 12),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([1000.0]),
    }


def _numbered(stack: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stack}.{i}" for i in range(count))


CASES = {
    "DiT": Case(dit, _numbered("transformer_blocks", 2)),
    "PixArt": Case(pixart, _numbered("transformer_blocks", 2)),
    "SD3": Case(sd3, _numbered("transformer_blocks", 3), streams=2),
    "Flux": Case(flux, _numbered("transformer_blocks", 2) + _numbered("single_transformer_blocks", 2), streams=2),
    "Wan": Case(wan, _numbered("blocks", 4)),
    "CogVideoX": Case(cogvideox, _numbered("transformer_blocks", 2), streams=2),
    "LTX": Case(ltx, _numbered("transformer_blocks", 2)),
    "HunyuanVideo": Case(
        hunyuan_video, _numbered("transformer_blocks", 1) + _numbered("single_transformer_blocks", 2), streams=2
    ),
}


def interpreted() -> AbstractContextManager[object]:
    """While it lasts, variants are interpreted and not compiled: the same graphs, ready at once."""

    def run_graph(gm: fx.GraphModule, context: object) -> Callable[[list[Any]], Sequence[Any]]:
        def run(arguments: list[Any]) -> Sequence[Any]:
            values = list(arguments)
            arguments.clear()
            with torch.no_grad():
                found: Sequence[Any] = gm(*values)
            return found

        return run

    return mock.patch("ditopt.runtime.variants.lower", run_graph)


@dataclass
class Captured:
    """A compiled model with its one program, and the boxed inputs of a call."""

    model: nn.Module
    inputs: dict[str, Any]
    session: Session
    compiled: Callable[..., tuple[Tensor, ...]]
    eager: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    arguments: list[Any]

    @property
    def program(self) -> Program:
        """The program of the one graph."""
        (found,) = self.session.programs
        return found

    def run(
        self, plan: StepPlan, added: Mapping[str, Tensor] | None = None
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Run the interpreted variant of ``plan``: (what the user gets, recorded features as age 0 slots)."""
        with interpreted():
            variant = self.program.variants.get(plan)
        results = variant.run([self.arguments[i] if isinstance(i, int) else (added or {})[i] for i in variant.inputs])
        slots: dict[str, Tensor] = {}
        rest = list(results[variant.user_outputs :])
        for site, count in variant.recorded:
            slots |= {slot_name(site, 0, stream): rest.pop(0) for stream in range(count)}
        assert not rest
        return results[: variant.user_outputs], slots

    def predict(self, *sites: str, also: tuple[str, ...] = ()) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Record the features of ``sites`` in a full run, then run on the same inputs with these for prediction."""
        _, slots = self.run(StepPlan((), sites))
        factors = {factors_name(site): torch.ones(1) for site in sites}
        return self.run(StepPlan(tuple(Prediction(site, 1) for site in sites), also), slots | factors)


def compiled(model: Callable[..., Any], *, fullgraph: bool = True, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` with ditopt's backend and options."""
    forward: Callable[..., Any] = torch.compile(model, backend=ditopt_backend, fullgraph=fullgraph, options=options)
    return forward


def capture(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> Captured:
    """Compile ``model`` into one graph and call it once."""
    torch._dynamo.reset()
    session = Session(check_passes=True, **settings)
    arguments: list[Any] = []
    with torch.no_grad():
        eager = model(**inputs, return_dict=False)
        forward = compiled(model, session=session)
        outputs = forward(**inputs, return_dict=False)
        (program,) = session.programs
        program.observer = lambda seen: arguments.extend(seen.arguments)
        with interpreted():
            forward(**inputs, return_dict=False)
        program.observer = None
    return Captured(model, inputs, session, forward, eager, outputs, arguments)
