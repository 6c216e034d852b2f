"""Tells when a pipeline generates under another guidance, or by another scheduler, than its plan was made with."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

from ditopt.plan import Plan

log = logging.getLogger("ditopt")

SCALES = {"guidance_scale": "guidance_scale", "guidance_scale_2": "_guidance_scale_2"}
"""Arguments of diffusers pipelines that set guidance, and the attributes that tell them of the call under way.

Wan's pipelines with two transformers keep the second scale, and have no property for it. Other scales
(``true_cfg_scale``, ``image_guidance_scale``, ...) are seldom kept anywhere: a change of these is not seen.
"""


def watch_guidance(pipe: Any, plan: Plan) -> Callable[[], None]:
    """A check, to be made when a generation begins, that warns once of every value that the plan was not made with.

    The pipeline is held weakly. A scale that the plan's settings do not name had the pipeline's default; a second
    scale whose default is None was the first. Seen are the scales in ``SCALES`` and no others, and these only where
    the pipeline sets their attribute before it calls a network; and the class of ``pipe.scheduler``, as solvers of one
    schedule have the same timesteps. ``torch.compile(..., backend="ditopt")`` has no pipeline, and sees neither.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    planned = {
        name: plan.settings.get(name, accepted[name].default)
        for name in SCALES
        if name in accepted and (name in plan.settings or accepted[name].default is not inspect.Parameter.empty)
    }
    if "guidance_scale_2" in planned and planned["guidance_scale_2"] is None:
        planned["guidance_scale_2"] = planned.get("guidance_scale")
    reference = weakref.ref(pipe)
    told: set[tuple[str, float | str]] = set()

    def check() -> None:
        owner = reference()
        scheduler = getattr(owner, "scheduler", None)
        own, found = plan.sampler.class_name, type(scheduler).__name__
        if scheduler is not None and found != own and ("scheduler", found) not in told:
            told.add(("scheduler", found))
            log.warning(
                "the plan was made for %s, this generation samples with %s: its predictions may not fit, its quality "
                "is not known; set pipe.scheduler to %s or make a plan for %s with `ditopt optimize`",
                own,
                found,
                own,
                found,
            )
        for name, wanted in planned.items():
            now = getattr(owner, SCALES[name], wanted)
            if isinstance(now, int | float) and now != wanted and (name, now) not in told:
                told.add((name, now))
                log.warning(
                    "the plan was made and measured with %s=%s, this generation has %s: its quality and speed are not "
                    "known; make a plan for it with `ditopt optimize`",
                    name,
                    wanted,
                    now,
                )

    return check
