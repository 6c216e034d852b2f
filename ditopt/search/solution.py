"""What the search hands out: rules, predicted figures, the number of variants, and why each choice was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ditopt.decisions import Dense
from ditopt.plan import Rule
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


COMBINED: Shape = (0, False)
"""Stands for what a computed step of second order reads: the output of the one before. No predictor has this shape."""
Signature = tuple[frozenset[tuple[str, Shape]], frozenset[str]]


def signatures(steps: int, draft: Draft, second_order: bool = False) -> list[Signature]:
    """What tells the graphs of two steps apart: the shapes predicted, and the sites recorded for later.

    Factors are inputs of a graph, so ``reuse`` and a fit of one feature share one. ``second_order``: computed steps
    but the first one and the last step read the one before.
    """
    predicted: list[set[tuple[str, Shape]]] = [set() for _ in range(steps)]
    recorded: list[set[str]] = [set() for _ in range(steps)]
    for site, computed, families, among in draft.sites(steps):
        for step, history in with_histories(computed, among).items():
            predicted[step].add((site, families[step].shape))
            for source in history[: families[step].history]:
                recorded[source].add(site)
    if second_order:
        for before, step in pairwise(step for step in draft.kept if step < steps - 1):
            predicted[step].add((STEP, COMBINED))
            recorded[before].add(STEP)
    return [(frozenset(a), frozenset(b)) for a, b in zip(predicted, recorded, strict=True)]


def count_variants(steps: int, draft: Draft, second_order: bool = False) -> int:
    """Number of distinct graphs that ``draft`` needs."""
    return len(set(signatures(steps, draft, second_order)))


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
    """A rule for every site and candidate, in order of its first step; computed steps need none but for their dtype."""
    rules = computed_rules(problem)
    for site, made in choices.items():
        by_candidate: dict[Candidate, list[StepChoice]] = {}
        for choice in made:
            if choice.candidate is not None:
                by_candidate.setdefault(choice.candidate, []).append(choice)
        for candidate, same in by_candidate.items():
            steps = tuple(choice.step for choice in same)
            rules.append(Rule(sites=site, steps=steps, do=candidate.decide(same), network=problem.network))
    return tuple(rules)


def computed_rules(problem: SearchProblem) -> list[Rule]:
    """The rule of what is done in computed steps, if it is not what the model does; those of predictions follow it."""
    decision = Dense.model_validate({"dtype": problem.dtype, "second_order": problem.second_order})
    if decision.is_plain:
        return []
    return [Rule(sites=STEP, steps=tuple(range(problem.steps)), do=decision, network=problem.network)]


def dtype_rules(problem: SearchProblem) -> list[Rule]:
    """The rule that computed steps run in the problem's dtype, if it has one, and nothing else is done in them."""
    return computed_rules(replace(problem, second_order=None))
