"""What attention heads under patterns do to the final sample: measured errors of heads, added up as a plan has them.

A head's error is measured after the output projection, where heads mix, so that errors of heads of one call add up as
squares; those of one head in several steps point nearly the same way: they are mixed as ``quadratic.COHERENCE`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditopt.measures import Label, Table
from ditopt.profile import Array, NetworkProfile, branch_shares
from ditopt.search.joint import carried
from ditopt.search.problem import SearchProblem
from ditopt.search.quadratic import COHERENCE
from ditopt.search.solution import Draft

HEADS = "heads"
"""The site of ``sensitivity`` whose table compares rollouts with heads under patterns with what was predicted."""
SKIP = '{"pattern": "skip"}'


@dataclass(frozen=True)
class HeadPattern:
    """One head of a site under a candidate (its label in the table ``patterns``) in some computed steps."""

    site: str
    head: int
    candidate: Label
    steps: tuple[int, ...]


def output_growth(table: Table, step: int, *errors: str) -> float:
    """``||change of the network's output|| / ||error||`` for an error at a site in ``step``.

    ``table`` is the site's of ``sensitivity``; between its anchors the logarithm is interpolated. ``errors`` are kinds
    of planted errors that it is to be like: the first that was planted counts; of none, the mean of all.
    """
    growth = table["to_output"]
    for error in errors:
        if error in table.labels["error"]:
            of_kind = growth.at(error=table.position("error", error)).values
            if not np.isnan(of_kind).any():
                break
    else:
        of_kind = growth.mean("error").values
    levels = np.log(np.maximum(of_kind, 1e-30))
    return float(np.exp(np.interp(step, np.asarray(table.labels["anchor"], dtype=float), levels)))


def output_errors(network: NetworkProfile, sensitivity: Mapping[str, Table], choice: HeadPattern) -> Array:
    """``[T]``: the norm of the guided output's error that a choice makes in its steps, mean square over prompts."""
    table = network.tables["patterns"][choice.site]
    at = table.position("candidate", choice.candidate)
    relative = table["error"].at(head=choice.head, candidate=at).ordered("prompt", "step", "branch")
    norm = table["output"].ordered("prompt", "step", "branch") * np.sqrt(table.facts["elements"])
    present = next(iter(network.grams.values())).present
    shares = branch_shares(present, network.branch_weights)
    squares = np.nansum((relative * norm * shares.T[None]) ** 2, axis=2).mean(axis=0)
    alike = ("head", "pattern") if choice.candidate == SKIP else ("pattern", "head")
    growth = np.array([output_growth(sensitivity[choice.site], step, *alike) for step in range(len(squares))])
    found = np.zeros(len(squares))
    steps = list(choice.steps)
    found[steps] = np.sqrt(squares[steps]) * growth[steps]
    return found


def heads_error(network: NetworkProfile, problem: SearchProblem, draft: Draft, choices: Sequence[HeadPattern]) -> float:
    """The final sample's relative error, root mean square, that ``choices`` make under a schedule.

    What is added up is scaled as rollouts with planted patterns say, where there were some.

    Raises:
        KeyError: the profile has no tables of a site (``patterns``, ``sensitivity``), or not the candidate.
    """
    sensitivity = network.tables["sensitivity"]
    weights, total = carried(problem, draft), 0.0
    for choice in choices:
        moved = weights * output_errors(network, sensitivity, choice)
        moved = moved[list(draft.kept)]
        total += COHERENCE * float(moved.sum()) ** 2 + (1 - COHERENCE) * float((moved**2).sum())
    planted = sensitivity.get(HEADS)
    return float(np.sqrt(total)) * (float(planted["scale"].values) if planted is not None else 1.0)
