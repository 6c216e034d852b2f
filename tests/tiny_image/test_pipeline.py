"""The tiny image pipeline behaves as a diffusers pipeline does: outputs, guidance, schedulers, saving, refusals."""

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

from examples.common.exporting import WEIGHTS, export
from examples.tiny_image.image_detector import attribute_score
from examples.tiny_image.image_pipeline import SOURCES, TinyImagePipeline
from examples.tiny_video.pipeline import SOURCES as VIDEO_SOURCES

PROMPT = "a small striped red circle at the top left over sand"
OTHER = "a small blue star inside a large green diamond over night"
TINY: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 2}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_output_types_agree(pipeline: TinyImagePipeline) -> None:
    array = pipeline([PROMPT, OTHER], generator=seeded(0), **TINY).images
    assert array.shape == (2, 16, 24, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    tensor = pipeline([PROMPT, OTHER], generator=seeded(0), output_type="pt", **TINY).images
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    images = pipeline([PROMPT, OTHER], generator=seeded(0), output_type="pil", **TINY).images
    assert len(images) == 2 and isinstance(images[0], PIL.Image.Image)
    np.testing.assert_array_equal(np.asarray(images[1]), np.round(array[1] * 255).astype(np.uint8))
    (latents,) = pipeline([PROMPT, OTHER], generator=seeded(0), output_type="latent", return_dict=False, **TINY)
    assert latents.shape == (2, 12, 8, 12)


def test_generators_belong_to_images(pipeline: TinyImagePipeline) -> None:
    both = pipeline([PROMPT, OTHER], generator=[seeded(1), seeded(2)], **TINY).images
    alone = pipeline(OTHER, generator=seeded(2), **TINY).images
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    twice = pipeline(PROMPT, generator=[seeded(1), seeded(2)], num_images_per_prompt=2, **TINY).images
    np.testing.assert_allclose(twice[0], both[0], atol=1e-5)
    assert np.abs(twice[1] - twice[0]).max() > 0.01


def test_given_latents_replace_the_noise(pipeline: TinyImagePipeline) -> None:
    noise = torch.randn(1, 12, 8, 12, generator=seeded(3))
    expected = pipeline(PROMPT, generator=seeded(3), **TINY).images
    np.testing.assert_array_equal(pipeline(PROMPT, latents=noise, **TINY).images, expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_is_one_call_of_twice_the_batch(
    pipeline: TinyImagePipeline, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Tensor]] = []
    forward = pipeline.transformer.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", record)
    pipeline(PROMPT, guidance_scale=guidance, generator=seeded(0), **(TINY | {"num_inference_steps": 3}))
    batch = 2 if guidance > 1 else 1
    assert len(calls) == 3
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"):
        assert all(len(call[name]) == batch for call in calls), name
    assert len({id(call["encoder_hidden_states"]) for call in calls}) == 1
    if guidance > 1:
        empty, pooled = pipeline.encode_prompt([""], 1, torch.device("cpu"))
        assert torch.equal(calls[0]["encoder_hidden_states"][:1], empty), "the unconditional half comes first"
        assert torch.equal(calls[0]["pooled_projections"][:1], pooled)


def test_guidance_is_the_published_combination(pipeline: TinyImagePipeline) -> None:
    """One Euler step is linear in the prediction, so the latents of a guided step combine in the same way."""
    one: dict[str, Any] = TINY | {"num_inference_steps": 1, "output_type": "latent"}
    noise = torch.randn(1, 12, 8, 12, generator=seeded(3))
    cond = pipeline(PROMPT, latents=noise, guidance_scale=1.0, **one).images
    uncond = pipeline("", latents=noise, guidance_scale=1.0, **one).images
    guided = pipeline(PROMPT, latents=noise, guidance_scale=4.0, **one).images
    torch.testing.assert_close(guided, uncond + 4 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert (cond - uncond).abs().max() > 1e-3


def test_pooled_text_is_the_mean_over_words(pipeline: TinyImagePipeline) -> None:
    embeds, pooled = pipeline.encode_prompt([PROMPT, OTHER], 1, torch.device("cpu"))
    for row, text in enumerate((PROMPT, OTHER)):
        words = len(text.split()) + 1  # and the end of the text
        torch.testing.assert_close(pooled[row], embeds[row, :words].mean(0))
        assert (embeds[row, words:] == 0).all()


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
def test_schedulers_swap(pipeline: TinyImagePipeline, scheduler: Any, config: dict[str, Any]) -> None:
    pipeline.scheduler = scheduler(**config)
    settings = TINY | {"num_inference_steps": 3}
    first = pipeline(PROMPT, generator=seeded(0), **settings).images
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(pipeline(PROMPT, generator=seeded(0), **settings).images, first)


def test_callback_sees_each_step_and_can_replace_latents(pipeline: TinyImagePipeline) -> None:
    seen: list[int] = []

    def zero(pipe: TinyImagePipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        assert set(tensors) == {"latents", "pooled_prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "pooled_prompt_embeds"]
    images = pipeline(PROMPT, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=names, **TINY).images
    assert seen == [0, 1]
    assert (images == 0.5).all()


def test_callback_can_stop_the_loop(pipeline: TinyImagePipeline) -> None:
    seen: list[int] = []

    def stop(pipe: TinyImagePipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        pipe._interrupt = True
        return tensors

    pipeline(PROMPT, callback_on_step_end=stop, **TINY)
    assert seen == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_directory_loads_by_itself(
    pipeline: TinyImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    size = export(pipeline, tmp_path / "model", dtype)
    assert size < 5_000_000 and not list((tmp_path / "model").glob(".export-*"))
    monkeypatch.chdir(tmp_path)
    loaded = DiffusionPipeline.from_pretrained("model", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dtype == loaded.text_encoder.dtype == torch.float32
    pipeline.transformer.to(dtype).to(torch.float32)  # what is lost by keeping it
    for part in ("transformer", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert loaded.scheduler.config.shift == 3.0
    expected = pipeline(PROMPT, generator=seeded(0), **TINY).images
    np.testing.assert_array_equal(loaded(PROMPT, generator=seeded(0), **TINY).images, expected)
    image = np.full((1, 64, 64, 3), 0.5, np.float32)
    assert loaded.attribute_score(image, [PROMPT]) == attribute_score(list(image), [PROMPT])

    loaded.save_pretrained(tmp_path / "again")
    for name in (*SOURCES, "model_index.json", *([WEIGHTS] if dtype == torch.float32 else [])):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_both_shipped_pipelines_load_in_one_process(
    pipeline: TinyImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """Local pipelines share one module cache, so a file of one name has to be the same file in both folders."""
    ours = {name: root / "examples" / "tiny_image" / name for name in SOURCES}
    theirs = {name: root / "examples" / "tiny_video" / name for name in VIDEO_SOURCES}
    for name in ours.keys() & theirs.keys():
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    export(pipeline, tmp_path / "image")
    monkeypatch.chdir(tmp_path)
    video = DiffusionPipeline.from_pretrained(root / "examples" / "tiny_video", trust_remote_code=True)
    image = DiffusionPipeline.from_pretrained("image", trust_remote_code=True)
    assert (type(video).__name__, type(image).__name__) == ("TinyVideoPipeline", "TinyImagePipeline")
    clip = np.full((1, 6, 64, 64, 3), 0.5, np.float32)
    assert image.attribute_score(clip[:, 0], [PROMPT]) == attribute_score(list(clip[:, 0]), [PROMPT])
    assert 0 <= video.attribute_score(clip, ["a red circle moving left over sand"]) < 1


def test_too_large_a_pipeline_is_not_written(
    pipeline: TinyImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.common.exporting.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"takes [\d,]+ bytes; it must be at most 1,000"):
        export(pipeline, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_sources_list_every_sibling_that_is_imported() -> None:
    """diffusers copies only what the pipeline's file itself imports; a sibling's sibling must be in the list too."""
    here = Path(inspect.getfile(TinyImagePipeline)).parent
    direct = {f"{name}.py" for name in get_relative_imports(here / SOURCES[0])}
    assert direct | {SOURCES[0]} == set(SOURCES)
    assert {f"{name}.py" for source in SOURCES for name in get_relative_imports(here / source)} == direct


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "prompt is .*at least one string"),
        ({"prompt": 3}, "prompt is 3"),
        ({"negative_prompt": ["", ""]}, "negative_prompt is .*as many strings as there are prompts"),
        ({"height": 31}, "height is 31; it must be a multiple of 2 from 2 to 32, such as"),
        ({"width": 0}, "width is 0; .*such as 2"),
        ({"width": 64}, "width is 64; .*such as 32"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; it must be at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"generator": [seeded(0), seeded(1)]}, "generator is a list of 2; .*list of 1"),
        ({"latents": torch.zeros(1, 12, 8, 8)}, r"latents has the shape \(1, 12, 8, 8\); .*\(1, 12, 8, 12\)"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; it must be one of np, pt, pil, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "names noise; a callback can have latents"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_be_right(
    pipeline: TinyImagePipeline, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**({"prompt": PROMPT} | TINY | wrong))
