"""The parts of the page that show what was measured of the model, and what is said where nothing was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from ditopt.plan import Plan
from ditopt.profile import NetworkProfile, Profile
from ditopt.report import charts
from ditopt.report.explained import Explained, NetworkFigures
from ditopt.report.features import change_maps, lag_rows, similarity_panels
from ditopt.report.figures import duration
from ditopt.report.heatmaps import MAX_PIXELS, attention_maps
from ditopt.report.planted import corrections, growth, planted_in_rollouts
from ditopt.report.profiled import ATTENTION, FORMATS, LINEAR, SENSITIVITY, average, format_snr, role_counts, sites_of
from ditopt.report.samples import Samples
from ditopt.report.work import kinds_of, roof, step_times, style_of, variant_notes, work_bars
from ditopt.sites import STEP

ROLE_MEANINGS = {
    "spatial": "the own frame",
    "temporal": "the same pixel of other frames",
    "local": "what is near in space and time",
    "stripe": "the same few keys for every query",
    "text": "text tokens",
    "global": "no one region",
    "idle": "under 2% of the layer's output",
}
OUTLIERS = 5
Missing = tuple[str, str]


def of_profile(profile: Profile | None, found: Explained) -> dict[str, Any]:
    """Attention, features, precision and times of every network, each only where it was measured."""
    networks = dict(profile.networks) if profile is not None else {}
    names = list(dict.fromkeys([*networks, *found.profile, *found.kernels]))
    room = MAX_PIXELS // max(len(networks), 1)
    attention = [each for name, part in networks.items() if (each := _attention(name, part, room))]
    times = [each for name in names if (each := _time(name, networks.get(name), found))]
    machine = found.roofline
    told = f"{machine.device}: " if machine and machine.device else ""
    return {
        "attention": attention,
        "most_frames": max((each["maps"].frames for each in attention), default=0),
        "features": [each for name in names if (each := _features(name, networks.get(name), found))],
        "precision": [each for name, part in networks.items() if (each := _precision(name, part))],
        "times": times,
        "machine": f"{told}{machine.bytes_per_second / 1e9:.4g} GB/s" if machine else "",
        "time_missing": _time_missing(found) if times and found.explanations else [],
        "overview": _overview(profile) if profile is not None else [],
        "left_out": profile.reasons if profile is not None else (),
    }


def _attention(name: str, part: NetworkProfile, room: int) -> dict[str, Any] | None:
    maps = attention_maps(part, room)
    if maps is None:
        return None
    anchors = [(f"a{i}", str(step)) for i, step in enumerate(maps.anchors)]
    branches = [(f"b{i}", branch) for i, branch in enumerate(maps.branches)]
    counts = {group.kind: role_counts(part, group.kind) for group in maps.groups}
    return {
        "network": name,
        "maps": maps,
        "counts": counts,
        "anchors": anchors,
        "branches": branches,
        "middle": len(anchors) // 2,
    }


def _features(name: str, part: NetworkProfile | None, found: Explained) -> dict[str, Any] | None:
    figures = found.profile.get(name) or (step_figures(part) if part is not None else NetworkFigures())
    lags, rows = lag_rows(part) if part is not None else ((), [])
    grown, kinds = growth(part) if part is not None else (None, [])
    shown: dict[str, Any] = {
        "growth": grown,
        "planted": planted_in_rollouts(part) if part is not None else None,
        "corrections": _corrections(part) if part is not None else [],
        "panels": similarity_panels(part) if part is not None else [],
        "lag_rows": rows,
        "changes": change_maps(part) if part is not None else [],
        "similarity": figures.similarity and charts.heat_map(figures.similarity, f"similarity of steps, {name}"),
        "sensitivity": figures.sensitivity and charts.curve(figures.sensitivity, "step", "growth of an error"),
    }
    return {"network": name, "lags": lags, "growth_kinds": kinds, **shown} if any(shown.values()) else None


def _corrections(part: NetworkProfile) -> list[str]:
    tables = [table for table in sites_of(part, SENSITIVITY).values() if "predicted" in table.measures]
    return [line for table in tables for line in corrections(table)]


def step_figures(part: NetworkProfile) -> NetworkFigures:
    """Similarity of the whole step's output between steps, sensitivity and times: as a plan's side file has them."""
    found: dict[str, Any] = {"timesteps": part.timesteps, "sigmas": part.sigmas, "sensitivity": part.sensitivity}
    if STEP in part.grams:
        steps = len(part.timesteps)
        gram = part.grams[STEP].effective(part.branch_weights).sum(0)[:steps, :steps]
        norms = np.sqrt(np.maximum(np.diag(gram), 1e-30))
        found["similarity"] = (gram / norms / norms[:, None]).round(5).tolist()
    return NetworkFigures(**found, seconds=part.seconds)


def _precision(name: str, part: NetworkProfile) -> dict[str, Any] | None:
    snr = format_snr(part)
    order = [*FORMATS, *sorted(snr.keys() - FORMATS)]
    outliers = {
        site: float(np.nanmax(average(table["outlier"], "step")))
        for site, table in sites_of(part, LINEAR).items()
        if "outlier" in table.measures
    }
    worst = sorted(outliers.items(), key=lambda each: -each[1])[:OUTLIERS]
    formats = [(FORMATS.get(key, key), snr[key]) for key in order if key in snr]
    return {"network": name, "formats": formats, "outliers": worst} if formats else None


def _time(name: str, part: NetworkProfile | None, found: Explained) -> dict[str, Any] | None:
    variants = found.kernels.get(name, {})
    seconds = found.profile[name].seconds if name in found.profile else part.seconds if part is not None else {}
    drawn: dict[str, Markup | None] = {
        "work": work_bars(variants),
        "roof": roof(variants, found.roofline) if found.roofline else None,
        "steps": step_times(seconds),
    }
    if not any(drawn.values()):
        return None
    kinds = [*((kind, style_of(kind)) for kind in kinds_of(variants)), ("not accounted for", "w-rest")]
    return {"network": name, "kinds": kinds, "notes": variant_notes(variants), **drawn}


def _time_missing(found: Explained) -> list[str]:
    told = []
    if not found.kernels:
        told.append("The side file does not say what each kind of operator takes; ditopt optimize writes it.")
    if found.roofline is None:
        told.append("The side file does not say what this machine can do at most, so there is no roofline.")
    return told


def _overview(profile: Profile) -> list[tuple[str, str]]:
    """The facts of a profile's first screen."""
    facts = [(str(len(profile.prompts)), "prompts")]
    for name, part in profile.networks.items():
        of = f" ({name})" if len(profile.networks) > 1 else ""
        facts.append((str(len(part.timesteps)), f"steps{of}"))
        if part.geometry is not None:
            size = " × ".join(map(str, part.geometry.sizes))
            facts.append((size, f"frames, rows, columns of tokens{of}"))
        attention = sites_of(part, ATTENTION)
        if attention:
            facts.append((str(len(attention)), f"attention sites, {_heads(part)} heads{of}"))
            counts = [role_counts(part, kind) for kind in ("self", "joint", "cross")]
            known, idle = sum(sum(each.values()) for each in counts), sum(each.get("idle", 0) for each in counts)
            if known:
                facts.append((f"{idle / known:.0%}", f"of the heads idle{of}"))
        if "full" in part.seconds:
            facts.append((duration(part.seconds["full"]), f"a computed step takes{of}"))
    return facts


