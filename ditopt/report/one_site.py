"""What is known about one site, for the terminal: of a plan its decisions and why, of a profile its measures."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from ditopt.errors import InputError
from ditopt.measures import Table
from ditopt.profile import NetworkProfile, Profile
from ditopt.report.figures import EXCEEDED, FALLEN_SHORT_OF, decibels, figure, share, with_upper
from ditopt.report.planted import corrections
from ditopt.report.profiled import (
    ATTENTION,
    FEATURES,
    FORMATS,
    LINEAR,
    PATTERNS,
    SITE_KINDS,
    UPPER,
    average,
    candidate_errors,
    candidate_name,
    masses,
    roles_of,
    upper,
)
from ditopt.sites import STEP

SHOWN_CANDIDATES = 8


def find_site(site: str, known: Iterable[str], where: str) -> str:
    """The site that is called so.

    Raises:
        InputError: there is none; the message names near ones.
    """
    names = list(dict.fromkeys(known))
    if site in names:
        return site
    under = [name for name in names if name.startswith(f"{site}.")]
    near = under or difflib.get_close_matches(site, names, n=4, cutoff=0.5) or names
    more = f" and {len(near) - 6} more" if len(near) > 6 else ""
    raise InputError(f"{where} knows no site {site!r}; try {', '.join(near[:6]) or 'none: it has no sites'}{more}")


def sites_of_profile(profile: Profile) -> list[str]:
    """What a profile has measures of."""
    found: list[str] = []
    for part in profile.networks.values():
        found += [site for tables in part.tables.values() for site in tables]
        found += [*part.grams, *part.range_weights]
    return list(dict.fromkeys(found))


def explain(profile: Profile, site: str | None, step: int | None, everything: bool) -> RenderableType:
    """What ``ditopt explain`` prints of a profile.

    Raises:
        InputError: no site is named or it is not known, or an option is given that is for plans.
    """
    if step is not None or everything:
        raise InputError(f"{'--all' if everything else '--step'} is for plans; a profile is explained site by site")
    if site is None:
        known = sites_of_profile(profile)
        some = ", ".join(known[:6]) + (f" and {len(known) - 6} more" if len(known) > 6 else "")
        raise InputError(f"of a profile, name the site to explain: {some}")
    return show_site(profile, site)


def show_site(profile: Profile, site: str) -> RenderableType:
    """All that a profile says of one site.

    Raises:
        InputError: it says nothing of it; the message names near sites.
    """
    find_site(site, sites_of_profile(profile), "the profile")
    parts: list[RenderableType] = []
    for name, part in profile.networks.items():
        told = list(_told(part, site))
        parts += [Text(f"{name}, {site}", style="bold"), *told] if told else []
    return Group(*parts)


def _told(part: NetworkProfile, site: str) -> Iterable[RenderableType]:
    tables = {collector: of_sites[site] for collector, of_sites in part.tables.items() if site in of_sites}
    if ATTENTION in tables:
        yield from _attention(part, site, tables[ATTENTION])
    if PATTERNS in tables:
        yield from _patterns(tables[PATTERNS])
    if FEATURES in tables:
        yield _features(tables[FEATURES])
    elif site in part.grams and FEATURES not in part.tables:
        yield Text("measured: the inner products of its output over all steps")
    if LINEAR in tables:
        yield _linear(tables[LINEAR])
    if site in part.range_weights:
        yield _weights(part.range_weights[site])
    if site == STEP and part.sensitivity:
        yield _weights(part.sensitivity)
    for collector, table in tables.items():
        if "predicted" in table.measures:
            yield _rollouts(table)
        elif collector not in (ATTENTION, PATTERNS, FEATURES, LINEAR):
            yield _anything(collector, table)


def _attention(part: NetworkProfile, site: str, table: Table) -> Iterable[RenderableType]:
    """Roles and masses of the heads."""
    facts, entropy, high = table.facts, average(table["entropy"], "head"), upper(table["entropy"], "head")
    title = f"{facts.get('kind', '')}-attention, {facts.get('queries', '?')} queries, {facts.get('keys', '?')} keys"
    grid = _grid("head", "role", "confidence", "same in steps", "in prompts", "entropy")
    for head, role in enumerate(roles_of(part, site)):
        told = [role.role, *map(figure, (role.confidence, role.over_steps, role.over_prompts))] if role else ["–"] * 4
        _row(grid, str(head), *told, with_upper(float(entropy[head]), float(high[head]), figure))
    yield _titled(title, grid)
    of_heads = masses(table)
    grid = _grid("on", *(f"head {head}" for head in range(len(entropy))), "if uniform")
    for where, mass in of_heads.items():
        shares = [with_upper(*of_head, share) for of_head in zip(mass.mean, mass.upper, strict=True)]
        _row(grid, where, *shares, share(mass.uniform))
    if of_heads:
        yield _titled(f"where an average query's mass lies (within: tokens in space and time){EXCEEDED}", grid)


def _patterns(table: Table) -> Iterable[RenderableType]:
    """What the candidates and reuse would cost, per head: relative errors of the layer's output."""
    if "error" in table.measures:
        errors, density = candidate_errors(table), table["density"].values
        uppers = upper(table["error"], "head", "candidate")
        names = list(map(str, table.labels["candidate"]))
        order = np.argsort(np.nan_to_num(errors.mean(0), nan=np.inf), kind="stable")
        order = np.array([at for at in order if '"qk"' not in names[at]], dtype=int)[:SHOWN_CANDIDATES]
        heads = [f"head {head}" for head in range(len(errors))]
        grid = _grid("pattern", "work", *heads)
        for i in order:
            name = candidate_name(names[i])
            _row(grid, name, f"{density[i]:.0%}", *map(with_upper, errors[:, i], uppers[:, i]))
        yield _titled(f"error of patterns, the least on average first{EXCEEDED}", grid)
    if "reuse" in table.measures:
        reuse = average(table["reuse"], "lag", "head")
        grid = _grid("steps earlier", *(f"head {head}" for head in range(reuse.shape[1])))
        uppers = upper(table["reuse"], "lag", "head")
        for lag, of_lag, high in zip(table.labels["lag"], reuse, uppers, strict=True):
            _row(grid, str(lag), *map(with_upper, of_lag, high))
        yield _titled(f"error of a head's own earlier output{EXCEEDED}", grid)


