"""A profile in the terminal: what was measured, the heads' roles as a coloured grid, similarity, number formats."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from ditopt.findings import describe
from ditopt.observations import findings_of
from ditopt.profile import NetworkProfile, Profile
from ditopt.report.figures import EXCEEDED, FALLEN_SHORT_OF, decibels, duration, figure, with_upper
from ditopt.report.profiled import (
    ATTENTION,
    ATTENTION_KINDS,
    FORMATS,
    SITE_KINDS,
    format_snr,
    lag_errors,
    role_counts,
    roles_of,
    similarity,
    sites_of,
)
from ditopt.roles import ROLES

STYLES = {
    "spatial": "blue",
    "temporal": "red",
    "local": "green",
    "stripe": "magenta",
    "text": "yellow",
    "global": "cyan",
    "idle": "dim",
}
SYMBOLS = {"spatial": "S", "temporal": "T", "local": "L", "stripe": "|", "text": "x", "global": "G", "idle": "·"}


def show_profile(profile: Profile) -> RenderableType:
    """What a profile holds, a part per network."""
    about = profile.template()
    parts: list[RenderableType] = []
    if about is not None:
        sampler = f"{about.sampler.class_name}, {about.sampler.steps} steps, guidance {about.sampler.guidance:g}"
        model = f"{about.model.class_name}, {about.model.blocks} blocks, {about.model.structure}"
        parts += [Text(f"{model}\n{sampler}\n{about.device.device}, {about.device.dtype}")]
    parts.append(Text(f"prompts: {len(profile.prompts)}, sample norm {figure(profile.sample_norm)}"))
    for name, part in profile.networks.items():
        parts += [Text(""), Text(_headline(name, part), style="bold"), *_network(part)]
    if profile.reasons:
        parts += [
            Text("\nnotes: what was left out, or counts twice", style="bold"),
            *(Text(f"- {reason}") for reason in profile.reasons),
        ]
    return Group(*parts)


def _headline(name: str, part: NetworkProfile) -> str:
    branches = len(part.branch_weights)
    steps = f"{name}: {len(part.timesteps)} steps, {branches} {'branch' if branches == 1 else 'branches'}"
    return f"{steps}, {part.geometry or 'geometry not known'}"


def _network(part: NetworkProfile) -> Iterable[RenderableType]:
    if part.seconds:
        named = {key: value for key, value in part.seconds.items() if "." not in key}
        yield Text("a step takes " + ", ".join(f"{duration(value)} {key}" for key, value in named.items()))
    held = [f"{collector} of {len(tables)} sites" for collector, tables in part.tables.items() if tables]
    yield Text("tables: " + (", ".join(held) or "none; features of the step and of ranges of blocks only"))
    for kind, title in ATTENTION_KINDS.items():
        counts = role_counts(part, kind)
        if counts:
            yield Text(f"\nhead roles, {title}", style="bold")
            yield _roles(part, kind)
            yield _legend(counts)
    yield from _similarity(part)
    snr = format_snr(part)
    if snr:
        grid = Grid("format", "mean dB", "worst dB", "where")
        for name in (*FORMATS, *sorted(snr.keys() - FORMATS)):
            if name in snr:
                one = snr[name]
                values = with_upper(one.mean, one.lower, decibels), with_upper(one.worst, one.worst_lower, decibels)
                grid.add_row(Text(FORMATS.get(name, name)), *values, Text(one.site))
        yield Text(f"\noutput SNR of linear layers{FALLEN_SHORT_OF}", style="bold")
        yield grid
    found = describe(findings_of(part))
    if found:
        yield Text("\nwhat that says", style="bold")
        yield from (Text(f"- {line}") for line in found)


def _roles(part: NetworkProfile, kind: str) -> Text:
    """A line a layer, a symbol a head."""
    text = Text()
    sites = list(sites_of(part, ATTENTION, kind))
    width = max(map(len, sites)) + 2
    for site in sites:
        text.append(f"{site:<{width}}")
        for role in roles_of(part, site):
            text.append(SYMBOLS[role.role] if role else "?", STYLES[role.role] if role else "dim")
        text.append("\n")
    text.rstrip()
    return text


def _legend(counts: dict[str, int]) -> Text:
    total = sum(counts.values())
    text = Text()
    for role in ROLES:
        if role in counts:
            text.append(SYMBOLS[role], STYLES[role]).append(f" {role} {counts[role]} ({counts[role] / total:.0%})  ")
    if "idle" not in counts:
        text.append("none idle")
    text.rstrip()
    return text


def _similarity(part: NetworkProfile) -> Iterable[RenderableType]:
    found, errors = similarity(part), lag_errors(part)
    if not found:
        return
    grid = Grid("kind of site", "sites", "early steps", "middle", "late", "error unchanged")
    for kind, of_sites in found.items():
        mean = np.array([line[1:] for line in of_sites.values()]).mean(axis=0)
        thirds = [f"{np.nanmean(each):.4f}" if len(each) else "–" for each in np.array_split(mean, 3)]
        lags = errors.get(kind, {}).get("plain", {})
        nearest = with_upper(*lags[min(lags)]) if lags else "–"
        grid.add_row(Text(SITE_KINDS.get(kind, kind)), str(len(of_sites)), *thirds, nearest)
    title = "similarity to the step before (cosine), and error of taking it unchanged"
    yield Text(f"\n{title}{EXCEEDED}", style="bold")
    yield grid
