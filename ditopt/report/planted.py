"""How far planted errors carry, drawn: by depth up to the network's output, and up to the final sample."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
from markupsafe import Markup

from ditopt.profile import NetworkProfile
from ditopt.report import charts
from ditopt.report.profiled import SENSITIVITY, SITE_KINDS, average, sites_of
from ditopt.report.tried import Agreement, agreement

NOISE, COLOURS = "noise", 5


def growth(part: NetworkProfile) -> tuple[Markup | None, list[tuple[str, str]]]:
    """What part of a planted error arrives at the output, over depth, a line per kind of site; the kinds' styles."""
    found: dict[str, list[float]] = {}
    for table in sites_of(part, SENSITIVITY).values():
        if "to_output" in table.measures and NOISE in table.labels.get("error", ()):
            values = average(table["to_output"], "error")
            kind = str(table.facts.get("kind", "site"))
            found.setdefault(kind, []).append(float(values[table.position("error", NOISE)]))
    if not found:
        return None, []
    kinds = [(SITE_KINDS.get(kind, kind), f"curve curve-{i % COLOURS}") for i, kind in enumerate(found)]
    series = [charts.Line(values, *kind) for values, kind in zip_longest(found.values(), kinds)]
    return charts.lines(series, "layer", "error at the output / planted", size=(520, 300), also=(0.0,)), kinds


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
