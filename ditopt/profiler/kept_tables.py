"""Tables, and what was left out of them, as a bundle of tensors, so that a checkpoint can hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.measures import Measure, Table

Tables = dict[str, dict[str, Table]]
"""By collector and site."""
HEADER = "tables.header"


def to_tensors(tables: Mapping[str, Mapping[str, Table]], reasons: Sequence[str] = ()) -> dict[str, Tensor]:
    """The measures as tensors, numbered, and one of bytes that says what they are (JSON)."""
    header: list[dict[str, object]] = []
    found: dict[str, Tensor] = {}
    for collector, sites in tables.items():
        for site, table in sites.items():
            measures = {}
            for name, measure in table.measures.items():
                key = f"tables.{len(found)}"
                found[key] = torch.from_numpy(np.array(measure.values, order="C"))  # sites may share one
                measures[name] = [key, measure.axes, measure.partial]
            header.append(
                {
                    "collector": collector,
                    "site": site,
                    "measures": measures,
                    "labels": dict(table.labels),
                    "facts": dict(table.facts),
                }
            )
    found[HEADER] = torch.frombuffer(
        bytearray(json.dumps({"tables": header, "reasons": list(reasons)}).encode()), dtype=torch.uint8
    )
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> Tables:
    """The tables of such a bundle, which may hold other tensors as well."""
    found: Tables = {}
    for entry in _header(tensors)["tables"]:
        measures = {
            name: Measure(tuple(axes), tensors[key].numpy(), partial)
            for name, (key, axes, partial) in entry["measures"].items()
        }
        labels = {axis: tuple(values) for axis, values in entry["labels"].items()}
        found.setdefault(entry["collector"], {})[entry["site"]] = Table(measures, labels, entry["facts"])
    return found


def reasons_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """What such a bundle says was left out."""
    return list(_header(tensors)["reasons"])


def _header(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tensors[HEADER].numpy().tobytes())
    return found
