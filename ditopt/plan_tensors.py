"""What a plan refers to and no text can hold: one safetensors file beside it, named by its hash. Data only; no torch.

The metadata have one entry, ``ditopt_plan_tensors``: ``{"ditopt_plan_tensors": 1, "maps": [...]}``, which says of the
tensors ``map.0``, ``map.1``, ... what they are. Nothing depends on when or where the file is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ditopt.errors import PlanError
from ditopt.geometry import Geometry

FORMAT_VERSION = 1
KEY = "ditopt_plan_tensors"
MAX_BYTES = 256 * 2**20
MAX_BLOCKS = 1 << 16
"""Limits on the file, and on the blocks of queries or keys of one map."""
CHOOSING = ("pattern", "keep", "mass", "columns", "most", "order")
"""Settings of a listed pattern that say which blocks it has."""
AGAIN = "copy it from where the plan was made, or make the plan again with `ditopt optimize DIR --prompts FILE -o PLAN`"

Bytes = npt.NDArray[np.uint8]
Booleans = npt.NDArray[np.bool_]


class TensorFile(BaseModel):
    """The file of a plan's tensors: its name in the plan's folder, and the SHA-256 of what is in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Reader(Protocol):
    """A rule of a plan, as far as it says which maps it reads."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The heads that it is for; None: all."""

    def reads(self, maps: BlockMaps) -> bool:
        """Whether it is about maps of such a network, site and pattern."""


