"""A plan bound to one network: per step what is predicted from which steps, recorded and kept."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from torch import Tensor

from ditopt._torch import real_tensors
from ditopt.decisions import Dense, FeatureDecision, Fit, Forecast, Hoist, Predictor
from ditopt.errors import PlanMismatchError
from ditopt.passes._infra import Component, Prediction, StepPlan
from ditopt.passes.kept import kept_slots
from ditopt.plan import Plan, Rule, format_steps
from ditopt.runtime.kept import KeptRead
from ditopt.runtime.nesting import Nesting
from ditopt.runtime.sparse import AttentionSites, SparseStep
from ditopt.search.predictors import predictor_coefficients, second_order_factors, step_positions
from ditopt.sites import STEP, range_name


@dataclass(frozen=True)
class BoundPrediction:
    """A predicted site in a step: by which decision, from which steps, with which coefficients."""

    site: str
    decision: Predictor
    sources: tuple[int, ...]
    factors: tuple[float, ...]

    @property
    def prediction(self) -> Prediction:
        """The graph rewrite that it needs."""
        return Prediction(self.site, self.decision.history, isinstance(self.decision, Fit) and self.decision.latents)


@dataclass(frozen=True)
class BoundSecondOrder:
    """What a computed step's output is combined with: that of ``source``, by two ``factors``."""

    source: int
    factors: tuple[float, float]


@dataclass(frozen=True)
class BoundStep:
    """One step of a bound plan.

    ``live`` are the (site or slot, step) features and slots that later steps still read, ``lists`` the inputs of its
    sparse attention, ``reads`` the slots that this reads.
    """

    predictions: tuple[BoundPrediction, ...]
    variant: StepPlan
    live: frozenset[tuple[str, int]]
    second_order: BoundSecondOrder | None = None
    lists: Mapping[str, Tensor] = field(default_factory=dict)
    reads: tuple[KeptRead, ...] = ()


@dataclass(frozen=True)
class BoundPlan:
    """All steps of a plan for one network; ``full`` computes everything, densely, and records what is ever read.

    ``refused``: why no step can run as planned, if so; ``notes``: what is decided and comes to nothing.
    """

    steps: tuple[BoundStep, ...]
    full: StepPlan
    times: tuple[float, ...]
    timesteps: tuple[float, ...]
    refused: str | None = None
    notes: tuple[str, ...] = ()

    def position(self, value: float) -> tuple[int, float]:
        """The planned step nearest to a timestep value, and the sigma of that value.

        Sigmas lie on straight lines through the planned ones, also beyond the first and the last.
        """
        step = min(range(len(self.timesteps)), key=lambda index: abs(self.timesteps[index] - value))
        known = sorted(dict(zip(self.timesteps, self.times, strict=True)).items())
        if len(known) == 1:
            return step, known[0][1]
        at = min(max(bisect(known, (value,)), 1), len(known) - 1)
        (low, low_time), (high, high_time) = known[at - 1], known[at]
        return step, low_time + (value - low) * (high_time - low_time) / (high - low)

    def begins_anew(self, last: float | None, value: float) -> bool:
        """Whether a timestep ``value`` after ``last`` starts another generation: time runs backwards."""
        rising = self.timesteps[-1] > self.timesteps[0]
        return last is None or (value < last if rising else value > last)

    def begins_again(self, first: float | None, last: float | None, value: float) -> bool:
        """Whether a timestep ``value`` after ``last`` may start another generation than that which ``first`` began.

        A schedule that repeats its first value starts twice so.
        """
        return value == first or self.begins_anew(last, value)

    @property
    def variants(self) -> tuple[StepPlan, ...]:
        """The distinct graphs needed, in order of first use; ``full`` where what steps read may not be there."""
        full = [self.full] if any(step.predictions or step.reads for step in self.steps) else []
        return tuple(dict.fromkeys([*(step.variant for step in self.steps), *full]))

    @cached_property
    def kept(self) -> frozenset[str]:
        """The slots that steps hand on beside features."""
        return frozenset(slot for variant in self.variants for slot, _ in kept_slots(variant))

    @property
    def depth(self) -> int:
        """The longest history that any step reads."""
        predictions = (p.decision.history for step in self.steps for p in step.predictions)
        return max([*predictions, *(1 for step in self.steps if step.second_order)], default=0)


