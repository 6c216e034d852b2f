"""Exact hoisting: computing ahead of the steps what is the same in many, where whole generations are faster so.

Nothing is approximated, so there is nothing to search: rules are put beside those of a plan (or beside none, which is
``quality="exact"``), and generations with and without them, in turn, decide.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ditopt.console import Reporter
from ditopt.decisions import Hoist
from ditopt.errors import DitoptError
from ditopt.measure import Evaluator
from ditopt.plan import Plan, Rule, cast_rules
from ditopt.runtime.prologue import hoisted_work

Pairs = Sequence[tuple[str, int]]

WORTH = 0.995
"""A generation has to take less than this share of the time it takes as it is: values cost memory, graphs compiling."""
TURNS, SECONDS = (5, 15), 90.0
"""At least and at most so many generations of each are timed, as many as there is time for."""
ROUNDING = {"float32": 1e-4, "float64": 1e-10}
"""How far samples may be apart (relative to the largest value) for sums in another order; ``OTHERWISE`` in 16 bits.

Samplers let rounding grow; that nothing else differs is proven graph by graph, so this only catches a broken one.
"""
OTHERWISE = 0.1
CUT = "graph breaks cut the network, so that nothing can be computed ahead of steps"


def hoist_rules(plan: Plan) -> tuple[Rule, ...]:
    """The rules that compute ahead of all steps of a plan that are computed at all."""
    networks = list(plan.sampler.timesteps)
    steps = {name: plan.kept_steps(name) for name in networks}
    return tuple(
        Rule(sites="step", steps=steps[name], do=Hoist(), network=name if len(networks) > 1 else "*")
        for name in networks
        if steps[name] and name not in plan.breaks
    )


def ahead_mib(work: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """MiB of what all networks compute ahead for one guidance branch, as a plan has it."""
    total: int = sum(each["bytes"] for parts in work.values() for each in parts)
    return round(total / 2**20, 3)


def max_relative(sample: Tensor, reference: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest magnitude of ``reference``."""
    return float((sample - reference).abs().max()) / max(float(reference.abs().max()), 1e-30)


@dataclass(frozen=True)
class Hoisted:
    """What measuring found: ``rules`` with what pays, seconds of a generation with and without, and the difference.

    ``reason`` says why nothing is computed ahead; ``work`` what is, by network.
    """

    rules: tuple[Rule, ...]
    seconds: tuple[float, float] | None = None
    apart: float = 0.0
    reason: str | None = None
    work: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass
class Hoisting:
    """Measures on generations of ``pairs``, the first of which is compared, for about so many ``seconds``."""

    evaluator: Evaluator
    pairs: Pairs
    reporter: Reporter
    seconds: float = SECONDS

    def __call__(self, rules: Sequence[Rule] = ()) -> Hoisted:
        """The rules with what is computed ahead, or as they are with the reason."""
        evaluator, plain = self.evaluator, tuple(rules)
        added = hoist_rules(evaluator.template.model_copy(update={"rules": plain}))
        if not added:
            return Hoisted(plain, reason=CUT)
        hoisted = (*plain, *added)
        try:
            evaluator.compile(hoisted)
        except (DitoptError, RuntimeError) as error:
            return Hoisted(plain, reason=f"it could not be compiled: {error}")
        work = self._work()
        if not any(work.values()):
            return Hoisted(plain, reason="nothing in the graph is worth being computed ahead of steps")
        apart = self._apart(hoisted, plain)
        dtype = evaluator.template.device.dtype
        if apart is None or apart > ROUNDING.get(self._dtype(plain) or dtype, OTHERWISE):
            told = "is not finite" if apart is None else f"differs by {apart:.1e} of the largest value"
            return Hoisted(plain, apart=apart or 0.0, reason=f"a sample {told}, more than rounding makes", work=work)
        seconds, share = self._in_turn(hoisted, plain)
        told = f"a generation takes {seconds[0]:.4g} s with it, {seconds[1]:.4g} s without"
        self.reporter.say(f"  computed ahead of the steps: {told}; samples differ by {apart:.1e}")
        if share >= WORTH:
            return Hoisted(plain, seconds, apart, f"no faster by more than {1 - WORTH:.1%}: {told}", work)
        return Hoisted(hoisted, seconds, apart, None, work)

    def _dtype(self, rules: Sequence[Rule]) -> str | None:
        return next((dtype for _, dtype in cast_rules(rules) if dtype is not None), None)

    def _apart(self, hoisted: Sequence[Rule], plain: Sequence[Rule]) -> float | None:
        """How far the samples of the first pair are apart; None where one is not finite."""
        with_it, _ = self.evaluator.samples(hoisted, self.pairs[:1])
        without, _ = self.evaluator.samples(plain, self.pairs[:1])
        return None if with_it is None or without is None else max_relative(with_it[0], without[0])

    def _in_turn(self, hoisted: Sequence[Rule], plain: Sequence[Rule]) -> tuple[tuple[float, float], float]:
        """Median seconds with and without, and the median of the ratios of generations that followed each other."""
        first = self.evaluator.times_in_turn([hoisted, plain], self.pairs, 1)
        turns = min(TURNS[1], max(TURNS[0], int(self.seconds / max(sum(map(sum, first)), 1e-6))))
        with self.reporter.stage("timing with and without what is computed ahead", 2 * turns) as stage:
            spent = self.evaluator.times_in_turn([hoisted, plain], self.pairs, turns, stage.advance)
        ratios = [one / other for one, other in zip(*spent, strict=True)]
        return (statistics.median(spent[0]), statistics.median(spent[1])), statistics.median(ratios)

    def _work(self) -> dict[str, list[dict[str, Any]]]:
        """What each network computes ahead under the plan that is bound: from which arguments, how many values."""
        return {
            name: [
                each
                for program in session.programs
                for each in hoisted_work(program.variants, program.bound.variants if program.bound else ())
            ]
            for name, session in self.evaluator.sessions.items()
        }
