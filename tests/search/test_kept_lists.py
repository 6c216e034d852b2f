"""Lists and rests that are kept, in the search: their price is that of the steps in which the runtime finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.kept import Use, uses
from ditopt.measures import Measure, Table
from ditopt.plan import Plan, Rule
from ditopt.profile import NetworkProfile
from ditopt.recipes import Recipe
from ditopt.runtime.sparse import AttentionSites, Place
from ditopt.search import SearchProblem, from_kept
from ditopt.search.heads import HeadPattern
from ditopt.search.joint import draft_for
from ditopt.search.site_choice import SiteCandidates, found_every, needs_of
from ditopt.search.solution import SparsePart, signatures
from ditopt.search.sparse import head_candidates, planned_saving, sparse_rules
from ditopt.search.with_heads import HeadsBeside, count_graphs, divisions
from ditopt.sites import AttentionSite
from tests.made_profiles import made_plan
from tests.search.test_sparse import BAND, COST, HEADS, with_attention
from tests.search.toy import Toy

STEPS, PERIODS = 12, (2, 4, 6)
PATTERNS = (
    *(pattern_text({"pattern": "draft", "keep": 0.25, "by": "mass", "refresh": every}) for every in PERIODS),
    pattern_text({"pattern": "draft", "keep": 0.25, "by": "error", "refresh": 4}),
    pattern_text({"pattern": "draft", "keep": 0.25, "by": "mass"}),
    pattern_text({"pattern": "draft", "keep": 0.25}),
    *(pattern_text({"pattern": "band", "width": 2.0, "rest": {"kept": "merge", "refresh": every}}) for every in (2, 4)),
)
SHARES = (0.25,) * 6 + (0.625, 0.4375)
FORM = {"pattern": "draft", "keep": "any", "by": "any", "refresh": "any"}
ALIKE = Recipe("alike", "Alike", "0000.00000", (FORM,), alike=True, dense_first=0.2)
steps_kept = st.sets(st.integers(0, STEPS - 1), min_size=2).map(sorted)


@cache
def network() -> NetworkProfile:
    """``with_attention``, and candidates that keep lists or rests, of errors that leave all of them in the choice."""
    found = with_attention(Toy(steps=STEPS).profile())
    table = found.tables["patterns"]["attn"]
    plain = table["error"].values
    more = np.broadcast_to(np.linspace(0.02, 0.05, len(PATTERNS)), (*plain.shape[:-1], len(PATTERNS)))
    measures = {
        **table.measures,
        "error": Measure(table["error"].axes, np.concatenate([plain, more], -1)),
        "density": Measure(("candidate",), np.append(table["density"].values, SHARES)),
    }
    labels = {"candidate": (*table.labels["candidate"], *PATTERNS)}
    return replace(found, tables={**found.tables, "patterns": {"attn": Table(measures, labels, table.facts)}})


@cache
def problem() -> SearchProblem:
    return SearchProblem.from_profile(network(), ("reuse",))


def plan_of(rules: Sequence[Rule]) -> Plan:
    tokens = {"net": Geometry(4, 16, 16)}
    plan = Plan.model_validate(made_plan({"net": network().timesteps}))
    return plan.model_copy(update={"rules": tuple(rules), "tokens": tokens})


def finds(choices: Sequence[HeadPattern], kept: Sequence[int], name: str) -> int:
    """In how many computed steps some head finds what it needs by this name, step by step by the runtime's own rule."""
    does = {(each.head, step): Sparse(pattern=str(each.candidate)) for each in choices for step in each.steps}
    found = set()
    for head in range(HEADS):
        in_turn = [does.get((head, step)) for step in kept]
        of_head = uses(in_turn, lambda do: None if do is None else found_every(do))
        for step, do, use in zip(kept, in_turn, of_head, strict=True):
            if do is not None and use is not Use.READ and name in dict(needs_of(do)):
                found.add(step)
    return len(found)


def steps_of(site: SiteCandidates) -> tuple[int, ...]:
    """The range that it is of; none where it has no candidates."""
    return next((each.choice.steps for of_head in site.heads for each in of_head), ())


@given(st.data(), steps_kept, st.booleans())
@settings(deadline=None)
def test_whatever_is_chosen_has_the_price_of_the_steps_that_find(
    data: st.DataObject, kept: list[int], alike: bool
) -> None:
    draft = draft_for(problem(), tuple(kept), ["reuse"])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(kept) - 1), max_size=3)))
    ranges = [kept[start:end] for start, end in zip((0, *cuts), (*cuts, len(kept)), strict=True)]
    recipe = ALIKE if alike else None
    found = head_candidates(network(), problem(), draft, {"attn": COST}, ranges, recipe)
    saved, choices = 0.0, []
    for site in found:
        names = sorted({str(each.choice.candidate) for each in site.heads[0]})
        one = data.draw(st.sampled_from([None, *names])) if alike else None
        drawn = [
            data.draw(st.sampled_from([None, *of_head]))
            if not alike
            else next((each for each in of_head if each.choice.candidate == one), None)
            for of_head in site.heads
        ]
        taken = [each for each in drawn if each is not None]
        saved += sum(each.saved for each in taken) - (site.paid(taken) if taken else 0.0)
        choices += [each.choice for each in taken]
    plan = plan_of(sparse_rules(choices))
    assert saved == pytest.approx(planned_saving(plan, "net", network(), {"attn": COST}, kept))
    for name, price in {"mass": 100.0, "error": 10.0}.items():
        dear = replace(COST, shared={**COST.shared, name: price + COST.shared[name]})
        told = planned_saving(plan, "net", network(), {"attn": dear}, kept)
        count = finds(choices, kept, name)
        assert saved - told == pytest.approx(price * count)
        priced = head_candidates(network(), problem(), draft, {"attn": dear}, ranges, recipe)
        paid = [0.0, 0.0]
        for sites in zip(found, priced, strict=True):
            here = [each for each in choices if each.steps == steps_of(sites[0])]
            needs = frozenset(need for each in here for need in needs_of(Sparse(pattern=str(each.candidate))))
            paid = [before + site.seconds(needs) for before, site in zip(paid, sites, strict=True)]
        assert paid[1] - paid[0] == pytest.approx(price * count), "what the search pays"


