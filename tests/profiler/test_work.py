"""Where the time of a step goes: what is counted, and how a profile of operators is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ditopt.finish import clip_of
from ditopt.passes._infra import StepPlan
from ditopt.profiler.work import (
    ATTENTION_KIND,
    PRODUCT_KIND,
    REST,
    _seconds_by_kind,
    counted_work,
    machine_rates,
    variant_work,
)
from ditopt.trace import count_flops
from tests.trace.models import CASES, capture, interpreted


@dataclass
class Event:
    """An operator as torch's profiler tells it."""

    name: str
    cpu_time_total: float
    cpu_parent: Event | None = None


def test_operators_inside_others_count_once() -> None:
    linear = Event("aten::linear", 40.0)
    product = Event("aten::addmm", 30.0, linear)
    found = _seconds_by_kind(
        [
            linear,
            product,
            Event("aten::copy_", 10.0, product),
            Event("aten::_scaled_dot_product_flash_attention_for_cpu", 50.0, Event("graph", 1e3)),
            Event("ditopt::flash_attention", 5.0),
        ]
    )
    assert found == {ATTENTION_KIND: pytest.approx(55e-6), PRODUCT_KIND: pytest.approx(40e-6)}


def test_flops_by_kind_are_those_of_the_graph_and_seconds_add_up() -> None:
    model, inputs = CASES["Wan"].make()
    with interpreted():
        captured = capture(model, inputs)
        program = captured.program
        counted = counted_work(program.variants.graph(StepPlan()))
        found = variant_work(program, StepPlan(), captured.arguments)
    assert counted[ATTENTION_KIND]["calls"] == 8
    assert sum(kind.get("flops", 0) for kind in counted.values()) == count_flops(program.variants.trace.gm)
    query = 32 * 24 * 4  # float32 of 32 tokens
    assert counted[ATTENTION_KIND]["bytes"] == 4 * (4 * query) + 4 * (2 * query + 2 * 6 * 24 * 4)
    assert set(found["kinds"]) == {ATTENTION_KIND, PRODUCT_KIND, REST}
    assert all(kind["seconds"] >= 0 for kind in found["kinds"].values())
    assert found["kinds"][PRODUCT_KIND]["seconds"] > 0


def test_rates_of_this_machine_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.profiler.work.SIDE", 256)
    monkeypatch.setattr("ditopt.profiler.work.STREAM", 1 << 20)
    rates = machine_rates(torch.device("cpu"), [torch.float32])
    assert rates["flops_per_second"]["float32"] > 1e8
    assert rates["bytes_per_second"] > 1e8


def test_samples_are_clips_whatever_their_layout() -> None:
    clip = torch.rand(2, 3, 8, 6, 3)
    found = clip_of(clip)
    assert found is not None and found.shape == (6, 8, 6, 3) and found.dtype == torch.uint8
    assert torch.equal(found.float(), (clip * 255).round().reshape(6, 8, 6, 3))
    image = clip_of(torch.rand(1, 3, 8, 6))
    assert image is not None and image.shape == (1, 8, 6, 3)
    assert clip_of(torch.randn(1, 4, 8, 8)) is None
    assert clip_of(torch.rand(1, 4, 8, 8)) is None


def test_samples_lie_beside_the_plan() -> None:
    from ditopt.report.samples import samples_path

    assert samples_path(Path("out/wan.plan.yaml")).name == "wan.plan.samples.safetensors"
