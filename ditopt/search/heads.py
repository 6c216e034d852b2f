"""What attention heads under patterns do to the final sample: measured errors of heads, added up as a plan has them.

A head's error is measured after the output projection, where heads mix, so that errors of heads of one call add up as
squares; those of one head in several steps point nearly the same way: they are mixed as ``quadratic.COHERENCE`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditopt.errors import InputError
from ditopt.measures import PROMPT, Label, Table, growth_over_prompts, nanmean
from ditopt.profile import Array, NetworkProfile, branch_shares
from ditopt.search.joint import carried
from ditopt.search.problem import SearchProblem
from ditopt.search.quadratic import mixed
from ditopt.search.solution import Draft

HEADS = "heads"
"""The site of ``sensitivity`` whose table compares rollouts with heads under patterns with what was predicted."""
SKIP = '{"pattern": "skip"}'
LEFT_OUT, PATTERN = "head", "pattern"
"""Kinds of planted errors in ``sensitivity``."""


@dataclass(frozen=True)
class HeadPattern:
    """One head of a site under a candidate (its label in the table ``patterns``) in some computed steps."""

    site: str
    head: int
    candidate: Label
    steps: tuple[int, ...]


def output_growth(table: Table, step: int, error: str, head: int | None = None) -> float:
    """``||change of the network's output|| / ||error||`` for an error at a site in ``step``.

    ``table`` is the site's of ``sensitivity``; between its anchors the logarithm is interpolated. ``error`` is the kind
    of planted error that it is to be like, at ``head`` where that was planted, else at any; where none of the kind was,
    all kinds count.

    Raises:
        InputError: nothing that was planted at the site was an error.
    """
    column = table.position("error", error)
    of_site = growth_over_prompts(table["to_output"])
    growths = [of_site.at(error=column), of_site.mean("error")]
    if head is not None and "head_to_output" in table.measures:
        of_head = growth_over_prompts(table["head_to_output"]).at(head=head)
        growths = [of_head.at(error=column), of_head.mean("error"), *growths]
    found = next((growth.values for growth in growths if not np.isnan(growth.values).all()), None)
    if found is None:
        raise InputError("no error that was planted at the site moved anything; it has no measured sensitivity")
    known = ~np.isnan(found)
    anchors = np.asarray(table.labels["anchor"], dtype=float)[known]
    return float(np.exp(np.interp(step, anchors, np.log(np.maximum(found[known], 1e-30)))))


def growth_at(
    network: NetworkProfile, sensitivity: Mapping[str, Table], site: str, steps: Sequence[int], error: str, head: int
) -> Array:
    """As ``output_growth``, at an attention site in ``steps``; between sites before and behind if nothing was planted.

    Raises:
        InputError: no error that was planted at any attention site moved anything.
    """
    return _near(network, sensitivity, site).growth(steps, error, head)


@dataclass(frozen=True)
class _Near:
    """What was planted before and behind a site in depth, and how far it is on the way; ``own``: at the site itself."""

    before: Table
    behind: Table
    share: float
    own: bool

    def growth(self, steps: Sequence[int], error: str, head: int) -> Array:
        of_head = head if self.own else None
        tables = (self.before, self.behind)
        first, last = (np.array([output_growth(table, step, error, of_head) for step in steps]) for table in tables)
        return np.asarray(first ** (1 - self.share) * last**self.share)


def _near(network: NetworkProfile, sensitivity: Mapping[str, Table], site: str) -> _Near:
    order = list(network.tables["patterns"])
    at = order.index(site)
    tables = ((place, _table_of(sensitivity, name)) for place, name in enumerate(order))
    planted = {place: table for place, table in tables if table is not None and _planted(table)}
    if not planted:
        raise InputError("no error planted at an attention site moved anything; heads have no measured sensitivity")
    before = max((place for place in planted if place <= at), default=min(planted))
    behind = min((place for place in planted if place >= at), default=max(planted))
    share = (at - before) / (behind - before) if behind > before else 0.0
    return _Near(planted[before], planted[behind], share, before == behind == at)


def _table_of(sensitivity: Mapping[str, Table], site: str) -> Table | None:
    """The table of an attention site: its own, or that of the module that it is in."""
    parts = site.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((sensitivity[name] for name in names if name in sensitivity), None)


def _planted(table: Table) -> bool:
    """Whether a table holds what errors in self-attention grow by."""
    if table.facts.get("kind") == "cross" or "to_output" not in table.measures:
        return False
    return not bool(np.isnan(table["to_output"].values).all())


def is_measured(network: NetworkProfile, choice: HeadPattern) -> bool:
    """Whether the profile tells what a choice costs its head in every one of its steps."""
    at = network.tables["patterns"][choice.site].position("candidate", choice.candidate)
    return not bool(np.isnan(_errors(network, choice.site, [choice.head], [at])[:, list(choice.steps)]).any())


def _errors(network: NetworkProfile, site: str, heads: Sequence[int], candidates: Sequence[int]) -> Array:
    """``[prompt, step, branch, H, C]``: norms of errors behind the projection; 0 where a branch does not run."""
    table = network.tables["patterns"][site]
    along = ("prompt", "step", "branch")
    relative = table["error"].ordered(*along, "head", "candidate")[..., list(heads), :][..., list(candidates)]
    norm = table["output"].ordered(*along) * np.sqrt(table.facts["elements"])
    runs = network.present.T[None, ..., None, None]
    return np.asarray(np.where(runs, relative * norm[..., None, None], 0.0))


def output_errors(
    network: NetworkProfile,
    sensitivity: Mapping[str, Table],
    site: str,
    steps: Sequence[int],
    heads: Sequence[int],
    candidates: Sequence[int],
) -> Array:
    """``[len(steps), H, C]``: norms of the guided output's error, mean square over prompts; NaN if not measured.

    They are what each of ``heads`` of a site does under each of ``candidates`` (positions in the table ``patterns``). A
    pattern errs nearly alike in both guidance branches, so their errors are mixed as those of steps are. Prompts under
    which a candidate was not measured (lists have to be chosen by others) do not count.

    Raises:
        InputError: no error that was planted at any attention site moved anything.
    """
    at = list(steps)
    shares = branch_shares(network.present, network.branch_weights).T[None, ..., None, None]
    each = (_errors(network, site, heads, candidates) * shares)[:, at]
    squares = nanmean(mixed(each.sum(axis=2) ** 2, (each**2).sum(axis=2)), (0,))
    labels = network.tables["patterns"][site].labels["candidate"]
    kinds = [LEFT_OUT if labels[candidate] == SKIP else PATTERN for candidate in candidates]
    near, growth = _near(network, sensitivity, site), np.empty(squares.shape)
    for row, head in enumerate(heads):
        of_kind = {kind: near.growth(steps, kind, head) for kind in dict.fromkeys(kinds)}
        growth[:, row] = np.stack([of_kind[kind] for kind in kinds], axis=1)
    return np.asarray(np.sqrt(squares) * growth)


def squared_errors(
    network: NetworkProfile,
    problem: SearchProblem,
    draft: Draft,
    site: str,
    steps: Sequence[int],
    heads: Sequence[int],
    candidates: Sequence[int],
) -> Array:
    """``[H, C]``: squares of the final sample's relative error that each head makes alone; NaN if not measured.

    What is added up is scaled as rollouts with planted patterns say, where there were some. In steps that the schedule
    does not compute, a head makes no error.

    Raises:
        KeyError: the profile has no tables of the site (``patterns``, ``sensitivity``).
        InputError: no error that was planted at any attention site moved anything.
    """
    computed = [step for step in steps if step in draft.kept]
    if not computed:
        return np.zeros((len(heads), len(candidates)))
    sensitivity = network.tables["sensitivity"]
    weights = carried(problem, draft)[computed, None, None]
    moved = weights * output_errors(network, sensitivity, site, computed, heads, candidates)
    planted = sensitivity.get(HEADS)
    scale = correction(planted)[0] if planted is not None else 1.0
    return np.asarray(mixed(moved.sum(axis=0) ** 2, (moved**2).sum(axis=0)) * (scale if np.isfinite(scale) else 1) ** 2)


def heads_error(network: NetworkProfile, problem: SearchProblem, draft: Draft, choices: Sequence[HeadPattern]) -> float:
    """The final sample's relative error, root mean square, that ``choices`` make under a schedule.

    Raises:
        KeyError: the profile has no tables of a site (``patterns``, ``sensitivity``), or not the candidate.
        InputError: a site was not measured in one of the steps that the schedule computes.
    """
    total = 0.0
    for choice in choices:
        at = network.tables["patterns"][choice.site].position("candidate", choice.candidate)
        found = float(squared_errors(network, problem, draft, choice.site, choice.steps, [choice.head], [at])[0, 0])
        if np.isnan(found):
            raise InputError(f"{choice.site}: what {choice.candidate} costs head {choice.head} was not measured")
        total += found
    return float(np.sqrt(total))


def correction(table: Table, error: str | None = None) -> tuple[float, float]:
    """By how much what is predicted has to be multiplied, and how far off it is then, of rollouts with planted errors.

    Mean and standard deviation are of the logarithm, over plants (of the kind ``error``; None: all) and prompts: with a
    spread ``s`` two of three predictions are right to a factor of ``exp(s)``. NaN of fewer than two plants. One that
    moved nothing, or whose movement could not be predicted, does not count.
    """
    chosen = [at for at, kind in enumerate(table.facts["errors"]) if error in (None, kind)]
    found = [table[name].ordered(PROMPT, "plant")[:, chosen] for name in ("measured", "predicted")]
    known = np.all([values > 0 for values in found], axis=0)
    logs = np.log(found[0][known]) - np.log(found[1][known])
    if not logs.size:
        return float("nan"), float("nan")
    return float(np.exp(logs.mean())), float(logs.std(ddof=1)) if logs.size > 1 else float("nan")
