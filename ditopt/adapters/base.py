"""Who calls the network, and how: the one interface through which the rest sees a pipeline or a bare loop."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.errors import RolloutError
from ditopt.plan import LATENT_NAMES, TIMESTEP_NAMES
from ditopt.runtime.clock import read_timestep


@dataclass(frozen=True)
class CallRecord:
    """One call of a network in a rollout: which network, at what timestep, with which conditioning object."""

    network: str
    timestep: float
    identity: int
    batch: int


@dataclass
class CallLog:
    """All calls of one rollout in order, and the names of the arguments that matter."""

    records: list[CallRecord] = field(default_factory=list)
    timestep: str = ""
    latents: str = ""
    identity: str | None = None
    forward: tuple[str, ...] = ()
    kept: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Sampler:
    """What the adapter knows of the sampling loop."""

    class_name: str
    guidance: float
    sigmas: dict[float, float]


class Adapter(ABC):
    """A model with its sampling loop."""

    networks: dict[str, nn.Module]

    @abstractmethod
    def rollout(self, prompt: str, seed: int, **settings: Any) -> Tensor:
        """The finished sample for a prompt and seed, float32 on the CPU."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """The sampling loop's facts after a rollout."""

    def describe(self) -> str:
        """What else a rollout depends on, as text: two loops that differ should differ in it."""
        return type(self).__name__

    def checked_rollout(self, prompt: str, seed: int, **settings: Any) -> Tensor:
        """A rollout whose result is a finite tensor.

        Raises:
            RolloutError: it is not.
        """
        with torch.no_grad():
            sample = self.rollout(prompt, seed, **settings)
        if not isinstance(sample, Tensor):
            raise RolloutError(
                f"rollout returned {type(sample).__name__} for prompt {prompt!r}; it must return the finished "
                "sample as a torch.Tensor"
            )
        if not bool(torch.isfinite(sample).all()):
            bad = int((~torch.isfinite(sample)).sum())
            raise RolloutError(
                f"the dense model gave {bad} NaN or infinite values of {sample.numel()} for prompt {prompt!r}, "
                f"seed {seed}; mend the model, dtype or sampler first"
            )
        return sample.detach().float().cpu()


def forward_order(network: nn.Module) -> tuple[str, ...]:
    """Names of the forward's parameters in order."""
    return tuple(
        name
        for name, p in inspect.signature(network.forward).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


@contextmanager
def watch_calls(networks: dict[str, nn.Module]) -> Iterator[CallLog]:
    """Record every call of the networks while the context lasts.

    The argument that holds the timestep is found by name, else as the small tensor whose value changes;
    the latents by name, else as the tensor argument of the output's shape; the conditioning object
    (whose identity tells guidance branches and generations apart) is the first other tensor argument
    of two or more dimensions that stays the same object from step to step.
    """
    log = CallLog()
    raw: list[tuple[str, dict[str, Any]]] = []
    handles = []
    for name, network in networks.items():
        order = forward_order(network)
        log.forward = log.forward or order

        def before(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            name: str = name,
            order: tuple[str, ...] = order,
        ) -> None:
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            raw.append((name, {key: value for key, value in given.items() if isinstance(value, Tensor)}))

        handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()
        _digest(log, raw)


def _digest(log: CallLog, raw: Sequence[tuple[str, dict[str, Any]]]) -> None:
    if not raw:
        return
    shared = [key for key in raw[0][1] if all(key in given for _, given in raw)]
    small = [key for key in shared if raw[0][1][key].ndim <= 1]
    log.timestep = next((key for key in TIMESTEP_NAMES if key in small), "") or _changing(raw, small)
    large = [key for key in shared if key != log.timestep and raw[0][1][key].ndim >= 2]
    log.latents = next((key for key in LATENT_NAMES if key in large), large[0] if large else "")
    for key in [k for k in large if k != log.latents]:
        objects = {id(given[key]) for _, given in raw}
        if len(objects) <= max(1, len(raw) // 2):
            log.identity = key
            break
    for network, given in raw:
        if not log.timestep:
            break
        identity = id(given[log.identity]) if log.identity else 0
        batch = int(given[log.latents].shape[0]) if log.latents else 1
        log.records.append(CallRecord(network, read_timestep(given[log.timestep]), identity, batch))
    log.kept = [given for _, given in raw]


def _changing(raw: Sequence[tuple[str, dict[str, Any]]], small: Sequence[str]) -> str:
    """The small tensor argument whose value changes from call to call."""
    for key in small:
        values = {float(given[key].flatten()[0]) for _, given in raw}
        if len(values) > 1:
            return key
    return ""
