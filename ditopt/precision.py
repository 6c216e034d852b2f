"""Which dtype the computed steps of a network run in: one that is faster here and good enough by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ditopt.cost_models.measured import MeasuredCost
from ditopt.plan import Rule
from ditopt.quality import LEVELS, Quality
from ditopt.search import SearchProblem
from ditopt.search.solution import dtype_rules
from ditopt.target import Target

DTYPE_SPEED = 0.9
"""A dtype in which a step takes more than this share of its time is not worth its rounding."""
DTYPE_SPARE_DB = 3.0
"""By how much a dtype alone has to exceed the target, so that predictions have an error left to make."""


def in_dtype(
    problem: SearchProblem,
    seconds: Mapping[str, float],
    dtype: str,
    target: Target,
    measure: Callable[[Sequence[Rule]], Quality],
) -> SearchProblem:
    """The problem with steps computed in ``dtype``, or as it is, with what speaks against that.

    ``seconds`` are the profile's; ``measure`` are rollouts under some rules, made only where the dtype is faster. A
    target for speed alone has no bound on quality: there the dtype is held to the highest level.
    """
    full, narrow = seconds["full"], seconds.get(dtype)
    as_it_is = replace(problem, dtype_tried=dtype)
    if problem.seconds_predicted is None:
        cut = "graph breaks cut the network, and a dtype is decided for whole steps"
        return replace(as_it_is, dtype_reason=cut)
    if narrow is None:
        return replace(as_it_is, dtype_reason="no float32 product of many rows, or none that runs in it here")
    told = f"a step takes {narrow:.3g} s in {dtype}, {full:.3g} s as it is"
    if narrow > DTYPE_SPEED * full:
        return replace(as_it_is, dtype_reason=f"hardly faster: {told}")
    cast = replace(as_it_is, dtype=dtype)
    alone = measure(dtype_rules(cast))
    told += f"; alone it has {alone.psnr:.1f} dB"
    speed_alone = target.speedup is not None and target.min_psnr is None
    wanted = Target(min_psnr=max(LEVELS.values())) if speed_alone else replace(target, speedup=None)
    if wanted.missing_db(alone) > -DTYPE_SPARE_DB:
        return replace(as_it_is, dtype_reason=f"{told}, too little to spare for {wanted.to_data()}")
    times = MeasuredCost(seconds).in_dtype(dtype)
    ranges = {name: replace(site, seconds_saved=times[name]) for name, site in problem.ranges.items()}
    return replace(cast, seconds_full=times["full"], ranges=ranges, dtype_reason=f"slower: {told}")
