"""Why each decision was made: per step and site the rivals, what they would have cost, the reason against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ditopt.cost_models.measured import SIMPLIFIED
from ditopt.profile import Array
from ditopt.search.problem import SearchProblem
from ditopt.search.solution import Draft, Explanation, Rival
from ditopt.search.space import CANDIDATES, Candidate, StepChoice
from ditopt.search.table import ErrorTable, with_histories
from ditopt.sites import STEP

COMPUTE = "compute"
OWN_DTYPE = "the model's dtype"
AS_TRACED = "as the model has it"
OWN_ORDER = "outputs as computed"
NOT_AIMED = "before fits and computed steps were aimed so, samples were farther from those of a second-order solver"

_OTHERWISE = (
    "the whole schedule's error, the limit of {} variants, a block range, a recipe's schedules, or what was measured "
    "decided"
)


def explain(
    problem: SearchProblem,
    draft: Draft,
    choices: Mapping[str, Sequence[StepChoice]],
    growth: Mapping[str, Array],
    relief: Array,
    objective: float,
    lam: float | None,
    max_variants: int,
) -> tuple[Explanation, ...]:
    """One explanation for every step and site in use, and one for every range left out.

    ``relief`` ``[T]`` is what ranges take off the objective of each computed step.
    """
    found = []
    for site, made in choices.items():
        computed = draft.kept if site == STEP else draft.ranges[site].computed
        eased = relief if site == STEP else np.zeros(problem.steps)
        ledger = _Ledger(problem, site, growth[site], lam, [choice.step for choice in made], eased)
        for choice in made:
            chosen = choice.candidate.name if choice.candidate else COMPUTE
            rivals = tuple(_rivals(ledger, choice, computed, objective, max_variants))
            named = problem.site if site == STEP else site
            found.append(Explanation(choice.step, named, chosen, objective, rivals))
    if problem.simplify_reason:
        chosen, other = (SIMPLIFIED, AS_TRACED) if problem.simplify else (AS_TRACED, SIMPLIFIED)
        rival = Rival(other, np.nan, np.nan, problem.simplify_reason)
        found.append(Explanation(None, STEP, chosen, objective, (rival,)))
    if problem.dtype_tried is not None:
        chosen, other = (problem.dtype, OWN_DTYPE) if problem.dtype else (OWN_DTYPE, problem.dtype_tried)
        rival = Rival(other, np.nan, np.nan, problem.dtype_reason)
        found.append(Explanation(None, STEP, chosen, objective, (rival,)))
    if problem.second_order is not None:
        rival = Rival(OWN_ORDER, np.nan, np.nan, NOT_AIMED)
        found.append(Explanation(None, STEP, f"{problem.second_order:g} of second order", objective, (rival,)))
    for name in problem.ranges:
        if name not in draft.ranges:
            found.append(Explanation(None, name, COMPUTE, objective, (_unused(problem, draft, name, objective, lam),)))
    return tuple(found)


class _Ledger:
    """The additive objective of one site's schedules, the rest of the plan being as it is."""

    def __init__(
        self, problem: SearchProblem, site: str, growth: Array, lam: float | None, among: list[int], relief: Array
    ) -> None:
        self.site, self.lam, self.among, self.growth = site, lam, among, np.abs(growth)
        self.table: ErrorTable = problem.table if site == STEP else problem.range_tables[site]
        self.price = problem.price(growth) * (1.0 if lam is None else lam)
        self.root = 0.5 if problem.additive == "squares" else 1.0
        self.whole_steps = problem.seconds_predicted is not None
        step_saved = problem.seconds_full - (problem.seconds_predicted or 0.0)
        saved = step_saved if site == STEP else problem.ranges[site].seconds_saved
        self.saved = (0.0 if lam is None else saved) - relief

    def cost(self, family: int, step: int, history: Sequence[int]) -> float:
        """What predicting ``step`` adds to the objective, relative to computing it."""
        return float(self.price[step] * self.table.error(family, step, history) - self.saved[step])

    def norm(self, family: int, step: int, history: Sequence[int]) -> float:
        """The predicted error as ``StepChoice.error`` states it."""
        return float(self.table.error(family, step, history) ** self.root * self.growth[step])

    def cheapest(self, computed: Sequence[int], but: int) -> float:
        """The objective of computing ``computed`` and predicting the rest best, step ``but`` left out."""
        histories = with_histories(computed, self.among)
        others = ((t, past) for t, past in histories.items() if t != but)
        return sum(float(self.price[t] * self.table.best(t, past)[0] - self.saved[t]) for t, past in others)


