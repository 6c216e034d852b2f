"""What the adapter takes of a pipeline's settings, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ditopt.adapters import DiffusersAdapter
from ditopt.errors import InputError
from examples.tiny_video.pipeline import TinyVideoPipeline
from tests.tiny import tiny_wan

SMALL = {"num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2}
PROMPT = "a red circle moving left over snow"


class ByClass(diffusers.DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Generates from class labels, as DiT's pipeline does."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    def __call__(self, class_labels: list[int], num_inference_steps: int = 4) -> None:
        raise AssertionError("not to be called")


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("generator", torch.Generator(), "from a seed of its own"), ("prompt", "a", "second argument of ditopt.optimize")],
)
def test_what_is_given_elsewhere_is_refused(
    pipeline: TinyVideoPipeline, name: str, value: object, instead: str
) -> None:
    with pytest.raises(InputError, match=f"pipe_kwargs has {name}, which ditopt sets itself: .*{instead}"):
        DiffusersAdapter(pipeline, {name: value})


def test_images_are_compared_as_arrays(pipeline: TinyVideoPipeline) -> None:
    samples = [
        DiffusersAdapter(pipeline, {**SMALL, **more}).checked_rollout(PROMPT, 3)
        for more in ({"output_type": "pil"}, {})
    ]
    assert torch.equal(*samples)


def test_pipeline_without_prompts_is_refused() -> None:
    with pytest.raises(InputError, match=r"ByClass takes no prompt, its arguments are class_labels, .*rollout="):
        DiffusersAdapter(ByClass(tiny_wan()))