def _heads(part: NetworkProfile) -> int:
    return sum(table["entropy"].size("head") for table in sites_of(part, ATTENTION).values())


def missing(
    plan: Plan | None,
    explained: Explained | None,
    bench: Mapping[str, Any] | None,
    profile: Profile | None,
    samples: Samples | None,
) -> list[Missing]:
    """What the page would show if its data were at hand, and the command that makes them."""
    found: list[Missing] = []
    if plan is not None:
        if samples is None:
            found.append(("Sample outputs side by side", "ditopt optimize DIR --prompts FILE -o PLAN"))
        if explained is None:
            told = "Why each decision was made and what was tried (the side file *.explain.json)"
            found.append((told, "ditopt optimize DIR --prompts FILE -o PLAN"))
        if bench is None:
            made = "ditopt bench DIR --plan PLAN --prompts FILE --json bench.json"
            found.append(("Whole generations against every rival (--bench)", made))
    make = "ditopt profile DIR --prompts FILE -o p.profile"
    if profile is None:
        found.append(("Attention maps, head roles, features and number formats (--profile)", make))
    else:
        tables = [part.tables for part in profile.networks.values()]
        for collector, told in (
            (ATTENTION, "Attention maps and head roles"),
            ("patterns", "What sparse patterns would cost"),
            ("features", "Features of every kind of site"),
            ("tokens", "Which tokens change"),
            (LINEAR, "Number formats of linear layers"),
        ):
            if not any(collector in each for each in tables):
                found.append((f"{told}: this profile has no table “{collector}”", f"{make} --collect {collector}"))
    return found
