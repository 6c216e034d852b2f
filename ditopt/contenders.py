"""Who generates in a benchmark, and how: networks compiled by Inductor or ditopt, schedulers, rival solvers."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.adapters import DiffusersAdapter
from ditopt.backend import Session

SOLVERS = {"unipc": "UniPCMultistepScheduler", "dpmpp": "DPMSolverMultistepScheduler"}

Sample = tuple[Tensor, float]


@dataclass(frozen=True)
class Contender:
    """One way to generate: calls of the networks (None: eager), scheduler (None: the pipeline's), settings."""

    adapter: DiffusersAdapter
    calls: Mapping[str, Any]
    scheduler: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def generate(self, prompt: str, seed: int) -> Sample:
        """The sample and the wall-clock seconds of the whole generation."""
        swapped = self.adapter.scheduler(self.scheduler) if self.scheduler is not None else nullcontext()
        with installed(self.adapter.networks, self.calls), swapped:
            began = time.perf_counter()
            sample = self.adapter.checked_rollout(prompt, seed, **self.settings)  # ends on the host: no work is left
            return sample, time.perf_counter() - began


@contextmanager
def installed(networks: Mapping[str, nn.Module], calls: Mapping[str, Any]) -> Iterator[None]:
    """Let each network run by ``calls[name]`` (what ``Module.compile`` made; None: eager) while the context lasts."""
    before = {name: network._compiled_call_impl for name, network in networks.items()}
    try:
        for name, network in networks.items():
            network._compiled_call_impl = calls.get(name)
        yield
    finally:
        for name, network in networks.items():
            network._compiled_call_impl = before[name]


def compiled_calls(networks: Mapping[str, nn.Module], sessions: Mapping[str, Session]) -> dict[str, Any]:
    """The compiled call of every network: by ditopt where it has a session, else by Inductor alone."""
    made = {}
    for name, network in networks.items():
        with installed({name: network}, {}):
            if name in sessions:
                network.compile(backend="ditopt", options={"session": sessions[name]})
            else:
                network.compile(backend="inductor")
            made[name] = network._compiled_call_impl
    return made


def flow_solver(name: str, own: Any) -> Any:
    """Diffusers' multistep solver ``name`` (``unipc``, ``dpmpp``) in the form that goes with the scheduler ``own``.

    For flow matching its timesteps are kept exact; diffusers rounds them to integers, which would cost it accuracy.
    """
    import diffusers

    cls = getattr(diffusers, SOLVERS[name])
    config = own.config
    if "FlowMatch" not in type(own).__name__:
        return cls.from_config(config)
    shared = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type")
    kept = {key: config[key] for key in shared if config.get(key) is not None}
    made = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.get("shift") or 1.0, **kept)
    original = made.set_timesteps

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        exact = made.sigmas[: len(made.timesteps)] * made.config.num_train_timesteps
        made.timesteps = exact.to(device=made.timesteps.device, dtype=torch.float32)

    made.set_timesteps = set_timesteps
    return made
