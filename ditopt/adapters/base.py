"""Who calls the network, and how: the one interface through which the rest sees a pipeline or a bare loop."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.errors import NonFiniteError, RolloutError
from ditopt.plan import LATENT_NAMES, TIMESTEP_NAMES
from ditopt.runtime.clock import read_timestep
from ditopt.runtime.streams import current_context_name


@dataclass(frozen=True)
class CallRecord:
    """One call of a network in a rollout: which network, at what timestep, with which conditioning object.

    ``context`` is the name of diffusers' ``cache_context`` around the call; ``latents`` is a digest of the
    latents' values (None: not taken).
    """

    network: str
    timestep: float
    identity: int
    batch: int
    context: str | None = None
    latents: str | None = None

    @property
    def branch(self) -> tuple[int, str | None]:
        """What tells the call's guidance branch, as run-time streams do."""
        return self.identity, self.context


@dataclass
class CallLog:
    """All calls of one rollout in order, and the names of the arguments that matter.

    ``contexts`` are the names of diffusers' ``cache_context`` if branches that share the conditioning object are
    told apart by them; ``looked_at`` are the tensor arguments among which ``identity`` was sought.
    """

    records: list[CallRecord] = field(default_factory=list)
    timestep: str = ""
    latents: str = ""
    identity: str | None = None
    forward: tuple[str, ...] = ()
    kept: list[Any] = field(default_factory=list)
    contexts: tuple[str, ...] | None = None
    looked_at: tuple[str, ...] = ()


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
            RolloutError: it is no tensor.
            NonFiniteError: it has NaN or infinite values.
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
            raise NonFiniteError(
                f"the model gave {bad} NaN or infinite values of {sample.numel()} for prompt {prompt!r}, "
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


@dataclass(frozen=True)
class _Call:
    """A call as it comes in: the tensors given by name, and what would be gone later."""

    network: str
    tensors: dict[str, Tensor]
    context: str | None
    latents: str | None


@contextmanager
def watch_calls(networks: dict[str, nn.Module]) -> Iterator[CallLog]:
    """Record every call of the networks while the context lasts.

    The argument that holds the timestep is found by name, else as the small tensor whose value changes;
    the latents by name, else as the first tensor argument of two or more dimensions. The conditioning
    object (whose identity tells guidance branches and generations apart) is one of the other tensor
    arguments: one whose objects stay the same from step to step, a branch having one; of several such
    the one with the most objects, so that an argument which the branches share comes last. The name of
    diffusers' ``cache_context`` around a call tells branches apart as well.
    """
    log = CallLog()
    raw: list[_Call] = []
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
            tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
            latents = _latents_name(tensors, tensors)
            digest = _digest_of(tensors[latents]) if latents else None  # loops may write into them later
            raw.append(_Call(name, tensors, current_context_name(), digest))

        handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()
        _fill(log, raw)


def _latents_name(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Which of the arguments ``names`` holds the latents; empty if none can."""
    large = [name for name in names if tensors[name].ndim >= 2]
    return next((name for name in LATENT_NAMES if name in large), large[0] if large else "")


def _digest_of(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()


def _fill(log: CallLog, raw: Sequence[_Call]) -> None:
    if not raw:
        return
    log.kept = [call.tensors for call in raw]
    first = raw[0].tensors
    shared = [key for key in first if all(key in call.tensors for call in raw)]
    small = [key for key in shared if first[key].ndim <= 1]
    log.timestep = next((key for key in TIMESTEP_NAMES if key in small), "") or _changing(raw, small)
    log.latents = _latents_name(first, shared)
    log.looked_at = tuple(key for key in shared if key not in (log.timestep, log.latents))
    if not log.timestep:
        return
    times = [read_timestep(call.tensors[log.timestep]) for call in raw]
    log.identity = _find_identity(raw, times, log.looked_at)
    for call, time in zip(raw, times, strict=True):
        identity = id(call.tensors[log.identity]) if log.identity else 0
        batch = int(call.tensors[log.latents].shape[0]) if log.latents else 1
        log.records.append(CallRecord(call.network, time, identity, batch, call.context, call.latents))
    names = {(record.network, *record.branch) for record in log.records}
    if len(names) > len({name[:2] for name in names}):
        log.contexts = tuple(dict.fromkeys(call.context for call in raw if call.context is not None))


def _find_identity(raw: Sequence[_Call], times: Sequence[float], names: Sequence[str]) -> str | None:
    """The argument whose objects tell branches apart: constant ones, the most, rather of two dimensions than fewer.

    An argument is constant if there are as many objects in the whole rollout of a network as in the step with the
    most: objects made anew for a step or a call add up to more. (Some steps may leave a branch out.)
    """
    objects: dict[str, int] = {}
    for name in names:
        seen: dict[str, dict[float, set[int]]] = {}
        for call, time in zip(raw, times, strict=True):
            seen.setdefault(call.network, {}).setdefault(time, set()).add(id(call.tensors[name]))
        counts = [(len(set().union(*steps.values())), max(map(len, steps.values()))) for steps in seen.values()]
        if all(total == most for total, most in counts):
            objects[name] = sum(total for total, _ in counts)
    return max(objects, key=lambda name: (objects[name], min(raw[0].tensors[name].ndim, 2)), default=None)


def _changing(raw: Sequence[_Call], small: Sequence[str]) -> str:
    """The small tensor argument whose value changes from call to call."""
    for key in small:
        values = {float(call.tensors[key].flatten()[0]) for call in raw}
        if len(values) > 1:
            return key
    return ""