def _rivals(
    ledger: _Ledger, choice: StepChoice, computed: tuple[int, ...], objective: float, max_variants: int
) -> Iterator[Rival]:
    step, table = choice.step, ledger.table
    history = tuple(t for t in reversed(computed) if t < step)
    without = tuple(t for t in computed if t != step)
    shift = 0.0
    if choice.candidate is None and step:
        shift = ledger.cheapest(without, step) - ledger.cheapest(computed, step)
    own = 0.0 if choice.candidate is None else ledger.cost(table.candidates.index(choice.candidate), step, history)
    if choice.candidate is not None:
        gain = ledger.cheapest(tuple(sorted((*computed, step))), step) - ledger.cheapest(computed, step)
        yield Rival(COMPUTE, 0.0, objective + gain - own, _against_computing(ledger, step, gain - own, max_variants))
    for candidate in CANDIDATES:
        if candidate == choice.candidate:
            continue
        if candidate not in table.candidates:
            yield Rival(candidate.name, np.inf, np.inf, _outside(ledger, candidate))
            continue
        family = table.candidates.index(candidate)
        error = ledger.norm(family, step, history)
        if not np.isfinite(error):
            yield Rival(candidate.name, np.inf, np.inf, _impossible(candidate, history))
            continue
        change = ledger.cost(family, step, history) - own + shift
        everything = len(computed) == len(ledger.among)
        reason = _against(ledger, choice, error, change, shift, max_variants, everything)
        yield Rival(candidate.name, error, objective + change, reason)


def _outside(ledger: _Ledger, candidate: Candidate) -> str:
    if ledger.site == STEP and not ledger.whole_steps:
        return "graph breaks cut the network, so a whole step cannot be predicted"
    if ledger.site != STEP and candidate.latents:
        return "a range of blocks does not read the latents"
    if ledger.site != STEP and candidate.history > 2:
        return "ranges of blocks read at most two steps"
    return "not among the techniques chosen, or its history is too long for this many steps"


def _impossible(candidate: Candidate, history: tuple[int, ...]) -> str:
    if len(history) < candidate.history:
        steps = "step" if candidate.history == 1 else "steps"
        return f"needs {candidate.history} computed {steps} before it, there are {len(history)}"
    return "the computed steps before it ran other branches"


def _against_computing(ledger: _Ledger, step: int, change: float, limit: int) -> str:
    if ledger.lam is None:
        return "how many steps are computed was set before (by rollouts or the target), and others are better ones"
    if change >= 0:
        return f"takes {ledger.saved[step]:.3g} s more; the error it removes is worth less (objective +{change:.3g} s)"
    return f"would lower the predicted objective by {-change:.3g} s, but {_OTHERWISE.format(limit)}"


def _against(
    ledger: _Ledger, choice: StepChoice, error: float, change: float, shift: float, limit: int, everything: bool
) -> str:
    """``everything``: whether the plan computes all steps."""
    unit = "" if ledger.lam is None else " s"
    if choice.candidate is None:
        if change >= 0 and ledger.lam is None:
            given = "rollouts or the target let all steps be computed"
            spent = given if everything else "the steps given are better spent here"
            return f"raises the plan's error (objective +{change:.3g}); {spent}"
        if change >= 0 and change - shift < 0:
            return f"cheaper here, but later steps need this one computed (objective +{change:.3g}{unit})"
        if change >= 0:
            return f"its error is worth more than the time it saves (objective +{change:.3g}{unit})"
        return f"would lower the predicted objective by {-change:.3g}{unit}, but {_OTHERWISE.format(limit)}"
    if error >= choice.error:
        ratio = f"{error / choice.error:.4g} times" if choice.error else "more than"
        return f"its error is {ratio} that of {choice.candidate.name}"
    return f"smaller error by itself, but {_OTHERWISE.format(limit)}"


def _unused(problem: SearchProblem, draft: Draft, name: str, objective: float, lam: float | None) -> Rival:
    site = problem.ranges[name]
    if lam is None:
        return Rival(name, np.nan, np.nan, "only whole steps were asked for")
    clash = [other for other in draft.ranges if not _apart(problem, name, other)]
    if clash:
        return Rival(name, np.nan, np.nan, f"overlaps {', '.join(clash)}, which together gain more")
    if site.seconds_saved <= 0:
        return Rival(name, np.nan, np.nan, f"skipping it saves no time ({site.seconds_saved:.3g} s)")
    reason = f"its error outweighs the {site.seconds_saved:.3g} s it saves a step, or it needs too many variants"
    return Rival(name, np.nan, np.nan, reason)


def _apart(problem: SearchProblem, one: str, two: str) -> bool:
    a, b = problem.ranges[one], problem.ranges[two]
    return a.last < b.first or b.last < a.first
