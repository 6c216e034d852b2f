"""The weights that the repository ships: their size, what a forward takes, and that they draw what captions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.common.evaluating import generate, total
from examples.tiny_video.detector import count_by_kind
from examples.tiny_video.prompts import captions

CAPTIONS = 4


@pytest.fixture(scope="module")
def pipeline(root: Path) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiffusionPipeline.from_pretrained(root / "examples" / "tiny_video", trust_remote_code=True)


def test_they_take_at_most_40_mb(root: Path) -> None:
    weights = list((root / "examples" / "tiny_video").rglob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) <= 40e6


@pytest.mark.slow
def test_they_draw_what_captions_say(pipeline: Any) -> None:
    """Of 64 captions the model gets 0.929 right; 4 are enough to see broken weights."""
    tokens = []

    def count(module: torch.nn.Module, args: Any, inputs: Any, output: Any) -> None:
        shape: Tensor = inputs["hidden_states"]
        _, _, frames, height, width = shape.shape
        tokens.append(frames * (height // 2) * (width // 2))

    hook = pipeline.transformer.register_forward_hook(count, with_kwargs=True)
    prompts = captions(range(CAPTIONS))
    clips = generate(pipeline, prompts, CAPTIONS, guidance_scale=4.0)
    hook.remove()
    assert set(tokens) == {1536} and len(tokens) == 2 * 30, "guidance runs the network twice in each of 30 steps"
    right, of = total([count_by_kind(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])["all"]
    assert right / of >= 0.8
