"""Sparse heads under a price of error: candidates of every head of a site in some steps, and the choice among them.

Squared errors of heads add up (``heads``), and so do the seconds that they save, so each head is chosen by itself; what
the block-sparse kernel costs beyond its lists is paid once by a site, in each step that has a sparse head, and so are
finding blocks and pooling (``site_choice``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ditopt.cost_models.sparse import Need, SparseCost, shared_seconds
from ditopt.decisions import Decision, Sparse
from ditopt.errors import InputError
from ditopt.kept import Use, uses
from ditopt.measures import Table
from ditopt.plan import Plan, Rule, format_steps
from ditopt.profile import LATENCY, NetworkProfile
from ditopt.recipes import Recipe
from ditopt.search.heads import HeadPattern, squared_errors
from ditopt.search.problem import SearchProblem
from ditopt.search.site_choice import (
    HeadCandidate,
    SiteCandidates,
    between,
    found_every,
    is_clustered,
    is_int8,
    kept_every,
    mean_density,
    needs_now,
    needs_of,
    not_worse,
    union,
)
from ditopt.search.solution import Draft, Explanation, Rival, SparsePart

LOWEST_PRICE, HIGHEST_PRICE = 1e-9, 1e15
"""Of a squared relative error, in seconds: at the one whatever saves time is taken, at the other nothing that errs."""
DENSE = "dense"


class AttentionCosts(NamedTuple):
    """What attention takes by site, and why sites have none."""

    costs: dict[str, SparseCost]
    reasons: tuple[str, ...]


def site_costs(network: NetworkProfile, form: str) -> AttentionCosts:
    """What the sites take whose attention was timed in steps of a ``form`` (``form_name``), and why others have none.

    Raises:
        KeyError: the profile has no table ``latency``.
    """
    found, reasons = {}, []
    for site, table in network.tables[LATENCY].items():
        queries, block, profiled = (table.facts[key] for key in ("queries", "block_queries", "profiled"))
        if profiled != block:
            told = f"kernels take blocks of {block} queries, patterns are measured in blocks of {profiled}"
            reasons.append(f"{site}: {queries} tokens are too few: {told}")
            continue
        patterns = network.tables.get("patterns", {})
        if patterns and (site not in patterns or not patterns[site].facts.get("tried", True)):
            reasons.append(f"{site}: no pattern was measured there")
            continue
        if form not in table.labels["form"]:
            reasons.append(f"{site}: its attention was not timed in {form} steps")
            continue
        at = table.position("form", form)
        times = dict(zip(table.labels["density"], table["sparse"].at(form=at).values.tolist(), strict=True))
        try:
            dense = float(table["dense"].at(form=at).values)
            known = {float(density): each for density, each in times.items()}
            eight = _int8(table, at)
            found[site] = SparseCost.measured(dense, known, _shared(table, at), eight, _uneven(table, at))
            if eight and found[site].int8 is None:
                reasons.append(f"{site}: int8 scores take no less time in {form} steps, so no head there has them")
        except InputError as error:
            reasons.append(f"{site}: {error}")
    return AttentionCosts(found, tuple(reasons))


def _shared(table: Table, at: int) -> dict[str, float]:
    """Seconds of what heads share in a form, as far as it was timed; profiles of before have none."""
    if "shared" not in table.measures:
        return {}
    seconds = table["shared"].at(form=at).values.tolist()
    return {str(name): each for name, each in zip(table.labels["need"], seconds, strict=True) if not math.isnan(each)}


def _int8(table: Table, at: int) -> dict[float, float]:
    """Seconds by density of heads with int8 scores in a form, where that was timed."""
    if "int8" not in table.measures:
        return {}
    seconds = table["int8"].at(form=at).values.tolist()
    timed = zip(table.labels["density"], seconds, strict=True)
    return {float(density): each for density, each in timed if not math.isnan(each)}


def _uneven(table: Table, at: int) -> tuple[list[float], float] | None:
    """Densities of heads that are not alike and the seconds that they take in a form, where that was timed."""
    if "uneven" not in table.measures:
        return None
    seconds = float(table["uneven"].at(form=at).values)
    return None if math.isnan(seconds) else (table["budget"].values.tolist(), seconds)


def _densities(table: Table, cost: SparseCost) -> dict[Sparse, float]:
    """Of a site's candidates: with int8 scores or clusters the density at which a head without takes as long."""
    found = {}
    for label, density in zip(table.labels["candidate"], table["density"].values.tolist(), strict=True):
        decision = Sparse(pattern=str(label))
        taken = cost.as_plain(density) if is_int8(decision) else density
        found[decision] = cost.with_clusters(taken) if is_clustered(decision) else taken
    return found


