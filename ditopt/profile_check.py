"""Checks of a profile: sizes that have to agree and numbers that have to be finite. Data only; numpy, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ditopt.errors import ProfileError
from ditopt.geometry import Geometry
from ditopt.measures import PROMPT, Measure, Table
from ditopt.profile import FeatureGram, NetworkProfile, Profile
from ditopt.sites import STEP

FLOATS = ("float16", "float32", "float64")
ATTENTION = "attention"
SELF_KINDS = ("self", "joint")
"""What the tables of attention are called, and the kinds of it whose queries are the tokens of a geometry."""


def check_profile(profile: Profile, source: str = "profile") -> None:
    """Refuse a profile whose parts disagree, or that holds numbers which no measurement gives.

    Raises:
        ProfileError: names ``source``, the field, what was found there, and what was expected.
    """
    for complaint in _of_profile(profile):
        raise ProfileError(f"{source}, field {complaint}")
    try:
        plan = profile.template()
    except ProfileError as error:
        raise ProfileError(f"{source}, {error}") from None
    for name, network in profile.networks.items() if plan is not None else ():
        steps = plan.sampler.timesteps.get(name) if plan is not None else None
        if steps != network.timesteps:
            raise ProfileError(
                f"{source}, field plan.sampler.timesteps.{name}: is {_brief(steps)}, the profile was taken at "
                f"{_brief(network.timesteps)}"
            )


def _of_profile(profile: Profile) -> Iterator[str]:
    if not profile.networks:
        yield "networks: there is none; expected at least one network"
    if not profile.prompts:
        yield "prompts: there is none; expected at least one prompt"
    yield from _finite("sample_norm", profile.sample_norm)
    if profile.sample_norm <= 0:
        yield f"sample_norm: is {profile.sample_norm}; expected a positive number"
    for key, value in profile.sample.items():
        yield from _finite(f"sample.{key}", value)
        if value <= 0:
            yield f"sample.{key}: is {value}; expected a positive number"
    for name, network in profile.networks.items():
        yield from (f"networks.{name}.{complaint}" for complaint in _of_network(network, len(profile.prompts)))


def _of_network(network: NetworkProfile, prompts: int) -> Iterator[str]:
    steps, branches = len(network.timesteps), len(network.branch_weights)
    if not steps:
        yield "timesteps: there is none; a profile has at least one step"
    if not branches:
        yield "branch_weights: there is none; a profile has at least one branch"
    per_step = {name: getattr(network, name) for name in ("timesteps", "sigmas", "step_widths", "sensitivity")}
    per_step |= {f"range_weights.{site}": values for site, values in network.range_weights.items()}
    for name, values in per_step.items():
        if len(values) != steps:
            yield f"{name}: has {len(values)} numbers; {steps} steps need {steps}"
        yield from _finite(name, values)
    yield from _finite("branch_weights", network.branch_weights)
    for name, value in network.seconds.items():
        yield from _finite(f"seconds.{name}", value)
        if name in ("full", "predicted") and value <= 0:
            yield f"seconds.{name}: is {value}; a step takes more than 0 seconds"
    for name in ("step_widths", "sensitivity"):
        if min(getattr(network, name), default=1.0) <= 0:
            yield f"{name}: has {min(getattr(network, name))}; expected positive numbers"
    for name in network.range_weights:
        if name not in network.grams:
            yield f"range_weights.{name}: there is no Gram matrix of this site"
    for site, gram in network.grams.items():
        yield from (f"grams.{site}.{complaint}" for complaint in _of_gram(gram, site, steps, branches, prompts))
    sizes = {PROMPT: prompts, "step": steps, "branch": branches}
    for collector, tables in network.tables.items():
        for site, table in tables.items():
            yield from (f"tables.{collector}.{site}.{complaint}" for complaint in _of_table(table, sizes))
    if network.geometry is not None:
        yield from _of_geometry(network.geometry, network.tables.get(ATTENTION, {}))


def _of_gram(gram: FeatureGram, site: str, steps: int, branches: int, prompts: int) -> Iterator[str]:
    if gram.site != site:
        yield f"site: is {gram.site!r}; expected {site!r}"
    if gram.steps != steps:
        yield f"steps: is {gram.steps}; expected {steps}, the steps of the network"
    if len(gram.branches) != branches:
        yield f"branches: are {', '.join(gram.branches) or 'none'}; the network's weights are of {branches}"
    if gram.has_latents and site != STEP:
        yield f"has_latents: is true; only the site {STEP!r} has latents"
    rows = steps * (branches + gram.has_latents)
    for name, values, wanted in (
        ("values", gram.values, (prompts, rows, rows)),
        ("present", gram.present, (branches, steps)),
    ):
        if values.shape != wanted:
            what = f"{prompts} prompts, {branches} branches and {steps} steps need {list(wanted)}"
            yield f"{name}: has shape {list(values.shape)}; {what}"
    if gram.values.dtype != np.float64:
        yield f"values: is {gram.values.dtype}; expected float64"
    if gram.present.dtype != np.bool_:
        yield f"present: is {gram.present.dtype}; expected bool"
    yield from _finite("values", gram.values)
    if gram.values.ndim == 3 and np.einsum("pnn->pn", gram.values).min(initial=0.0) < 0:
        yield "values: have a negative number on the diagonal, where squared norms stand"


def _of_table(table: Table, sizes: Mapping[str, int]) -> Iterator[str]:
    expected = {**sizes, **{axis: len(labels) for axis, labels in table.labels.items()}}
    for name, measure in table.measures.items():
        if str(measure.values.dtype) not in FLOATS:
            yield f"{name}: is {measure.values.dtype}; expected one of {', '.join(FLOATS)}"
        for axis in measure.axes:
            size = measure.size(axis)
            wanted = expected.setdefault(axis, size)  # axes without a known size agree within the table
            if size != wanted:
                what = "labels" if axis in table.labels else "in the profile" if axis in sizes else "in another measure"
                yield f"{name}: axis {axis!r} has {size} entries; expected {wanted}, as {what}"
        known = np.where(np.isnan(measure.values), 0.0, measure.values) if measure.partial else measure.values
        yield from _finite(name, known, measure)


def _of_geometry(geometry: Geometry, tables: Mapping[str, Table]) -> Iterator[str]:
    """A network may have attention within frames or within pixels alone; one of its sites has to fit at least."""
    queries = {
        site: table.facts.get("queries") for site, table in tables.items() if table.facts.get("kind") in SELF_KINDS
    }
    known = {site: count for site, count in queries.items() if isinstance(count, int)}
    fitting = {geometry.tokens, geometry.video, geometry.frames, geometry.rows * geometry.columns}
    if known and fitting.isdisjoint(known.values()):
        site, count = next(iter(known.items()))
        yield f"geometry: {geometry} makes {geometry.tokens} tokens; attention {site} has {count} queries"


def _finite(name: str, values: Any, measure: Measure | None = None) -> Iterator[str]:
    wrong = ~np.isfinite(np.asarray(values))
    if wrong.any():
        index = np.argwhere(wrong)[0].tolist()
        axes = measure.axes if measure is not None else ("index",) * len(index)
        where = ", ".join(f"{axis} {at}" for axis, at in zip(axes, index, strict=True))
        only = "; only a measure that is partial may have gaps" if measure is not None else "; expected finite numbers"
        yield f"{name}: NaN or infinite{f' at {where}' if where else ''}{only}"


def _brief(steps: tuple[float, ...] | None) -> str:
    return "missing" if steps is None else f"{len(steps)} steps from {steps[0]:g} to {steps[-1]:g}"
