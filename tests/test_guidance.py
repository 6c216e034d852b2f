"""A generation under another guidance or scheduler than the plan's is warned of, once for every value."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ditopt.guidance import watch_guidance
from ditopt.plan import DevicePrint, ModelPrint, Plan, SamplerPrint


class Pipeline:
    """As much of a pipeline as guidance needs: the call sets what the property tells."""

    def __call__(self, prompt: str, guidance_scale: float = 5.0, check: Callable[[], None] = lambda: None) -> None:
        self._guidance_scale = guidance_scale
        check()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale


class TwoScales(Pipeline):
    """As Wan with two transformers: the second scale is kept without a property, and is the first by default."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        true_cfg_scale: float = 4.0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._guidance_scale_2 = guidance_scale if guidance_scale_2 is None else guidance_scale_2
        super().__call__(prompt, guidance_scale, check)


def plan(**settings: float) -> Plan:
    return Plan(
        model=ModelPrint(class_name="Any", structure="sha256:0", blocks=1),
        sampler=SamplerPrint(class_name="Euler", steps=1, timesteps={"t": (1.0,)}, sigmas={"t": (1.0,)}),
        settings=dict(settings),
        device=DevicePrint(device="cpu", torch="2", dtype="float32"),
    )


@pytest.mark.parametrize(("settings", "own"), [({"guidance_scale": 4.0}, 4.0), ({}, 5.0)])
def test_each_other_value_is_told_once(
    settings: dict[str, float], own: float, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = Pipeline()
    check = watch_guidance(pipe, plan(**settings))
    with caplog.at_level(logging.WARNING, "ditopt"):
        for scale in (own, 1.0, own, 1.0, 7.5):
            pipe("a prompt", guidance_scale=scale, check=check)
    told = [record.message.split(":")[0] for record in caplog.records]
    assert told == [
        f"the plan was made and measured with guidance_scale={own}, this generation has {scale}" for scale in (1.0, 7.5)
    ]


@pytest.mark.parametrize(("settings", "own"), [({"guidance_scale_2": 3.0}, 3.0), ({}, 5.0)])
def test_the_second_scale_is_seen_where_it_is_kept(
    settings: dict[str, float], own: float, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = TwoScales()
    check = watch_guidance(pipe, plan(**settings))
    with caplog.at_level(logging.WARNING, "ditopt"):
        pipe("a prompt", guidance_scale_2=own, check=check)
        assert not caplog.records
        pipe("a prompt", guidance_scale_2=2.0, check=check)
    (record,) = caplog.records
    assert f"made and measured with guidance_scale_2={own}, this generation has 2.0" in record.message


def test_a_scale_that_no_pipeline_keeps_is_not_seen(caplog: pytest.LogCaptureFixture) -> None:
    pipe = TwoScales()
    check = watch_guidance(pipe, plan(true_cfg_scale=4.0))
    with caplog.at_level(logging.WARNING, "ditopt"):
        pipe("a prompt", true_cfg_scale=1.0, check=check)
    assert not caplog.records, "the docstring and the README say so"


def test_each_other_scheduler_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = Pipeline()
    check = watch_guidance(pipe, plan())
    with caplog.at_level(logging.WARNING, "ditopt"):
        for name in ("Euler", "UniPC", "Euler", "UniPC", "Heun"):
            pipe.scheduler = type(name, (), {})()
            pipe("a prompt", check=check)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"the plan was made for Euler, this generation samples with {name}" for name in ("UniPC", "Heun")
    ]
    assert "set pipe.scheduler to Euler or make a plan for UniPC with `ditopt optimize`" in caplog.messages[0]


def test_a_pipeline_that_tells_nothing_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipeline()
    check = watch_guidance(pipe, plan(guidance_scale=4.0))
    with caplog.at_level(logging.WARNING, "ditopt"):
        check()
    assert not caplog.records


def test_the_pipeline_is_not_kept_alive() -> None:
    pipe = Pipeline()
    check = watch_guidance(pipe, plan())
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    check()
