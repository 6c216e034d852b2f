"""What a profile says of sites and heads, as numbers and words: terminal and page tell the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ditopt.errors import InputError
from ditopt.measures import PROMPT, Measure, Numbers, Table
from ditopt.profile import NetworkProfile
from ditopt.report.figures import with_upper
from ditopt.roles import ROLES, HeadRole, head_roles
from ditopt.sites import STEP

ATTENTION, PATTERNS, FEATURES, TOKENS, LINEAR = "attention", "patterns", "features", "tokens", "linear"
SENSITIVITY = "sensitivity"
GOOD_ENOUGH = 0.02
"""The relative error of a layer's output below which a pattern counts as good for a head."""
UPPER = 0.9
"""The quantile over prompts that stands in brackets behind means; of what is better the larger it is, 1 minus it."""
ATTENTION_KINDS = {"self": "self-attention", "joint": "joint attention (text and video)", "cross": "cross-attention"}
SITE_KINDS = {
    "self": "self-attention output",
    "joint": "joint attention output",
    "cross": "cross-attention output",
    "mlp": "MLP output",
    "block": "what a block adds",
    "range": "what a range of blocks adds",
    "step": "the whole step",
}
FORMATS = {
    "bfloat16": "bfloat16",
    "int8_dynamic": "int8, dynamic scales per token",
    "int8_weight": "int8 weights only",
    "fp8_e4m3": "fp8 (e4m3)",
    "int8_smooth": "int8, smoothed",
    "int8_rotated": "int8, rotated",
}
MASSES = {
    "mass_text": "text",
    "mass_first_frame": "first frame",
    "mass_sinks": "sinks",
    "mass_in_frame": "own frame",
    "mass_same_pixel": "same pixel",
    "mass_near_pixel": "next to the pixel in other frames",
}


@dataclass(frozen=True)
class Good:
    """The sparsest candidate pattern that is good enough for a head."""

    name: str
    density: float
    error: float
    upper: float

    def __str__(self) -> str:
        return f"{self.name}: {self.density:.0%} of the work, error {with_upper(self.error, self.upper)}"


def sites_of(part: NetworkProfile, collector: str, kind: str | None = None) -> dict[str, Table]:
    """The tables of a collector by site, in the order of execution; of one ``kind`` of site or of all."""
    tables = part.tables.get(collector, {})
    return {name: table for name, table in tables.items() if kind in (None, table.facts.get("kind"))}


def average(measure: Measure, *kept: str) -> Numbers:
    """The mean over all axes but those ``kept``, in their order."""
    return measure.mean(*(axis for axis in measure.axes if axis not in kept)).ordered(*kept)


def upper(measure: Measure, *kept: str, quantile: float = UPPER) -> Numbers:
    """As ``average``, but over prompts the ``quantile``."""
    others = (axis for axis in measure.axes if axis not in (*kept, PROMPT))
    of_prompts = measure.mean(*others)
    return (of_prompts.upper(quantile, PROMPT) if PROMPT in measure.axes else of_prompts).ordered(*kept)


def candidate_name(text: str | int | float) -> str:
    """A candidate of the patterns in words.

    >>> candidate_name('{"frames": 0, "pattern": "spatial"}')
    'spatial, frames 0'
    >>> candidate_name('{"pattern": "skip", "rest": {"pooled": 16}}')
    'skip, rest by means of 16'
    >>> candidate_name('{"pattern": "skip", "rest": {"taylor": 16}}')
    'skip, rest to first order around means of 16'
    >>> candidate_name('{"keep": 0.25, "order": {"tiles": [4, 4, 4]}, "pattern": "draft"}')
    'draft, keep 0.25, order tiles 4×4×4'
    >>> candidate_name('{"pattern": "band", "rest": {"kept": "merge", "refresh": 4}, "width": 2.0}')
    'band, width 2, rest kept (merge), refresh 4'
    """
    try:
        data = json.loads(str(text))
    except ValueError:
        return str(text)
    if not isinstance(data, Mapping):
        return str(text)
    rest = data.get("rest")
    words = _pattern_words({key: value for key, value in data.items() if key != "rest"})
    if rest is None:
        return words
    return f"{words}, rest {_rest_words(rest)}"


