"""A bare module with the caller's own sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import Tensor, nn

from ditopt.adapters.base import Adapter, Sampler
from ditopt.errors import InputError
from ditopt.runtime.streams import watch_contexts

Rollout = Callable[[nn.Module, str, int], Tensor]


class ModuleAdapter(Adapter):
    """Runs ``rollout(model, prompt, seed) -> sample``."""

    def __init__(self, model: nn.Module, rollout: Rollout) -> None:
        if not callable(rollout):
            raise InputError(
                f"rollout={rollout!r} is not callable; give rollout(model, prompt, seed) -> Tensor, your sampling loop"
            )
        watch_contexts()
        self.networks = {"transformer": model}
        self._rollout = rollout

    def rollout(self, prompt: str, seed: int, **settings: Any) -> Tensor:
        """The caller's loop; ``settings`` are for pipelines and must be empty here."""
        if settings:
            raise InputError(f"settings {sorted(settings)} cannot be passed to a bare rollout")
        return self._rollout(self.networks["transformer"], prompt, seed)

    def describe(self) -> str:
        """The caller's loop by name and compiled code, so that an edited loop is another one."""
        code = getattr(self._rollout, "__code__", None)
        return f"{self.sampler().class_name} {'' if code is None else _code_text(code)}"

    def sampler(self) -> Sampler:
        """A bare loop tells nothing of itself: distances between steps are those of the timesteps."""
        return Sampler(getattr(self._rollout, "__name__", type(self._rollout).__name__), 1.0, {})


def _code_text(code: CodeType) -> str:
    """A function's code with the functions inside it, the same in every process."""
    constants = [_code_text(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
