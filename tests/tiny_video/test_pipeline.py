"""The tiny pipeline behaves as a diffusers pipeline does: outputs, guidance, schedulers, saving, refusals."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from torch import Tensor

from examples.common.exporting import export
from examples.tiny_video.detector import attribute_score
from examples.tiny_video.pipeline import SOURCES, TinyVideoPipeline

PROMPT = "a red circle moving left over sand"
OTHER = "a blue cross spinning over night"
TINY: dict[str, Any] = {"num_frames": 2, "height": 16, "width": 24, "num_inference_steps": 2}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_output_types_agree(pipeline: TinyVideoPipeline) -> None:
    array = pipeline([PROMPT, OTHER], generator=seeded(0), **TINY).frames
    assert array.shape == (2, 2, 16, 24, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    tensor = pipeline([PROMPT, OTHER], generator=seeded(0), output_type="pt", **TINY).frames
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    images = pipeline([PROMPT, OTHER], generator=seeded(0), output_type="pil", **TINY).frames
    assert len(images) == 2 and len(images[0]) == 2 and isinstance(images[0][0], PIL.Image.Image)
    np.testing.assert_array_equal(np.asarray(images[1][0]), np.round(array[1, 0] * 255).astype(np.uint8))
    (latents,) = pipeline([PROMPT, OTHER], generator=seeded(0), output_type="latent", return_dict=False, **TINY)
    assert latents.shape == (2, 12, 2, 8, 12)


def test_generators_belong_to_clips(pipeline: TinyVideoPipeline) -> None:
    both = pipeline([PROMPT, OTHER], generator=[seeded(1), seeded(2)], **TINY).frames
    alone = pipeline(OTHER, generator=seeded(2), **TINY).frames
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    twice = pipeline(PROMPT, generator=[seeded(1), seeded(2)], num_videos_per_prompt=2, **TINY).frames
    np.testing.assert_allclose(twice[0], both[0], atol=1e-5)
    assert np.abs(twice[1] - twice[0]).max() > 0.01


def test_given_latents_replace_the_noise(pipeline: TinyVideoPipeline) -> None:
    noise = torch.randn(1, 12, 2, 8, 12, generator=seeded(3))
    expected = pipeline(PROMPT, generator=seeded(3), **TINY).frames
    np.testing.assert_array_equal(pipeline(PROMPT, latents=noise, **TINY).frames, expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_calls_the_transformer_once_a_branch(
    pipeline: TinyVideoPipeline, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, Tensor]] = []
    forward = pipeline.transformer.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((id(kwargs["encoder_hidden_states"]), kwargs["timestep"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", record)
    pipeline(PROMPT, guidance_scale=guidance, generator=seeded(0), **(TINY | {"num_inference_steps": 3}))
    branches = 2 if guidance > 1 else 1
    assert len(calls) == 3 * branches
    assert len({text for text, _ in calls}) == branches
    assert [text for text, _ in calls] == [text for text, _ in calls[:branches]] * 3
    assert all(timestep.shape == (1,) for _, timestep in calls)


def test_guidance_is_the_published_combination(pipeline: TinyVideoPipeline) -> None:
    """One Euler step is linear in the prediction, so the latents of a guided step combine in the same way."""
    one: dict[str, Any] = TINY | {"num_inference_steps": 1, "output_type": "latent"}
    noise = torch.randn(1, 12, 2, 8, 12, generator=seeded(3))
    cond = pipeline(PROMPT, latents=noise, guidance_scale=1.0, **one).frames
    uncond = pipeline("", latents=noise, guidance_scale=1.0, **one).frames
    guided = pipeline(PROMPT, latents=noise, guidance_scale=4.0, **one).frames
    torch.testing.assert_close(guided, uncond + 4 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert (cond - uncond).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # raised within diffusers
@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
        (UniPCMultistepScheduler, FLOW),
        (DPMSolverMultistepScheduler, FLOW),
    ],
)
def test_schedulers_swap(pipeline: TinyVideoPipeline, scheduler: Any, config: dict[str, Any]) -> None:
    pipeline.scheduler = scheduler(**config)
    settings = TINY | {"num_inference_steps": 3}
    first = pipeline(PROMPT, generator=seeded(0), **settings).frames
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(pipeline(PROMPT, generator=seeded(0), **settings).frames, first)


def test_callback_sees_each_step_and_can_replace_latents(pipeline: TinyVideoPipeline) -> None:
    seen: list[int] = []

    def zero(pipe: TinyVideoPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds"]
    frames = pipeline(PROMPT, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=names, **TINY).frames
    assert seen == [0, 1]
    assert (frames == 0.5).all()


def test_saved_directory_loads_by_itself_bit_for_bit(
    pipeline: TinyVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = export(pipeline, tmp_path / "model")
    assert size < 5_000_000 and not list((tmp_path / "model").glob(".export-*"))
    monkeypatch.chdir(tmp_path)
    loaded = DiffusionPipeline.from_pretrained("model", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    for part in ("transformer", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert loaded.scheduler.config.shift == 3.0
    expected = pipeline(PROMPT, generator=seeded(0), **TINY).frames
    np.testing.assert_array_equal(loaded(PROMPT, generator=seeded(0), **TINY).frames, expected)
    clips = np.repeat(expected, 3, 1)
    assert loaded.attribute_score(clips, [PROMPT]) == attribute_score(list(clips), [PROMPT])

    loaded.save_pretrained(tmp_path / "again")
    for name in (*SOURCES, "model_index.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_sources_list_every_sibling_that_is_imported() -> None:
    """diffusers copies only what pipeline.py itself imports; a sibling's sibling must be in the list too."""
    here = Path(inspect.getfile(TinyVideoPipeline)).parent
    direct = {f"{name}.py" for name in get_relative_imports(here / SOURCES[0])}
    assert direct | {SOURCES[0]} == set(SOURCES)
    assert {f"{name}.py" for source in SOURCES for name in get_relative_imports(here / source)} == direct


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "prompt is .*at least one string"),
        ({"prompt": 3}, "prompt is 3"),
        ({"negative_prompt": ["", ""]}, "negative_prompt is .*as many strings as there are prompts"),
        ({"height": 30}, "height is 30; it must be a multiple of 4 from 4 to 256, such as"),
        ({"width": 0}, "width is 0; .*such as 4"),
        ({"width": 512}, "width is 512; .*such as 256"),
        ({"num_frames": 0}, "num_frames is 0; it must be from 1 to 64"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; it must be at least 1"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"generator": [seeded(0), seeded(1)]}, "generator is a list of 2; .*list of 1"),
        ({"latents": torch.zeros(1, 12, 2, 8, 8)}, r"latents has the shape \(1, 12, 2, 8, 8\); .*\(1, 12, 2, 8, 12\)"),
        ({"output_type": "mp4"}, "output_type is 'mp4'; it must be one of np, pt, pil, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "names noise; a callback can have latents"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_be_right(
    pipeline: TinyVideoPipeline, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**({"prompt": PROMPT} | TINY | wrong))
