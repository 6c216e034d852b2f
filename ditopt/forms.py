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
from ditopt.sites import STEP
from ditopt.target import Target

SIMPLIFIED_SPEED = 0.98
"""A simplified step has to take less than this share of a step's time: it costs no quality, but a graph of its own."""
DTYPE_SPEED = 0.9
"""A dtype in which a step takes more than this share of its time is not worth its rounding."""
DTYPE_SPARE_DB = 3.0
"""By how much a dtype alone has to exceed the target, so that predictions have an error left to make."""


def simplified(problem: SearchProblem, seconds: Mapping[str, float]) -> SearchProblem:
    """The problem with steps of its dtype simplified if these are faster; ``seconds`` are the profile's."""
    plain, simple = form_name(problem.dtype), form_name(problem.dtype, simplify=True)
    problem = _in_form(replace(problem, simplify=False), seconds)
    if problem.seconds_predicted is None:
        return replace(problem, simplify_reason="graph breaks cut the network, and this is decided for whole steps")
    if simple not in seconds:
        return replace(problem, simplify_reason="nothing in the graph to simplify, or not among the techniques chosen")
    other = problem.dtype or "as the model has it"
    told = f"a step takes {seconds[simple]:.3g} s {simple}, {seconds[plain]:.3g} s {other}"
    if seconds[simple] >= SIMPLIFIED_SPEED * seconds[plain]:
        return replace(problem, simplify_reason=f"{_no_faster(seconds[simple], seconds[plain])}: {told}")
    return _in_form(replace(problem, simplify=True, simplify_reason=f"slower: {told}"), seconds)


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
    as_it_is = replace(problem, dtype_tried=dtype)
    if problem.seconds_predicted is None:
        cut = "graph breaks cut the network, and a dtype is decided for whole steps"
        return replace(as_it_is, dtype_reason=cut)
    if form_name(dtype) not in seconds:
        return replace(as_it_is, dtype_reason="no float32 product of many rows, or none that is faster in it here")
    cast = simplified(replace(as_it_is, dtype=dtype), seconds)
    form = form_name(dtype, cast.simplify)
    told = f"a step takes {cast.seconds_full:.3g} s in {form}, {problem.seconds_full:.3g} s in the model's own"
    if cast.seconds_full > DTYPE_SPEED * problem.seconds_full:
        return replace(as_it_is, dtype_reason=f"{_no_faster(cast.seconds_full, problem.seconds_full)}: {told}")
    alone = measure(form_rules(cast))
    told += f"; alone it has {alone.psnr:.1f} dB"
    speed_alone = target.speedup is not None and target.min_psnr is None
    wanted = Target(min_psnr=max(LEVELS.values())) if speed_alone else replace(target, speedup=None)
    if wanted.missing_db(alone) > -DTYPE_SPARE_DB:
        return replace(as_it_is, dtype_reason=f"{told}, too little to spare for {wanted.to_data()}")
    return replace(cast, dtype_reason=f"slower: {told}")


def _no_faster(seconds: float, others: float) -> str:
    return "hardly faster" if seconds <= others else "not faster"


def _in_form(problem: SearchProblem, seconds: Mapping[str, float]) -> SearchProblem:
    """The problem with the times of its form."""
    times = MeasuredCost(seconds).in_form(problem.dtype, problem.simplify)
    ranges = {name: replace(site, seconds_saved=times[name]) for name, site in problem.ranges.items()}
    made = replace(problem, seconds_full=times[FULL], ranges=ranges)
    if problem.site != STEP:
        made = replace(made, seconds_predicted=times[FULL] - times[problem.site])
    return made
