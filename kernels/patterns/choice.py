"""What a sparse decision asks for: blocks that a pattern keeps, what becomes of others, tokens' order, products.

And whether blocks that a step finds are kept for those that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.kept import KEPT, Kept
from ditopt.kernels.patterns.listed import Listed
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.kernels.patterns.registry import choice_from_data, pattern_to_data
from ditopt.kernels.patterns.whole import Everything, Nothing

REST, POOLED, TAYLOR, ORDER, QK, INT8 = "rest", "pooled", "taylor", "order", "qk", "int8"
REFRESH = "refresh"
LINEAR = "linear"
WITHOUT_PLACES = (Draft, Everything, Nothing)
"""Patterns that do not speak of where tokens are."""
LEAST_POOL = 4
"""Groups have a power of two tokens, so many at least."""


@dataclass(frozen=True)
class Pooled:
    """A rest that counts by the means of groups of ``tokens`` consecutive keys; None: of whole blocks.

    ``first_order``: and by how keys and values go together around them (``taylor``).

    >>> Pooled().of(64), Pooled(16).of(64)
    (64, 16)
    """

    tokens: int | None = None
    first_order: bool = False

    def of(self, key_block: int) -> int:
        """Tokens of a group, in blocks of so many keys.

        Raises:
            ValueError: a block is no whole number of groups.
        """
        tokens = key_block if self.tokens is None else self.tokens
        if key_block % tokens:
            raise ValueError(
                f"groups of {tokens} tokens do not divide blocks of {key_block} keys; write "
                f"{{{self._word}: {key_block}}} or less, or rest: {self._word}, which is whole blocks"
            )
        return tokens

    def to_data(self) -> str | dict[str, int]:
        """The word or mapping that describes it."""
        return self._word if self.tokens is None else {self._word: self.tokens}

    @property
    def _word(self) -> str:
        return TAYLOR if self.first_order else POOLED


@dataclass(frozen=True)
class Linear:
    """A rest that counts by linear attention behind a projection (SLA), which the file beside the plan has.

    >>> Linear().to_data()
    'linear'
    """

    def to_data(self) -> str:
        """The word that describes it."""
        return LINEAR


@dataclass(frozen=True)
class SparseChoice:
    """A pattern, and the ``rest`` of what it keeps; None: that is lost.

    Blocks are of tokens in an ``order`` of the video; None: in raster order. ``qk`` is what queries and keys of these
    blocks are multiplied as; None: as they are. A draft's blocks are found in the first of a run of computed steps with
    the same decision and in every ``refresh``-th behind it, and kept in between; None: in each.
    """

    pattern: Pattern | Draft | Listed
    rest: Pooled | Kept | Linear | None = None
    order: TokenOrder | None = None
    qk: Literal["int8"] | None = None
    refresh: int | None = None

    @property
    def pooled(self) -> Pooled | None:
        """A rest that counts by means."""
        return self.rest if isinstance(self.rest, Pooled) else None

    @property
    def kept(self) -> Kept | None:
        """A rest that is kept from an earlier step."""
        return self.rest if isinstance(self.rest, Kept) else None

    @property
    def in_any_order(self) -> bool:
        """Whether it means the same in every order of the tokens: all of them, or none but text."""
        return isinstance(self.pattern, Everything) or (isinstance(self.pattern, Nothing) and self.rest is None)

    @classmethod
    def from_data(cls, data: Any) -> SparseChoice:
        """What the mapping of a sparse decision asks for: ``{pattern: draft, keep: 0.25, rest: pooled, order: tiles}``.

        Raises:
            ValueError: the pattern is unknown, or a parameter, the rest, the order, ``qk`` or the refresh does not
                validate, or the pattern is one of places and the order one that calls find, or what is to be kept is
                not found, or a rest is to be kept of blocks that differ by step.
        """
        settings = dict(data) if isinstance(data, dict) else data
        rest, order, qk, refresh = (
            settings.pop(key, None) if isinstance(settings, dict) else None for key in (REST, ORDER, QK, REFRESH)
        )
        if qk not in (None, INT8):
            raise ValueError(
                f"{QK} {qk!r} is unknown; write {QK}: {INT8}, or nothing for products of the model's dtype"
            )
        found = cls(
            choice_from_data(settings),
            None if rest is None else _rest(rest),
            None if order is None else TokenOrder.from_data(order),
            qk,
            refresh,
        )
        refused = None if refresh is None else _not_kept(found)
        if refused is not None:
            raise ValueError(f"refresh {refresh!r}: {refused}")
        if found.order is not None and found.order.is_found and not isinstance(found.pattern, WITHOUT_PLACES):
            raise ValueError(
                f"order {order}: tokens of a block are alike there wherever they are, so that {settings['pattern']}, "
                "which is a pattern of places, means nothing; draft and skip go with it"
            )
        refused = None if found.kept is None else _no_kept_rest(found)
        if refused is not None:
            raise ValueError(f"rest {rest!r}: {refused}")
        return found

    def to_data(self) -> dict[str, Any]:
        """The mapping that describes it."""
        beside = {REST: self.rest, ORDER: self.order}
        return {
            **pattern_to_data(self.pattern),
            **{key: value.to_data() for key, value in beside.items() if value is not None},
            **({} if self.qk is None else {QK: self.qk}),
            **({} if self.refresh is None else {REFRESH: self.refresh}),
        }


def _not_kept(choice: SparseChoice) -> str | None:
    """Why a choice's blocks cannot be kept between steps; None if they can."""
    if not (type(choice.refresh) is int and choice.refresh >= 2):
        return (
            "write 2 or more: N finds blocks in every N-th step and keeps them in between; leave it out for every step"
        )
    if not isinstance(choice.pattern, Draft):
        return f"{pattern_to_data(choice.pattern)['pattern']} finds no blocks; only a draft's are kept between steps"
    if choice.order is not None and choice.order.is_found:
        return "clusters are found in every call, so that blocks of one step are not those of the next; leave one out"
    return None


def _no_kept_rest(choice: SparseChoice) -> str | None:
    """Why a choice has no rest that can be kept between steps; None if it has."""
    if isinstance(choice.pattern, Draft):
        return "a draft skips other blocks in other steps, so that what was kept is not what is skipped; write pooled"
    if isinstance(choice.pattern, Everything):
        return "dense skips nothing"
    if choice.order is not None and choice.order.is_found:
        return f"order {choice.order.name} is another one in every call, and what is kept is of queries in their order"
    return None


def _rest(written: Any) -> Pooled | Kept | Linear:
    if isinstance(written, dict) and KEPT in written:
        return Kept.from_data(written)
    if written == LINEAR:
        return Linear()
    word, tokens = written, None
    if isinstance(written, dict) and len(written) == 1:
        ((word, tokens),) = written.items()
    sized = type(tokens) is int and tokens >= LEAST_POOL and not tokens & (tokens - 1)
    if word not in (POOLED, TAYLOR) or not (sized or word is written):
        raise ValueError(
            f"rest {written!r} is unknown; write {POOLED}, {TAYLOR} or {LINEAR}, or {{{POOLED}: 16}} for means of 16 "
            f"tokens, a power of two from {LEAST_POOL} on, or {{{KEPT}: merge, refresh: 4}} for what an earlier one had"
        )
    return Pooled(tokens, first_order=word == TAYLOR)
