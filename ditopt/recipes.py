"""Recipes: published systems as named restrictions of the search. Data; a paper is no code path.

One of sparse attention says which of the profiled candidates the search may choose, whether the heads of a site have to
do alike, and how much of the schedule stays dense; one of the loop by which predictors steps may be predicted, and
which steps may be computed. What is chosen within that is told by the common price of error, as ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ditopt.errors import InputError
from ditopt.step_rules import Every, Magnitude, Segments, StepRule

ANY = "any"
"""In a form: a setting that has to be there, whatever its value."""
SAID = ("rest", "order", "by", "refresh", "qk")
"""Settings that a candidate of a recipe has only where the form speaks of them; others, as widths, are free."""
Form = Mapping[str, Any]
"""Settings of candidates, as plans have them: ``{pattern: draft, keep: any, rest: {pooled: any}}``."""


def fits(form: Form, settings: Mapping[str, Any]) -> bool:
    """Whether a candidate with these settings is of a form.

    >>> fits({"pattern": "band"}, {"pattern": "band", "width": 2.0})
    True
    >>> fits({"pattern": "band"}, {"pattern": "band", "width": 2.0, "rest": {"pooled": 16}})
    False
    """
    if any(key in settings and key not in form for key in SAID):
        return False
    return all(key in settings and _alike(wanted, settings[key]) for key, wanted in form.items())


def _alike(wanted: Any, found: Any) -> bool:
    if wanted == ANY:
        return True
    if isinstance(wanted, Mapping):
        written = {found: ANY} if isinstance(found, str) else found  # a word stands for itself without numbers
        return isinstance(written, Mapping) and fits(wanted, written)
    if isinstance(wanted, tuple):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_alike, wanted, found))
    return bool(wanted == found)


@dataclass(frozen=True)
class Loop:
    """What may be done in the loop: all blocks are computed or predicted together, all predicted steps alike.

    Attributes:
        predictors: by their names in the search (``search.space``), one of which a plan uses.
        steps: the rule that gives the schedules.
    """

    predictors: tuple[str, ...]
    steps: StepRule


@dataclass(frozen=True)
class Recipe:
    """One published system.

    Attributes:
        name: what users call it.
        system: the name that its authors gave it, ``arxiv`` their paper.
        forms: of the candidates that the search may choose for heads; dense is always among the choices. None: of heads
            it says nothing.
        alike: whether all heads of a site do the same in a step; else each has its own.
        dense_first: the share of the schedule that stays dense, from its start.
        techniques: all that the system consists of; where ``optimize`` is given others, they have to name these.
        departs: how what runs here differs from what was published.
        loop: what it says of the loop; None: nothing.
    """

    name: str
    system: str
    arxiv: str
    forms: tuple[Form, ...] = ()
    alike: bool = False
    dense_first: float = 0.0
    techniques: tuple[str, ...] = ("sparse",)
    departs: str = ""
    loop: Loop | None = None

    @property
    def of_heads(self) -> Recipe | None:
        """The recipe, if it speaks of heads."""
        return self if self.forms else None

    @property
    def source(self) -> str:
        """The system and its paper."""
        return f"{self.system}, arXiv {self.arxiv}"

    @property
    def restriction(self) -> str:
        """What the search may choose, in words."""
        if self.loop is not None:
            return f"all blocks by {' or '.join(self.loop.predictors)}; computed are {self.loop.steps.text}"
        heads = "the heads of a site alike" if self.alike else "each head its own"
        first = f", the first {self.dense_first:.0%} of steps dense" if self.dense_first else ""
        return f"{heads}{first}: dense, {', '.join(map(form_text, self.forms))}"

    def first_step(self, steps: int) -> int:
        """Of so many steps the first that may be sparse."""
        return round(self.dense_first * steps)

    def allows(self, candidate: str) -> bool:
        """Whether the search may choose a candidate, by its name in profiles (``pattern_text``)."""
        settings = json.loads(candidate)
        return any(fits(form, settings) for form in self.forms)

    def missing(self, candidates: Iterable[str]) -> tuple[Form, ...]:
        """The forms of which none of the ``candidates`` is."""
        known = [json.loads(each) for each in candidates]
        return tuple(form for form in self.forms if not any(fits(form, settings) for settings in known))

    def told(self, candidates: Iterable[str]) -> tuple[str, ...]:
        """What is to be said of a search among ``candidates``: what was left out, and what was not profiled."""
        names = [*dict.fromkeys(candidates)]
        outside = sum(not self.allows(each) for each in names)
        found = [
            f"recipe {self.name} ({self.source}): {outside} of {len(names)} profiled candidates are outside of it and "
            f"were not considered; {self.restriction}"
        ]
        lacking = self.missing(names)
        if lacking:
            what = ", ".join(map(form_text, lacking))
            found.append(f"recipe {self.name}: not among the profiled candidates, so not considered: {what}")
        return tuple(found)


def form_text(form: Form) -> str:
    """A form as plans write it.

    >>> form_text({"pattern": "draft", "mass": ANY, "rest": {"pooled": ANY}})
    '{pattern: draft, mass: any, rest: {pooled: any}}'
    """
    return "{" + ", ".join(f"{key}: {_text(value)}" for key, value in form.items()) + "}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return form_text(value) if isinstance(value, Mapping) else str(value)


def _of_loop(name: str, system: str, arxiv: str, loop: Loop, departs: str) -> Recipe:
    techniques = (*loop.predictors, "ranges")
    return Recipe(name, system, arxiv, techniques=techniques, departs=departs, loop=loop)


SINK: Form = {"pattern": "sink"}
RECIPES: dict[str, Recipe] = {
    each.name: each
    for each in (
        Recipe(
            "sparse-vdit",
            "Sparse-vDiT",
            "2506.03065",
            forms=(
                {"pattern": "skip"},
                {"pattern": "band"},
                {"pattern": "temporal"},
                {"pattern": "union", "of": ({"pattern": "band"}, SINK)},
            ),
            departs="errors are those behind the projection, grown to the sample; dense competes at its own loss (the "
            "threshold epsilon is lambda); a mode has several widths; stripes are the first frame's, with a diagonal",
        ),
        Recipe(
            "radial",
            "Radial Attention",
            "2506.19852",
            forms=({"pattern": "radial"}, {"pattern": "union", "of": ({"pattern": "radial"}, SINK)}),
            alike=True,
            dense_first=0.24,
            departs="blocks of 64, diagonals one token wider and kept in all frames; which sites are sparse is priced, "
            "where the paper keeps the first block dense",
        ),
        Recipe(
            "adaspa",
            "AdaSpa",
            "2502.21079",
            forms=({"pattern": "draft", "keep": ANY, "by": "mass", "refresh": ANY},),
            dense_first=0.2,
            departs="blocks are found anew in every 4th, 8th or 16th computed step, first behind the dense start (the "
            "paper: in steps 10 and 30 of 50), each time with the log-sum-exp of that step; every block of queries has "
            "the same share, an eighth or a quarter by the price of a head's error (the paper: 20%, moved by recall)",
        ),
        Recipe(
            "pisa",
            "PISA",
            "2602.01077",
            forms=({"pattern": "draft", "keep": ANY, "by": "error", "rest": {"taylor": ANY}},),
            alike=True,
            departs="a query's own block is exact; means are of groups of 16 tokens; steps are priced, so no share of "
            "them is dense by rule",
        ),
        Recipe(
            "svg2",
            "Sparse VideoGen2",
            "2505.18875",
            forms=({"pattern": "draft", "mass": ANY, "order": "clusters"},),
            alike=True,
            dense_first=0.3,
            departs="blocks are of 64 sorted tokens, where the paper's are the clusters; k-means starts anew in each "
            "call; at most half of the blocks are kept",
        ),
        Recipe(
            "ditfastattn",
            "DiTFastAttn",
            "2406.08552",
            forms=tuple({"pattern": name, "rest": {"kept": "residual", "refresh": ANY}} for name in ("band", "skip")),
            alike=True,
            departs="windows are of whole blocks; full attention comes back every 2 or 4 steps, where the paper's "
            "greedy search places it; outputs are shared across steps (skip), but not across guidance branches",
        ),
        Recipe(
            "re-ttention",
            "Re-ttention",
            "2505.22918",
            forms=({"pattern": "band", "rest": {"kept": "ratio", "refresh": ANY}},),
            alike=True,
            dense_first=0.3,
            departs="windows are of whole blocks; full attention comes back every 2 or 4 steps, not every 5; the ratio "
            "stays between them: the paper adds lambda to it after each of these steps (0.04 in its code for PixArt), "
            "which is not built; a lambda of 0 is a row of its ablation",
        ),
        Recipe(
            "flashblock",
            "FlashBlock",
            "2602.05305",
            forms=({"pattern": "spatial", "rest": {"kept": "merge", "refresh": ANY}},),
            alike=True,
            departs="made for diffusion block by block, where the rest is of tokens that stay: here the block is the "
            "query's own frame, and the rest is of frames that move, too",
        ),
        _of_loop(
            "taylorseer",
            "TaylorSeer",
            "2503.06923",
            Loop(("forecast1-steps", "taylor2"), Every(first=3)),
            "what all blocks add to the stream is forecast as one, where the paper forecasts the output of every "
            "attention and feed-forward layer; the interval N and the order, 1 or 2, are the search's",
        ),
        _of_loop(
            "magcache",
            "MagCache",
            "2506.09045",
            Loop(("reuse",), Magnitude(retained=0.2, most=(2, 3, 4, 5, 6))),
            "magnitudes are of the guided combination of branches, whole tensors and the mean over prompts, where the "
            "paper has those of every token and branch of one prompt; threshold and K are the search's",
        ),
        _of_loop(
            "cachequant-schedule",
            "CacheQuant",
            "2503.01323",
            Loop(("fit1",), Segments()),
            "distances are L2, not L1; the correction is one factor for all channels, without an offset; nothing is "
            "quantised",
        ),
    )
}


def find_recipe(name: str | None) -> Recipe | None:
    """The recipe called ``name``; None: no restriction.

    Raises:
        InputError: there is none of that name.
    """
    if name is None:
        return None
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; choose from {', '.join(RECIPES)} (`ditopt recipes` says more)")
    return RECIPES[name]
