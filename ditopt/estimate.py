"""What a network takes in a generation under a plan, by what was measured of its steps and its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ditopt.cost_models.measured import MeasuredCost
from ditopt.cost_models.sparse import SparseCost
from ditopt.plan import Plan
from ditopt.profile import NetworkProfile
from ditopt.runtime.schedule import bind
from ditopt.search.sparse import planned_saving


def estimated_seconds(
    plan: Plan,
    name: str,
    network: NetworkProfile,
    ranges: Mapping[str, tuple[int, int]],
    costs: Callable[[], Mapping[str, SparseCost]],
) -> float:
    """Seconds of all evaluations of the network ``name``, whose block ranges are ``ranges``.

    ``costs`` are asked for where the plan has rules for heads, which are taken to save what their densities tell.

    Raises:
        PlanMismatchError: a rule does not fit the network.
        KeyError: a step was not timed as the plan has it.
    """
    without_heads = tuple(rule for rule in plan.rules if not rule.for_heads)
    steps = bind(plan.model_copy(update={"rules": without_heads}), name, ranges).steps
    timed = MeasuredCost(network.seconds)
    seconds = sum(
        timed.step_seconds([p.site for p in step.predictions], step.variant.dtype, step.variant.simplify)
        for step in steps
    )
    if len(without_heads) == len(plan.rules):
        return seconds
    return seconds - planned_saving(plan, name, network, costs(), plan.kept_steps(name))
