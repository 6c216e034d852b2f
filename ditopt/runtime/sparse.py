"""Sparse rules bound to a network: which blocks of keys each head attends to in each step, as lists for the kernel.

Under a static pattern a head's lists are all that it attends to. Under a dynamic one they are what it attends to in any
case, and how much more it finds in each call goes with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from ditopt.decisions import HeadDecision, Sparse
from ditopt.errors import InputError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, kernel_blocks, longest_list
from ditopt.kernels.block_sparse_attention.pooled import FIRST_ORDER, ZEROTH_ORDER
from ditopt.kernels.ops import ATTENTION, FIRST_ORDER_ON_GPU, MASK_AND_REST
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.choice import Linear, Pooled, SparseChoice
from ditopt.kernels.patterns.draft import OWN, Draft
from ditopt.kernels.patterns.listed import Listed
from ditopt.kernels.patterns.orders import TokenOrder
from ditopt.kernels.patterns.whole import Nothing
from ditopt.passes._infra import SITE, SparseAttention, tensor_value
from ditopt.passes.attention import mask_of
from ditopt.passes.kept import LISTS, REST, readers_name, room_name
from ditopt.passes.sparse import (
    clusters_name,
    draft_inputs,
    int8_name,
    list_names,
    order_names,
    projection_name,
    rest_name,
)
from ditopt.plan import Plan, Rule
from ditopt.runtime.choices import Heads, choice_of
from ditopt.runtime.drafts import finding, limits_of_steps, room_of, selectors_of_steps
from ditopt.runtime.kept import KeptRead, KeptSteps, kept_steps, refresh_of
from ditopt.runtime.kept_rests import kept_rests
from ditopt.runtime.linear import LinearRests
from ditopt.runtime.listed import BoundList, ListedHeads
from ditopt.runtime.products import int8_heads, is_int8
from ditopt.runtime.token_orders import clustered_heads, site_orders
from ditopt.sites import AttentionSite
from ditopt.trace import Trace, block_of

WIDTHS = 128
"""Lists have room for a multiple of so many blocks, or for all: so other patterns seldom need another graph."""
WITHOUT_TOKENS = ("dense", "skip")
"""Patterns that need not know how keys lie."""

FindGeometry = Callable[[Geometry | None], tuple[Geometry | None, str]]
"""Finds how the tokens of a network's self-attention lie, and how it knows; None with a reason where it does not.

Given what is said of them, it is that, or an ``InputError`` tells what is not so.
"""


def not_looked_for(given: Geometry | None) -> tuple[Geometry | None, str]:
    """Finds nothing, and takes what is given."""
    return given, "nobody looked for it"


@dataclass(frozen=True)
class Place:
    """An attention site, its block, whether it is self-attention of the latents' tokens (``own``), and its device.

    ``masked``: the model hides keys from queries there. ``channels`` are those of a head's values.
    """

    site: AttentionSite
    block: str | None
    own: bool
    device: torch.device
    masked: bool = False
    channels: int = 0

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys it has."""
        return blocks(self.site.keys, kernel_blocks(self.site.queries, self.site.keys)[1])


def attention_nodes(trace: Trace) -> dict[str, fx.Node]:
    """The attention calls of a graph, by the name of their site."""
    return {node.meta[SITE]: node for node in trace.gm.graph.nodes if node.target is ATTENTION}


def places_of(trace: Trace) -> dict[str, Place]:
    """The attention sites of a graph, by name."""
    changing = trace.changing() if trace.roots else set(trace.gm.graph.nodes)
    nodes = attention_nodes(trace)
    return {
        site.name: Place(
            site,
            block_of(nodes[site.name]),
            site.queries == site.keys and nodes[site.name].args[1] in changing,
            tensor_value(nodes[site.name]).device,
            mask_of(nodes[site.name]) is not None,
            int(tensor_value(nodes[site.name].args[2]).shape[-1]),  # type: ignore[arg-type]  # a node
        )
        for site in trace.sites
        if isinstance(site, AttentionSite)
    }


