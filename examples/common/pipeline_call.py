"""What the shipped pipelines share: which arguments a call takes, and how a pipeline is saved with its source.

The pipelines have it as a file beside them (a link), as diffusers copies those into its module cache.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


def texts_of(value: object) -> list[str]:
    """The strings of a prompt argument; none if it is not a string or a list of strings."""
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []


def check_prompts(prompt: object, negative_prompt: object) -> int:
    """How many prompts there are.

    Raises:
        ValueError: there is none, or negative prompts are neither one string nor as many.
    """
    prompts, negatives = texts_of(prompt), texts_of(negative_prompt)
    if not prompts:
        raise ValueError(f"prompt is {prompt!r}; it must be a string or a list of at least one string")
    if not isinstance(negative_prompt, str) and len(negatives) != len(prompts):
        raise ValueError(
            f"negative_prompt is {negative_prompt!r}; it must be a string"
            f" or a list of as many strings as there are prompts ({len(prompts)})"
        )
    return len(prompts)


def check_sizes(sizes: Mapping[str, tuple[int, int, int]]) -> None:
    """Pixels by name, each with the step and the largest that the model takes.

    Raises:
        ValueError: a size is not a multiple of its step from that to the largest.
    """
    for name, (value, step, limit) in sizes.items():
        if value <= 0 or value % step or value > limit:
            near = min(max(step, round(value / step) * step), limit)
            raise ValueError(
                f"{name} is {value}; it must be a multiple of {step} from {step} to {limit}, such as {near}"
            )


def check_loop(num_inference_steps: int, guidance_scale: float, copies: Mapping[str, int]) -> None:
    """``copies`` has the argument that says how many samples a prompt is to have.

    Raises:
        ValueError: one of these is too small.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    if guidance_scale < 1:
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be at least 1, and 1 means no guidance")
    for name, number in copies.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def check_noise(generator: object, latents: Tensor | None, shape: Sequence[int], sample: str) -> None:
    """``shape`` is that of latents, a batch of what is called a ``sample``.

    Raises:
        ValueError: generators or latents do not fit the batch.
    """
    if isinstance(generator, list) and len(generator) != shape[0]:
        told = f"one generator or a list of {shape[0]}, one per {sample}"
        raise ValueError(f"generator is a list of {len(generator)}; it must be {told}")
    if latents is not None and tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents has the shape {tuple(latents.shape)}; for these arguments it must be {tuple(shape)}")


def check_outputs(output_type: str, wanted: Sequence[str], known: Collection[str]) -> None:
    """``wanted`` are the tensors that a callback is to have, ``known`` those that there are.

    Raises:
        ValueError: the type is unknown, or one of the tensors.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs names {', '.join(unknown)}; a callback can have {', '.join(known)}"
        )


def save_sources(pipeline: Any, target: Path, sources: Sequence[str]) -> None:
    """Let a saved pipeline's directory load by itself: with the files ``sources``, of which the first has its class."""
    here = Path(inspect.getfile(type(pipeline))).parent
    index = target / pipeline.config_name
    entries = {k: v for k, v in json.loads(index.read_text()).items() if k != "_name_or_path"}
    entries["_class_name"] = [Path(sources[0]).stem, type(pipeline).__name__]
    index.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    if target.resolve() != here.resolve():
        for name in sources:
            shutil.copyfile(here / name, target / name)
