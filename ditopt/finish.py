"""What is put beside a finished plan so that a person can look at it: samples, and where the time of a step goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ditopt.device import describe_device
from ditopt.errors import DitoptError
from ditopt.measure import Evaluator
from ditopt.passes._infra import StepPlan
from ditopt.plan import Rule, format_steps
from ditopt.profiler.observe import Pair, inputs_of
from ditopt.profiler.work import machine_rates, variant_work
from ditopt.report.samples import DENSE, FEWER, OPTIMISED, samples_path


def clip_of(sample: Tensor) -> Tensor | None:
    """A finished sample as uint8 ``[F, H, W, 3]``; None where it is no picture of three channels in [0, 1].

    Leading dimensions are frames; channels come last, or first in each frame.
    """
    if sample.ndim < 3 or float(sample.min()) < -1e-3 or float(sample.max()) > 1 + 1e-3:
        return None
    if sample.shape[-1] != 3:
        if sample.shape[-3] != 3:
            return None
        sample = sample.movedim(-3, -1)
    return (sample.float().clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1, *sample.shape[-3:]).contiguous()


def write_samples(
    plan: Path, evaluator: Evaluator, rules: Sequence[Rule], pair: Pair, rival: Tensor | None
) -> str | None:
    """Generate a held-out prompt under the plan and keep what it gives beside it; why not, where it is not done.

    Raises:
        PlanError: the samples cannot be written.
    """
    samples, _ = evaluator.samples(rules, [pair])
    every = {DENSE: evaluator.references[pair], OPTIMISED: samples[0] if samples else None, FEWER: rival}
    clips = {name: clip_of(sample) for name, sample in every.items() if sample is not None}
    found = {name: clip for name, clip in clips.items() if clip is not None}
    if DENSE not in found:
        return "samples are no pictures of three channels in [0, 1], so none are kept for the report"
    found = {name: clip for name, clip in found.items() if clip.shape == found[DENSE].shape}
    path = samples_path(plan)
    partial = path.with_suffix(".partial")
    try:
        save_file(found, partial, {"prompt": pair[0], "seed": str(pair[1])})
        os.replace(partial, path)
    except OSError as error:
        return f"{path}: samples cannot be kept ({error.strerror or error})"
    return None


def step_work(evaluator: Evaluator, rules: Sequence[Rule], pair: Pair) -> dict[str, Any]:
    """``kernels`` and ``roofline`` of the side file: of dense and each variant of a plan, on a real call's inputs."""
    kernels: dict[str, dict[str, Any]] = {}
    plan = evaluator.bind(rules)
    for name, session in evaluator.sessions.items():
        (program,) = session.programs
        (arguments,) = inputs_of(evaluator, pair, [program])
        of_network = kernels.setdefault(name, {})
        of_network["dense"] = variant_work(program, StepPlan(), arguments)
        bound = program.resolve(plan)
        for variant in bound.variants:
            steps = [number for number, step in enumerate(bound.steps) if step.variant == variant]
            if steps:
                work = variant_work(program, variant, arguments, bound.steps[steps[0]].lists)
                of_network[_words(variant, len(of_network))] = work | {"steps": format_steps(steps)}
    device = next(evaluator.adapter.networks[name] for name in kernels).parameters()
    where = next(iter(device)).device
    dtypes = {kind.get("dtype") for of in kernels.values() for work in of.values() for kind in work["kinds"].values()}
    rates = machine_rates(where, [getattr(torch, dtype) for dtype in sorted(filter(None, dtypes))])
    return {"kernels": kernels, "roofline": {**rates, "device": describe_device(where)}}


def _words(variant: StepPlan, number: int) -> str:
    parts = [f"predicts {prediction.site} from {prediction.history}" for prediction in variant.predicted]
    parts += [word for word, is_so in (("simplified", variant.simplify), (variant.dtype or "", True)) if is_so and word]
    parts += ["reads what is computed ahead"] if variant.hoist else []
    parts += ["second order"] if variant.second_order else []
    parts += [f"sparse attention at {len(variant.sparse)} sites"] if variant.sparse else []
    return f"variant {number}: {', '.join(parts) or 'as it is'}"


def looks(
    plan: Path, evaluator: Evaluator, rules: Sequence[Rule], pair: Pair, rival: Tensor | None, whole: bool
) -> tuple[Mapping[str, Any], list[str]]:
    """Write the samples; further parts of the side file, and what could not be had: a report's lack stops no plan."""
    told: list[str] = []
    reason = write_samples(plan, evaluator, rules, pair, rival)
    if reason is not None:
        told.append(reason)
    if not whole:
        return {}, [*told, "where the time of a step goes is not measured where graph breaks cut a network"]
    try:
        return step_work(evaluator, rules, pair), told
    except (RuntimeError, DitoptError) as error:
        return {}, [*told, f"where the time of a step goes is not known: {error}"]
