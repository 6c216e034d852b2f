"""Sparse heads under a price of error: candidates of every head of a site in some steps, and the choice among them.

Squared errors of heads add up (``heads``), and so do the seconds that they save, so each head is chosen by itself; what
the block-sparse kernel costs beyond its lists is paid once by a site, in each step that has a sparse head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ditopt.cost_models.sparse import SparseCost
from ditopt.decisions import Sparse
from ditopt.plan import Rule
from ditopt.profile import NetworkProfile
from ditopt.search.heads import HeadPattern, heads_error
from ditopt.search.problem import SearchProblem
from ditopt.search.solution import Draft


@dataclass(frozen=True)
class HeadCandidate:
    """A head under a pattern in some steps.

    ``saved`` are seconds of a generation against the head being dense in the same kernel, ``error`` is the square of
    the final sample's relative error.
    """

    choice: HeadPattern
    saved: float
    error: float

    def gain(self, price: float) -> float:
        """Seconds saved, less the error at a price (seconds per squared relative error)."""
        return self.saved - price * self.error


@dataclass(frozen=True)
class SiteCandidates:
    """The heads of one site in some steps; ``heads`` are the candidates of each, beside dense.

    ``lost`` are the seconds of a generation that the block-sparse kernel takes longer than dense attention where every
    head attends to everything; below 0 where it is the faster one.
    """

    heads: tuple[tuple[HeadCandidate, ...], ...]
    lost: float

    def chosen(self, price: float) -> tuple[HeadCandidate, ...]:
        """The candidates of most gain together, one a head at most; none where dense attention is better."""
        best = [max(of_head, key=lambda each: each.gain(price)) for of_head in self.heads if of_head]
        found = [each for each in best if each.gain(price) > 0]
        if not found and best:  # one of them is what it takes to run in the kernel
            found = [max(best, key=lambda each: each.gain(price))]
        return tuple(found) if sum(each.gain(price) for each in found) > self.lost else ()


def head_candidates(
    network: NetworkProfile,
    problem: SearchProblem,
    draft: Draft,
    costs: Mapping[str, SparseCost],
    ranges: Iterable[Sequence[int]],
) -> tuple[SiteCandidates, ...]:
    """The candidates of all heads of the sites that have ``costs``, in every range of steps, worse ones left out.

    Of a range the steps count that ``draft`` computes. A candidate is worse than another that saves as much with as
    small an error, and than dense if it saves nothing. Densities are those of the profile's blocks.

    Raises:
        KeyError: the profile has no tables of a site (``patterns``, ``sensitivity``).
        InputError: a site was not measured in one of the steps.
    """
    computed = [tuple(step for step in steps if step in draft.kept) for steps in ranges]
    found = []
    for site, cost in costs.items():
        table = network.tables["patterns"][site]
        heads = len(table["error"].at(candidate=0).ordered("head", "prompt", "step", "branch"))
        for steps in filter(None, computed):
            dense_head = cost.dense / cost.efficiency / heads * len(steps)
            of_heads = []
            for head in range(heads):
                choices = [HeadPattern(site, head, label, steps) for label in table.labels["candidate"]]
                saved = [dense_head * (1 - float(density)) for density in table["density"].values]
                errors = [heads_error(network, problem, draft, [choice]) ** 2 for choice in choices]
                of_heads.append(not_worse(map(HeadCandidate, choices, saved, errors)))
            lost = (cost.seconds(1.0) - cost.dense) * len(steps)
            found.append(SiteCandidates(tuple(of_heads), lost))
    return tuple(found)


def not_worse(candidates: Iterable[HeadCandidate]) -> tuple[HeadCandidate, ...]:
    """Those that save something and that none beats in both: the more they save, the larger their error."""
    found: list[HeadCandidate] = []
    for each in sorted(candidates, key=lambda each: (each.error, -each.saved)):
        if each.saved > max((other.saved for other in found), default=0.0):
            found.append(each)
    return tuple(found)


def choose(candidates: Iterable[SiteCandidates], price: float) -> tuple[HeadCandidate, ...]:
    """What minimises ``seconds + price * squared error``; heads that are not among the choices stay dense."""
    return tuple(each for site in candidates for each in site.chosen(price))


def sparse_rules(choices: Iterable[HeadPattern], network: str = "*") -> tuple[Rule, ...]:
    """A rule for every site, pattern and steps, with the heads that share them."""
    heads: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for choice in choices:
        heads.setdefault((choice.site, str(choice.candidate), choice.steps), []).append(choice.head)
    return tuple(
        Rule(sites=site, heads=tuple(of_rule), steps=steps, do=Sparse(pattern=pattern), network=network)
        for (site, pattern, steps), of_rule in heads.items()
    )