def head_candidates(
    network: NetworkProfile,
    problem: SearchProblem,
    draft: Draft,
    costs: Mapping[str, SparseCost],
    ranges: Iterable[Sequence[int]],
    recipe: Recipe | None = None,
    *,
    kept: bool = True,
) -> tuple[SiteCandidates, ...]:
    """The candidates of all heads of the sites that have ``costs``, in every range of steps, worse ones left out.

    Of a range the steps count that ``draft`` computes, which are in a row. Where ranges follow each other, heads find
    or keep something every so many steps only if they may begin it there: in a multiple of these behind the first step.
    So whichever ranges a head does that in, its site does it in the same steps, as prices have it. A candidate is worse
    than another that saves as much with as small an error, and than dense if it saves nothing; what was not measured in
    one of the steps is none. Densities are those of the profile's blocks; of a rest that is kept it counts how many of
    the steps are dense. What a ``recipe`` does not allow, and steps that it keeps dense, are left out, and where
    ``kept`` is false all that is kept; so are int8 scores where a site's costs have none.

    Raises:
        KeyError: the profile has no tables of a site (``patterns``, ``sensitivity``).
        InputError: no error that was planted at any attention site moved anything.
    """
    first = recipe.first_step(problem.steps) if recipe is not None else 0
    alike = recipe is not None and recipe.alike
    computed = [tuple(step for step in steps if step in draft.kept and step >= first) for steps in ranges]
    begun = _begun([*filter(None, computed)], draft.kept)
    found = []
    for site, cost in costs.items():
        table = network.tables["patterns"][site]
        labels = table.labels["candidate"]
        decisions = [Sparse(pattern=str(label)) for label in labels]
        periods = [found_every(do) for do in decisions]
        allowed = [
            (recipe is None or recipe.allows(do.pattern))
            and (kept or every is None)
            and not (cost.int8 is None and is_int8(do))
            for do, every in zip(decisions, periods, strict=True)
        ]
        needs = list(map(needs_of, decisions))
        density = _densities(table, cost)
        heads = range(table["error"].size("head"))
        for steps, before in begun.items():
            errors = squared_errors(network, problem, draft, site, steps, heads, range(len(labels)))
            of_head = cost.dense / cost.efficiency / len(heads) * len(steps)
            saved = [of_head * (1 - mean_density(each, share, len(steps))) for each, share in density.items()]
            of_heads = []
            for head, row in zip(heads, errors.tolist(), strict=True):
                may = (allowed[at] and before % (every or 1) == 0 for at, every in enumerate(periods))
                known = [at for at, ok in enumerate(may) if ok and not math.isnan(row[at])]
                each = (
                    HeadCandidate(HeadPattern(site, head, labels[at], steps), saved[at], row[at], needs[at])
                    for at in known
                )
                of_heads.append(tuple(each) if alike else not_worse(each))
            lost = (cost.seconds(1.0) - cost.dense) * len(steps)
            prices = {name: seconds * len(steps) for name, seconds in cost.prices.items()}
            found.append(
                SiteCandidates(
                    tuple(of_heads), lost, alike, prices, len(steps), of_head=of_head, per_spread=cost.per_spread
                )
            )
    return tuple(found)


