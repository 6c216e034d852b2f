"""Figures for people: how a value is written, and the rows of a benchmark's table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def figure(value: Any) -> str:
    """A value for people: four digits, a dash for what is not there.

    >>> figure(3.14159), figure(None), figure({"steps": 6, "psnr": 27.9})
    ('3.142', '–', 'steps 6, psnr 27.9')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(figure(part) for part in value)
    return str(value)


def duration(seconds: float | None) -> str:
    """A time for people, three digits.

    >>> duration(4.0781), duration(0.0652), duration(7e-5)
    ('4.08 s', '65.2 ms', '70 µs')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds * 1e6:.3g} µs"


def error(value: float | None) -> str:
    """A relative error for people, as a percentage of about three digits.

    >>> error(0.0503), error(1.5), error(None)
    ('5.03%', '150%', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value * 100:.3g}%" if value < 10 else f"{value:.0%}"


def share(value: float | None) -> str:
    """A share of a whole for people.

    >>> share(0.0503), share(None)
    ('5.0%', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def decibels(value: float | None) -> str:
    """A ratio in decibels for people.

    >>> decibels(31.416), decibels(None)
    ('31.4', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


EXCEEDED = " (in brackets: what a prompt in ten exceeds)"
FALLEN_SHORT_OF = " (in brackets: what a prompt in ten falls short of)"
"""What titles say of the brackets of ``with_upper``."""


def with_upper(mean: float | None, upper: float | None, write: Callable[[float | None], str] = error) -> str:
    """A mean over prompts, and in brackets an upper quantile where it reads otherwise.

    >>> with_upper(0.012, 0.02), with_upper(0.012, 0.012), with_upper(None, None)
    ('1.2% (2%)', '1.2%', '–')
    """
    one, other = write(mean), write(upper)
    return one if one == other else f"{one} ({other})"


def _dtype(bench: Mapping[str, Any]) -> str | None:
    """The dtype of its own that a benchmark's plan computes in."""
    decisions = (rule["do"] for rule in bench.get("plan", {}).get("rules", ()))
    found = (each["dense"].get("dtype") for each in decisions if isinstance(each, Mapping) and "dense" in each)
    return next((dtype for dtype in found if dtype is not None), None)


OPTIMISED = "optimised"
"""The row of the plan."""


def bench_rows(bench: Mapping[str, Any]) -> list[tuple[str, Any, Any, Any, Any, Any]]:
    """Name, evaluations, seconds, speed-up over Inductor, mean and worst PSNR of every contender of a benchmark."""
    dense = bench.get("dense_inductor_s")
    plain = [
        ("dense, eager", bench.get("steps"), bench.get("dense_eager_s"), None, None),
        ("dense, Inductor", bench.get("steps"), dense, None, None),
        (OPTIMISED, bench.get("kept"), bench.get("optimized_s"), bench.get("psnr_db"), bench.get("worst_psnr_db")),
    ]
    names = {"fewer_steps": "fewer steps", "unipc": "UniPC", "dpmpp": "DPM-Solver++"}
    if dtype := _dtype(bench):
        cast = {f"{key}_cast": name for key, name in {"dense": "dense", **names}.items()}
        names |= {key: f"{name}, {dtype}" for key, name in cast.items()}
    for key, name in names.items():
        rival = bench.get(key) or {}
        if rival.get("seconds") is not None:
            quality = rival.get("psnr_db"), rival.get("worst_psnr_db")
            plain.append((name, rival["steps"], rival["seconds"], *quality))
    return [(name, n, s, dense / s if dense and s else None, db, worst) for name, n, s, db, worst in plain]


def bench_notes(bench: Mapping[str, Any]) -> list[str]:
    """What a benchmark says of its plan beside the table."""
    converged, score = bench.get("converged"), bench.get("attribute_score")
    found = []
    if converged:
        near, ours = figure(converged["dense_db"]), figure(converged["optimized_db"])
        found.append(f"to a converged run: dense {near} dB, optimised {ours} dB")
    if score:
        found.append(f"attribute score: dense {figure(score['dense'])}, optimised {figure(score['optimized'])}")
    return found
