"""One small random pipeline for all tests of the tiny video model."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from examples.tiny_video.pipeline import TinyVideoPipeline
from examples.tiny_video.text import build_text_encoder, build_tokenizer


@pytest.fixture
def pipeline() -> TinyVideoPipeline:
    """Two blocks of width 32 with random weights; the scheduler is the test's to replace."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=15, out_channels=12,
        text_dim=128, freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    encoder = build_text_encoder(len(tokenizer))
    pipe = TinyVideoPipeline(tokenizer, encoder.eval(), transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe
