"""How much memory a bound plan's state takes: features, and what attention sites keep, from step to step."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.passes._infra import outputs
from ditopt.passes.cut import bytes_of
from ditopt.runtime.schedule import BoundPlan
from ditopt.runtime.variants import VariantCache


def slot_bytes(variants: VariantCache, bound: BoundPlan) -> dict[str, int]:
    """Bytes of each feature and slot of one stream, by name, as the graphs of a plan hand them on; none is compiled."""
    found: dict[str, int] = {}
    for plan in bound.variants:
        recorded = variants.recorded(plan)
        if {name for name, _ in recorded} <= found.keys():
            continue
        gm = variants.graph(plan)
        behind = iter(outputs(gm)[int(gm.meta["ditopt_user_outputs"]) :])
        for name, count in recorded:
            nodes = [next(behind) for _ in range(count)]
            found[name] = sum(bytes_of(node.meta["val"]) for node in nodes if node is not None)
    return found


def planned_bytes(variants: VariantCache, bound: BoundPlan) -> int:
    """The most that one stream (a guidance branch of a generation) holds if all steps run as planned.

    It is that of a step which has made its features and not yet dropped what nobody reads any more.
    """
    return _most_held(variants, bound, slot_bytes(variants, bound))


def _most_held(variants: VariantCache, bound: BoundPlan, sizes: Mapping[str, int]) -> int:
    most, held = 0, frozenset[tuple[str, int]]()
    for number, step in enumerate(bound.steps):
        held |= {(name, number) for name, _ in variants.recorded(step.variant)}
        most = max(most, sum(sizes[name] for name, _ in held))
        held &= step.live
    return most
