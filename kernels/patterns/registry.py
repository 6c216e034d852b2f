"""All patterns by name, static, dynamic and from a file; a further one is a file beside this and a line here."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.band import Band
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.listed import Listed
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

DYNAMIC: dict[str, type[Draft]] = {"draft": Draft}
"""Those that have no map: which blocks they keep is found in every call anew."""
FROM_FILE: dict[str, type[Listed]] = {"listed": Listed}
"""Those whose maps stand in the file beside the plan, head by head."""


def pattern_from_data(data: Any) -> Pattern:
    """The pattern that a word (``dense``) or a mapping (``{pattern: spatial, frames: 1}``) describes.

    Raises:
        ValueError: the name is unknown or that of a dynamic one, or its parameters do not validate.
    """
    found = choice_from_data(data)
    if isinstance(found, Listed):
        raise ValueError(f"pattern {data!r}: {found.kind} has a map for each head of its own; no union takes it")
    if isinstance(found, Draft):
        raise ValueError(
            f"pattern {data!r}: {found.kind} finds its blocks anew in every call; it has no map, and no union takes it"
        )
    return found


def choice_from_data(data: Any) -> Pattern | Draft | Listed:
    """As ``pattern_from_data``, for all patterns.

    Raises:
        ValueError: the name is unknown, or its parameters do not validate.
    """
    written = {"pattern": data} if isinstance(data, str) else data
    settings: dict[str, Any] = dict(written) if isinstance(written, dict) else {}
    name = settings.pop("pattern", None)
    known: dict[str, type[Pattern] | type[Draft] | type[Listed]] = {**PATTERNS, **DYNAMIC, **FROM_FILE}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"pattern {data!r} is unknown; write one of {', '.join(known)}, e.g. {{pattern: spatial}}")
    if name == "union":
        parts = settings.get("of", ())
        if not isinstance(parts, list | tuple):
            raise ValueError(f"union of {parts!r}: 'of' has to be a list of patterns")
        settings["of"] = tuple(pattern_from_data(part) for part in parts)
    try:
        return known[name](**settings)
    except ValidationError as error:
        wrong = "; ".join(_told(each["loc"], each["msg"]) for each in error.errors())
        has = ", ".join(parameter for parameter in known[name].model_fields if parameter != "kind")
        raise ValueError(f"pattern {data!r}: {wrong}; {name} has {has or 'no parameters'}") from None


def _told(at: tuple[int | str, ...], message: str) -> str:
    """What is wrong with the parameter at a place; at none: with how they go together."""
    return ": ".join([*([".".join(map(str, at))] if at else ()), message.removeprefix("Value error, ")])


def pattern_to_data(pattern: Pattern | Draft | Listed) -> dict[str, Any]:
    """The mapping that describes a pattern; of one without a map without what it leaves as it is by default."""
    if isinstance(pattern, Draft | Listed):
        return {"pattern": pattern.kind, **pattern.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)}
    settings = pattern.model_dump(mode="json", exclude={"kind", "of"})
    if isinstance(pattern, Union):
        settings["of"] = [pattern_to_data(part) for part in pattern.of]
    return {"pattern": pattern.kind, **settings}  # type: ignore[attr-defined]  # every one has its name
