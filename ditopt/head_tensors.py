"""What single heads have that no text of a plan can hold: block maps, projections. Data only; no torch."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from ditopt.geometry import Geometry

MAX_BLOCKS = 1 << 16
"""Limit on the blocks of queries or keys of one map."""
CHOOSING = ("pattern", "keep", "mass", "columns", "most", "order")
BESIDE = ("qk", "refresh")
"""Settings of a listed pattern that say which blocks it has, and of any that say nothing of which it leaves out."""

Booleans = npt.NDArray[np.bool_]


def period_of(starts: Sequence[int], step: int) -> int:
    """The period of a schedule that a step lies in, of those that begin at ``starts``.

    >>> period_of((0, 3, 6), 5)
    1
    """
    return int(np.searchsorted(starts, step, side="right")) - 1


@dataclass(frozen=True, eq=False)
class HeadTensors(ABC):
    """What some heads of a site have each, in every period of the schedule, under a pattern.

    Attributes:
        network: whose site it is, and ``site`` its name.
        pattern: as much of the ``pattern_text`` of decisions that read it as ``text_of`` says.
        heads: those that have some, ascending.
        starts: the first steps of the periods of the schedule, from 0 on.
        packed: ``[periods, heads, ...]``.
    """

    network: str
    site: str
    pattern: str
    heads: tuple[int, ...]
    starts: tuple[int, ...]
    packed: npt.NDArray[Any]

    what: ClassVar[str]
    name: ClassVar[str]
    """What an entry is called in errors, and in the file."""

    @property
    def place(self) -> str:
        """What it is of, in words."""
        return f"{self.network}, {self.site}, {self.pattern}"

    def period(self, step: int) -> int:
        """The period that a step lies in."""
        return period_of(self.starts, step)

    def of_heads(self, heads: Iterable[int]) -> Self:
        """Those of some of the heads."""
        wanted = {*heads}
        at = [place for place, head in enumerate(self.heads) if head in wanted]
        return replace(self, heads=tuple(self.heads[place] for place in at), packed=self.packed[:, at])

    def of_head(self, head: int, step: int) -> npt.NDArray[Any]:
        """What is ``packed`` of a head in a step.

        Raises:
            KeyError: the head has nothing.
        """
        if head not in self.heads:
            told = f"head {head} has no {self.what}; heads {', '.join(map(str, self.heads))} have"
            raise KeyError(f"{self.place}: {told}")
        found: npt.NDArray[Any] = self.packed[self.period(step), self.heads.index(head)]
        return found

    def complaint(self) -> str | None:
        """What does not fit together in it; None if all does."""
        if [*self.heads] != sorted({*self.heads}) or min(self.heads, default=-1) < 0:
            return f"heads {list(self.heads)} are not ascending numbers"
        if self.starts[:1] != (0,) or [*self.starts] != sorted({*self.starts}):
            return f"periods start at steps {list(self.starts)}; they ascend from 0"
        return None

    def facts(self) -> dict[str, Any]:
        """What the metadata say of it: all but the tensor."""
        return {key: value for key, value in vars(self).items() if key != "packed"}

    @staticmethod
    @abstractmethod
    def text_of(pattern: str) -> str | None:
        """The ``pattern`` of what decisions read whose text it is; None: they read none."""


@dataclass(frozen=True, eq=False)
class BlockMaps(HeadTensors):
    """Which blocks of keys heads attend to, of tokens that lie as ``geometry`` says, in blocks of ``block``.

    ``packed`` is ``[periods, heads, Qb, ceil(Kb / 8)]`` uint8, a bit for a block, the highest bit first.
    """

    geometry: Geometry
    block: int

    what: ClassVar[str] = "map"
    name: ClassVar[str] = "map"

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
        return cls(network, site, pattern, heads, starts, np.packbits(kept, axis=-1), geometry, block)

    @property
    def blocks(self) -> int:
        """Of queries and of keys, each."""
        return -(-self.geometry.tokens // self.block)

    def kept(self, head: int, step: int) -> Booleans:
        """``[Qb, Kb]``: the blocks of a head in a step. Raises KeyError: the head has none."""
        return np.unpackbits(self.of_head(head, step), axis=-1, count=self.blocks).astype(bool)

    def complaint(self) -> str | None:
        """What does not fit together in it; None if all does."""
        shape = len(self.starts), len(self.heads), self.blocks, -(-self.blocks // 8)
        if self.blocks > MAX_BLOCKS:
            return f"{self.blocks} blocks a side are over the limit of {MAX_BLOCKS}"
        if self.packed.dtype != np.uint8 or self.packed.shape != shape:
            found = f"{self.packed.dtype} of shape {list(self.packed.shape)}"
            return f"maps are {found}; {self.geometry} in blocks of {self.block} has uint8 of shape {list(shape)}"
        return super().complaint()

    def facts(self) -> dict[str, Any]:
        """What the metadata say of it: all but the tensor."""
        return {**super().facts(), "geometry": asdict(self.geometry)}

    @staticmethod
    def text_of(pattern: str) -> str | None:
        """As much of a listed pattern as says which blocks are kept: without its ``rest``, say.

        >>> BlockMaps.text_of('{"keep": 0.25, "pattern": "listed", "rest": "pooled"}')
        '{"keep": 0.25, "pattern": "listed"}'
        """
        settings = json.loads(pattern)
        if settings.get("pattern") != "listed":
            return None
        return json.dumps({key: value for key, value in settings.items() if key in CHOOSING}, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Projections(HeadTensors):
    """What linear attention to the blocks that heads skip is multiplied by, from the right (``rest: linear``).

    ``packed`` is ``[periods, heads, E, E]`` float16.
    """

    what: ClassVar[str] = "projection"
    name: ClassVar[str] = "projection"

    def complaint(self) -> str | None:
        """What does not fit together in it; None if all does."""
        shape = self.packed.shape
        if self.packed.dtype != np.float16 or len(shape) != 4 or shape[2] != shape[3]:
            return f"projections are {self.packed.dtype} of shape {list(shape)}, not float16 [periods, heads, E, E]"
        if shape[:2] != (len(self.starts), len(self.heads)):
            return f"projections are {list(shape[:2])}; there are {len(self.starts)} periods, {len(self.heads)} heads"
        if not np.isfinite(self.packed).all():
            return "projections have NaN or infinite values"
        return super().complaint()

    @staticmethod
    def text_of(pattern: str) -> str | None:
        """A pattern with such a rest, without what does not say what is skipped (``qk``, ``refresh``).

        >>> Projections.text_of('{"pattern": "skip", "qk": "int8", "rest": "linear"}')
        '{"pattern": "skip", "rest": "linear"}'
        """
        settings = json.loads(pattern)
        if settings.get("rest") != "linear":
            return None
        return json.dumps({key: each for key, each in settings.items() if key not in BESIDE}, sort_keys=True)


def reads_tensors(pattern: str) -> bool:
    """Whether a decision with this pattern reads something in the file beside its plan."""
    return any(kind.text_of(pattern) is not None for kind in (BlockMaps, Projections))