def _begun(ranges: Sequence[tuple[int, ...]], computed: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Of every range how many ``computed`` steps of those before it are in a row with it.

    >>> _begun([(1, 2), (4, 5), (8,)], [0, 1, 2, 4, 5, 6, 8])
    {(1, 2): 0, (4, 5): 2, (8,): 0}
    """
    place = {step: at for at, step in enumerate(computed)}
    found: dict[tuple[int, ...], int] = {}
    before: tuple[int, ...] = ()
    for steps in ranges:
        follows = bool(before) and place[steps[0]] == place[before[-1]] + 1
        found[steps] = found[before] + len(before) if follows else 0
        before = steps
    return found


def profiled_candidates(network: NetworkProfile) -> tuple[str, ...]:
    """The candidates that were measured at some site."""
    tables = network.tables["patterns"].values()
    return tuple(dict.fromkeys(str(label) for table in tables for label in table.labels["candidate"]))


def choose(candidates: Iterable[SiteCandidates], price: float) -> tuple[HeadCandidate, ...]:
    """What minimises ``seconds + price * squared error``; heads that are not among the choices stay dense."""
    return tuple(each for site in candidates for each in site.chosen(price))


def totals(candidates: Iterable[SiteCandidates], price: float) -> tuple[float, float]:
    """Seconds of a generation that the choices at a price save, and the square of their error."""
    saved = error = 0.0
    for site in candidates:
        chosen = site.chosen(price)
        if chosen:
            saved += sum(each.saved for each in chosen) - site.paid(chosen)
            error += sum(each.error for each in chosen)
    return saved, error


def price_of(candidates: Sequence[SiteCandidates], fits: Callable[[float, float], bool]) -> float:
    """The lowest price, to a hundredth, whose ``totals`` fit: at a higher one less is saved with a smaller error.

    ``fits(saved, error)`` has to hold from some price on.
    """
    low, high = LOWEST_PRICE, HIGHEST_PRICE
    if fits(*totals(candidates, low)):
        return low
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(*totals(candidates, middle)) else (middle, high)
    return high


def price_that_saves(candidates: Sequence[SiteCandidates], seconds: float) -> float:
    """The highest price, nearly, at which so many seconds are saved, if they can be."""
    return price_of(candidates, lambda saved, error: saved < seconds) / 1.02  # past what it is found to


def sparse_part(
    candidates: Sequence[SiteCandidates], price: float, network: str = "*", objective: float = math.nan
) -> SparsePart:
    """The choices at a price as a part of a plan; ``objective`` is the plan's, for the explanations."""
    chosen = {site: site.chosen(price) for site in candidates}
    saved, error = totals(candidates, price)
    rules = sparse_rules((each.choice for made in chosen.values() for each in made), network)
    told = tuple(each for site, made in chosen.items() for each in _explained(site, made, price, objective))
    return SparsePart(rules, saved, error, told)


def _explained(
    site: SiteCandidates, made: Sequence[HeadCandidate], price: float, objective: float
) -> Iterator[Explanation]:
    """Why each head of a site is sparse as it is, or dense."""
    taken, paid = {each.choice.head: each for each in made}, union(made)
    for of_head in filter(None, site.heads):
        first = of_head[0].choice
        own = taken.get(first.head)
        gain = own.gain(price) if own is not None else 0.0
        rivals = []
        if own is not None:
            rivals.append(Rival(DENSE, 0.0, objective + gain, f"would take {1e3 * own.saved:.3g} ms longer"))
        for each in of_head:
            if each is not own:
                told = f"saves {1e3 * each.saved:.3g} ms of a generation"
                worth = each.gain(price)
                if worth > gain and site.alike:
                    why = f"{told}, but the site's heads do alike, and together they would gain less"
                elif worth > gain and made and not each.needs <= paid:
                    further = site.seconds(paid | each.needs) - site.seconds(paid)
                    what = ", ".join(sorted({name for name, _ in each.needs - paid}))
                    why = f"{told}, but would cost the site {1e3 * further:.3g} ms more for {what}"
                elif worth > gain:
                    why = f"{told}, but what the site would gain is less than the kernel costs it"
                elif own is not None and each.saved < own.saved:
                    why = f"{told} only"
                else:
                    why = f"{told}: too little for its error"
                rivals.append(Rival(str(each.choice.candidate), math.sqrt(each.error), objective + gain - worth, why))
        chosen = DENSE if own is None else str(own.choice.candidate)
        name = f"head {first.head} in steps {format_steps(first.steps)}: {chosen}"
        yield Explanation(None, first.site, name, objective, tuple(rivals))


def planned_saving(
    plan: Plan, name: str, network: NetworkProfile, costs: Mapping[str, SparseCost], steps: Sequence[int]
) -> float:
    """Seconds that sparse heads save in ``steps``, which the plan computes; patterns not profiled save nothing.

    What a site computes for its heads is taken off, in the steps in which it does, and what it takes that their
    budgets are not alike. Heads are dense where they keep a rest.
    """
    saved = 0.0
    for site, cost in costs.items():
        table = network.tables["patterns"][site]
        heads = table["error"].size("head")
        density = _densities(table, cost)
        decided = plan.head_decisions(site, name)
        in_turn = [decided[step].of(heads) for step in steps]
        of_uses = zip(*(uses(each, found_every) for each in zip(*in_turn, strict=True)), strict=True)
        for step, of_heads, used in zip(steps, in_turn, of_uses, strict=True):
            if decided[step].any_sparse:
                each = [_density(density, do, use) for do, use in zip(of_heads, used, strict=True)]
                needs = frozenset[Need]().union(*map(needs_now, of_heads, used))
                taken = cost.seconds(sum(each) / heads) + cost.uneven_seconds(each)
                saved += cost.dense - taken - shared_seconds(cost.prices, needs)
    return saved


def _density(density: Mapping[Sparse, float], do: Decision, use: Use) -> float:
    """What a head attends to in a step that finds its blocks or keeps its rest, or reads them: in the former all."""
    if not isinstance(do, Sparse):
        return 1.0
    found, every = density.get(do, 1.0), kept_every(do)
    if every is None:
        return found
    return 1.0 if use is Use.FOUND else between(every, found)


def sparse_rules(choices: Iterable[HeadPattern], network: str = "*") -> tuple[Rule, ...]:
    """A rule for every site, pattern and steps, with the heads that share them."""
    heads: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for choice in choices:
        heads.setdefault((choice.site, str(choice.candidate), choice.steps), []).append(choice.head)
    return tuple(
        Rule(sites=site, heads=tuple(of_rule), steps=steps, do=Sparse(pattern=pattern), network=network)
        for (site, pattern, steps), of_rule in heads.items()
    )
