"""A plan with all that can lie beside it, which belongs to the synthetic profile; and the page of all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ditopt.decisions import Forecast, Reuse
from ditopt.plan import Plan, Rule
from ditopt.report.explained import Explained, side_path
from ditopt.report.samples import samples_path
from tests.report_profiles import STEPS, TIMES, make_profile

FRAMES, EDGE = 6, 32


def make_plan() -> Plan:
    """A plan for the model and the schedule of the synthetic profile."""
    rules = (
        Rule(sites="step", steps=(3, 5, 6), do=Forecast(order=1)),
        Rule(sites="blocks.2..5", steps=(2, 7), do=Reuse()),
    )
    template = Plan.model_validate(dict(make_profile(tables=False).plan))
    measured = {
        "psnr": 38.25, "worst_psnr": 36.5, "rel_l2": 0.021, "dense_s": 4.0, "plan_s": 1.6, "speedup": 2.5,
        "evaluations": 7, "fewer_steps": {"steps": 4, "psnr": 27.9, "seconds": 1.7},
    }  # fmt: skip
    predicted = {"seconds": 1.5, "relative_error": 0.018}
    return template.model_copy(
        update={"rules": rules, "measured": measured, "predicted": predicted, "target": {"min_psnr": 36.0}}
    )


def make_side() -> dict[str, Any]:
    """A side file with every part that there is."""
    rivals = [
        {"name": "compute", "error": 0.0, "objective": 3.75, "reason": "takes 0.13 s more"},
        {"name": "reuse", "error": 0.2, "objective": 4.5, "reason": "its error is 3 times that of forecast1"},
    ]
    steps = [{"step": s, "site": "step", "chosen": "forecast1", "objective": 3.5, "rivals": rivals} for s in (3, 5, 6)]
    blocks = {"step": 2, "site": "blocks.2..5", "chosen": "reuse", "objective": 1.0, "rivals": rivals[:1]}
    trials = [
        {
            "kept": list(range(n)), "evaluations": n, "psnr": 24.0 + 2 * n, "rel_l2": 0.3 / n, "seconds": 0.3 * n,
            "predicted_error": 0.25 / n, "measured_seconds": 0.33 * n, "stage": "bisect", "met": n > 5,
        }
        for n in range(3, STEPS)
    ]  # fmt: skip
    kinds = {
        "attention": {"seconds": 0.05, "flops": 4e9, "bytes": 2e7},
        "linear": {"seconds": 0.06, "flops": 8e9, "bytes": 1e8},
        "elementwise": {"seconds": 0.015, "flops": 1e7, "bytes": 3e7},
    }
    less = {kind: {name: value / 2 for name, value in work.items()} for kind, work in kinds.items()}
    return {
        "explanations": {"transformer": [*steps, blocks]},
        "trials": trials,
        "reasons": ["precision: no product of many rows"],
        "prompts": {"profiled": ["a red circle"], "held_out": ["a blue square"]},
        "timings": {"profile": 12.5},
        "table": [
            {"name": "dense, compiled", "seconds": 4.0, "speedup": 1.0, "evaluations": STEPS},
            {"name": "ditopt", "seconds": 1.6, "speedup": 2.5, "psnr": 38.25, "worst_psnr": 36.5, "evaluations": 7},
            {"name": "dense, 4 steps", "seconds": 1.7, "speedup": 2.35, "psnr": 27.9, "evaluations": 4},
        ],
        "profile": {
            "transformer": {
                "timesteps": TIMES, "sigmas": [t / 1000 for t in TIMES], "sensitivity": [1.0] * STEPS,
                "similarity": [[1 - abs(a - b) / 20 for a in range(STEPS)] for b in range(STEPS)],
                "seconds": {"full": 0.134, "bfloat16": 0.065, "predicted": 7e-5},
            }
        },
        "kernels": {
            "transformer": {
                "dense": {"seconds": 0.134, "kinds": kinds},
                "blocks.2..5 reused": {"seconds": 0.07, "kinds": less, "steps": "2, 7"},
            }
        },
        "roofline": {
            "flops_per_second": {"float32": 2e11, "bfloat16": 6e11}, "bytes_per_second": 2.5e10, "device": "EPYC",
        },
    }  # fmt: skip


def make_clips(frames: int = FRAMES, edge: int = EDGE) -> dict[str, Any]:
    """A bright square that wanders; the optimised one is a shade off, that of fewer steps a pixel off."""
    clips = {
        name: np.full((frames, edge, edge, 3), 40, dtype=np.uint8) for name in ("dense", "optimised", "fewer_steps")
    }
    for frame in range(frames):
        top = 2 + frame * (edge // (frames + 3))
        for name, off, shade in (("dense", 0, 230), ("optimised", 0, 222), ("fewer_steps", 1, 190)):
            clips[name][frame, top : top + edge // 4, top + off : top + off + edge // 4] = (shade, 90, 60)
    return clips


def write_all(folder: Path) -> Path:
    """A plan, its side file, its samples and the profile ``p.profile`` in a folder; returns the plan's path."""
    path = folder / "plan.yaml"
    make_plan().save(path)
    Explained.model_validate(make_side()).save(side_path(path))
    save_file(make_clips(), samples_path(path), metadata={"prompt": "a red circle", "seed": "7"})
    make_profile().save(folder / "p.profile")
    return path
