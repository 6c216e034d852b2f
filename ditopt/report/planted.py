"""How far planted errors carry, drawn: by depth up to the network's output, and up to the final sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ditopt.measures import Table, growth_over_prompts
from ditopt.profile import NetworkProfile
from ditopt.report import charts
from ditopt.report.profiled import SENSITIVITY, SITE_KINDS, average, sites_of
from ditopt.report.tried import Agreement, agreement
from ditopt.search.heads import correction

NOISE, COLOURS = "noise", 5
ERRORS = {
    NOISE: "noise at a module",
    "reuse": "a module's output of the step before",
    "pattern": "heads under patterns",
}


def growth(part: NetworkProfile) -> tuple[Markup | None, list[tuple[str, str]]]:
    """What part of a planted error arrives at the output, over depth, a line per kind of site; the kinds' styles."""
    found: dict[str, dict[str, float]] = {}
    for site, table in sites_of(part, SENSITIVITY).items():
        if "to_output" in table.measures and NOISE in table.labels.get("error", ()):
            values = average(growth_over_prompts(table["to_output"]), "error")
            kind = str(table.facts.get("kind", "site"))
            found.setdefault(kind, {})[site] = float(values[table.position("error", NOISE)])
    if not found:
        return None, []
    kinds = [(SITE_KINDS.get(kind, kind), f"curve curve-{i % COLOURS}") for i, kind in enumerate(found)]
    drawn = zip(kinds, found.values(), strict=True)
    series = [charts.Line(list(of_kind.values()), *kind, at=_layers(list(of_kind))) for kind, of_kind in drawn]
    return charts.lines(series, "layer", "error at the output / planted", size=(520, 300), also=(0.0,)), kinds


def _layers(sites: Sequence[str]) -> Sequence[int] | None:
    """The numbers of the blocks that sites are in; None, their order, where they have none of their own each."""
    numbers = [[int(word) for word in site.split(".") if word.isdecimal()][:1] for site in sites]
    found = [number for of_site in numbers for number in of_site]
    return found if len(found) == len(sites) and found == sorted(set(found)) else None


def corrections(table: Table) -> list[str]:
    """For each kind of error planted in rollouts, how far what was measured is off what was predicted, in words."""
    found = []
    for error in dict.fromkeys(table.facts.get("errors", ())):
        scale, spread = correction(table, error)
        if np.isfinite(scale):
            off = f", off by a factor of {np.exp(spread):.2g} either way" if np.isfinite(spread) else ""
            found.append(f"{ERRORS.get(error, error)}: measured {scale:.2g} times the predicted{off}")
    return found


def planted_in_rollouts(part: NetworkProfile) -> Agreement | None:
    """Predicted against measured effect on the final sample of errors planted in real runs."""
    pairs = []
    for table in sites_of(part, SENSITIVITY).values():
        if {"predicted", "measured"} <= table.measures.keys():
            predicted, measured = (average(table[name], "plant") for name in ("predicted", "measured"))
            names = table.labels.get("plant", ())
            pairs += [(float(a), float(b), str(n)) for a, b, n in zip(predicted, measured, names, strict=True)]
    known = [pair for pair in pairs if np.isfinite(pair[:2]).all()]
    title = "Errors planted in rollouts"
    return agreement(title, known, "predicted movement of the sample", "measured", True) if known else None