@dataclass(frozen=True)
class SparseStep:
    """The sparse attention of one step: what its graph has to do, the graph's inputs by name, and slots it reads."""

    variant: tuple[SparseAttention, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    reads: tuple[KeptRead, ...] = ()


@dataclass(frozen=True)
class AttentionSites:
    """What sparse rules may name in one network, and what its tokens are.

    ``find`` is asked where the plan does not say how they lie; if ``retarget``, also where it says so of others.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    find: FindGeometry = not_looked_for
    retarget: bool = False

    def check(self, plan: Plan, network: str) -> None:
        """Check the rules for heads of ``network``.

        Raises:
            PlanMismatchError: a rule names a site or head that is not there, or a pattern that is unknown, is given
                parameters, a rest or an order that it has not, or is for self-attention only and the site is none, or
                has no lists in the plan's file.
        """
        listed, linear = ListedHeads(plan, network, self.retarget), LinearRests(plan, network)
        for number, rule in enumerate(plan.rules):
            if rule.for_heads and fnmatchcase(network, rule.network):
                told = f"rule {number} ({rule.place})"
                named = [place for name, place in self.places.items() if rule.names(name)]
                if not named:
                    known = ", ".join(list(self.places)[:8]) or "(none found)"
                    raise PlanMismatchError(f"{told}: no attention site is called so; the model has {known}")
                for place in named:
                    self._check_heads(rule, told, place)
                    listed.check(rule, told, place.site.name, place.site.heads)
                    linear.check(rule, told, place.site.name, place.site.heads, place.channels)

    def _check_heads(self, rule: Rule, told: str, place: Place) -> None:
        heads = place.site.heads
        if rule.heads is not None and rule.heads[-1] >= heads:
            raise PlanMismatchError(f"{told}: {place.site.name} has heads 0-{heads - 1}, there is no {rule.heads[-1]}")
        if isinstance(rule.do, Sparse):
            try:
                choice = SparseChoice.from_data(rule.do.settings)
            except ValueError as error:
                raise PlanMismatchError(f"{told}: {error}") from None
            if not place.own and rule.do.settings["pattern"] not in WITHOUT_TOKENS:
                raise PlanMismatchError(
                    f"{told}: {place.site.name} is no self-attention of the latents' tokens, with {place.site.queries} "
                    f"queries and {place.site.keys} keys; of patterns only {' and '.join(WITHOUT_TOKENS)} are for it"
                )
            if not place.own and choice.rest is not None:
                raise PlanMismatchError(
                    f"{told}: {place.site.name} is no self-attention of the latents' tokens; a rest is for that only, "
                    "as text is not pooled"
                )
            if place.masked and isinstance(choice.rest, Pooled | Linear):
                raise PlanMismatchError(f"{told}: {place.site.name}: {MASK_AND_REST}")
            if not place.own and choice.order is not None:
                raise PlanMismatchError(
                    f"{told}: {place.site.name} is no self-attention of the latents' tokens; an order is for that only"
                )

    def steps(
        self, plan: Plan, network: str, inside: Callable[[int, str | None], bool]
    ) -> tuple[tuple[SparseStep, ...], tuple[str, ...]]:
        """What is sparse in every step, but for sites in blocks that ``inside(step, block)`` says are not computed.

        And why what is decided comes to nothing, where it does.

        Raises:
            PlanMismatchError: how the tokens of a site lie is not known, or lists of the plan's file are for others, or
                a rest is not in pools of one size that divides its blocks.
            AuditError: lists are not those of the plan's file.
        """
        listed, linear = ListedHeads(plan, network, self.retarget), LinearRests(plan, network)
        found: list[list[tuple[SparseAttention, dict[str, Tensor], tuple[KeptRead, ...]]]]
        found = [[] for _ in plan.sampler.timesteps[network]]
        notes: dict[str, None] = {}  # a set in order
        known: dict[object, BlockLists] = {}
        for name, place in self.places.items():
            of_plan = plan.head_decisions(name, network)
            computed = [step for step in range(len(of_plan)) if not inside(step, place.block)]
            decided = {step: of_plan[step].of(place.site.heads) for step in computed if of_plan[step].any_sparse}
            if not decided:
                continue
            geometry = self._geometry(plan, network, place) if place.own else None
            decided = listed.bind(name, geometry, kernel_blocks(place.site.queries, place.site.keys), decided, notes)
            of_steps = _lists(place, geometry, decided, notes, known)
            decided = {step: decided[step] for step in of_steps}
            kept = _kept(place, computed, decided)
            rests = _rests(place, decided)
            kept_rest = kept_rests(name, computed, decided, of_steps, place.key_blocks, WIDTHS, known)
            limits = limits_of_steps(decided, kept, place.key_blocks, place.device)
            selectors = selectors_of_steps({step: finding(decided[step], kept.uses[step]) for step in limits})
            block = kernel_blocks(place.site.queries, place.site.keys)[1]
            ordered, orders = site_orders(decided, geometry, block, place.device)
            products = int8_heads(name, decided, place.device)
            projections = linear.inputs(name, place.channels, decided, place.device)
            for step, lists in of_steps.items():
                listed.audit(name, geometry, decided[step], step, lists)
                pool, heads = rests[step]
                width = int(lists.indices.shape[-1])
                inputs = dict(zip(list_names(name), (lists.indices, lists.counts), strict=True))
                inputs |= {rest_name(name): heads} if pool else {}
                inputs |= zip(order_names(name), orders[step], strict=True) if orders else ()
                wanted = SparseAttention(name, lists.query_block, lists.key_block, width, pool, order=ordered)
                if step in limits:
                    by, codes = selectors[step]
                    wanted = replace(wanted, draft=True, by=by)
                    inputs |= zip(draft_inputs(wanted), (*limits[step], codes.to(place.device)), strict=False)
                if products:
                    wanted, inputs[int8_name(name)] = replace(wanted, int8=True), products[step]
                if projections:
                    wanted, inputs[projection_name(name)] = replace(wanted, linear=True), projections[step]
                clustered = clustered_heads(decided[step])
                if geometry is not None and any(clustered):
                    before = geometry.text if geometry.text_first else 0
                    wanted = replace(wanted, clusters=(before, before + geometry.video))
                    inputs[clusters_name(name)] = _of_heads([int(each) for each in clustered], torch.int32, place)
                reads, rest_reads = kept.reads(step), kept_rest.reads(step)
                wanted = replace(
                    wanted,
                    keeps=(*kept.keeps(step), *kept_rest.keeps(step)),
                    reads=(*((LISTS,) if reads else ()), *((REST,) if rest_reads else ())),
                    others=kept_rest.room if kept_rest.keeps(step) else 0,
                    resting=kept_rest.resting(step),
                )
                inputs |= kept_rest.inputs(name, step)
                if reads:
                    readers = kept.readers(step)
                    rooms = [
                        room_of(do, place.key_blocks) * read for do, read in zip(decided[step], readers, strict=True)
                    ]
                    inputs[readers_name(LISTS, name)] = _of_heads(readers, torch.bool, place)
                    inputs[room_name(name)] = _of_heads(rooms, torch.int32, place)
                found[step].append((wanted, inputs, (*reads, *rest_reads)))
        steps = (
            SparseStep(
                tuple(each for each, _, _ in of_step),
                {name: tensor for _, inputs, _ in of_step for name, tensor in inputs.items()},
                tuple(read for _, _, reads in of_step for read in reads),
            )
            for of_step in found
        )
        return tuple(steps), tuple(notes)

    def _geometry(self, plan: Plan, network: str, place: Place) -> Geometry:
        """How the tokens of a site lie: as the plan says, or as is found."""
        tokens, told = place.site.queries, "the plan does not say it"
        given = plan.tokens.get(network)
        if given is not None:
            told = f"the plan says {given}, which makes {given.tokens}"
            fits = given.of_tokens(tokens)
            if fits is not None:
                return self._checked(fits, network)
        if given is None or self.retarget:
            found, how = self.find(None)
            fits = None if found is None else found.of_tokens(tokens)
            if fits is not None:
                return fits
            told += f", and {how if found is None else f'{found} was found ({how})'}"
        raise PlanMismatchError(
            f"{place.site.name}: sparse patterns need to know how its {tokens} tokens lie; {told}. Give it in the "
            f"plan: tokens: {{{network}: {{frames: ..., rows: ..., columns: ..., text: ...}}}}"
        )

    def _checked(self, given: Geometry, network: str) -> Geometry:
        """What the plan says of tokens, its text where it says."""
        try:
            if given.text:
                self.find(given)
        except InputError as error:
            raise PlanMismatchError(f"the plan's tokens of {network}: {error}") from None
        return given


def _lists(
    place: Place,
    geometry: Geometry | None,
    decided: Mapping[int, Heads],
    notes: dict[str, None],
    known: dict[object, BlockLists],
) -> dict[int, BlockLists]:
    """The lists of a site by step; steps in which its heads attend to all blocks have none, and run dense.

    Those of heads that do the same at another site are the same tensors; ``known`` is what others have.
    """
    site = place.site
    query_block, key_block = kernel_blocks(site.queries, site.keys)
    key_blocks = blocks(site.keys, key_block)
    maps = {
        heads: torch.stack([_map(do, geometry, site, query_block, key_block) for do in heads])[None]
        for heads in dict.fromkeys(decided.values())
    }
    none = not key_blocks  # of a prompt of no length
    whole = [heads for heads, each in maps.items() if each.all() and (none or not any(map(is_int8, heads)))]
    if whole:
        size = f"{query_block} queries and {key_block} keys"
        notes[f"{site.name}: patterns that keep every block of {size} run dense"] = None
    maps = {heads: attended for heads, attended in maps.items() if heads not in whole}
    longest = max(map(longest_list, maps.values()), default=0)
    longest = max([longest, *(room_of(do, key_blocks) for heads in maps for do in heads)])
    width = min(key_blocks, max(1, -(-longest // WIDTHS)) * WIDTHS)
    lists = {}
    for heads, attended in maps.items():
        key = (heads, geometry, site.queries, site.keys, width, place.device)
        if key not in known:
            known[key] = BlockLists.from_map(attended, query_block, key_block, width).to(place.device)
        lists[heads] = known[key]
    return {step: lists[heads] for step, heads in decided.items() if heads in lists}


def _rests(place: Place, decided: Mapping[int, Heads]) -> dict[int, tuple[int, Tensor]]:
    """By step the pool of a site's means, 0 where no step has any, and which heads have them, to which order, ``[H]``.

    A step without any is pooled as another step is, so that it needs no graph of its own.

    Raises:
        PlanMismatchError: heads ask for several pools in one step, or for one that does not divide the blocks of keys.
    """
    site = place.site
    _, key_block = kernel_blocks(site.queries, site.keys)
    asked: dict[Heads, tuple[int, ...]] = {}
    orders = {}
    for heads in dict.fromkeys(decided.values()):
        rests = [None if choice is None else choice.pooled for choice in map(choice_of, heads)]
        try:
            asked[heads] = tuple(rest.of(key_block) if rest is not None else 0 for rest in rests)
        except ValueError as error:
            raise PlanMismatchError(f"{site.name}: {error}") from None
        orders[heads] = [0 if rest is None else FIRST_ORDER if rest.first_order else ZEROTH_ORDER for rest in rests]
        if FIRST_ORDER in orders[heads] and place.device.type != "cpu":
            raise PlanMismatchError(f"{site.name}: {FIRST_ORDER_ON_GPU}; write pooled instead of taylor")
        several = sorted({*asked[heads]} - {0})
        if len(several) > 1:
            told = " and ".join(map(str, several))
            raise PlanMismatchError(
                f"{site.name}: in one step its heads have rests in groups of one size, not of {told}"
            )
    coarsest = max((pool for pools in asked.values() for pool in pools), default=0)
    found = {
        heads: (max(pools) or coarsest, _of_heads(orders[heads], torch.int32, place)) for heads, pools in asked.items()
    }
    return {step: found[heads] for step, heads in decided.items()}


def _kept(place: Place, computed: Sequence[int], decided: Mapping[int, Heads]) -> KeptSteps:
    """In which steps which heads find the lists that they keep, and in which they read them."""
    return kept_steps(
        LISTS, place.site.name, computed, decided, lambda do: refresh_of(do) if room_of(do, place.key_blocks) else None
    )


def _of_heads(values: Sequence[float], dtype: torch.dtype, place: Place) -> Tensor:
    """``[H]``: a number for every head of a site."""
    return torch.tensor(values, dtype=dtype, device=place.device)


def _map(
    decision: HeadDecision, geometry: Geometry | None, site: AttentionSite, query_block: int, key_block: int
) -> Tensor:
    """``[Qb, Kb]``: which blocks a head attends to in any case.

    Without a geometry it is all, or nothing where it is skipped; of a dynamic pattern it is what it always keeps.
    """
    if isinstance(decision, BoundList):
        return decision.bound.kept
    size = blocks(site.queries, query_block), blocks(site.keys, key_block)
    choice = choice_of(decision)
    if choice is not None and geometry is not None:
        pattern, order = choice.pattern, choice.order
        assert not isinstance(pattern, Listed), "its lists are bound"
        if isinstance(pattern, Draft):
            if pattern.everything(size[1]):
                return torch.ones(size, dtype=torch.bool)
            pattern = OWN if order is None or not order.is_found else Nothing()
        return _pattern_map(pattern, geometry, query_block, key_block, order)
    skipped = isinstance(decision, Sparse) and decision.settings["pattern"] == "skip"
    return torch.full(size, not skipped)


@functools.lru_cache(maxsize=64)
def _pattern_map(
    pattern: Pattern, geometry: Geometry, query_block: int, key_block: int, order: TokenOrder | None
) -> Tensor:
    there = None if order is None else order.of_video(geometry, key_block)
    return torch.from_numpy(pattern.block_map(geometry, query_block, key_block, there))
