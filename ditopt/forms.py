"""How the computed steps of a network are computed: simplified, and in which dtype.

A form is taken where a step is faster in it here, and a dtype only if it is good enough by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ditopt.cost_models.measured import FULL, MeasuredCost, form_name
from ditopt.plan import Rule
from ditopt.quality import LEVELS, Quality
from ditopt.search import SearchProblem
from ditopt.search.solution import form_rules
from ditopt.target import Target

SIMPLIFIED_SPEED = 0.98
"""A simplified step has to take less than this share of a step's time: it costs no quality, but a graph of its own."""
DTYPE_SPEED = 0.9
"""A dtype in which a step takes more than this share of its time is not worth its rounding."""
DTYPE_SPARE_DB = 3.0
"""By how much a dtype alone has to exceed the target, so that predictions have an error left to make."""


def simplified(problem: SearchProblem, seconds: Mapping[str, float]) -> SearchProblem:
    """The problem with simplified steps if these are faster; ``seconds`` are the profile's."""
    if problem.seconds_predicted is None:
        return replace(problem, simplify_reason="graph breaks cut the network, and this is decided for whole steps")
    found = seconds.get(form_name(simplify=True))
    if found is None:
        return replace(problem, simplify_reason="nothing in the graph to simplify, or not among the techniques chosen")
    told = f"a step takes {found:.3g} s simplified, {seconds[FULL]:.3g} s as the model has it"
    if not is_faster(seconds):
        return replace(problem, simplify_reason=f"hardly faster: {told}")
    return _in_form(replace(problem, simplify=True, simplify_reason=f"slower: {told}"), seconds)


def is_faster(seconds: Mapping[str, float]) -> bool:
    """Whether simplified steps have been timed and are faster."""
    return seconds.get(form_name(simplify=True), float("inf")) < SIMPLIFIED_SPEED * seconds[FULL]


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
    full, as_it_is = problem.seconds_full, replace(problem, dtype_tried=dtype)
    names = {form_name(dtype, simplify): simplify for simplify in (problem.simplify, not problem.simplify)}
    timed = [(simplify, seconds[name]) for name, simplify in names.items() if name in seconds]
    if problem.seconds_predicted is None:
        cut = "graph breaks cut the network, and a dtype is decided for whole steps"
        return replace(as_it_is, dtype_reason=cut)
    if not timed:
        return replace(as_it_is, dtype_reason="no float32 product of many rows, or none that is faster in it here")
    simplify, narrow = timed[0]
    told = f"a step takes {narrow:.3g} s in {dtype}, {full:.3g} s in the model's own"
    if narrow > DTYPE_SPEED * full:
        return replace(as_it_is, dtype_reason=f"hardly faster: {told}")
    cast = replace(as_it_is, dtype=dtype, simplify=simplify)
    if simplify != problem.simplify:  # within the noise of the clock as fast as the other
        cast = replace(cast, simplify_reason=f"steps in {dtype} were timed in the other form only")
    alone = measure(form_rules(cast))
    told += f"; alone it has {alone.psnr:.1f} dB"
    speed_alone = target.speedup is not None and target.min_psnr is None
    wanted = Target(min_psnr=max(LEVELS.values())) if speed_alone else replace(target, speedup=None)
    if wanted.missing_db(alone) > -DTYPE_SPARE_DB:
        return replace(as_it_is, dtype_reason=f"{told}, too little to spare for {wanted.to_data()}")
    return _in_form(replace(cast, dtype_reason=f"slower: {told}"), seconds)


def _in_form(problem: SearchProblem, seconds: Mapping[str, float]) -> SearchProblem:
    """The problem with the times of its form."""
    times = MeasuredCost(seconds).in_form(problem.dtype, problem.simplify)
    ranges = {name: replace(site, seconds_saved=times[name]) for name, site in problem.ranges.items()}
    return replace(problem, seconds_full=times[FULL], ranges=ranges)
