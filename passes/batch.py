"""Batch: a graph that takes one timestep becomes one that takes a schedule's, and reads each weight once for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.passes._infra import Tracer

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)
MOST_CALLS = 2
"""A batched graph with more than this many times the calls does steps one after the other somewhere."""


def as_outputs(gm: fx.GraphModule, trace: Tracer) -> fx.GraphModule:
    """The same graph with outputs of its own, contiguous: none is a view of an input or of another."""
    return trace(lambda *values: _own(_Plain(gm).run(*values)), _described(gm))


def batched(gm: fx.GraphModule, position: int, rows: int, trace: Tracer) -> fx.GraphModule | str:
    """A graph that does what ``gm`` does for ``rows`` values of its input ``position``, or why there is none.

    That input and all outputs get a first dimension of ``rows``; outputs are contiguous.
    """
    values = _described(gm)
    one = values[position]
    values[position] = one.new_empty((rows, *one.shape))
    dims = tuple(0 if number == position else None for number in range(len(values)))

    def run(*given: Tensor) -> list[Tensor]:
        return _own(torch.vmap(lambda *each: tuple(_Plain(gm).run(*each)), in_dims=dims)(*given))

    try:
        found = trace(run, values)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # an operator that has no batched form
        return f"not for all steps at once: {str(error).strip().splitlines()[0]}"
    before, after = (sum(node.op == "call_function" for node in each.graph.nodes) for each in (gm, found))
    if after > MOST_CALLS * before + 40:
        return f"not for all steps at once: {before} operations would become {after}"
    return found


def _own(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.clone(memory_format=torch.contiguous_format) for value in values]


def _described(gm: fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]


class _Plain(fx.Interpreter):
    """Runs a graph with operators that can be batched: conversions, and views of what then lies otherwise in memory."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.prims.convert_element_type.default:
            return args[0].to(args[1])
        if target in VIEWS:
            return args[0].reshape(args[1])
        return super().call_function(target, args, kwargs)
