"""Sparse rules bound to a network: which blocks of keys each head attends to in each step, as lists for the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from ditopt.decisions import HeadDecision, Sparse
from ditopt.errors import InputError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, kernel_blocks
from ditopt.kernels.ops import ATTENTION
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.passes._infra import SITE, SparseAttention, tensor_value
from ditopt.passes.sparse import list_names
from ditopt.plan import Plan, Rule
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
    """An attention site, its block, whether it is self-attention of the latents' tokens (``own``), and its device."""

    site: AttentionSite
    block: str | None
    own: bool
    device: torch.device


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
        )
        for site in trace.sites
        if isinstance(site, AttentionSite)
    }


@dataclass(frozen=True)
class SparseStep:
    """The sparse attention of one step: what its graph has to do, and the graph's inputs by name."""

    variant: tuple[SparseAttention, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


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
                parameters that it has not, or is for self-attention only and the site is none.
        """
        for number, rule in enumerate(plan.rules):
            if rule.for_heads and fnmatchcase(network, rule.network):
                told = f"rule {number} ({rule.place})"
                named = [place for name, place in self.places.items() if rule.names(name)]
                if not named:
                    known = ", ".join(list(self.places)[:8]) or "(none found)"
                    raise PlanMismatchError(f"{told}: no attention site is called so; the model has {known}")
                for place in named:
                    self._check_heads(rule, told, place)

    def _check_heads(self, rule: Rule, told: str, place: Place) -> None:
        heads = place.site.heads
        if rule.heads is not None and rule.heads[-1] >= heads:
            raise PlanMismatchError(f"{told}: {place.site.name} has heads 0-{heads - 1}, there is no {rule.heads[-1]}")
        if isinstance(rule.do, Sparse):
            try:
                _pattern(rule.do)
            except ValueError as error:
                raise PlanMismatchError(f"{told}: {error}") from None
            if not place.own and rule.do.settings["pattern"] not in WITHOUT_TOKENS:
                raise PlanMismatchError(
                    f"{told}: {place.site.name} is no self-attention of the latents' tokens, with {place.site.queries} "
                    f"queries and {place.site.keys} keys; of patterns only {' and '.join(WITHOUT_TOKENS)} are for it"
                )

    def steps(
        self, plan: Plan, network: str, inside: Callable[[int, str | None], bool]
    ) -> tuple[tuple[SparseStep, ...], tuple[str, ...]]:
        """What is sparse in every step, but for sites in blocks that ``inside(step, block)`` says are not computed.

        And why what is decided comes to nothing, where it does.

        Raises:
            PlanMismatchError: how the tokens of a site lie is not known.
        """
        found: list[list[tuple[SparseAttention, BlockLists]]] = [[] for _ in plan.sampler.timesteps[network]]
        notes: dict[str, None] = {}  # a set in order
        for name, place in self.places.items():
            decided = {
                step: each.of(place.site.heads)
                for step, each in enumerate(plan.head_decisions(name, network))
                if each.any_sparse and not inside(step, place.block)
            }
            if not decided:
                continue
            geometry = self._geometry(plan, network, place) if place.own else None
            for step, lists in _lists(place, geometry, decided, notes).items():
                width = int(lists.indices.shape[-1])
                found[step].append((SparseAttention(name, lists.query_block, lists.key_block, width), lists))
        steps = (
            SparseStep(
                tuple(each for each, _ in of_step),
                {
                    name: tensor
                    for each, lists in of_step
                    for name, tensor in zip(list_names(each.site), (lists.indices, lists.counts), strict=True)
                },
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
            fits = next(_fitting(given, tokens), None)
            if fits is not None:
                return self._checked(fits, network)
        if given is None or self.retarget:
            found, how = self.find(None)
            fits = next(_fitting(found, tokens), None) if found is not None else None
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
    decided: Mapping[int, tuple[HeadDecision, ...]],
    notes: dict[str, None],
) -> dict[int, BlockLists]:
    """The lists of a site by step; steps in which its heads attend to all blocks have none, and run dense."""
    site = place.site
    query_block, key_block = kernel_blocks(site.queries, site.keys)
    maps = {
        heads: torch.stack([_map(do, geometry, site, query_block, key_block) for do in heads])[None]
        for heads in dict.fromkeys(decided.values())
    }
    if any(attended.all() for attended in maps.values()):
        size = f"{query_block} queries and {key_block} keys"
        notes[f"{site.name}: patterns that keep every block of {size} run dense"] = None
    maps = {heads: attended for heads, attended in maps.items() if not attended.all()}
    longest = max((int(attended.sum(-1).max()) for attended in maps.values()), default=0)
    width = min(blocks(site.keys, key_block), max(1, -(-longest // WIDTHS)) * WIDTHS)
    lists = {
        heads: BlockLists.from_map(attended, query_block, key_block, width).to(place.device)
        for heads, attended in maps.items()
    }
    return {step: lists[heads] for step, heads in decided.items() if heads in lists}


def _fitting(geometry: Geometry, tokens: int) -> Iterator[Geometry]:
    """The geometry of a site with so many tokens: with the text of a network, or without."""
    return (each for each in (geometry, replace(geometry, text=0)) if each.tokens == tokens)


def _pattern(decision: Sparse) -> Pattern:
    return pattern_from_data(decision.settings)


def _map(
    decision: HeadDecision, geometry: Geometry | None, site: AttentionSite, query_block: int, key_block: int
) -> Tensor:
    """``[Qb, Kb]``: which blocks a head attends to; without a geometry it is all, or nothing where it is skipped."""
    if isinstance(decision, Sparse) and geometry is not None:
        return _pattern_map(_pattern(decision), geometry, query_block, key_block)
    skipped = isinstance(decision, Sparse) and decision.settings["pattern"] == "skip"
    size = blocks(site.queries, query_block), blocks(site.keys, key_block)
    return torch.full(size, not skipped)


@functools.lru_cache(maxsize=64)
def _pattern_map(pattern: Pattern, geometry: Geometry, query_block: int, key_block: int) -> Tensor:
    return torch.from_numpy(pattern.block_map(geometry, query_block, key_block))
