"""Tensors as they were at some time: the very objects, not written to since, at the same addresses.

Torch counts up a tensor's version with every write. Tensors are referred to weakly: one that is gone is no input of any
later call. Not seen is a write through ``.data``, or to a tensor that was made in ``torch.inference_mode``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

Stamp = tuple[int, int]
"""A tensor's version and address."""


def stamp(tensor: Tensor) -> Stamp:
    """What changes when a tensor is written to or given other memory."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


class Stamped:
    """Tensors, and how they were when this was made."""

    __slots__ = ("_stamps", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(each) for each in tensors]
        self._stamps = [stamp(each) for each in tensors]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are these, unchanged."""
        return len(tensors) == len(self._tensors) and all(
            ref() is each and made == stamp(each)
            for ref, made, each in zip(self._tensors, self._stamps, tensors, strict=True)
        )


@dataclass(frozen=True)
class Made:
    """Of what a graph made something: tensors, and numbers."""

    tensors: Stamped
    numbers: tuple[float, ...]


class Ingredients:
    """Which inputs of a graph make its function: weights, and what else the module has, as the scale of an adapter.

    Dynamo hands numbers over as tensors made anew for each call, which are compared by value.
    """

    def __init__(self, inputs: Sequence[fx.Node], positions: Sequence[int]) -> None:
        values = {position: inputs[position].meta["val"] for position in positions if position < len(inputs)}
        lasting = {
            at: isinstance(each, Tensor) and (each.ndim or each.device.type != "cpu") for at, each in values.items()
        }
        self._tensors = [at for at in values if lasting[at]]
        self._numbers = [at for at in values if not lasting[at]]

    def of(self, arguments: Sequence[Any]) -> Made:
        """As they are in a call with ``arguments``."""
        return Made(Stamped([arguments[at] for at in self._tensors]), self._values(arguments))

    def are(self, made: Made, arguments: Sequence[Any]) -> bool:
        """Whether a call with ``arguments`` has the very ones."""
        same = made.numbers == self._values(arguments)
        return same and made.tensors.is_of([arguments[at] for at in self._tensors])

    def _values(self, arguments: Sequence[Any]) -> tuple[float, ...]:
        return tuple(float(arguments[at]) for at in self._numbers)


def _lasts(value: object) -> bool:
    """Whether an input is a tensor that the module has."""
    return isinstance(value, Tensor) and (value.ndim > 0 or value.device.type != "cpu")
