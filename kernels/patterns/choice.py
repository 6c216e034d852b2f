"""What a sparse decision asks for: the blocks that a pattern keeps, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.registry import choice_from_data, pattern_to_data

REST, POOLED = "rest", "pooled"
LEAST_POOL = 4
"""Groups have a power of two tokens, so many at least."""


@dataclass(frozen=True)
class Pooled:
    """A rest that counts by the means of groups of ``tokens`` consecutive keys; None: of whole blocks.

    >>> Pooled().of(64), Pooled(16).of(64)
    (64, 16)
    """

    tokens: int | None = None

    def of(self, key_block: int) -> int:
        """Tokens of a group, in blocks of so many keys.

        Raises:
            ValueError: a block is no whole number of groups.
        """
        tokens = key_block if self.tokens is None else self.tokens
        if key_block % tokens:
            raise ValueError(
                f"groups of {tokens} tokens do not divide blocks of {key_block} keys; write {{pooled: {key_block}}} or "
                f"less, or rest: {POOLED}, which is whole blocks"
            )
        return tokens

    def to_data(self) -> str | dict[str, int]:
        """The word or mapping that describes it."""
        return POOLED if self.tokens is None else {POOLED: self.tokens}


@dataclass(frozen=True)
class SparseChoice:
    """A pattern, and the ``rest`` of what it keeps; None: that is lost."""

    pattern: Pattern | Draft
    rest: Pooled | None = None

    @classmethod
    def from_data(cls, data: Any) -> SparseChoice:
        """What the mapping of a sparse decision asks for: ``{pattern: temporal, rows: 1, rest: {pooled: 16}}``.

        Raises:
            ValueError: the pattern is unknown, or a parameter or the rest does not validate.
        """
        settings = dict(data) if isinstance(data, dict) else data
        written = settings.pop(REST, None) if isinstance(settings, dict) else None
        return cls(choice_from_data(settings), None if written is None else _rest(written))

    def to_data(self) -> dict[str, Any]:
        """The mapping that describes it."""
        data = pattern_to_data(self.pattern)
        return data if self.rest is None else {**data, REST: self.rest.to_data()}


def _rest(written: Any) -> Pooled:
    if written == POOLED:
        return Pooled()
    tokens = written.get(POOLED) if isinstance(written, dict) and len(written) == 1 else None
    if type(tokens) is not int or tokens < LEAST_POOL or tokens & (tokens - 1):
        raise ValueError(
            f"rest {written!r} is unknown; write {POOLED}, or {{{POOLED}: 16}} for means of 16 tokens, a power of two "
            f"from {LEAST_POOL} on"
        )
    return Pooled(tokens)
