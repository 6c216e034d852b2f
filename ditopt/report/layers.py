"""What the blocks of a network are called, from anything at hand that tells."""

from __future__ import annotations

from collections.abc import Sequence

from ditopt.plan import Plan
from ditopt.profile import Profile
from ditopt.report.explained import Explained, Explanation
from ditopt.report.picture import layer_names
from ditopt.sites import range_names


def layers_of(plan: Plan, network: str, found: Explained, profile: Profile | None = None) -> Sequence[str]:
    """The names of a network's blocks in order; none if nothing tells them."""
    if network in plan.breaks:
        return [name for stack in plan.breaks[network].blocks for name in stack]
    if len(plan.sampler.timesteps) > 1:  # the plan has the number of all their blocks together
        return ()
    known = {entry.site for entry in found.explanations.get(network, ())}
    known |= {rule.sites for rule in plan.rules if not set("*?[") & set(rule.sites)}
    if network in found.profile:
        known |= set(found.profile[network].range_weights)
    if profile is not None and network in profile.networks:
        known |= set(profile.networks[network].grams)
    return layer_names(plan.model.blocks, sorted(known))


def with_site(made: Sequence[Explanation], site: str, layers: Sequence[str]) -> list[Explanation]:
    """What explains a site: what is said of it, or of a range of blocks that it is in."""
    ranges = range_names(layers)
    first, last = ranges.get(site, (0, -1))
    inside = {name for name, (a, b) in ranges.items() if first <= last and a <= first and last <= b}
    return [one for one in made if one.site == site or one.site in inside]
