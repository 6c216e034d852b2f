"""One small random pipeline for all tests of the tiny image model."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from examples.tiny_image.image_pipeline import TinyImagePipeline
from examples.tiny_image.text import build_text_encoder, build_tokenizer


@pytest.fixture
def pipeline() -> TinyImagePipeline:
    """Three blocks of width 32 with random weights; the scheduler is the test's to replace."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=12, out_channels=12, num_layers=3, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=128, caption_projection_dim=32, pooled_projection_dim=128,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    encoder = build_text_encoder(len(tokenizer))
    pipe = TinyImagePipeline(tokenizer, encoder.eval(), transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe
