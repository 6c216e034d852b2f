"""What the search hands out: rules, predicted figures, the number of variants, and why each choice was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ditopt.decisions import Dense
from ditopt.plan import Rule
from ditopt.search.predictors import second_order_factors
from ditopt.search.problem import SearchProblem
from ditopt.search.space import Candidate, Shape, StepChoice
from ditopt.search.table import with_histories
from ditopt.sites import STEP


@dataclass(frozen=True)
class RangeDraft:
    """A range's schedule among the computed steps: where it is computed, and the candidates elsewhere."""

    computed: tuple[int, ...]
    families: Mapping[int, Candidate]


@dataclass(frozen=True)
class Draft:
    """A whole plan as numbers: computed steps, candidates of the predicted ones, schedules of the ranges in use."""

    kept: tuple[int, ...]
    families: Mapping[int, Candidate]
    ranges: Mapping[str, RangeDraft] = field(default_factory=dict)

    def sites(self, steps: int) -> Iterator[tuple[str, Sequence[int], Mapping[int, Candidate], Sequence[int]]]:
        """Every site in use: name, where it is computed, candidates elsewhere, and the steps it is asked for."""
        yield STEP, self.kept, self.families, range(steps)
        for name, part in self.ranges.items():
            yield name, part.computed, part.families, self.kept


@dataclass(frozen=True)
class Rival:
    """An alternative not taken: its error (as ``StepChoice.error``), the plan's objective with it, and why not."""

    name: str
    error: float
    objective: float
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Why ``chosen`` was taken at ``site`` in ``step`` (None: in all steps) and each rival was not.

    ``objective`` is that of the plan; a rival's is comparable with it.
    """

    step: int | None
    site: str
    chosen: str
    objective: float
    rivals: tuple[Rival, ...]


@dataclass(frozen=True)
class SparsePart:
    """What sparse heads add to a plan: rules, predicted seconds of a generation saved, the square of their error, why.

    ``error`` is of the final sample's relative error, as ``Solution.predicted_error`` is.
    """

    rules: tuple[Rule, ...] = ()
    saved: float = 0.0
    error: float = 0.0
    explanations: tuple[Explanation, ...] = ()


@dataclass(frozen=True)
class Solution:
    """A plan's decisions with what was predicted for them.

    Attributes:
        rules: what ``Plan`` holds; a site's equal decisions share a rule.
        kept: the steps in which the network runs.
        predicted_error: of the final sample, relative, root mean square over prompts (``quadratic``).
        predicted_seconds: of all network evaluations of a generation.
        explanations: a line for each step and site.
        variants: number of distinct straight-line graphs.
        objective: seconds + lam * additive error; the additive error alone where ``lam`` is None.
        additive_error: what the dynamic programme added up: mean squares, or norms.
        lam: the price of error it was solved at, None where the number of kept steps was given.
        max_variants: the limit it was solved under.
        choices: per site the choice of every step that has one.
        draft: the plan as numbers.
        sparse: its sparse heads, which all of these but the draft, the choices and the number of graphs tell of, too.
    """

    rules: tuple[Rule, ...]
    kept: tuple[int, ...]
    predicted_error: float
    predicted_seconds: float
    explanations: tuple[Explanation, ...]
    variants: int
    objective: float
    additive_error: float
    lam: float | None
    max_variants: int
    choices: Mapping[str, tuple[StepChoice, ...]]
    draft: Draft
    sparse: SparsePart = SparsePart()

    def with_sparse(self, part: SparsePart) -> Solution:
        """The plan with these sparse heads in place of those that it has; head rules come last."""
        own, before = len(self.rules) - len(self.sparse.rules), self.sparse
        told = len(self.explanations) - len(before.explanations)
        return replace(
            self,
            rules=(*self.rules[:own], *part.rules),
            predicted_error=max(self.predicted_error**2 - before.error + part.error, 0.0) ** 0.5,
            predicted_seconds=self.predicted_seconds + before.saved - part.saved,
            explanations=(*self.explanations[:told], *part.explanations),
            sparse=part,
        )


COMBINED: Shape = (0, False)
"""Stands for what a computed step of second order reads: the output of the one before. No predictor has this shape."""
Signature = tuple[frozenset[tuple[str, Shape]], frozenset[str]]


def combined_steps(problem: SearchProblem, kept: Sequence[int]) -> dict[int, tuple[int, tuple[float, float]]]:
    """Of every computed step that has a share of second order, the computed step before and the factors of both.

    Steps that run other branches than the one before have none: guidance would weigh the branches' shares.
    """
    share, groups = problem.second_order, problem.groups or (0,) * problem.steps
    found = {}
    for before, step in pairwise(kept):
        if share is not None and groups[before] == groups[step]:
            factors = second_order_factors(share, problem.times, step, before)
            if factors is not None:
                found[step] = before, factors
    return found


def signatures(problem: SearchProblem, draft: Draft) -> list[Signature]:
    """What tells the graphs of two steps apart: what they read of earlier steps, and the sites recorded for later.

    Factors are inputs of a graph, so ``reuse`` and a fit of one feature share one.
    """
    steps = problem.steps
    read: list[set[tuple[str, Shape]]] = [set() for _ in range(steps)]
    recorded: list[set[str]] = [set() for _ in range(steps)]
    for site, computed, families, among in draft.sites(steps):
        for step, history in with_histories(computed, among).items():
            read[step].add((site, families[step].shape))
            for source in history[: families[step].history]:
                recorded[source].add(site)
    for step, (before, _) in combined_steps(problem, draft.kept).items():
        read[step].add((STEP, COMBINED))
        recorded[before].add(STEP)
    return [(frozenset(a), frozenset(b)) for a, b in zip(read, recorded, strict=True)]


def count_variants(problem: SearchProblem, draft: Draft) -> int:
    """Number of distinct graphs that ``draft`` needs."""
    return len(set(signatures(problem, draft)))


def step_choices(
    problem: SearchProblem, draft: Draft, growth: Mapping[str, Sequence[float]]
) -> dict[str, tuple[StepChoice, ...]]:
    """The choices of every site in use; ``growth[site][t]`` is how an error of step t reaches the final sample."""
    found = {}
    for site, computed, families, among in draft.sites(problem.steps):
        table = problem.table if site == STEP else problem.range_tables[site]
        histories = with_histories(computed, among)
        choices = []
        for step in among:
            if step not in histories:
                choices.append(StepChoice(step))
                continue
            candidate, history = families[step], histories[step]
            index = table.candidates.index(candidate)
            error = table.error(index, step, history) ** (0.5 if problem.additive == "squares" else 1.0)
            factors = table.coefficients(index, step, history)
            scaled = error * abs(float(growth[site][step]))
            choices.append(StepChoice(step, candidate, history[: candidate.history], factors, scaled))
        found[site] = tuple(choices)
    return found


def to_rules(problem: SearchProblem, choices: Mapping[str, Sequence[StepChoice]]) -> tuple[Rule, ...]:
    """A rule for every site and candidate, in order of its first step, behind those of computed steps."""
    kept = [choice.step for choice in choices.get(STEP, ()) if choice.candidate is None]
    rules = [*form_rules(problem), *second_order_rules(problem, kept)]
    for site, made in choices.items():
        by_candidate: dict[Candidate, list[StepChoice]] = {}
        for choice in made:
            if choice.candidate is not None:
                by_candidate.setdefault(choice.candidate, []).append(choice)
        for candidate, same in by_candidate.items():
            steps = tuple(choice.step for choice in same)
            named = problem.site if site == STEP else site
            rules.append(Rule(sites=named, steps=steps, do=candidate.decide(same), network=problem.network))
    return tuple(rules)


def form_rules(problem: SearchProblem) -> list[Rule]:
    """The rule that computed steps run in the problem's dtype, or simplified; those of predictions come after it."""
    decision = _computed(problem)
    if decision.is_plain:
        return []
    return [Rule(sites=STEP, steps=tuple(range(problem.steps)), do=decision, network=problem.network)]


def second_order_rules(problem: SearchProblem, kept: Sequence[int]) -> list[Rule]:
    """The rule that computed steps have the problem's share of second order, in its form, if it has one."""
    steps = tuple(combined_steps(problem, kept))
    if not steps:
        return []
    decision = _computed(problem, problem.second_order)
    return [Rule(sites=STEP, steps=steps, do=decision, network=problem.network)]


def _computed(problem: SearchProblem, second_order: float | None = None) -> Dense:
    """How the problem has steps computed."""
    settings = {"dtype": problem.dtype, "simplify": problem.simplify, "second_order": second_order}
    return Dense.model_validate(settings)
