"""The plan: ordered rules (sites x steps -> decision) with where they come from and what they measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ditopt.decisions import (
    Decision,
    Dense,
    FeatureDecision,
    Fit,
    HeadDecision,
    HeadDecisions,
    Hoist,
    Sparse,
    decision_from_data,
    decision_to_data,
)
from ditopt.errors import PlanError
from ditopt.geometry import Geometry
from ditopt.head_tensors import HeadTensors, reads_tensors
from ditopt.plan_tensors import PlanTensors, TensorFile
from ditopt.plan_text import explain, number_ranges, read_yaml, short, write_text_atomically, write_yaml
from ditopt.sites import STEP, range_names

FORMAT_VERSION = 1
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "time")
LATENT_NAMES = ("hidden_states", "sample", "latents", "x", "noisy_latents")
"""What networks call the arguments that ``Inputs`` names, likeliest first: for guessing where no plan says it."""
MAX_BYTES = 4 * 2**20
MAX_RULES = 10_000
MAX_STEPS = 100_000
MAX_RULE_STEPS = 200_000
"""Limits on the steps of one schedule, hence of one rule, and on those that all rules name together."""
MAX_HEADS = 256
"""Limit on the heads that one rule names."""
MAX_STACKS = 100
MAX_BLOCKS = 300
"""Limits on the stacks that graph breaks leave and on the blocks of one: ranges grow with the square of it."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_steps(text: str | int) -> tuple[int, ...]:
    """The steps that ``"3, 5-6"`` names, ascending and without repeats.

    >>> parse_steps("3, 5-7")
    (3, 5, 6, 7)

    Raises:
        ValueError: the text is not a list of numbers and ranges, or names more than ``MAX_STEPS`` steps.
    """
    return tuple(sorted(set().union(*number_ranges(text, "steps", MAX_STEPS))))


def format_steps(steps: Iterable[int]) -> str:
    """The shortest text that ``parse_steps`` turns back into ``steps``.

    >>> format_steps([3, 5, 6, 7])
    '3, 5-7'
    """
    parts: list[list[int]] = []
    for step in sorted(set(steps)):
        if parts and parts[-1][-1] == step - 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)


def _reader(what: str, limit: int) -> BeforeValidator:
    """Reads a text of numbers and ranges; what is none is left to the field's own validation."""

    def read(value: Any) -> Any:
        is_text = isinstance(value, str | int) and not isinstance(value, bool)
        return tuple(sorted(set().union(*number_ranges(value, what, limit)))) if is_text else value

    return BeforeValidator(read)


def _count_steps(value: Any) -> int:
    """How many steps a rule's ``steps`` stand for; 0 of what its own validation will refuse."""
    try:
        value = number_ranges(value, "steps", MAX_STEPS) if isinstance(value, str | int) else [value]
        return sum(map(len, value))
    except (TypeError, ValueError):
        return 0


def _bounded(rules: Any) -> Any:
    """Refuse rules that name too many steps in all, before any are expanded."""
    total = 0
    for number, rule in enumerate(rules if isinstance(rules, list | tuple) else ()):
        total += _count_steps(rule.get("steps") if isinstance(rule, dict) else getattr(rule, "steps", None))
        if total > MAX_RULE_STEPS:
            raise ValueError(
                f"rules 0-{number} name {total} steps, over the limit of {MAX_RULE_STEPS} for a plan; name only steps "
                "of the schedule, and one rule for many sites (a glob, a range of blocks) instead of many"
            )
    return rules


def _read_decision(value: Any) -> Any:
    try:
        return decision_from_data(value) if isinstance(value, str | dict) else value
    except TypeError:  # of keys, which pydantic does not turn into findings
        raise ValueError("a decision is a word or one 'kind: {setting: value}', its settings named by words") from None