def _rest_words(rest: Any) -> str:
    """What a head does about the blocks that it skips."""
    match rest:
        case "pooled":
            return "by means"
        case "linear":
            return "by linear attention"
        case {"pooled": tokens}:
            return f"by means of {tokens}"
        case {"taylor": tokens}:
            return f"to first order around means of {tokens}"
        case {"kept": form, "refresh": every}:
            return f"kept ({form}), refresh {every}"
    return _value(rest)


def _pattern_words(data: Mapping[str, Any]) -> str:
    name = str(data.get("pattern", "pattern"))
    if name == "union":
        return " + ".join(_pattern_words(each) for each in data.get("of", ()))
    settings = [f"{key} {_value(value)}" for key, value in data.items() if key != "pattern" and value not in ([], ())]
    return ", ".join([name, *settings])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_value(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return "×".join(map(_value, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def candidate_errors(table: Table) -> Numbers:
    """``[head, candidate]``: the relative error of each candidate, over prompts, steps and branches."""
    return average(table["error"], "head", "candidate")


def good_patterns(table: Table, bound: float = GOOD_ENOUGH) -> list[Good | None]:
    """For each head the sparsest candidate with an error below ``bound``; None where only dense attention has one."""
    errors, density = candidate_errors(table), np.asarray(table["density"].values, dtype=float)
    names, uppers = table.labels["candidate"], upper(table["error"], "head", "candidate")
    found: list[Good | None] = []
    for of_head, upper_of_head in zip(errors, uppers, strict=True):
        fitting = [i for i in np.argsort(density, kind="stable") if of_head[i] < bound and density[i] < 1]
        best = fitting[0] if fitting else None
        if best is None:
            found.append(None)
            continue
        figures = (float(density[best]), float(of_head[best]), float(upper_of_head[best]))
        found.append(Good(candidate_name(names[best]), *figures))
    return found


class Mass(NamedTuple):
    """An average query's mass on a part of the keys, ``[head]``: mean and upper quantile over prompts.

    ``uniform`` is uniform attention's, None where it is not known.
    """

    mean: Numbers
    upper: Numbers
    uniform: float | None


def masses(table: Table) -> dict[str, Mass]:
    """An average query's masses, by name in words."""
    uniform = table.facts.get("uniform") or {}
    found: dict[str, Mass] = {}
    for name, words in MASSES.items():
        if name in table.measures and "distance" not in table[name].axes:
            measure = table[name]
            found[words] = Mass(average(measure, "head"), upper(measure, "head"), _number(uniform.get(name)))
    if "mass_near" in table.measures:
        near, high = (of(table["mass_near"], "distance", "head") for of in (average, upper))
        of_uniform = uniform.get("mass_near")
        for i, distance in enumerate(table.labels["distance"]):
            share = of_uniform[i] if isinstance(of_uniform, list | tuple) and i < len(of_uniform) else None
            found[f"within {distance}"] = Mass(near[i], high[i], _number(share))
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def roles_of(part: NetworkProfile, site: str) -> tuple[HeadRole | None, ...]:
    """The role of each head of an attention site; None for each where the masses that tell it were not measured."""
    table = part.tables[ATTENTION][site]
    try:
        return head_roles(table, part.tables.get(PATTERNS, {}).get(site)).heads
    except InputError:
        return (None,) * table["entropy"].size("head")


def role_counts(part: NetworkProfile, kind: str) -> dict[str, int]:
    """How many heads of all layers have each role, in the order of ``ROLES``."""
    found = Counter(head.role for site in sites_of(part, ATTENTION, kind) for head in roles_of(part, site) if head)
    return {role: found[role] for role in ROLES if found[role]}


def similarity(part: NetworkProfile) -> dict[str, dict[str, list[float]]]:
    """By kind and site, the cosine similarity of the output in each step with that of the step before.

    The mean over prompts and guidance branches; NaN in the first step. Kinds are those that tables of features tell;
    without them a Gram matrix is that of the step or of a range of blocks.
    """
    found: dict[str, dict[str, list[float]]] = {}
    tables = sites_of(part, FEATURES)
    for site in dict.fromkeys([*tables, *part.grams]):
        kind = "step" if site == STEP else "range"
        if site in tables:
            kind = str(tables[site].facts.get("kind", kind))
        if site in part.grams:
            rows = part.grams[site].steps * len(part.grams[site].branches)
            gram = part.grams[site].values[:, :rows, :rows]
        elif "gram" in tables[site].measures:
            gram = np.asarray(tables[site]["gram"].ordered("prompt", "row", "column"), dtype=np.float64)
        else:
            continue
        found.setdefault(kind, {})[site] = _neighbours(gram, len(part.timesteps))
    return {kind: found[kind] for kind in (*SITE_KINDS, *sorted(found.keys() - SITE_KINDS)) if kind in found}


def _neighbours(gram: Numbers, steps: int) -> list[float]:
    """The mean cosine of step t and step t - 1 over prompts and branches, of ``[P, B*T, B*T]``."""
    norms = np.sqrt(np.maximum(np.einsum("pii->pi", gram), 0))
    row = np.arange(gram.shape[-1])
    later = row[row % steps > 0]
    size = norms[:, later] * norms[:, later - 1]
    with np.errstate(all="ignore"):
        cosine = np.where(size > 0, gram[:, later, later - 1] / size, np.nan)
    whole = np.full((gram.shape[0], gram.shape[-1]), np.nan)
    whole[:, later] = cosine
    measure = Measure(("prompt", "branch", "step"), whole.reshape(len(gram), -1, steps), True)
    return [float(value) for value in average(measure, "step")]


def lag_errors(part: NetworkProfile) -> dict[str, dict[str, dict[int, tuple[float, float]]]]:
    """By kind, way of prediction and lag, the relative error of taking the output of that many steps earlier.

    Mean over sites and steps; over prompts mean and upper quantile.
    """
    found: dict[str, dict[str, dict[int, list[Numbers]]]] = {}
    for table in sites_of(part, FEATURES).values():
        of_kind = found.setdefault(str(table.facts.get("kind", "site")), {})
        for name in ("plain", "affine", "affine_shared"):
            if name in table.measures:
                for lag, errors in zip(table.labels["lag"], average(table[name], "lag", PROMPT), strict=True):
                    of_kind.setdefault(name, {}).setdefault(int(lag), []).append(errors)
    return {
        kind: {name: {lag: _over_prompts(each) for lag, each in lags.items()} for name, lags in ways.items()}
        for kind, ways in found.items()
    }


def _over_prompts(sites: Sequence[Numbers]) -> tuple[float, float]:
    """Mean and upper quantile over prompts of the mean over sites; each is ``[prompt]``."""
    measure = Measure(("site", PROMPT), np.array(sites), True)
    return float(average(measure)), float(upper(measure))


@dataclass(frozen=True)
class FormatNoise:
    """The SNR in dB of linear layers' outputs in one number format: their mean, and the least of any site.

    ``lower`` and ``worst_lower`` are what one prompt of ten falls short of.
    """

    mean: float
    lower: float
    worst: float
    worst_lower: float
    site: str


def format_snr(part: NetworkProfile) -> dict[str, FormatNoise]:
    """By format, the noise that it adds."""
    found: dict[str, dict[str, tuple[float, Numbers]]] = {}
    for site, table in sites_of(part, LINEAR).items():
        means, prompts = average(table["snr"], "format"), average(table["snr"], "format", PROMPT)
        for name, mean, of_prompts in zip(table.labels["format"], means, prompts, strict=True):
            if np.isfinite(mean):
                found.setdefault(str(name), {})[site] = float(mean), of_prompts
    return {name: _noise(of_sites) for name, of_sites in found.items()}


def _noise(of_sites: Mapping[str, tuple[float, Numbers]]) -> FormatNoise:
    site = min(of_sites, key=lambda name: of_sites[name][0])
    every = Measure(("site", PROMPT), np.array([prompts for _, prompts in of_sites.values()]), True)
    worst = Measure((PROMPT,), of_sites[site][1], True)
    lower, worst_lower = (float(upper(each, quantile=1 - UPPER)) for each in (every, worst))
    return FormatNoise(
        float(np.mean([mean for mean, _ in of_sites.values()])), lower, of_sites[site][0], worst_lower, site
    )
