"""Times a program's variants on this machine: what a computed step, a predicted one and a skipped range take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ditopt.passes._infra import Prediction, StepPlan
from ditopt.passes.cast import castable
from ditopt.passes.predict import factors_name, slot_name
from ditopt.runtime.program import Program
from ditopt.sites import STEP
from ditopt.trace import count_flops


def synchronise(tensors: Sequence[Any]) -> None:
    """Wait for the devices that hold ``tensors``."""
    if any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tensors):
        torch.cuda.synchronize()


@torch.no_grad()
def time_variant(program: Program, plan: StepPlan, arguments: Sequence[Any], repeats: int = 5) -> float:
    """Median seconds of one run of a variant on ``arguments`` (a call's inputs), after two warm-up runs.

    Slots hold zeros of the recorded shapes: the time of a dense tensor program does not depend on values.
    """
    variant = program.variants.get(plan)
    added = {}
    for prediction in plan.predicted:
        shapes = _feature_values(program, prediction.site)
        for age in range(prediction.history):
            for stream, value in enumerate(shapes):
                added[slot_name(prediction.site, age, stream)] = value
        added[factors_name(prediction.site)] = torch.zeros(prediction.terms, device=shapes[0].device)
    seconds = []
    for _ in range(repeats + 2):
        values = [arguments[i] if isinstance(i, int) else added[i] for i in variant.inputs]
        began = time.perf_counter()
        results = variant.run(values)
        synchronise(results)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _feature_values(program: Program, site: str) -> list[Tensor]:
    from ditopt.passes.features import feature

    found = feature(program.variants.trace.gm, program.variants.index, site)
    return [
        torch.zeros(tuple(end.meta["val"].shape), dtype=end.meta["val"].dtype, device=end.meta["val"].device)
        for end in found.ends
    ]


def measure_seconds(
    program: Program, arguments: Sequence[Any], ranges: Sequence[str], dtypes: Sequence[str] = ()
) -> dict[str, float]:
    """Seconds of a ``full`` and a ``predicted`` step, what predicting each of ``ranges`` saves, and each of ``dtypes``.

    The range of all blocks is timed; others get the share of it that their FLOPs have. A dtype's time is that of a
    full step whose products are computed in it; there is none where a network has no such products or it does not run.
    """
    trace = program.variants.trace
    seconds = {"full": time_variant(program, StepPlan((), (STEP,)), arguments)}
    seconds["predicted"] = time_variant(program, StepPlan((Prediction(STEP, 2),)), arguments)
    for dtype in dtypes if castable(trace.gm) else ():
        with suppress(RuntimeError):  # the device lacks the dtype, or the memory for weights in it
            seconds[dtype] = time_variant(program, StepPlan((), (STEP,), dtype=dtype), arguments)
    spans = trace.ranges()
    if ranges:
        everything = next(name for name, span in spans.items() if span == (0, len(trace.blocks) - 1))
        rest = time_variant(program, StepPlan((Prediction(everything, 2),), (STEP,)), arguments)
        flops = [count_flops(trace.gm, block) for block in trace.blocks]
        for name in ranges:
            first, last = spans[name]
            seconds[name] = (seconds["full"] - rest) * sum(flops[first : last + 1]) / max(sum(flops), 1)
    return seconds