Steps = Annotated[tuple[int, ...], _reader("steps", MAX_STEPS), PlainSerializer(format_steps, return_type=str)]
Heads = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(min_length=1, max_length=MAX_HEADS),
    _reader("heads", MAX_HEADS),
    AfterValidator(lambda heads: tuple(sorted(set(heads)))),
    PlainSerializer(format_steps, return_type=str),
]
DecisionField = Annotated[Decision, BeforeValidator(_read_decision), PlainSerializer(decision_to_data, return_type=Any)]


class Rule(_Part):
    """``do`` at the sites ``sites`` (``step``, ``blocks.3``, a range ``blocks.2..5`` or a glob) in ``steps``.

    A sparse rule is for attention sites (``blocks.3.attn1`` or a glob of such), and for their ``heads``; None: for all.
    """

    sites: Annotated[str, Field(min_length=1, max_length=300)]
    heads: Heads | None = None
    steps: Annotated[Steps, Field(min_length=1)]
    do: DecisionField
    network: str = "*"

    @model_validator(mode="after")
    def _fit_covers_steps(self) -> Self:
        if isinstance(self.do, Fit) and set(self.do.coefficients) != set(self.steps):
            raise ValueError(
                f"fit has coefficients for steps {format_steps(self.do.coefficients)}, the rule is for "
                f"{format_steps(self.steps)}"
            )
        return self

    @model_validator(mode="after")
    def _heads_of_attention(self) -> Self:
        if self.heads is not None and self.do != Dense() and not isinstance(self.do, Sparse):
            raise ValueError(
                f"heads {format_steps(self.heads)} are given to {decision_to_data(self.do)}; only sparse and dense "
                "without settings are decided for heads"
            )
        return self

    @model_validator(mode="after")
    def _hoist_whole_steps(self) -> Self:
        if isinstance(self.do, Hoist) and self.sites != STEP:
            raise ValueError(f"hoist is decided for whole steps; write sites: {STEP}, not {self.sites}")
        return self

    def names(self, site: str) -> bool:
        """Whether it is for a site."""
        return site == self.sites or fnmatch.fnmatchcase(site, self.sites)

    @property
    def reads_tensors(self) -> bool:
        """Whether what it decides reads something in the file beside the plan."""
        return isinstance(self.do, Sparse) and reads_tensors(self.do.pattern)

    def reads(self, entry: HeadTensors) -> bool:
        """Whether it reads an entry of that file."""
        same = isinstance(self.do, Sparse) and entry.text_of(self.do.pattern) == entry.pattern
        return same and self.names(entry.site) and fnmatch.fnmatchcase(entry.network, self.network)

    @property
    def for_heads(self) -> bool:
        """Whether it speaks of heads of attention sites, and of nothing else."""
        return self.heads is not None or isinstance(self.do, Sparse)

    @property
    def place(self) -> str:
        """What it is for, in words: its sites, and their heads where it names some."""
        return self.sites if self.heads is None else f"{self.sites} heads {format_steps(self.heads)}"


def cast_rules(rules: Iterable[Rule]) -> list[tuple[Rule, str | None]]:
    """The rules of computed steps with their dtype, and nothing else left of them; none if no step has a dtype.

    One that then says what the one before it says is left out, so that plans of one dtype have the same.
    """
    found: list[tuple[Rule, str | None]] = []
    for rule in rules:
        if isinstance(rule.do, Dense) and not rule.for_heads:
            dtype = rule.do.dtype
            bare = rule.model_copy(update={"do": Dense(dtype=dtype)})
            last = found[-1][0] if found else None
            if last is None or last.model_copy(update={"steps": bare.steps}) != bare or {*bare.steps} - {*last.steps}:
                found.append((bare, dtype))
    return found if any(each for _, each in found) else []


class ModelPrint(_Part):
    """Which model a plan was made for: class name, hash of the parameter structure, number of blocks."""

    class_name: Annotated[str, Field(alias="class")]
    structure: str
    blocks: Annotated[int, Field(ge=0)]
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SamplerPrint(_Part):
    """Which sampling loop: scheduler class, number of network evaluations and their timestep values, guidance scale."""

    class_name: Annotated[str, Field(alias="class")]
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    guidance: float = 1.0
    timesteps: Annotated[dict[str, tuple[float, ...]], Field(min_length=1)]
    sigmas: dict[str, tuple[float, ...]]
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _paired(self) -> Self:
        lengths = [{name: len(values) for name, values in part.items()} for part in (self.timesteps, self.sigmas)]
        if lengths[0] != lengths[1] or 0 in lengths[0].values():
            raise ValueError(f"timesteps are {lengths[0]} and sigmas {lengths[1]}; each network needs as many of both")
        return self


