"""Dense generations under observation: observers in place for one rollout and gone after it, whatever happens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditopt.errors import RolloutError
from ditopt.measure import Evaluator
from ditopt.profiler.features import FeatureCollector
from ditopt.profiler.interpret import CountedCalls
from ditopt.runtime.program import Interceptor, Observation, Observer, Program

Pair = tuple[str, int]
Observers = Sequence[tuple[Program, Observer]]
LESS_OFTEN = (
    "the rollout of prompt {prompt!r} calls the model less often than that of the first prompt; it must call it alike "
    "for every prompt"
)


def observed(evaluator: Evaluator, pair: Pair, observers: Observers) -> Tensor:
    """The sample of a dense generation in which each program has its observer."""
    evaluator.bind(())
    with _in_place(observers):
        return evaluator.adapter.checked_rollout(*pair)


def collected(evaluator: Evaluator, pair: Pair, observers: Observers, collectors: Iterable[FeatureCollector]) -> Tensor:
    """As `observed`, where the observers feed ``collectors``.

    Raises:
        RolloutError: the rollout called a network more or less often than in the recorded generation, or with inputs of
            other shapes.
    """
    try:
        with captured_once(evaluator, pair):
            sample = observed(evaluator, pair, observers)
    except IndexError as error:
        raise RolloutError(
            "the rollout calls the model more often than in the recorded generation; it must call it alike "
            "for every prompt"
        ) from error
    if not all(collector.complete for collector in collectors):
        raise RolloutError(LESS_OFTEN.format(prompt=pair[0]))
    return sample


@contextmanager
def captured_once(evaluator: Evaluator, pair: Pair) -> Iterator[None]:
    """A generation that may not make Dynamo capture a network again.

    Raises:
        RolloutError: it did, because an input has another shape than under the first prompt.
    """
    before = {name: len(session.programs) for name, session in evaluator.sessions.items()}
    yield
    for name, session in evaluator.sessions.items():
        if len(session.programs) > before[name]:
            raise RolloutError(
                f"prompt {pair[0]!r} makes {name} be captured again: an input has another shape than under the first "
                "prompt (a text of another length?); pad prompts to one length"
            )


def inputs_of(evaluator: Evaluator, pair: Pair, programs: Sequence[Program]) -> list[Sequence[Any]]:
    """Each program's inputs in a real call: a rollout supplies them, and is left once they are there."""
    seen: dict[int, Sequence[Any]] = {}

    class Enough(Exception):
        """Raised out of the rollout once the inputs are there."""

    def keep(number: int, observation: Observation) -> None:
        seen.setdefault(number, list(observation.arguments))
        if len(seen) == len(programs):
            raise Enough

    evaluator.bind(())
    with _in_place([(program, partial(keep, number)) for number, program in enumerate(programs)]):
        try:
            with torch.no_grad():
                evaluator.adapter.rollout(*pair)
        except Enough:
            pass
    return [seen[number] for number in range(len(programs))]


@contextmanager
def _in_place(observers: Observers) -> Iterator[None]:
    for program, observer in observers:
        program.observer = observer
    try:
        yield
    finally:
        for program, _ in observers:
            program.observer = None


def answered(
    evaluator: Evaluator, pair: Pair, programs: Mapping[str, Program], by: Mapping[str, CountedCalls]
) -> Tensor:
    """The sample of a dense generation in which the networks named in ``by`` are answered by its interceptors.

    Raises:
        RolloutError: the rollout called a network more or less often than in the recorded generation, or with inputs of
            other shapes.
    """
    with captured_once(evaluator, pair), intercepted(evaluator, programs, by):
        sample = evaluator.adapter.checked_rollout(*pair)
    if not all(each.complete for each in by.values()):
        raise RolloutError(LESS_OFTEN.format(prompt=pair[0]))
    return sample


@contextmanager
def intercepted(evaluator: Evaluator, programs: Mapping[str, Program], by: Mapping[str, Interceptor]) -> Iterator[None]:
    """Dense generations in which the networks named in ``by`` are answered by its interceptors."""
    evaluator.bind(())
    for name, interceptor in by.items():
        programs[name].interceptor = interceptor
    try:
        yield
    finally:
        for name in by:
            programs[name].interceptor = None
