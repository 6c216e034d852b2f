"""A text-to-video diffusers pipeline around a tiny Wan transformer; frames are pixels, not a VAE's code.

It loads with its components from the directory it stands in, from any working directory:

    DiffusionPipeline.from_pretrained("examples/tiny_video", trust_remote_code=True)

diffusers then copies this file, and the siblings that it imports by ``from .name import``, into its own
module cache. It does not follow the siblings' imports, so whatever they need is imported here as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .clips import FRAMES, SIZE
from .detector import attribute_score
from .drawing import Array
from .pipeline_call import check_loop, check_noise, check_outputs, check_prompts, check_sizes, save_sources, texts_of
from .seeing import colour_masks  # noqa: F401 -- the detector needs this file, see above
from .space_to_depth import FACTOR, coordinates, from_latents
from .words import encode

logger = logging.get_logger(__name__)

SOURCES = (
    *("pipeline.py", "clips.py", "detector.py"),
    *("drawing.py", "pipeline_call.py", "seeing.py", "space_to_depth.py", "words.py"),  # shared with the other models
)

Frames = Array | Tensor | list[list[PIL.Image.Image]]
Generators = torch.Generator | list[torch.Generator]
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Any]], dict[str, Any]]


class TinyVideoPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no type information
    """Text to clips of coloured shapes, with the loop of diffusers' `WanPipeline`.

    Under guidance the transformer runs twice a step, in the cache contexts ``cond`` and ``uncond``; the text
    features of a branch are one tensor object, handed over unchanged at every step.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: T5EncoderModel,
        transformer: WanTransformer3DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler
        )
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current or the last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a step has an unconditional branch."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of scheduler steps of the current or the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep of the step under way, None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set by a callback (``pipe._interrupt = True``) to skip the rest of the steps."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: object,
        negative_prompt: object,
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_videos_per_prompt: int,
        generator: object,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuse what `__call__` cannot serve, with the name, the value and what would be right.

        Raises:
            ValueError: for any argument that is out of range or does not fit the others.
        """
        prompts = check_prompts(prompt, negative_prompt)
        limit, (_, rows, columns) = self.transformer.config.rope_max_seq_len, self.transformer.config.patch_size
        steps = FACTOR * rows, FACTOR * columns
        check_sizes({"height": (height, steps[0], steps[0] * limit), "width": (width, steps[1], steps[1] * limit)})
        if not 1 <= num_frames <= limit:
            raise ValueError(f"num_frames is {num_frames}; it must be from 1 to {limit} (training used {FRAMES})")
        check_loop(num_inference_steps, guidance_scale, {"num_videos_per_prompt": num_videos_per_prompt})
        shape = self._latent_shape(prompts * num_videos_per_prompt, num_frames, height, width)
        check_noise(generator, latents, shape, "clip")
        check_outputs(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def encode_prompt(self, texts: list[str], num_videos_per_prompt: int, device: torch.device) -> Tensor:
        """Features ``[len(texts) * num_videos_per_prompt, words, width]`` in the transformer's dtype."""
        lost = sorted({w for t in texts for w in self.tokenizer.tokenize(t) if w == self.tokenizer.unk_token})
        if lost:
            logger.warning(f"some words of {texts} are not in the vocabulary of the tiny video model and are ignored")
        embeds = encode(self.tokenizer, self.text_encoder, texts, device).to(self.transformer.dtype)
        return embeds.repeat_interleave(num_videos_per_prompt, 0)

    def _latent_shape(self, batch: int, frames: int, height: int, width: int) -> tuple[int, ...]:
        return (batch, self.transformer.config.out_channels, frames, height // FACTOR, width // FACTOR)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        num_frames: int = FRAMES,
        height: int = SIZE,
        width: int = SIZE,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        num_videos_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> Any:
        """Generate ``B = len(prompt) * num_videos_per_prompt`` clips.

        Args:
            prompt: captions such as ``a red circle moving left and a blue cross spinning over sand``.
            negative_prompt: what the unconditional branch reads; training used the empty caption.
            num_frames: of a clip; training used 6.
            height: of a frame in pixels, a multiple of 4; training ended at 64.
            width: likewise.
            num_inference_steps: as the scheduler counts them (Heun's runs the network twice for most).
            guidance_scale: ``s`` in ``uncond + s * (cond - uncond)``; at 1 the unconditional branch does not run.
            num_videos_per_prompt: clips per caption, side by side in the batch.
            generator: of the noise; a list gives every clip its own, whatever the batch.
            latents: the noise itself, ``[B, 12, F, H/2, W/2]`` float32, in place of drawing it.
            output_type: ``np`` ``[B, F, H, W, 3]`` float32 in [0, 1], ``pt`` ``[B, F, 3, H, W]``, ``pil`` (a list
                of images per clip) or ``latent``.
            return_dict: False returns a tuple of one.
            callback_on_step_end: called as ``(pipe, step, timestep, tensors)`` after each step; the tensors of
                the dictionary that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: names of the tensors it is given (default: ``latents``).

        Returns:
            A `WanPipelineOutput`, whose ``frames`` are the clips, or a tuple of the clips alone.

        Raises:
            ValueError: see `check_inputs`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        wanted = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        self.check_inputs(
            prompt, negative_prompt, num_frames, height, width, num_inference_steps, guidance_scale,
            num_videos_per_prompt, generator, latents, output_type, wanted,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        prompts, negatives = texts_of(prompt), texts_of(negative_prompt)
        if isinstance(negative_prompt, str):
            negatives = negatives * len(prompts)
        prompt_embeds = self.encode_prompt(prompts, num_videos_per_prompt, device)
        negative_prompt_embeds = None
        if self.do_classifier_free_guidance:
            negative_prompt_embeds = self.encode_prompt(negatives, num_videos_per_prompt, device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        self.scheduler.set_begin_index(0)
        if latents is None:
            shape = self._latent_shape(len(prompts) * num_videos_per_prompt, num_frames, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device=device, dtype=torch.float32)

        dtype = self.transformer.dtype
        places = coordinates(latents.to(dtype))
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                model_input = torch.cat([latents.to(dtype), places], 1)
                timestep = t.expand(latents.shape[0])
                context = {
                    "step_index": i,
                    "sigma": float(self.scheduler.sigmas[i]),
                    "num_inference_steps": self._num_timesteps,
                }
                with self.transformer.cache_context("cond", **context):
                    prediction = self.transformer(
                        hidden_states=model_input,
                        timestep=timestep,
                        encoder_hidden_states=prompt_embeds,
                        return_dict=False,
                    )[0]
                if self.do_classifier_free_guidance:
                    with self.transformer.cache_context("uncond", **context):
                        unconditional = self.transformer(
                            hidden_states=model_input,
                            timestep=timestep,
                            encoder_hidden_states=negative_prompt_embeds,
                            return_dict=False,
                        )[0]
                    prediction = unconditional + guidance_scale * (prediction - unconditional)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    given = callback_on_step_end(self, i, t, {name: tensors[name] for name in wanted})
                    latents = given.pop("latents", latents)
                    prompt_embeds = given.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = given.pop("negative_prompt_embeds", negative_prompt_embeds)
                progress.update()
        self._current_timestep = None

        frames = latents if output_type == "latent" else _frames(latents, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    @staticmethod
    def attribute_score(frames: Array, prompts: list[str]) -> float:
        """Share in [0, 1] of the captions' attributes that the analytic detector finds in ``[B, F, H, W, 3]``.

        Raises:
            ValueError: if the numbers of clips and captions differ, or a caption is not of the training form.
        """
        return attribute_score(list(frames), prompts)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the components and this pipeline's source, so that the directory loads by itself.

        Keyword arguments are those of `DiffusionPipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        save_sources(self, Path(save_directory), SOURCES)


def _frames(latents: Tensor, output_type: str) -> Frames:
    """``[B, 12, F, H/2, W/2]`` -> clips in [0, 1], in the form that ``output_type`` names."""
    clips = from_latents(latents).float().clamp(0, 1)
    if output_type == "pt":
        return clips.permute(0, 1, 4, 2, 3)
    array: Array = clips.cpu().numpy()
    return array if output_type == "np" else [VaeImageProcessor.numpy_to_pil(clip) for clip in array]
