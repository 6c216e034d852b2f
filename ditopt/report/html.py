"""The HTML report: one file that fetches nothing, readable with and without its script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import ditopt
from ditopt.decisions import decision_to_data
from ditopt.plan import Plan, format_steps
from ditopt.profile import Profile
from ditopt.report import measured_parts
from ditopt.report.explained import Explained, Explanation
from ditopt.report.figures import bench_notes, bench_rows, decibels, duration, error, figure, with_upper
from ditopt.report.gained import gained
from ditopt.report.layers import layers_of
from ditopt.report.measured_parts import ROLE_MEANINGS
from ditopt.report.picture import MEANINGS, kinds_in, pictures
from ditopt.report.png import heat_palette
from ditopt.report.samples import Samples, drawn, facts_of
from ditopt.report.schedule import schedule
from ditopt.report.tried import agreements, grouped, nearest, nearest_rivals, trials_chart
from ditopt.roles import ROLES
from ditopt.sites import range_names

TITLES = {
    "result": "Result",
    "overview": "Overview",
    "plan": "Plan",
    "search": "Search",
    "attention": "Attention",
    "features": "Features",
    "precision": "Precision",
    "time": "Time",
    "reasons": "Reasons",
    "source": "Source",
}


def render_report(
    plan: Plan | None,
    explained: Explained | None,
    bench: Mapping[str, Any] | None,
    source: str,
    profile: Profile | None = None,
    samples: Samples | None = None,
) -> str:
    """The report on a plan, or on a profile, as HTML.

    Args:
        plan: what to report on; None: the profile.
        explained: its side file, if there is one; without it the report does not say why.
        bench: what ``ditopt bench --json`` wrote, if anything.
        source: the file's name, for the title.
        profile: what was measured of the model, if it is at hand.
        samples: of one prompt, dense and optimised, if they are at hand.
    """
    loader = PackageLoader("ditopt", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals |= {"with_upper": with_upper, "decibels": decibels}
    environment.filters |= {"figure": figure, "duration": duration, "percent": _percent, "error": error}
    found = explained or Explained()
    context = measured_parts.of_profile(profile, found)
    context |= _common(plan, found, source, profile)
    missing = measured_parts.missing(plan, explained, bench, profile, samples)
    context |= _of_plan(plan, explained, bench, profile, samples) if plan is not None else {}
    parts = _parts(plan, explained, context)
    return environment.get_template("report.html.j2").render(**context, missing=missing, parts=parts)


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _common(plan: Plan | None, found: Explained, source: str, profile: Profile | None) -> dict[str, Any]:
    """What every page has: title, provenance, prompts, the names and colours of roles."""
    about = plan or (profile.template() if profile is not None else None)
    data = about.to_data() if about is not None else {}
    names = ("target", "predicted", "measured", "model", "sampler", "settings", "device", "geometry")
    long = {"timesteps", "sigmas"}
    prompts = {**found.prompts, **({"in the profile": profile.prompts} if profile is not None else {})}
    subtitle = source
    if about is not None:
        sampler = f"{about.sampler.class_name}, {about.sampler.steps} steps, guidance {figure(about.sampler.guidance)}"
        subtitle = f"{source} · {about.model.class_name} · {sampler} · {about.device.device}"
    return {
        "source": source,
        "version": ditopt.__version__,
        "headline": f"Profile of {about.model.class_name if about else source}",
        "subtitle": subtitle,
        "found": found,
        "provenance": [
            *((part, key, value) for part in names for key, value in data.get(part, {}).items() if key not in long),
            *([("recipe", "name", data["recipe"])] if "recipe" in data else []),
        ],
        "prompts": prompts,
        "roles": ROLES,
        "role_meanings": ROLE_MEANINGS.items(),
        "ramp": ["#" + bytes(colour).hex() for colour in heat_palette(9)],
    }


def _of_plan(
    plan: Plan,
    explained: Explained | None,
    bench: Mapping[str, Any] | None,
    profile: Profile | None,
    samples: Samples | None,
) -> dict[str, Any]:
    """The parts that only a plan has."""
    found = explained or Explained()
    clips = drawn(samples) if samples is not None else {}
    made = gained(plan, bench, clips)
    layers = {network: layers_of(plan, network, found, profile) for network in plan.sampler.timesteps}
    pictured = pictures(plan, layers)
    decisions = [
        (network, nearest_rivals(entries), grouped(entries)) for network, entries in found.explanations.items()
    ]
    return {
        "gained": made,
        "headline": made.headline,
        "clips": clips,
        "louder": max((clip.louder for clip in clips.values()), default=1),
        "clips_of": facts_of(samples) if samples is not None else "",
        "bench": bench,
        "bench_rows": bench_rows(bench) if bench else [],
        "bench_notes": bench_notes(bench) if bench else [],
        "schedules": [
            (
                each.summary,
                schedule(each, _why(found.explanations.get(each.network, ()), layers[each.network], each.steps)),
            )
            for each in pictured
        ],
        "legend": [(kind, MEANINGS.get(kind, kind)) for kind in kinds_in(pictured)],
        "rules": [
            (rule.place, format_steps(rule.steps), rule.network, figure(_short(decision_to_data(rule.do))))
            for rule in plan.rules
        ],
        "explained": explained,
        "decisions": decisions,
        "trials": trials_chart(plan, found, bench),
        "agreements": agreements(plan, found),
    }


def _short(decision: Any) -> Any:
    """A decision without its coefficients, which stand in the picture's notes."""
    if not isinstance(decision, Mapping):
        return decision
    long = ("coefficients", "sources")
    return {
        kind: {name: each for name, each in settings.items() if name not in long} for kind, settings in decision.items()
    }


def _why(made: Sequence[Explanation], layers: Sequence[str], steps: int) -> dict[tuple[int, str], str]:
    """By step and row of the picture, why the decision there was made."""
    ranges = range_names(layers)
    found: dict[tuple[int, str], str] = {}
    for one in sorted(made, key=lambda each: each.step is None):  # what is for all steps gives way
        first, last = ranges.get(one.site, (0, -1))
        for row in (one.site, *layers[first : last + 1]):
            for step in range(steps) if one.step is None else (one.step,):
                found.setdefault((step, row), _reason(one))
    return found


def _reason(one: Explanation) -> str:
    near = nearest(one)
    told = f"chosen: {one.chosen}"
    if near is not None:
        told += f"\nnot {near.name}: {near.reason}"
    return told + (f"\n(and {len(one.rivals) - 1} others)" if len(one.rivals) > 1 else "")


def _parts(plan: Plan | None, explained: Explained | None, context: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The parts whose data are there, with their titles."""
    there = {
        "result": plan is not None,
        "overview": plan is None,
        "plan": plan is not None,
        "search": bool(context.get("trials")) or any(each.count for each in context.get("agreements", ())),
        "attention": bool(context["attention"]),
        "features": bool(context["features"]),
        "precision": bool(context["precision"]),
        "time": bool(context["times"]),
        "reasons": plan is not None and explained is not None,
        "source": True,
    }
    return [(name, title) for name, title in TITLES.items() if there[name]]
