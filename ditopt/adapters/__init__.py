"""Adapters: who calls the network, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ditopt.adapters.base import Adapter
from ditopt.adapters.diffusers import DiffusersAdapter, is_pipeline
from ditopt.adapters.module import ModuleAdapter, Rollout
from ditopt.errors import InputError


def adapt(model: Any, rollout: Rollout | None, pipe_kwargs: Mapping[str, Any] | None) -> Adapter:
    """The adapter for a diffusers pipeline, or for a module with its rollout.

    Raises:
        InputError: the model is neither, or the arguments do not go together.
    """
    if is_pipeline(model):
        if rollout is not None:
            raise InputError(
                "rollout= is for bare modules; a diffusers pipeline is its own sampling loop (use pipe_kwargs=)"
            )
        return DiffusersAdapter(model, pipe_kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}; give a diffusers pipeline, or an nn.Module together with rollout="
        )
    if rollout is None:
        raise InputError(
            f"{type(model).__name__} is a bare module: give rollout(model, prompt, seed) -> Tensor, your own "
            "sampling loop"
        )
    if pipe_kwargs:
        raise InputError("pipe_kwargs= is for diffusers pipelines; put such settings into your rollout")
    return ModuleAdapter(model, rollout)


__all__ = ["Adapter", "DiffusersAdapter", "ModuleAdapter", "Rollout", "adapt", "is_pipeline"]
