"""Kinds of decision that a user can choose among, and what the profiler has to measure for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditopt.decisions import DTYPES
from ditopt.errors import InputError
from ditopt.recipes import find_recipe
from ditopt.search import TECHNIQUES
from ditopt.search.space import candidates

OTHERS = RANGES, SIMPLIFY, PRECISION, SECOND_ORDER, SPARSE, HOIST = (
    *("ranges", "simplify", "precision", "second_order", "sparse"),
    "hoist",
)
"""Kinds of decision that are no predictors of a step."""
ALL_TECHNIQUES = (*TECHNIQUES, *OTHERS)

COLLECTORS = ("attention", "patterns", "features", "tokens", "linear", "sensitivity", "latency")
"""What can be measured beside the features of steps and ranges, by the name of its tables."""
LINEAR_REST = "linear_rest"
"""Beside ``patterns``: linear rests are fitted, which takes much room and seldom pays; only where it is named."""


@dataclass(frozen=True)
class Techniques:
    """A choice: the predictors of steps by name, and which of the others.

    ``all_computed``: no predictor is wanted, only sparse heads; ``predictors`` are not used then.
    """

    predictors: tuple[str, ...]
    ranges: bool
    simplify: bool
    dtypes: tuple[str, ...]
    second_order: bool
    sparse: bool
    hoist: bool = False
    all_computed: bool = False

    @classmethod
    def choose(cls, names: Sequence[str] | None, recipe: str | None = None) -> Techniques:
        """Those called ``names``; None: those of the recipe, or without one all.

        Raises:
            InputError: a name or the recipe is unknown, or the names leave out what the recipe consists of.
        """
        chosen = ALL_TECHNIQUES if names is None else tuple(names)
        wanted = find_recipe(recipe)
        if wanted is not None:
            chosen = wanted.techniques if names is None else chosen
            lacking = [each for each in wanted.techniques if each not in chosen]
            if lacking:
                raise InputError(
                    f"recipe {recipe} uses {', '.join(lacking)}, which techniques {', '.join(chosen)} leave out; name "
                    "it, or give no techniques"
                )
        predictors = tuple(name for name in chosen if name not in OTHERS)
        all_computed = not predictors and SPARSE in chosen
        if all_computed:
            predictors = TECHNIQUES[:1]
        try:
            candidates(predictors)
        except InputError as error:
            raise InputError(str(error).replace("choose from ", f"choose from {', '.join(OTHERS)}, ")) from None
        return cls(
            predictors,
            RANGES in chosen,
            SIMPLIFY in chosen,
            DTYPES if PRECISION in chosen else (),
            SECOND_ORDER in chosen,
            SPARSE in chosen,
            HOIST in chosen,
            all_computed,
        )


ASKED_BY = {
    **dict.fromkeys((*TECHNIQUES, RANGES), ("features", "tokens")),
    PRECISION: ("linear",),
    SIMPLIFY: (),
    SECOND_ORDER: (),
    HOIST: (),
    SPARSE: ("attention", "patterns", "sensitivity", "latency"),
}
"""The tables that speak of a technique."""


def choose_collectors(names: Sequence[str] | None, techniques: Sequence[str] | None = None) -> tuple[str, ...]:
    """The collectors called ``names``, in their own order; None: those of ``techniques``, all where that is None, too.

    ``linear_rest`` is no table of its own: it is among all only by name, and brings ``patterns`` along.

    Raises:
        InputError: a name is unknown.
    """
    known = (*COLLECTORS, LINEAR_REST)
    unknown = sorted(set(names or ()) - {*known})
    if unknown:
        raise InputError(f"collect {', '.join(unknown)}: unknown; choose from {', '.join(known)}")
    if names is None and techniques is not None:
        names = [name for technique in techniques for name in ASKED_BY.get(technique, COLLECTORS)]
    if names is None:
        return COLLECTORS
    wanted = {*names, "patterns"} if LINEAR_REST in names else {*names}
    return tuple(name for name in known if name in wanted)