def test_ranges_begin_where_lists_are_found() -> None:
    """Ten steps behind a dense start, as ``adaspa`` has them: heads that begin in other ranges find together."""
    steps = range(2, STEPS)
    assert divisions(steps)[2] == ((2, 3, 4, 5), (6, 7, 8), (9, 10, 11))
    assert ((2, 3, 4, 5), (6, 7, 8, 9), (10, 11)) in divisions(steps, (4,))
    assert ((2, 3, 4, 5, 6, 7, 8, 9), (10, 11)) in divisions(steps, (4, 8))
    assert divisions(range(1), (4,)) == [((0,),)]
    draft = draft_for(problem(), tuple(range(STEPS)), ["reuse"])

    def offered(*ranges: Sequence[int]) -> list[set[int]]:
        found = head_candidates(network(), problem(), draft, {"attn": COST}, ranges)
        all_of = [{str(each.choice.candidate) for head in site.heads for each in head} for site in found]
        return [{every for every in map(found_every, (Sparse(pattern=each) for each in of)) if every} for of in all_of]

    assert offered(range(2), range(2, 8), range(8, 12)) == [{2, 4, 6}, {2}, {2, 4}]
    assert offered(range(1, 4), range(6, 12)) == [{2, 4, 6}, {2, 4, 6}], "a step between ends all runs"


@pytest.mark.parametrize("kept", [range(STEPS), (0, 1, 3, 4, 6, 7, 8, 11), (2, 5, 9)])
def test_a_part_saves_what_its_plan_does(kept: Sequence[int]) -> None:
    base = from_kept(problem(), tuple(kept))
    heads = HeadsBeside(network(), problem(), base, {"attn": replace(COST, shared={"mass": 0.6, "kept": 0.01})},
                        lambda _: True)  # fmt: skip
    keeping = 0
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0):
        part = heads.saving(share * heads.most_saved)
        assert part is not None
        told = planned_saving(plan_of(part.rules), "net", network(),
                              {"attn": replace(COST, shared={"mass": 0.6, "kept": 0.01})}, kept)  # fmt: skip
        assert part.saved == pytest.approx(told)
        keeping += any(found_every(rule.do) for rule in part.rules)
    assert keeping, "some of them keep something"


MORE = (
    BAND,
    pattern_text({"pattern": "draft", "keep": 0.25, "by": "means", "refresh": 2}),
    pattern_text({"pattern": "draft", "keep": 0.5, "by": "error"}),
    pattern_text({"pattern": "draft", "keep": 0.5, "order": "clusters"}),
    pattern_text({"pattern": "band", "width": 2.0, "rest": {"pooled": 16}}),
)


def bound_graphs(rules: Sequence[Rule], kept: Sequence[int]) -> int:
    """How many graphs a plan has where it is bound to a network with one attention site of 1,024 tokens."""
    site = AttentionSite("attn", 0, HEADS, 1024, 1024, 16, False)
    sites = AttentionSites({"attn": Place(site, None, True, torch.device("cpu"), False, 16)})
    steps, _ = sites.steps(plan_of(rules), "net", lambda step, _: step not in kept)
    of_base = signatures(problem(), draft_for(problem(), tuple(kept), ["reuse"]))
    return len({(signed, step.variant) for signed, step in zip(of_base, steps, strict=True)})


@given(st.data(), st.sampled_from([tuple(range(STEPS)), (0, 1, 3, 4, 6, 7, 8, 11)]))
@settings(deadline=None, max_examples=40)
def test_graphs_are_counted_as_the_runtime_has_them(data: st.DataObject, kept: tuple[int, ...]) -> None:
    cuts = (0, *sorted(data.draw(st.sets(st.integers(1, len(kept) - 1), max_size=2))), len(kept))
    choices = [
        HeadPattern("attn", head, chosen, tuple(kept[start:end]))
        for start, end in pairwise(cuts)
        for head in range(HEADS)
        if (chosen := data.draw(st.sampled_from([None, *PATTERNS, *MORE]))) is not None
    ]
    rules = sparse_rules(choices)
    solution = from_kept(problem(), kept).with_sparse(SparsePart(rules, 1.0, 0.0))
    assert count_graphs(problem(), solution) == bound_graphs(rules, kept)


def test_a_step_that_reads_lists_looks_for_no_blocks_unless_a_head_does() -> None:
    """Another head begins to look for its own in every call: where only lists are read, a graph without that."""
    everywhere, late = tuple(range(STEPS)), tuple(range(6, STEPS))
    rules = sparse_rules([HeadPattern("attn", 0, PATTERNS[1], everywhere), HeadPattern("attn", 1, PATTERNS[5], late)])
    solution = from_kept(problem(), everywhere).with_sparse(SparsePart(rules, 1.0, 0.0))
    assert count_graphs(problem(), solution) == bound_graphs(rules, everywhere) == 3
