"""Times a program's variants on this machine: what a computed step, a predicted one and a skipped range take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.cost_models.measured import FULL, form_name
from ditopt.errors import AuditError
from ditopt.passes._infra import Prediction, StepPlan, tensor_value
from ditopt.passes.cast import castable
from ditopt.passes.combine import factors_name, slot_name
from ditopt.passes.kept import stand_ins
from ditopt.passes.second_order import SECOND_ORDER
from ditopt.passes.simplify import simplifiable
from ditopt.runtime.program import Program
from ditopt.sites import STEP
from ditopt.trace import count_flops

MATRICES = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
WARM_UPS = 2
ROUNDS = 9


def synchronise(tensors: Sequence[Any]) -> None:
    """Wait for the devices that hold ``tensors``."""
    if any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tensors):
        torch.cuda.synchronize()


Timed = Callable[[], float]
"""Runs a variant once; the seconds it took."""


def inputs_for(
    program: Program, plan: StepPlan, arguments: Sequence[Any], lists: Mapping[str, Tensor] | None = None
) -> list[Any]:
    """What a variant is called with, on ``arguments`` (a call's inputs) and the ``lists`` of its sparse attention.

    Slots hold zeros of the recorded shapes: the time of a dense tensor program does not depend on values.
    """
    added: dict[str, Tensor] = dict(lists or {})
    if any(each.reads for each in plan.sparse):
        added |= stand_ins(program.variants.graph(plan), added)
    for prediction in plan.predicted:
        added |= _slots(program, prediction.site, prediction.history)
        added[factors_name(prediction.site)] = torch.zeros(prediction.terms, device=next(iter(added.values())).device)
    if plan.second_order:
        added |= _slots(program, STEP, 1)
        added[factors_name(SECOND_ORDER)] = torch.zeros(2, device=next(iter(added.values())).device)
    variant = program.variants.get(plan)
    added |= program.computed_ahead(variant, arguments)
    return [arguments[i] if isinstance(i, int) else added[i] for i in variant.inputs]


def prepared(program: Program, plan: StepPlan, arguments: Sequence[Any]) -> Timed:
    """A variant on ``arguments`` (a call's inputs), compiled and run twice."""
    variant, given = program.variants.get(plan), inputs_for(program, plan, arguments)

    @torch.no_grad()
    def seconds() -> float:
        values = list(given)
        began = time.perf_counter()
        results = variant.run(values)
        synchronise(results)
        return time.perf_counter() - began

    return warmed(seconds)


def timed(run: Callable[[], Tensor]) -> Timed:
    """The seconds that ``run`` takes until its result is there."""

    def seconds() -> float:
        began = time.perf_counter()
        synchronise([run()])
        return time.perf_counter() - began

    return seconds


def warmed(variant: Timed) -> Timed:
    """What is timed, run ``WARM_UPS`` times."""
    for _ in range(WARM_UPS):
        variant()
    return variant


def time_in_turn(variants: Mapping[str, Timed]) -> dict[str, float]:
    """Median seconds of each, run in turn ``ROUNDS`` times: what slows the machine for a while slows all of them."""
    rounds = [{name: variant() for name, variant in variants.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) for name in variants}


def _slots(program: Program, site: str, history: int) -> dict[str, Tensor]:
    values = _feature_values(program, site)
    return {slot_name(site, age, stream): value for age in range(history) for stream, value in enumerate(values)}


def _feature_values(program: Program, site: str) -> list[Tensor]:
    from ditopt.passes.features import feature

    found = feature(program.variants.trace.gm, program.variants.index, site)
    return [
        torch.zeros(tuple(end.meta["val"].shape), dtype=end.meta["val"].dtype, device=end.meta["val"].device)
        for end in found.ends
    ]


def measure_seconds(
    program: Program,
    arguments: Sequence[Any],
    ranges: Sequence[str],
    dtypes: Sequence[str] = (),
    simplify: bool = True,
) -> dict[str, float]:
    """Seconds of a ``full`` and a ``predicted`` step, what predicting each of ``ranges`` saves, and of other forms.

    The range of all blocks is timed; others get the share of it that their FLOPs have. Forms (``form_name``) are full
    steps computed otherwise: in each of ``dtypes``, simplified, and both; there is none where a network has no such
    products, the dtype does not run, or there is nothing to simplify.
    """
    trace, spans = program.variants.trace, program.variants.trace.ranges()
    plans = {FULL: StepPlan((), (STEP,)), "predicted": StepPlan((Prediction(STEP, 2),))}
    if ranges:
        everything = next(name for name, span in spans.items() if span == (0, len(trace.blocks) - 1))
        plans["rest"] = StepPlan((Prediction(everything, 2),), (STEP,))
    variants = {name: prepared(program, plan, arguments) for name, plan in plans.items()}
    for dtype in (None, *(dtype for dtype in dtypes if _has_faster_products(program, dtype))):
        for simpler in (False, True):
            form = form_name(dtype, simpler)
            if form == FULL or (simpler and not (simplify and simplifiable(trace.gm, dtype))):
                continue
            try:
                plan = StepPlan((), (STEP,), dtype=dtype, simplify=simpler)
                variants[form] = prepared(program, plan, arguments)
            except (RuntimeError, AuditError, OSError) as error:
                # a rewrite that is not right for this graph, a dtype that the device lacks, no memory for its weights
                program.variants.reasons.append(f"{form} steps were not tried: {error}")
                break
    seconds = time_in_turn(variants)
    if ranges:
        saved = seconds[FULL] - seconds.pop("rest")
        seconds |= shared_by_flops(saved, program, everything, ranges)
    return seconds


def _has_faster_products(program: Program, dtype: str) -> bool:
    """Whether there are products to cast, and the largest takes less time in ``dtype``; if it does not, that is told.

    A processor that has no such products takes several times as long, and compiling a step for it some seconds.
    """
    products = castable(program.variants.trace.gm)
    if not products:
        return False
    operands = [[arg for arg in p.args[-2:] if isinstance(arg, fx.Node)] for p in products if p.target in MATRICES]
    matrices = [(tensor_value(left), tensor_value(right)) for left, right in operands]
    if not matrices:
        return True
    left, right = max(matrices, key=lambda pair: pair[0].numel() * pair[1].shape[-1])
    wide = product_seconds(left, right, left.dtype)
    try:
        narrow = product_seconds(left, right, getattr(torch, dtype))
    except RuntimeError as error:
        program.variants.reasons.append(f"{dtype} was not tried: {error}")
        return False
    if narrow < wide:
        return True
    told = f"the largest product takes {1e3 * narrow:.3g} ms in it, {1e3 * wide:.3g} ms as it is"
    program.variants.reasons.append(f"{dtype} was not tried: {told}")
    return False


def product_seconds(left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Median seconds of a product ``[M, K] x [K, N]`` of the shapes of two (fake) tensors, on their device."""
    one, two = (torch.zeros(tuple(part.shape), dtype=dtype, device=part.device) for part in (left, right))
    return time_in_turn({"product": warmed(timed(lambda: torch.mm(one, two)))})["product"]


def shared_by_flops(saved: float, program: Program, widest: str, ranges: Sequence[str]) -> dict[str, float]:
    """What predicting each of ``ranges`` saves: of the seconds ``saved`` by ``widest``, the share of its FLOPs."""
    trace, spans = program.variants.trace, program.variants.trace.ranges()
    flops = [count_flops(trace.gm, block) for block in trace.blocks]
    within = {name: sum(flops[spans[name][0] : spans[name][1] + 1]) for name in {widest, *ranges}}
    return {name: saved * within[name] / max(within[widest], 1) for name in ranges}