def _features(table: Table) -> RenderableType:
    """Errors of prediction from earlier outputs."""
    kind = str(table.facts.get("kind", ""))
    ways = [name for name in ("plain", "affine", "affine_shared") if name in table.measures]
    grid = _grid("steps earlier", *ways)
    values = [(average(table[name], "lag"), upper(table[name], "lag")) for name in ways]
    for i, lag in enumerate(table.labels.get("lag", ())):
        _row(grid, str(lag), *(with_upper(mean[i], high[i]) for mean, high in values))
    title = f"{SITE_KINDS.get(kind, kind)}: relative error of predicting it from an earlier one"
    return _titled(f"{title}{EXCEEDED}", grid)


def _linear(table: Table) -> RenderableType:
    """Output SNR of the formats, at the steps where it was measured."""
    facts = table.facts
    title = f"linear, {facts.get('in_features', '?')} -> {facts.get('out_features', '?')}: output SNR in dB"
    grid = _grid("format", "mean", *(f"step {step}" for step in table.labels["anchor"]))
    low = 1 - UPPER
    every = (
        [average(table["snr"], *kept), upper(table["snr"], *kept, quantile=low)]
        for kept in (("format",), ("format", "anchor"))
    )
    means, lowers = (np.column_stack(each) for each in zip(*every, strict=True))
    for name, mean, lower in zip(table.labels["format"], means, lowers, strict=True):
        shown = [with_upper(one, other, decibels) for one, other in zip(mean, lower, strict=True)]
        _row(grid, FORMATS.get(str(name), str(name)), *shown)
    return _titled(f"{title}{FALLEN_SHORT_OF}", grid)


def _weights(values: Sequence[float]) -> RenderableType:
    """How much an error here grows up to the sample."""
    grid = _grid("step", "times")
    for step in sorted(set(np.linspace(0, len(values) - 1, min(10, len(values))).round().astype(int).tolist())):
        _row(grid, str(step), figure(float(values[step])))
    return _titled("growth of an error planted here, up to the sample", grid)


def _rollouts(table: Table) -> RenderableType:
    """How far errors planted in rollouts moved the sample, and what that says of predictions."""
    grid = _grid("planted", "moved the sample", "predicted")
    values = (average(table[name], "plant") for name in ("measured", "predicted"))
    for plant, *moved in zip(table.labels["plant"], *values, strict=True):
        _row(grid, str(plant), *(figure(float(value)) for value in moved))
    told = [Text(line) for line in corrections(table)]
    return Group(_titled("errors planted in rollouts, L2 norm of what the sample moved by", grid), *told)


def _anything(collector: str, table: Table) -> RenderableType:
    """The range of each measure of a collector that has no words of its own here."""
    grid = _grid("measure", "mean", "least", "largest")
    for name, measure in table.measures.items():
        known = measure.values[np.isfinite(measure.values)].astype(float)
        if known.size:
            _row(grid, name, *(figure(float(value)) for value in (known.mean(), known.min(), known.max())))
    return _titled(collector, grid)


def _titled(title: str, grid: Grid) -> Group:
    """A grid under its title, which may be wider than it."""
    return Group(Text(title, style="italic"), grid)


def _grid(*columns: str) -> Grid:
    grid = Grid()
    for i, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if i == 0 else "right")
    return grid


def _row(grid: Grid, *cells: str) -> None:
    """Add a row whose texts are taken as they are, brackets included."""
    grid.add_row(*(Text(cell) for cell in cells))
