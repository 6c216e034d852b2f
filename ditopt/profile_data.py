"""A profile as a JSON text and named arrays, and back: what a profile file holds. Data only; numpy, no torch.

Networks, sites and measures stand in the text in the profile's own order, which for sites is that of execution.
"""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError

from ditopt.errors import InputError, ProfileError
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.plan_text import short
from ditopt.profile import FeatureGram, NetworkProfile, Profile, plain_number

Arrays = dict[str, npt.NDArray[Any]]
MAX_FINDINGS = 10


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class _Gram(_Part):
    steps: Annotated[int, Field(ge=1)]
    branches: tuple[str, ...]
    has_latents: bool


class _Measure(_Part):
    axes: tuple[str, ...]
    partial: bool


class _Table(_Part):
    measures: dict[str, _Measure]
    labels: dict[str, tuple[StrictStr | StrictInt | StrictFloat, ...]]
    facts: dict[str, Any]


class _Geometry(_Part):
    frames: int
    rows: int
    columns: int
    text: int
    text_first: bool


class _Network(_Part):
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    step_widths: tuple[float, ...]
    sensitivity: tuple[float, ...]
    branch_weights: tuple[float, ...]
    grams: dict[str, _Gram]
    seconds: dict[str, float]
    range_weights: dict[str, tuple[float, ...]]
    tables: dict[str, dict[str, _Table]]
    geometry: _Geometry | None


class _Profile(_Part):
    networks: dict[str, _Network]
    prompts: tuple[str, ...]
    sample_norm: float
    plan: dict[str, Any]
    sample: dict[str, float]
    reasons: tuple[str, ...]
    weights: dict[str, str]


def profile_text(profile: Profile) -> str:
    """All of a profile that is no array, as JSON.

    Raises:
        ProfileError: labels, facts or the plan have values that JSON does not have, such as NaN.
    """
    data = {
        "networks": {name: _network_data(network) for name, network in profile.networks.items()},
        "prompts": list(profile.prompts),
        "sample_norm": float(profile.sample_norm),
        "plan": dict(profile.plan),
        "sample": {key: float(value) for key, value in profile.sample.items()},
        "reasons": list(profile.reasons),
        "weights": dict(profile.weights),
    }
    try:
        return canonical(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(f"profile: labels, facts and plan have to be plain JSON: {error}") from None


def canonical(data: Any) -> str:
    """JSON in the one form that is hashed. Raises ValueError for what JSON does not have."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False, default=plain_number)


def _network_data(network: NetworkProfile) -> dict[str, Any]:
    at = network.geometry
    return {
        "timesteps": _floats(network.timesteps),
        "sigmas": _floats(network.sigmas),
        "step_widths": _floats(network.step_widths),
        "sensitivity": _floats(network.sensitivity),
        "branch_weights": _floats(network.branch_weights),
        "grams": {
            site: {"steps": gram.steps, "branches": list(gram.branches), "has_latents": bool(gram.has_latents)}
            for site, gram in network.grams.items()
        },
        "seconds": {key: float(value) for key, value in network.seconds.items()},
        "range_weights": {site: _floats(values) for site, values in network.range_weights.items()},
        "tables": {
            collector: {site: _table_data(table) for site, table in tables.items()}
            for collector, tables in network.tables.items()
        },
        "geometry": None if at is None else {key: getattr(at, key) for key in _Geometry.model_fields},
    }


def _table_data(table: Table) -> dict[str, Any]:
    return {
        "measures": {
            name: {"axes": list(measure.axes), "partial": bool(measure.partial)}
            for name, measure in table.measures.items()
        },
        "labels": {axis: list(labels) for axis, labels in table.labels.items()},
        "facts": dict(table.facts),
    }


def _floats(values: tuple[float, ...]) -> list[float]:
    return [float(value) for value in values]


def _name(*parts: str) -> str:
    """The name of a tensor: its place in the JSON; slashes in a part are quoted."""
    return "/".join(quote(part, safe=" ") for part in parts)


def profile_arrays(profile: Profile) -> Arrays:
    """The Gram matrices and measures of a profile, by their place in the JSON."""
    found: Arrays = {}
    for network, part in profile.networks.items():
        for site, gram in part.grams.items():
            found[_name(network, "grams", site, "values")] = gram.values
            found[_name(network, "grams", site, "present")] = gram.present
        for collector, tables in part.tables.items():
            for site, table in tables.items():
                for name, measure in table.measures.items():
                    found[_name(network, "tables", collector, site, name)] = measure.values
    return {name: np.asarray(array, order="C") for name, array in found.items()}


def profile_of(text: str, arrays: Arrays, source: str) -> Profile:
    """The profile of which ``profile_text`` and ``profile_arrays`` are these; ``source`` is how errors name it.

    Raises:
        ProfileError: a field is missing, unknown or of another type, or the arrays are not those that the text names.
    """
    try:
        data = _Profile.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError("\n".join(_findings(source, error))) from None
    left = dict(arrays)

    def take(*parts: str) -> npt.NDArray[Any]:
        try:
            return left.pop(_name(*parts))
        except KeyError:
            raise ProfileError(f"{source}, field networks.{'.'.join(parts)}: its tensor is missing") from None

    networks = {}
    for name, part in data.networks.items():
        try:
            geometry = None if part.geometry is None else Geometry(**part.geometry.model_dump())
        except InputError as error:
            raise ProfileError(f"{source}, field networks.{name}.geometry: {error}") from None
        networks[name] = NetworkProfile(
            part.timesteps,
            part.sigmas,
            part.step_widths,
            part.sensitivity,
            part.branch_weights,
            {
                site: FeatureGram(
                    site,
                    gram.steps,
                    gram.branches,
                    take(name, "grams", site, "values"),
                    take(name, "grams", site, "present"),
                    gram.has_latents,
                )
                for site, gram in part.grams.items()
            },
            part.seconds,
            part.range_weights,
            {
                collector: {
                    site: _table(source, (name, "tables", collector, site), table, take)
                    for site, table in tables.items()
                }
                for collector, tables in part.tables.items()
            },
            geometry,
        )
    if left:
        raise ProfileError(f"{source}, tensor {short(next(iter(left)))}: no field of the profile names it")
    return Profile(networks, data.prompts, data.sample_norm, data.plan, data.sample, data.reasons, data.weights)


def _table(source: str, parts: tuple[str, ...], table: _Table, take: Any) -> Table:
    measures = {}
    for name, described in table.measures.items():
        try:
            measures[name] = Measure(described.axes, take(*parts, name), described.partial)
        except ProfileError:
            raise
        except InputError as error:
            raise ProfileError(f"{source}, field networks.{'.'.join(parts)}.{name}: {error}") from None
    return Table(measures, table.labels, table.facts)


def _findings(source: str, error: ValidationError) -> list[str]:
    found = []
    for finding in error.errors(include_url=False)[:MAX_FINDINGS]:
        field = ".".join(map(str, finding["loc"])) or "top"
        message = "is missing" if finding["type"] == "missing" else finding["msg"]
        shown = "" if finding["type"] in ("missing", "extra_forbidden") else f" (found {short(repr(finding['input']))})"
        found.append(f"{source}, field {short(field, 200)}: {message}{shown}")
    return found
