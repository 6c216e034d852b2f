"""What a plan refers to and no text can hold: one safetensors file beside it, named by its hash. Data only; no torch.

The metadata have one entry, ``{"ditopt_plan_tensors": 1, "maps": [...], "projections": [...]}``, which says of the
tensors ``map.0``, ``map.1``, ... and ``projection.0``, ... what they are. Nothing depends on when or where the file is
written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ditopt.errors import PlanError
from ditopt.geometry import Geometry
from ditopt.head_tensors import BlockMaps, HeadTensors, Projections
from ditopt.plan_text import write_atomically

FORMAT_VERSION = 1
KEY = "ditopt_plan_tensors"
MAX_BYTES = 256 * 2**20
"""Limit on the file."""
AGAIN = "copy it from where the plan was made, or make the plan again with `ditopt optimize DIR --prompts FILE -o PLAN`"


class TensorFile(BaseModel):
    """The file of a plan's tensors: its name in the plan's folder, and the SHA-256 of what is in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Reader(Protocol):
    """A rule of a plan, as far as it says which entries it reads."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The heads that it is for; None: all."""

    def reads(self, entry: HeadTensors) -> bool:
        """Whether it is about a network, site and pattern of an entry's."""


class _Described(BaseModel):
    """What the metadata say of one entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    network: str
    site: str
    pattern: str
    heads: tuple[Annotated[int, Field(ge=0)], ...]
    starts: tuple[Annotated[int, Field(ge=0)], ...]


class _DescribedMaps(_Described):
    geometry: Geometry
    block: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """The tensors of a plan. Two are equal if files of them are."""

    maps: tuple[BlockMaps, ...] = ()
    projections: tuple[Projections, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def entries(self) -> tuple[HeadTensors, ...]:
        """All of them."""
        return (*self.maps, *self.projections)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTensors) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # nobody looks it up

    def maps_for(self, network: str, site: str, pattern: str) -> BlockMaps | None:
        """The maps that a decision with this pattern reads at a site; None if there are none."""
        return _entry(self.maps, network, site, pattern)

    def projections_for(self, network: str, site: str, pattern: str) -> Projections | None:
        """The projections that a decision with this pattern reads at a site; None if there are none."""
        return _entry(self.projections, network, site, pattern)

    def used_by(self, rules: Iterable[Reader]) -> PlanTensors:
        """Those that rules read, and nothing else."""
        readers = [*rules]
        return PlanTensors(_used(self.maps, readers), _used(self.projections, readers))

    def to_bytes(self) -> bytes:
        """What a file of them holds."""
        told: dict[str, Any] = {KEY: FORMAT_VERSION}
        arrays: dict[str, npt.NDArray[Any]] = {}
        for kind, entries in (("maps", self.maps), ("projections", self.projections)):
            told[kind] = [each.facts() for each in entries]
            arrays |= {f"{each.name}.{at}": np.ascontiguousarray(each.packed) for at, each in enumerate(entries)}
        return bytes(save(arrays, metadata={KEY: json.dumps(told, sort_keys=True)}))

    def save(self, folder: Path) -> TensorFile:
        """Write them into a folder, whole or not at all; a file of the same contents has the same name.

        Raises:
            PlanError: they are larger than ``MAX_BYTES``, or the folder is missing or not writable.
        """
        data = self.to_bytes()
        if len(data) > MAX_BYTES:
            raise PlanError(
                f"{folder}: tensors of {len(data)} bytes are over the limit of {MAX_BYTES} for a plan; search again "
                "without them, or with fewer heads"
            )
        digest = hashlib.sha256(data).hexdigest()
        path = folder / f"tensors-{digest[:16]}.safetensors"
        write_atomically(path, data)
        return TensorFile(file=path.name, sha256=digest)

    @classmethod
    def load(cls, folder: Path, named: TensorFile) -> PlanTensors:
        """Read the file that a plan in a folder names.

        Raises:
            PlanError: it is missing, too large, cut short, another one than the plan was written with, or malformed.
        """
        path = folder / named.file
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise PlanError(f"{path}: {size} bytes are over the limit of {MAX_BYTES} for a plan's tensors")
            data = path.read_bytes()
        except FileNotFoundError:
            raise PlanError(
                f"{path}: no such file; the plan beside it reads what its heads have there: {AGAIN}"
            ) from None
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror or error}; {AGAIN}") from None
        digest = hashlib.sha256(data).hexdigest()
        if digest != named.sha256:
            raise PlanError(
                f"{path}: has the SHA-256 {digest[:16]}..., the plan was written with {named.sha256[:16]}...: the file "
                f"was cut short or changed, or is of another plan; {AGAIN}"
            )
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, source: str) -> PlanTensors:
        """What such a file holds; ``source`` is how errors name it. Raises ``PlanError`` if it is malformed."""
        try:
            arrays = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            told = json.loads(header["__metadata__"][KEY])
            version = told.pop(KEY)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"{source}: is no file of a plan's tensors ({error!r}); {AGAIN}") from None
        if version != FORMAT_VERSION:
            raise PlanError(f"{source}: format version {version!r} is not supported; expected {FORMAT_VERSION}")
        maps = _described(told, "maps", _DescribedMaps, source)
        others = _described(told, "projections", _Described, source)
        return cls(
            tuple(_checked(BlockMaps, number, each, arrays, source) for number, each in enumerate(maps)),
            tuple(_checked(Projections, number, each, arrays, source) for number, each in enumerate(others)),
        )


Entry = TypeVar("Entry", bound=HeadTensors)
Description = TypeVar("Description", bound=_Described)


def _entry(entries: Sequence[Entry], network: str, site: str, pattern: str) -> Entry | None:
    wanted = (network, site)
    return next(
        (each for each in entries if (each.network, each.site) == wanted and each.text_of(pattern) == each.pattern),
        None,
    )


def _used(entries: Sequence[Entry], readers: Sequence[Reader]) -> tuple[Entry, ...]:
    found = []
    for entry in entries:
        of_rules = [entry.heads if rule.heads is None else rule.heads for rule in readers if rule.reads(entry)]
        heads = {head for each in of_rules for head in each}
        if heads & {*entry.heads}:
            found.append(entry.of_heads(heads))
    return tuple(found)


def _described(told: Mapping[str, Any], kind: str, as_what: type[Description], source: str) -> list[Description]:
    found = told.get(kind)
    if not isinstance(found, list):
        raise PlanError(f"{source}, field {kind}: expected a list, found {type(found).__name__}; {AGAIN}")
    try:
        return [as_what.model_validate(each) for each in found]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanError(f"{source}, field {kind}: {where}: {first['msg']}; {AGAIN}") from None


def _checked(
    kind: type[Entry], number: int, described: _Described, arrays: Mapping[str, npt.NDArray[Any]], source: str
) -> Entry:
    name = f"{kind.name}.{number}"
    if name not in arrays:
        raise PlanError(f"{source}: has no tensor {name}, of which its metadata speak; {AGAIN}")
    facts = {field: getattr(described, field) for field in type(described).model_fields}
    found = kind(**facts, packed=arrays[name])
    wrong = found.complaint()
    if wrong is not None:
        raise PlanError(f"{source}, tensor {name} ({found.place}): {wrong}; {AGAIN}")
    return found