def bind(
    plan: Plan,
    network: str,
    ranges: Mapping[str, tuple[int, int]],
    *,
    partial: bool = False,
    attention: AttentionSites | None = None,
    components: Mapping[str, Component] | None = None,
) -> BoundPlan:
    """Resolve a plan's rules for ``network``, whose block ranges (first, last) are ``ranges``.

    ``partial``: the ranges are those of one graph of several, so that rules may name sites of the others; ``attention``
    is what its rules for heads may name, ``components`` are what rules may name of a block.

    Raises:
        PlanMismatchError: a rule names a site, head, pattern or step that is not there, or a step is predicted
            before enough of its history has been computed.
    """
    attention, nesting = attention or AttentionSites(), Nesting(ranges, components or {})
    if network not in plan.sampler.timesteps:
        raise PlanMismatchError(f"plan is for networks {sorted(plan.sampler.timesteps)}, not for {network!r}")
    total = len(plan.sampler.timesteps[network])
    times = plan.sampler.sigmas[network]
    known = set(ranges) if partial else nesting.sites
    rules = [rule for rule in plan.rules if fnmatchcase(network, rule.network)]
    if partial and any(isinstance(rule.do, Hoist) for rule in rules):
        raise PlanMismatchError(
            f"plan computes values ahead of the steps of {network}, which graph breaks cut into several graphs; "
            "hoisting needs the whole network in one"
        )
    if partial and STEP in (rule.sites for rule in rules):
        raise PlanMismatchError(
            f"plan decides whole steps of {network}, which graph breaks cut into several graphs; only ranges of "
            "blocks within one of them can be predicted"
        )
    if partial and any(rule.for_heads for rule in rules):
        raise PlanMismatchError(
            f"plan has rules for heads of {network}, which graph breaks cut into several graphs; sparse attention is "
            "not supported there"
        )
    attention.check(plan, network)
    for rule in rules:
        if isinstance(rule.do, Dense) and not rule.do.is_plain and rule.sites != STEP:
            asked = rule.do.model_dump(exclude_defaults=True)
            raise PlanMismatchError(
                f"plan computes {rule.sites} with {', '.join(asked)}, which is decided for whole steps: write "
                f"sites: {STEP}"
            )
    named = dict.fromkeys(rule.sites for rule in rules if not _only_for_heads(rule, attention))
    breaks = plan.breaks.get(network)
    decidable = breaks.sites if partial and breaks is not None else frozenset()
    if decidable:  # without the blocks that a break cuts
        known &= decidable
    missing = [name for name in named if not _matches_any(name, decidable or known)]
    if missing and (decidable or not partial):
        has = f"{STEP} and blocks {_stacks(ranges)}" if breaks is None else f"ranges within {_listed(breaks.blocks)}"
        raise PlanMismatchError(f"plan names sites that the model lacks: {', '.join(missing)}; the model has {has}")
    late = [t for rule in rules for t in rule.steps if t >= total]
    if late:
        raise PlanMismatchError(f"plan has rules for steps {format_steps(late)}, its schedule has steps 0-{total - 1}")
    sites = _sites_in_use(plan, network, total, known)
    table = [plan.decisions(t, sites, network) for t in range(total)]
    predicted = [nesting.active(decisions) for decisions in table]
    whole = [plan.decisions(t, [STEP], network)[STEP] for t in range(total)]
    finer = _second_order(whole, predicted, times)
    used = tuple(site for site in sites if any(site in step for step in predicted) or (site == STEP and any(finer)))
    history: dict[str, list[int]] = {site: [] for site in used}
    bound: list[tuple[BoundPrediction, ...]] = []
    for t, active in enumerate(predicted):
        found = []
        for site, decision in active.items():
            sources = tuple(history[site][: decision.history])
            if len(sources) < decision.history:
                raise PlanMismatchError(
                    f"step {t}: {decision.kind} of {site} reads {decision.history} computed steps, "
                    f"only {len(sources)} come before it"
                )
            if isinstance(decision, Fit) and decision.sources[t] != sources:
                raise PlanMismatchError(
                    f"step {t}: fit of {site} was made for the steps {list(decision.sources[t])}, but the steps "
                    f"computed before it are {list(sources)}; a plan with fits cannot be edited by hand, make it "
                    "again with `ditopt optimize`"
                )
            found.append(
                BoundPrediction(site, decision, sources, tuple(predictor_coefficients(decision, times, t, sources)))
            )
        bound.append(tuple(found))
        for site in nesting.recorded(used, active):
            history[site].insert(0, t)
    forms = [_form(decision) for decision in whole]
    computed = [form for form, active in zip(forms, predicted, strict=True) if STEP not in active]
    dtypes = {form.dtype for form in computed}
    hoisted, rows = plan.hoisted_steps(network), len(set(plan.sampler.timesteps[network]))
    full = StepPlan(
        recorded=used,
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
        simplify=bool(computed) and all(form.simplify for form in computed),
        hoist=rows if all(t in hoisted for t in range(total) if STEP not in predicted[t]) else 0,
    )
    lists: Sequence[SparseStep] = ()
    refused: str | None = None
    notes: tuple[str, ...] = ()
    try:
        _check_heads_of(nesting, plan, network, predicted, attention)
        with real_tensors():
            lists, notes = attention.steps(
                plan, network, lambda t, block: any(nesting.inside(block, site) for site in predicted[t])
            )
    except PlanMismatchError as error:  # calls that the plan is not for may run all the same
        refused = str(error)
    steps = _with_liveness(bound, [nesting.recorded(used, active) for active in predicted], forms, finer)
    steps = tuple(
        replace(step, variant=replace(step.variant, hoist=rows)) if t in hoisted and STEP not in predicted[t] else step
        for t, step in enumerate(steps)
    )
    if lists:
        steps = _with_lists(steps, lists)
    return BoundPlan(steps, full, times, plan.sampler.timesteps[network], refused, notes)


