"""How much memory a bound plan's state takes: features, and what attention sites keep, from step to step."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.passes._infra import outputs
from ditopt.passes.cut import bytes_of
from ditopt.passes.features import feature
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


def feature_bytes(variants: VariantCache, site: str) -> int:
    """Bytes of one feature of ``site``."""
    return sum(bytes_of(end.meta["val"]) for end in feature(variants.trace.gm, variants.index, site).ends)


def planned_bytes(variants: VariantCache, bound: BoundPlan, streams: int = 1) -> int:
    """The most that a generation holds if all steps run as planned, in ``streams`` (branches called one by one).

    It is that of a step in which one stream has made its features and not yet dropped what nobody reads any more, while
    the others are behind that step or before it.
    """
    sizes = slot_bytes(variants, bound)
    most, held = 0, frozenset[tuple[str, int]]()
    for number, step in enumerate(bound.steps):
        before = _total(sizes, held)
        held |= {(name, number) for name, _ in variants.recorded(step.variant)}
        made = _total(sizes, held)
        held &= step.live
        most = max(most, made + (streams - 1) * max(before, _total(sizes, held)))
    return most


def _total(sizes: Mapping[str, int], held: frozenset[tuple[str, int]]) -> int:
    return sum(sizes[name] for name, _ in held)
