"""All patterns by name; a further one is a file beside this and a line here."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.band import Band
from ditopt.kernels.patterns.radial import Radial
from ditopt.kernels.patterns.sink import Sink
from ditopt.kernels.patterns.spatial import Spatial
from ditopt.kernels.patterns.temporal import Temporal
from ditopt.kernels.patterns.union import Union
from ditopt.kernels.patterns.whole import Everything, Nothing
from ditopt.kernels.patterns.window import Window

PATTERNS: dict[str, type[Pattern]] = {
    "band": Band,
    "dense": Everything,
    "radial": Radial,
    "sink": Sink,
    "skip": Nothing,
    "spatial": Spatial,
    "temporal": Temporal,
    "union": Union,
    "window": Window,
}


def pattern_from_data(data: Any) -> Pattern:
    """The pattern that a word (``dense``) or a mapping (``{pattern: spatial, frames: 1}``) describes.

    Raises:
        ValueError: the name is unknown, or its parameters do not validate.
    """
    written = {"pattern": data} if isinstance(data, str) else data
    settings: dict[str, Any] = dict(written) if isinstance(written, dict) else {}
    name = settings.pop("pattern", None)
    if not isinstance(name, str) or name not in PATTERNS:
        raise ValueError(f"pattern {data!r} is unknown; write one of {', '.join(PATTERNS)}, e.g. {{pattern: spatial}}")
    if name == "union":
        parts = settings.get("of", ())
        if not isinstance(parts, list | tuple):
            raise ValueError(f"union of {parts!r}: 'of' has to be a list of patterns")
        settings["of"] = tuple(pattern_from_data(part) for part in parts)
    try:
        return PATTERNS[name](**settings)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        known = ", ".join(parameter for parameter in PATTERNS[name].model_fields if parameter != "kind")
        raise ValueError(f"pattern {data!r}: {wrong}; {name} has {known or 'no parameters'}") from None


def pattern_to_data(pattern: Pattern) -> dict[str, Any]:
    """The mapping that describes a pattern."""
    settings = pattern.model_dump(mode="json", exclude={"kind", "of"})
    if isinstance(pattern, Union):
        settings["of"] = [pattern_to_data(part) for part in pattern.of]
    return {"pattern": pattern.kind, **settings}  # type: ignore[attr-defined]  # every one has its name