class DevicePrint(_Part):
    """Where the figures were measured."""

    device: str
    torch: str
    dtype: str


class Inputs(_Part):
    """Names of the arguments that tell step, latents and generation apart; ``forward`` lists the forward's in order.

    ``contexts`` are the names of diffusers' ``cache_context`` where nothing else tells guidance branches apart.
    """

    timestep: str = "timestep"
    latents: str = "hidden_states"
    identity: str | None = None
    forward: tuple[str, ...] = ()
    contexts: tuple[str, ...] | None = None


Stack = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_BLOCKS)]


class Breaks(_Part):
    """How a network is cut by graph breaks: ``clock`` is the structure of its graph that is called with the timestep.

    ``at`` says file, line and reason of each break, ``blocks`` which blocks each graph has that can be decided on.
    """

    clock: str
    at: tuple[str, ...] = ()
    blocks: Annotated[tuple[Stack, ...], Field(max_length=MAX_STACKS)] = ()

    @property
    def sites(self) -> frozenset[str]:
        """What rules may name: the ranges of blocks within each graph."""
        return frozenset(site for stack in self.blocks for site in range_names(stack))


class Plan(_Part):
    """A plan: what to do where and when; what no rule names is dense, and later rules win.

    ``settings`` is what the pipeline was called with, ``geometry`` the shape of each network's latents (batch first),
    ``tokens`` how the tokens of that lie, ``breaks`` which networks are several graphs, ``recipe`` what the search was
    restricted to, ``tensors`` the file beside the plan that has what rules speak of and no text holds.
    """

    ditopt: Literal[1] = 1
    model: ModelPrint
    sampler: SamplerPrint
    settings: dict[str, bool | int | float | str] = {}
    geometry: dict[str, tuple[int, ...]] = {}
    tokens: dict[str, Geometry] = {}
    device: DevicePrint
    inputs: Inputs = Inputs()
    breaks: dict[str, Breaks] = {}
    target: dict[str, float | str] = {}
    recipe: Annotated[str, Field(max_length=100)] | None = None
    predicted: dict[str, float] = {}
    measured: dict[str, Any] = {}
    tensors: TensorFile | None = None
    rules: Annotated[tuple[Rule, ...], Field(max_length=MAX_RULES), BeforeValidator(_bounded)] = ()
    _beside: PlanTensors = PrivateAttr(default_factory=PlanTensors)

    @property
    def beside(self) -> PlanTensors:
        """What its rules read, or may, and no text holds: of the file beside it, or from where it was made."""
        return self._beside

    def with_beside(self, tensors: PlanTensors) -> Plan:
        """The same plan with these tensors, which ``save`` writes beside it as far as rules read them."""
        found = self.model_copy(update={"tensors": None})
        found._beside = tensors
        return found

    def decisions(self, step: int, sites: Sequence[str], network: str = "transformer") -> dict[str, FeatureDecision]:
        """The decision of every site of ``sites`` in ``step``; a site that no rule names is ``Dense()``.

        What is decided for heads is not among them: it is ``head_decisions``.
        """
        chosen: dict[str, FeatureDecision] = dict.fromkeys(sites, Dense())
        for rule in self.rules:
            if isinstance(rule.do, Sparse | Hoist) or rule.for_heads or step not in rule.steps:
                continue
            if fnmatch.fnmatchcase(network, rule.network):
                chosen |= {site: rule.do for site in sites if rule.names(site)}
        return chosen

    def head_decisions(self, site: str, network: str = "transformer") -> tuple[HeadDecisions, ...]:
        """What the heads of an attention site do in every step; those that no rule names are ``Dense()``."""
        found = [HeadDecisions()] * len(self.sampler.timesteps[network])
        for rule in self.rules:
            if isinstance(rule.do, HeadDecision) and rule.names(site) and fnmatch.fnmatchcase(network, rule.network):
                for step in {*rule.steps} & {*range(len(found))}:
                    found[step] = found[step].then(rule.heads, rule.do)
        return tuple(found)

    def hoisted_steps(self, network: str = "transformer") -> frozenset[int]:
        """The steps that read what was computed ahead of them."""
        rules = (rule for rule in self.rules if fnmatch.fnmatchcase(network, rule.network))
        return frozenset(step for rule in rules if isinstance(rule.do, Hoist) for step in rule.steps)

    @property
    def is_exact(self) -> bool:
        """Whether there are rules, and all of them leave every result as it is but for rounding.

        Such a plan is right for every model, schedule and geometry; those that it names are what it was measured with.
        """
        return bool(self.rules) and all(isinstance(rule.do, Hoist) for rule in self.rules)

    def kept_steps(self, network: str = "transformer") -> tuple[int, ...]:
        """The steps in which the network runs (the site ``step`` is dense)."""
        total = len(self.sampler.timesteps[network])
        return tuple(t for t in range(total) if isinstance(self.decisions(t, [STEP], network)[STEP], Dense))

    def to_data(self) -> dict[str, Any]:
        """The plan as plain YAML-able data, empty parts left out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for rule in data["rules"]:
            if rule["network"] == "*":
                del rule["network"]
        return {key: value for key, value in data.items() if value not in ({}, [])}

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, whole or not at all, and before it the file beside it that its rules read, if any.

        Raises:
            PlanError: the folder is missing or not writable, or what rules read beside it is not known.
        """
        path = Path(path)
        tensors = None
        if any(rule.reads_tensors for rule in self.rules):
            used = self.beside.used_by(self.rules)
            if not used:
                raise PlanError(
                    f"{path}: is not written: its rules read lists or projections that it does not have; load the plan "
                    "from its file (Plan.load), which has them beside it"
                )
            tensors = used.save(path.parent)
        text = "# A ditopt plan. Later rules win; what no rule names is dense.\n"
        text += write_yaml(self.model_copy(update={"tensors": tensors}).to_data())
        write_text_atomically(path, text)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and validate a plan file.

        Raises:
            PlanError: the file is missing, too large, not YAML, of another version or malformed, or the file of
                tensors that it names is not there as it was written; the message names file, line and field and says
                what was expected.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise PlanError(
                    f"{path}: a plan of {size} bytes is over the limit of {MAX_BYTES}; is this a plan file?"
                )
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanError(
                f"{path}: no such plan file; make one with `ditopt optimize DIR --prompts FILE -o {path}`"
            ) from None
        except UnicodeDecodeError:
            raise PlanError(
                f"{path}: is no text, so no plan; in a profile, `ditopt search {path} -o PLAN` finds one"
            ) from None
        except OSError as error:
            raise PlanError(f"{path}: cannot be read as a plan: {error}") from error
        found = cls.parse(text, str(path))
        if found.tensors is not None:
            found._beside = PlanTensors.load(path.parent, found.tensors)
        return found

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> Plan:
        """Validate the text of a plan; ``source`` is how errors name it. Raises as ``load``."""
        data, node = read_yaml(text, source)
        if not isinstance(data, dict):
            raise PlanError(
                f"{source}: a plan is a mapping that starts with 'ditopt: {FORMAT_VERSION}'; found "
                f"{type(data).__name__}"
            )
        version = data.get("ditopt")
        if version != FORMAT_VERSION:
            hint = (
                "upgrade ditopt or make the plan again"
                if isinstance(version, int) and version > FORMAT_VERSION
                else f"expected {FORMAT_VERSION}"
            )
            raise PlanError(f"{source}, field ditopt: format version {short(repr(version))} is not supported; {hint}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(explain(error, node, source)) from None
