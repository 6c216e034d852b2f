"""Decisions: what may be done at a site in a step. A closed, tagged union; data only.

In a plan file a decision is a word (``dense``, ``reuse``) or a one-key mapping
(``forecast: {order: 1}``). A further kind is one more class here and one more row in ``KINDS``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

Dtype = Literal["bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""What the products of a float32 network may be computed in."""
Distances = Literal["sigma", "steps"]
Formula = Literal["polynomial", "taylor"]
MAX_PATTERN = 4000
"""Characters of a sparse decision's pattern."""


class _Decision(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Dense(_Decision):
    """Compute the site as the model does; with ``dtype`` its matrix products and attention in that one.

    ``second_order`` is a share of Adams and Bashforth's two-step formula: the sampler is handed the output plus this
    share of ``h / (2 d)`` times its change since the computed step before, ``d`` away; ``h`` is how far the sampler
    goes on it. With 1, Euler's method moves as a solver of second order does, but for the first computed step, the last
    step and one at the sigma of the computed step before, which have none. It is for samplers of first order: others
    do something of the kind themselves.

    ``simplify`` rewrites what is slow as the model has it (rotary embeddings by strided writes, hyperbolic tangents),
    exactly but for rounding, and runs attention in our own kernel where there is one for the dtype and the processor.

    All three are decided for whole steps (the site ``step``); a dtype for those of a float32 model.
    """

    kind: Literal["dense"] = "dense"
    dtype: Dtype | None = None
    second_order: Annotated[float, Field(gt=0, le=1)] | None = None
    simplify: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing but what the model does is asked for."""
        return self == Dense()


class Reuse(_Decision):
    """Take the feature of the latest step that computed it (a forecast of order 0)."""

    kind: Literal["reuse"] = "reuse"

    @property
    def history(self) -> int:
        """Number of earlier computed features that are read."""
        return 1


class Forecast(_Decision):
    """Extrapolate from the last ``order + 1`` computed features at true distances, in sigma or in steps.

    By the polynomial through them; or (``formula: taylor``) by Taylor's series from the newest, whose derivatives are
    differences of computed steps, each divided by the distance of the newest two when it was taken (TaylorSeer). The
    two are the same for order 1.
    """

    kind: Literal["forecast"] = "forecast"
    order: Annotated[int, Field(ge=1, le=2)] = 1
    distances: Distances = "sigma"
    formula: Formula = "polynomial"

    @property
    def history(self) -> int:
        """Number of earlier computed features that are read."""
        return self.order + 1


class Fit(_Decision):
    """A linear combination, fitted on the profile, of computed features (newest first) and the current latents.

    ``coefficients[step]`` holds ``history`` factors and, where ``latents`` is true, one more for the
    latents; ``sources[step]`` the steps whose features they were fitted for.
    """

    kind: Literal["fit"] = "fit"
    history: Annotated[int, Field(ge=1, le=3)] = 2
    latents: bool = False
    coefficients: dict[int, tuple[float, ...]]
    sources: dict[int, tuple[int, ...]]

    @field_validator("sources")
    @classmethod
    def _paired(cls, sources: dict[int, tuple[int, ...]], info: Any) -> dict[int, tuple[int, ...]]:
        history, coefficients = info.data.get("history"), info.data.get("coefficients")
        if history is None or coefficients is None:
            return sources
        if sources.keys() != coefficients.keys():
            raise ValueError(
                f"names steps {sorted(sources)}, coefficients names {sorted(coefficients)}; they must agree"
            )
        width = history + int(info.data["latents"])
        for step, factors in coefficients.items():
            if len(factors) != width or len(sources[step]) != history:
                raise ValueError(
                    f"step {step} has {len(factors)} coefficients and {len(sources[step])} sources; "
                    f"history {history} with latents {info.data['latents']} needs {width} and {history}"
                )
        return sources


def pattern_text(pattern: Any) -> str:
    """The one text of a pattern: its mapping (or that as a text) as JSON with sorted keys, as profiles name candidates.

    >>> pattern_text({"pattern": "temporal", "columns": 1})
    '{"columns": 1, "pattern": "temporal"}'

    Raises:
        ValueError: it is no mapping with the name of a pattern, holds what JSON does not, or is too long.
    """
    try:
        written = json.loads(pattern) if isinstance(pattern, str) else pattern
        text = json.dumps(written, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a pattern is a mapping of names to numbers, words and lists: {error}") from None
    if not isinstance(written, Mapping) or not isinstance(written.get("pattern"), str):
        raise ValueError("sparse needs the name of a pattern, e.g. {sparse: {pattern: temporal, rows: 1, columns: 1}}")
    if len(text) > MAX_PATTERN:
        raise ValueError(f"a pattern of {len(text)} characters is over the limit of {MAX_PATTERN}")
    return text


def _name_first(entries: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return dict(sorted(entries, key=lambda entry: entry[0] != "pattern"))


class Sparse(_Decision):
    """Attend to the blocks of keys that a pattern keeps; for heads of attention sites.

    ``pattern`` is the ``pattern_text`` of its mapping, as ``kernels.patterns.choice`` reads it when a plan is bound;
    two that are written alike are equal. Its ``rest`` says what becomes of the other blocks: they are lost, or
    (``rest: pooled``) count by the means of their keys and values, in groups of whole blocks or of so many tokens
    (``rest: {pooled: 16}``). Its ``order`` (``tiles``, ...) says in which order of the tokens blocks are, ``qk: int8``
    that queries and keys are multiplied as int8; with a ``refresh`` of N a draft's blocks are found in every N-th step
    of a run, and kept in between.
    """

    kind: Literal["sparse"] = "sparse"
    pattern: Annotated[str, BeforeValidator(pattern_text)]

    @property
    def settings(self) -> dict[str, Any]:
        """The pattern's mapping, its name first."""
        found: dict[str, Any] = json.loads(self.pattern, object_pairs_hook=_name_first)
        return found


class Hoist(_Decision):
    """Compute ahead of the steps what is the same in many of them (``passes.hoist``); exact but for rounding.

    It goes with whatever else is decided, of which it changes nothing, and is decided for whole steps (the site
    ``step``): those that it names read what was computed ahead.
    """

    kind: Literal["hoist"] = "hoist"


Decision = Dense | Reuse | Forecast | Fit | Sparse | Hoist
Predictor = Reuse | Forecast | Fit
FeatureDecision = Dense | Predictor
"""What may be done at the whole step and at ranges of blocks."""
HeadDecision = Dense | Sparse
"""What may be done at a head of an attention site."""


@dataclass(frozen=True)
class HeadDecisions:
    """What the heads of an attention site do in a step: some by number, all ``others`` alike."""

    others: HeadDecision = Dense()  # noqa: RUF009  # it is frozen
    named: Mapping[int, HeadDecision] = field(default_factory=dict)

    def then(self, heads: Sequence[int] | None, do: HeadDecision) -> HeadDecisions:
        """The same with ``do`` for some heads, or for all."""
        if heads is None:
            return HeadDecisions(do)
        return HeadDecisions(self.others, {**self.named, **dict.fromkeys(heads, do)})

    @property
    def any_sparse(self) -> bool:
        """Whether some head is, if there are any that are not named."""
        return any(isinstance(do, Sparse) for do in (self.others, *self.named.values()))

    def of(self, heads: int) -> tuple[HeadDecision, ...]:
        """The decision of each of so many heads."""
        return tuple(self.named.get(head, self.others) for head in range(heads))


KINDS: dict[str, type[Dense] | type[Reuse] | type[Forecast] | type[Fit] | type[Sparse] | type[Hoist]] = {
    "dense": Dense,
    "reuse": Reuse,
    "forecast": Forecast,
    "fit": Fit,
    "sparse": Sparse,
    "hoist": Hoist,
}


def decision_to_data(decision: Decision) -> str | dict[str, Any]:
    """The readable form of a decision: a word where it has no settings, else a one-key mapping."""
    if isinstance(decision, Sparse):
        return {decision.kind: decision.settings}
    settings = decision.model_dump(
        mode="json", exclude={"kind"}, exclude_none=True, exclude_defaults=isinstance(decision, Dense | Fit | Forecast)
    )
    if isinstance(decision, Fit):
        settings = {"history": decision.history, **settings}
    if isinstance(decision, Forecast):
        settings = {"order": decision.order, **settings}
    return {decision.kind: settings} if settings else decision.kind


def decision_from_data(data: Any) -> Decision:
    """The decision that a plan file's ``do:`` describes.

    Raises:
        ValueError: the kind is unknown or its settings do not validate.
    """
    kind: Any = data
    settings: Any = {}
    if isinstance(data, dict) and len(data) == 1:
        kind, settings = next(iter(data.items()))
    if kind not in KINDS or not isinstance(settings, dict):
        raise ValueError(
            f"decision {data!r} is unknown; write one of {', '.join(KINDS)}, e.g. {{forecast: {{order: 1}}}}"
        )
    if kind == "sparse":
        return Sparse(pattern=pattern_text(settings))
    return KINDS[kind](**settings)