@dataclass(frozen=True, eq=False)
class BlockMaps:
    """Which blocks of keys some heads of a site attend to, under a pattern of which no other file tells it.

    Attributes:
        network: whose site it is, and ``site`` its name.
        pattern: the ``map_text`` of the decisions that read it.
        heads: those that have a map, ascending.
        starts: the first steps of the periods of the schedule, from 0 on; a map holds for a period.
        geometry: of the tokens, which are in blocks of ``block``.
        packed: ``[periods, heads, Qb, ceil(Kb / 8)]`` uint8, a bit for a block, the highest bit first.
    """

    network: str
    site: str
    pattern: str
    heads: tuple[int, ...]
    starts: tuple[int, ...]
    geometry: Geometry
    block: int
    packed: Bytes

    @classmethod
    def of(
        cls,
        kept: Booleans,
        network: str,
        site: str,
        pattern: str,
        heads: tuple[int, ...],
        starts: tuple[int, ...],
        geometry: Geometry,
        block: int,
    ) -> BlockMaps:
        """Those of booleans ``[periods, heads, Qb, Kb]``."""
        return cls(network, site, pattern, heads, starts, geometry, block, np.packbits(kept, axis=-1))

    @property
    def blocks(self) -> int:
        """Of queries and of keys, each."""
        return -(-self.geometry.tokens // self.block)

    @property
    def place(self) -> str:
        """What it is of, in words."""
        return f"{self.network}, {self.site}, {self.pattern}"

    def period(self, step: int) -> int:
        """The period that a step lies in."""
        return int(np.searchsorted(self.starts, step, side="right")) - 1

    def kept(self, head: int, step: int) -> Booleans:
        """``[Qb, Kb]``: the blocks of a head in a step.

        Raises:
            KeyError: the head has none.
        """
        if head not in self.heads:
            raise KeyError(f"{self.place}: head {head} has no map; heads {', '.join(map(str, self.heads))} have")
        rows = self.packed[self.period(step), self.heads.index(head)]
        return np.unpackbits(rows, axis=-1, count=self.blocks).astype(bool)

    def of_heads(self, heads: Iterable[int]) -> BlockMaps:
        """The maps of some of the heads."""
        wanted = {*heads}
        at = [place for place, head in enumerate(self.heads) if head in wanted]
        return replace(self, heads=tuple(self.heads[place] for place in at), packed=self.packed[:, at])

    def complaint(self) -> str | None:
        """What does not fit together in it; None if all does."""
        shape = len(self.starts), len(self.heads), self.blocks, -(-self.blocks // 8)
        if self.blocks > MAX_BLOCKS:
            return f"{self.blocks} blocks a side are over the limit of {MAX_BLOCKS}"
        if [*self.heads] != sorted({*self.heads}) or min(self.heads, default=-1) < 0:
            return f"heads {list(self.heads)} are not ascending numbers"
        if self.starts[:1] != (0,) or [*self.starts] != sorted({*self.starts}):
            return f"periods start at steps {list(self.starts)}; they ascend from 0"
        if self.packed.dtype != np.uint8 or self.packed.shape != shape:
            found = f"{self.packed.dtype} of shape {list(self.packed.shape)}"
            return f"maps are {found}; {self.geometry} in blocks of {self.block} has uint8 of shape {list(shape)}"
        return None


class _Described(BaseModel):
    """What the metadata say of one tensor of maps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    network: str
    site: str
    pattern: str
    heads: tuple[Annotated[int, Field(ge=0)], ...]
    starts: tuple[Annotated[int, Field(ge=0)], ...]
    geometry: Geometry
    block: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """The tensors of a plan. Two are equal if files of them are."""

    maps: tuple[BlockMaps, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.maps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTensors) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # nobody looks it up

    def find(self, network: str, site: str, pattern: str) -> BlockMaps | None:
        """The maps of a site under a pattern (its ``map_text``); None if there are none."""
        return next(
            (each for each in self.maps if (each.network, each.site, each.pattern) == (network, site, pattern)), None
        )

    def used_by(self, rules: Iterable[Reader]) -> PlanTensors:
        """Those that rules read, and nothing else."""
        readers = [*rules]
        found = []
        for maps in self.maps:
            of_rules = [maps.heads if rule.heads is None else rule.heads for rule in readers if rule.reads(maps)]
            heads = {head for heads in of_rules for head in heads}
            if heads & {*maps.heads}:
                found.append(maps.of_heads(heads))
        return PlanTensors(tuple(found))

    def to_bytes(self) -> bytes:
        """What a file of them holds."""
        described = []
        for maps in self.maps:
            facts = {key: value for key, value in vars(maps).items() if key != "packed"}
            described.append({**facts, "geometry": asdict(maps.geometry)})
        told = json.dumps({KEY: FORMAT_VERSION, "maps": described}, sort_keys=True)
        arrays = {f"map.{number}": np.ascontiguousarray(maps.packed) for number, maps in enumerate(self.maps)}
        return bytes(save(arrays, metadata={KEY: told}))

    def save(self, folder: Path) -> TensorFile:
        """Write them into a folder, whole or not at all; a file of the same contents has the same name.

        Raises:
            PlanError: they are larger than ``MAX_BYTES``, or the folder is missing or not writable.
        """
        data = self.to_bytes()
        if len(data) > MAX_BYTES:
            raise PlanError(
                f"{folder}: lists of {len(data)} bytes are over the limit of {MAX_BYTES} for a plan; search again "
                "without them, or with fewer heads"
            )
        digest = hashlib.sha256(data).hexdigest()
        path = folder / f"tensors-{digest[:16]}.safetensors"
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            raise PlanError(
                f"{path}: cannot be written: {error.strerror or error}; choose a folder that exists and is writable"
            ) from error
        finally:
            with suppress(OSError):  # an interrupted writing leaves nothing behind
                partial.unlink(missing_ok=True)
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
            raise PlanError(f"{path}: no such file; the plan beside it reads lists of blocks there: {AGAIN}") from None
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
        try:
            described = TypeAdapter(list[_Described]).validate_python(told.get("maps"))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"{source}, field maps.{where}: {first['msg']}; {AGAIN}") from None
        return cls(tuple(_maps(number, each, arrays, source) for number, each in enumerate(described)))


def _maps(number: int, described: _Described, arrays: Mapping[str, npt.NDArray[Any]], source: str) -> BlockMaps:
    name = f"map.{number}"
    if name not in arrays:
        raise PlanError(f"{source}: has no tensor {name}, of which its metadata speak; {AGAIN}")
    facts = {field: getattr(described, field) for field in _Described.model_fields}
    found = BlockMaps(**facts, packed=arrays[name])
    wrong = found.complaint()
    if wrong is not None:
        raise PlanError(f"{source}, tensor {name} ({found.place}): {wrong}; {AGAIN}")
    return found


def map_text(pattern: str) -> str:
    """The text of as much of a pattern as says which blocks are kept: without its ``rest``, say.

    >>> map_text('{"keep": 0.25, "pattern": "listed", "rest": "pooled"}')
    '{"keep": 0.25, "pattern": "listed"}'
    """
    return json.dumps({key: value for key, value in json.loads(pattern).items() if key in CHOOSING}, sort_keys=True)


def is_listed(pattern: str) -> bool:
    """Whether a pattern's blocks are those of a file (``{pattern: listed, ...}``)."""
    return bool(json.loads(pattern).get("pattern") == "listed")
