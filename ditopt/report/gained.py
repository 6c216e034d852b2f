"""The first screen: what was gained and what it cost, from the best source there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditopt.plan import Plan
from ditopt.report.figures import OPTIMISED, bench_rows
from ditopt.report.samples import DENSE, FEWER, Clip
from ditopt.report.samples import OPTIMISED as OPTIMISED_CLIP


@dataclass(frozen=True)
class Contender:
    """One way to sample: seconds of a generation, decibels to the dense run, evaluations of the network; a clip."""

    key: str
    title: str
    subtitle: str
    seconds: float | None = None
    speedup: float | None = None
    psnr: float | None = None
    worst_psnr: float | None = None
    evaluations: int | None = None
    clip: Clip | None = None

    @property
    def share(self) -> float | None:
        """Seconds as a share of the dense ones."""
        return None if not self.speedup else 1 / self.speedup


@dataclass(frozen=True)
class Gained:
    """Before, after and the honest rival; ``source`` says where the figures are from."""

    contenders: tuple[Contender, ...]
    headline: str
    source: str


def gained(plan: Plan, bench: Mapping[str, Any] | None, clips: Mapping[str, Clip]) -> Gained:
    """What a plan gained: from a benchmark if there is one, else from what ``optimize`` measured."""
    steps = sum(len(values) for values in plan.sampler.timesteps.values())
    kept = sum(len(plan.kept_steps(name)) for name in plan.sampler.timesteps)
    if bench:
        rows, source = _of_bench(bench), f"ditopt bench: medians of whole generations, {bench.get('prompts')} prompts"
    else:
        rows, source = _of_plan(plan, steps), "ditopt optimize, on prompts that the search did not see"
    dense, ours, fewer = (rows.get(key, {}) for key in (DENSE, OPTIMISED_CLIP, FEWER))
    rival = f"{fewer.get('evaluations') or '?'} steps{fewer.pop('dtype', '')}"
    found = [
        Contender(DENSE, "Before", f"dense, compiled, {steps} steps", **{"evaluations": steps, **dense}),
        Contender(OPTIMISED_CLIP, "After", f"this plan, {kept} of {steps} steps", **{"evaluations": kept, **ours}),
        Contender(FEWER, "Fewer steps", f"the same model, {rival}", **fewer),
    ]
    shown = [c for c in found if c.key != FEWER or fewer or FEWER in clips]
    shown = [Contender(**{**vars(c), "clip": clips.get(c.key)}) for c in shown]
    return Gained(tuple(shown), _headline(found[1], kept, steps), source if ours else "")


def _headline(ours: Contender, kept: int, steps: int) -> str:
    if not ours.speedup:
        return f"{kept} of {steps} steps computed"
    quality = f" at {ours.psnr:.1f} dB to the dense run" if ours.psnr is not None else ""
    return f"{ours.speedup:.2f}× faster{quality}"


def _of_bench(bench: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {row[0]: row[1:] for row in bench_rows(bench)}
    found = {}
    for key, name in ((DENSE, "dense, Inductor"), (OPTIMISED_CLIP, OPTIMISED)):
        n, seconds, speedup, psnr, worst = rows[name]
        found[key] = {"evaluations": n, "seconds": seconds, "speedup": speedup, "psnr": psnr, "worst_psnr": worst}
    rivals = [name for name in rows if name.startswith("fewer steps")]
    if rivals:  # the last is the strongest: it computes in the plan's own dtype
        n, seconds, speedup, psnr, worst = rows[rivals[-1]]
        dtype = rivals[-1].removeprefix("fewer steps")
        found[FEWER] = {"evaluations": n, "seconds": seconds, "speedup": speedup, "psnr": psnr, "worst_psnr": worst}
        found[FEWER]["dtype"] = dtype
    return found


def _of_plan(plan: Plan, steps: int) -> dict[str, dict[str, Any]]:
    measured = plan.measured
    dense, found = measured.get("dense_s"), {}
    if dense:
        found[DENSE] = {"seconds": dense, "speedup": 1.0, "evaluations": steps}
    if measured.get("speedup") or measured.get("plan_s"):
        names = {"seconds": "plan_s", "speedup": "speedup", "psnr": "psnr", "worst_psnr": "worst_psnr"}
        found[OPTIMISED_CLIP] = {key: measured.get(name) for key, name in names.items()}
        if measured.get("evaluations"):
            found[OPTIMISED_CLIP]["evaluations"] = measured["evaluations"]
    fewer = measured.get("fewer_steps")
    if isinstance(fewer, Mapping):
        seconds = fewer.get("seconds")
        found[FEWER] = {
            "evaluations": fewer.get("steps"),
            "seconds": seconds,
            "speedup": dense / seconds if dense and seconds else None,
            "psnr": fewer.get("psnr"),
            "dtype": f", {fewer['dtype']}" if "dtype" in fewer else "",
        }
    return found