def _only_for_heads(rule: Rule, attention: AttentionSites) -> bool:
    """Whether a rule says nothing of steps and blocks, or nothing but that attention sites are dense."""
    dense = isinstance(rule.do, Dense) and rule.do.is_plain
    return rule.for_heads or (dense and any(rule.names(name) for name in attention.places))


def _with_lists(steps: Sequence[BoundStep], lists: Sequence[SparseStep]) -> tuple[BoundStep, ...]:
    made: list[BoundStep] = []
    live: frozenset[tuple[str, int]] = frozenset()
    for step, found in zip(reversed(steps), reversed(lists), strict=True):
        variant = replace(step.variant, sparse=found.variant)
        made.append(replace(step, variant=variant, live=step.live | live, lists=found.inputs, reads=found.reads))
        live |= {(read.slot, read.source) for read in found.reads}
    return tuple(reversed(made))


def adapted_factors(
    decision: Predictor, time: float, held: Sequence[float], planned: Sequence[float], *, refit: bool
) -> tuple[float, ...] | None:
    """The coefficients of a prediction at sigma ``time`` from features at the sigmas ``held``: not the planned ones.

    Reuse and forecasts go by the true distances, in steps by those among the ``planned`` sigmas. A fit holds for its
    own steps only: where ``refit`` is true, order 1 takes its place in the same graph (further terms weigh nothing).
    None: the site has to be computed.
    """
    history = decision.history
    if isinstance(decision, Fit):
        if not refit or min(history, len(held)) < 2:
            return None
        order_1 = predictor_coefficients(Forecast(), (time, *held), 0, (1, 2))
        return (*order_1, *(0.0,) * (history - 2 + decision.latents))
    if len(held) < history:
        return None
    places: tuple[float, ...] = (time, *held)
    if isinstance(decision, Forecast) and decision.distances == "steps":
        places = step_positions(planned, places)
        decision = decision.model_copy(update={"distances": "sigma"})  # these positions are what it goes by
    return predictor_coefficients(decision, places, 0, range(1, history + 1))


