"""A rest kept from an earlier step: what a pattern skips counts as it did when a head last attended to everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Form = Literal["merge", "residual", "ratio"]
FORMS: tuple[Form, ...] = get_args(Form)
"""What is kept, and how it counts later (``block_sparse_attention.kept``): a head's code is 1 and its place here."""
KEPT, REFRESH = "kept", "refresh"
LONGEST = 1000


@dataclass(frozen=True)
class Kept:
    """In every ``refresh``-th step that computes it a head is dense and keeps its rest in a ``form`` for those between.

    >>> Kept("merge", 4).to_data()
    {'kept': 'merge', 'refresh': 4}
    """

    form: Form
    refresh: int

    @property
    def code(self) -> int:
        """What says so in a graph's input."""
        return FORMS.index(self.form) + 1

    @classmethod
    def from_data(cls, written: Mapping[str, Any]) -> Kept:
        """What ``rest: {kept: merge, refresh: 4}`` asks for.

        Raises:
            ValueError: the form is unknown, a further setting is there, or ``refresh`` is no number from 2 to 1000.
        """
        form, every = written.get(KEPT), written.get(REFRESH)
        known = type(every) is int and 2 <= every <= LONGEST
        if form not in FORMS or not known or len(written) > 2:
            raise ValueError(
                f"rest {dict(written)!r}: write {{{KEPT}: {form if form in FORMS else FORMS[0]}, {REFRESH}: 4}}: "
                f"{KEPT} is {', '.join(FORMS[:-1])} or {FORMS[-1]}, and with {REFRESH} N a head is dense and keeps its "
                f"rest anew in every N-th step that computes it, N from 2 to {LONGEST}; there is no other setting"
            )
        return cls(form, every)  # type: ignore[arg-type]  # looked at above

    def to_data(self) -> dict[str, str | int]:
        """The mapping that describes it."""
        return {KEPT: self.form, REFRESH: self.refresh}
