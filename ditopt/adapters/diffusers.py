"""A diffusers pipeline: its networks, its sampling loop, and its loop with fewer steps or another scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditopt.adapters.base import Adapter, Sampler
from ditopt.errors import InputError
from ditopt.runtime.streams import watch_contexts

GIVEN_ELSEWHERE = {
    "prompt": "prompts are the second argument of ditopt.optimize",
    "generator": "every prompt is generated from a seed of its own, counted from seed=",
}
NETWORKS = ("transformer", "transformer_2", "unet")


def is_pipeline(model: object) -> bool:
    """Whether ``model`` is a diffusers pipeline (diffusers is not imported for the answer)."""
    return any(
        cls.__name__ == "DiffusionPipeline" and cls.__module__.startswith("diffusers") for cls in type(model).__mro__
    )


class DiffusersAdapter(Adapter):
    """Calls a pipeline with the user's settings (``pipe_kwargs``) and takes the decoded sample."""

    def __init__(self, pipe: Any, pipe_kwargs: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.settings = dict(pipe_kwargs or {})
        self.networks = {
            name: getattr(pipe, name) for name in NETWORKS if isinstance(getattr(pipe, name, None), nn.Module)
        }
        if not self.networks:
            raise InputError(
                f"{type(pipe).__name__} has no network among {', '.join(NETWORKS)}; give its denoiser as an "
                "nn.Module with rollout="
            )
        accepted = inspect.signature(pipe.__call__).parameters
        if "prompt" not in accepted:
            raise InputError(
                f"{type(pipe).__name__} takes no prompt, its arguments are {', '.join(accepted)}; give its network, "
                "with your call of the pipeline as rollout="
            )
        for name, instead in GIVEN_ELSEWHERE.items():
            if name in self.settings:
                raise InputError(f"pipe_kwargs has {name}, which ditopt sets itself: {instead}")
        unknown = sorted(set(self.settings) - set(accepted))
        if unknown:
            raise InputError(
                f"pipe_kwargs {', '.join(unknown)} are not arguments of {type(pipe).__name__}; known are "
                f"{', '.join(accepted)}"
            )
        self.accepted = accepted
        watch_contexts()
        self._progress = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**{**self._progress, "disable": True})

    def restore(self) -> None:
        """Give the pipeline its own progress bar back."""
        self.pipe.set_progress_bar_config(**{"disable": False, **self._progress})

    def rollout(self, prompt: str, seed: int, **settings: Any) -> Tensor:
        """Generate one sample with the user's settings, changed by ``settings``."""
        arguments = {**self.settings, **settings}
        if "output_type" in self.accepted:
            arguments.setdefault("output_type", "np")
            if arguments["output_type"] == "pil":  # the same pixels, which can be compared
                arguments["output_type"] = "np"
        generator = torch.Generator().manual_seed(seed)
        result = self.pipe(prompt=prompt, generator=generator, **arguments)
        for name in ("frames", "images", "sample", "audios"):
            if hasattr(result, name):
                return _to_tensor(getattr(result, name))  # type: ignore[no-any-return]  # checked_rollout checks it
        return _to_tensor(result[0])  # type: ignore[no-any-return]  # as above

    def sampler(self) -> Sampler:
        """Scheduler class, guidance scale and the sigma of every timestep of the latest rollout."""
        scheduler = self.pipe.scheduler
        steps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
        known: dict[float, float] = {}
        if isinstance(steps, Tensor) and isinstance(sigmas, Tensor) and len(sigmas) >= len(steps):
            known = {float(t): float(s) for t, s in zip(steps.tolist(), sigmas.tolist(), strict=False)}
        guidance = self.settings.get("guidance_scale", self._default("guidance_scale", 1.0))
        return Sampler(type(scheduler).__name__, float(guidance if guidance is not None else 1.0), known)

    def describe(self) -> str:
        """The scheduler with its configuration, and the classes of the other components."""
        parts = {name: type(part).__name__ for name, part in self.pipe.components.items()}
        return f"{type(self.pipe).__name__} {parts} {dict(self.pipe.scheduler.config)}"

    @property
    def steps(self) -> int:
        """The number of sampling steps that the user's settings ask for."""
        return int(self.settings.get("num_inference_steps", self._default("num_inference_steps", 50)))

    def _default(self, name: str, otherwise: Any) -> Any:
        parameter = self.accepted.get(name)
        return otherwise if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

    @contextmanager
    def scheduler(self, replacement: Any) -> Iterator[None]:
        """Sample with another scheduler while the context lasts."""
        own = self.pipe.scheduler
        self.pipe.scheduler = replacement
        try:
            yield
        finally:
            self.pipe.scheduler = own


def _to_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)).float()
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return torch.from_numpy(np.stack(value)).float()
    return value
