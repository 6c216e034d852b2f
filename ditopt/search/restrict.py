"""Restrict a search to what one published system may do in the loop: its feature, its predictors, its schedules."""

from __future__ import annotations

from dataclasses import replace

from ditopt.errors import InputError
from ditopt.recipes import Loop
from ditopt.search.problem import SearchProblem


def restricted(problem: SearchProblem, loop: Loop, name: str) -> SearchProblem:
    """The problem of a recipe called ``name``: to predict what all blocks add to the stream, in one of its schedules.

    Where a step is not computed, its blocks are predicted as one range and what is around them runs.

    Raises:
        InputError: no range of blocks was profiled, or it saves no time.
    """
    stack = max(problem.ranges.values(), key=lambda site: site.seconds_saved, default=None)
    if stack is None or stack.seconds_saved <= 0:
        what = "which saves no time here" if stack else "of which the profile has none (fewer than 4, or graph breaks)"
        raise InputError(f"recipe {name} predicts what a range of blocks adds, {what}; search without it")
    made = replace(
        problem,
        gram=stack.gram,
        sensitivity=problem.sensitivity * stack.weight,
        seconds_predicted=problem.seconds_full - stack.seconds_saved,
        ranges={},
        techniques=loop.predictors,
        schedules=tuple(dict.fromkeys(loop.steps.schedules(stack.gram))),
        site=stack.name,
    )
    if not made.allowed:
        raise InputError(f"recipe {name} has no schedule for {problem.steps} steps that its predictors can carry out")
    return made


def told(problem: SearchProblem, loop: Loop, name: str) -> str:
    """What a search under a recipe looked at, and that the rest was left out."""
    schedules = {kept for kept, _, _ in problem.allowed}
    sizes = sorted(map(len, schedules))
    return (
        f"recipe {name}: {', '.join(each.name for each in problem.candidates)} of what {problem.site} adds, in "
        f"{len(schedules)} schedules of {sizes[0]} to {sizes[-1]} computed steps "
        f"({loop.steps.text}); other predictors, sites and schedules were left out"
    )