def _form(decision: FeatureDecision) -> StepPlan:
    """How what is computed in a step is computed."""
    return StepPlan(dtype=decision.dtype, simplify=decision.simplify) if isinstance(decision, Dense) else StepPlan()


def _second_order(
    whole: Sequence[FeatureDecision], predicted: Sequence[Mapping[str, Predictor]], times: Sequence[float]
) -> list[BoundSecondOrder | None]:
    """Of every step what its output is combined with; the first computed one and the last have nothing."""
    found: list[BoundSecondOrder | None] = []
    before: int | None = None
    for step, (decision, active) in enumerate(zip(whole, predicted, strict=True)):
        combined = None
        if isinstance(decision, Dense) and decision.second_order is not None and before is not None:
            factors = second_order_factors(decision.second_order, times, step, before)
            combined = None if factors is None else BoundSecondOrder(before, factors)
        found.append(combined)
        before = before if STEP in active else step
    return found


def _with_liveness(
    bound: Sequence[tuple[BoundPrediction, ...]],
    computed: Sequence[tuple[str, ...]],
    forms: Sequence[StepPlan],
    finer: Sequence[BoundSecondOrder | None],
) -> tuple[BoundStep, ...]:
    steps: list[BoundStep] = []
    live: frozenset[tuple[str, int]] = frozenset()
    turned = zip(reversed(bound), reversed(computed), reversed(forms), reversed(finer), strict=True)
    for found, recorded, form, combined in turned:
        predictions = tuple(p.prediction for p in found)
        variant = replace(form, predicted=predictions, recorded=recorded, second_order=combined is not None)
        steps.append(BoundStep(found, variant, live, combined))
        live = live | {(p.site, source) for p in found for source in p.sources}
        live = live | ({(STEP, combined.source)} if combined else set())
    return tuple(reversed(steps))


def _sites_in_use(plan: Plan, network: str, total: int, known: set[str]) -> tuple[str, ...]:
    ordered = sorted(known, key=lambda site: (site != STEP, site))
    table = [plan.decisions(t, ordered, network) for t in range(total)]
    return tuple(site for site in ordered if any(_reads(decisions[site]) for decisions in table))


def _reads(decision: FeatureDecision) -> bool:
    """Whether a decision may read features of earlier steps."""
    return not isinstance(decision, Dense) or decision.second_order is not None


def _check_heads_of(
    nesting: Nesting,
    plan: Plan,
    network: str,
    predicted: Sequence[Mapping[str, Predictor]],
    attention: AttentionSites,
) -> None:
    """Refuse sparse heads of attention that is not computed, as its module is predicted."""
    for name in attention.places:
        owner = nesting.owner(name)
        told = enumerate(plan.head_decisions(name, network)) if owner is not None else ()
        both = [step for step, heads in told if heads.any_sparse and owner in predicted[step]]
        if both:
            raise PlanMismatchError(
                f"plan predicts {owner} in steps {format_steps(both)}, in which heads of {name} are sparse: either is "
                "for other steps"
            )


def _matches_any(pattern: str, names: Collection[str]) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _listed(stacks: Sequence[Sequence[str]]) -> str:
    return ", ".join(range_name(stack[0], stack[-1]) for stack in stacks)


def _stacks(ranges: Mapping[str, tuple[int, int]]) -> str:
    singles = sorted((span[0], name) for name, span in ranges.items() if span[0] == span[1])
    return f"{singles[0][1]} to {singles[-1][1]}" if singles else "(none found)"
