"""Real rollouts under a plan, compared with the dense run of the same prompt and noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from ditopt.adapters.base import Adapter
from ditopt.backend import Session
from ditopt.calls import NetworkCalls
from ditopt.errors import NonFiniteError
from ditopt.plan import Plan, Rule
from ditopt.quality import CAP_DB, Quality, compare
from ditopt.runtime.state_bytes import feature_bytes, planned_bytes
from ditopt.sites import STEP

FAILED = Quality(psnr=-CAP_DB, worst_psnr=-CAP_DB, rel_l2=1e6, per_prompt=())


@dataclass(frozen=True)
class DensePath:
    """One dense generation of a network: its combined outputs ``[T, D]`` and the latents that entered ``[T, D]``.

    Float32, in drawn coordinates (``profiler.features.reduce_features``); latents are ``[T, 0]`` where the network
    has no such input.
    """

    outputs: Tensor
    latents: Tensor


@dataclass(frozen=True)
class SecondOrder:
    """A dense generation whose outputs were altered to the moves of a second-order solver, on the same steps."""

    path: DensePath
    sample: Tensor


@dataclass
class Evaluator:
    """Runs prompts under plans. ``references`` holds the dense sample of every (prompt, seed) that is judged.

    ``calls`` are the networks' call patterns; ``paths`` per network the dense paths that predictors are refitted to
    stay on, and ``finer`` what a second-order solver does in place of Euler's method, where the loop has one network.
    No plan is run whose slots take more than ``max_state_bytes``; ``reasons`` tells of such.
    """

    adapter: Adapter
    sessions: dict[str, Session]
    template: Plan
    references: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    calls: Mapping[str, NetworkCalls] = field(default_factory=dict)
    paths: dict[str, dict[tuple[str, int], DensePath]] = field(default_factory=dict)
    finer: dict[tuple[str, int], SecondOrder] = field(default_factory=dict)
    max_state_bytes: int | None = None
    reasons: list[str] = field(default_factory=list)

    def streams(self, network: str) -> int:
        """How many streams a generation has in a network: the guidance branches that are called one by one."""
        calls = self.calls.get(network)
        return 1 if calls is None or calls.batched else calls.branches

    def features_that_fit(self, network: str, sites: Iterable[str]) -> dict[str, int] | None:
        """How many features of each of ``sites`` may be held at once; None where there is no limit."""
        if self.max_state_bytes is None:
            return None
        session = self.sessions[network]
        parts = session.graphs.parts if session.graphs is not None else session.programs
        found: dict[str, int] = {}
        for program in parts:
            has = {STEP, *program.variants.trace.ranges()} if len(parts) == 1 else program.variants.trace.ranges()
            for site in {*has} & {*sites}:
                size = self.streams(network) * feature_bytes(program.variants, site)
                found[site] = self.max_state_bytes // max(size, 1)
        return found

    def state_bytes(self, rules: Sequence[Rule]) -> int:
        """The most that the slots of a generation take under ``rules``, by the shapes in the graphs; nothing is run.

        Of several networks, and of several graphs of one, the peaks are added up.
        """
        plan = self.template.model_copy(update={"rules": tuple(rules)})
        if not rules:
            return 0
        return sum(
            planned_bytes(program.variants, program.resolve(plan), self.streams(name))
            for name, session in self.sessions.items()
            for program in (session.graphs.parts if session.graphs is not None else session.programs)
        )

    def fits(self, rules: Sequence[Rule]) -> bool:
        """Whether the slots of a plan take no more than they may; says so where they do."""
        if self.max_state_bytes is None or (needed := self.state_bytes(rules)) <= self.max_state_bytes:
            return True
        kinds = ", ".join(dict.fromkeys(f"{each.do.kind} of {each.sites}" for each in rules if each.do.kind != "dense"))
        reason = f"{kinds}: slots of {needed} bytes, more than max_state_bytes={self.max_state_bytes}"
        if reason not in self.reasons:
            self.reasons.append(reason)
        return False

    def bind(self, rules: Sequence[Rule]) -> Plan:
        """Let all networks run by ``rules`` from now on; returns the plan."""
        plan = self.template.model_copy(update={"rules": tuple(rules)})
        for session in self.sessions.values():
            session.bind(plan if rules else None)
        return plan

    def compile(self, rules: Sequence[Rule]) -> None:
        """As ``bind``, with all graphs compiled that the plan needs."""
        self.bind(rules)
        for session in self.sessions.values():
            for program in session.programs:
                program.compile()

    def retarget(self, on: bool) -> None:
        """Whether calls of another schedule run by the rules of the nearest step; else they are dense."""
        for session in self.sessions.values():
            session.settle("retarget" if on else "dense", None)

    def dense(self, pairs: Sequence[tuple[str, int]]) -> float:
        """Make the references of ``pairs`` that are not there yet; returns mean seconds of those made."""
        self.bind(())
        spent = []
        for prompt, seed in pairs:
            if (prompt, seed) not in self.references:
                began = time.perf_counter()
                self.references[prompt, seed] = self.adapter.checked_rollout(prompt, seed)
                spent.append(time.perf_counter() - began)
        return sum(spent) / len(spent) if spent else 0.0

    def samples(self, rules: Sequence[Rule], pairs: Sequence[tuple[str, int]]) -> tuple[list[Tensor] | None, float]:
        """What ``pairs`` generate under ``rules``, and the mean seconds of a generation.

        None in place of samples where a generation has NaN or infinite values, and where the plan's slots take more
        than they may. Compiling does not count.
        """
        if not self.fits(rules):
            return None, 0.0
        self.compile(rules)
        found: list[Tensor] | None = None
        began = time.perf_counter()
        with suppress(NonFiniteError):
            found = [self.adapter.checked_rollout(prompt, seed) for prompt, seed in pairs]
        return found, (time.perf_counter() - began) / max(len(pairs), 1)

    def time_in_turn(
        self,
        contenders: Sequence[Sequence[Rule]],
        pairs: Sequence[tuple[str, int]],
        turns: int,
        after: Callable[[], None] | None = None,
    ) -> list[float]:
        """Median seconds of a generation under each of several sets of rules, as ``times_in_turn`` measures them."""
        return [statistics.median(seconds) for seconds in self.times_in_turn(contenders, pairs, turns, after)]

    def times_in_turn(
        self,
        contenders: Sequence[Sequence[Rule]],
        pairs: Sequence[tuple[str, int]],
        turns: int,
        after: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        """Seconds of each generation under each of several sets of rules, measured alternately.

        A turn is one generation under each, of one of ``pairs``; ``after`` is called behind every one. Compiling does
        not count.
        """
        spent: list[list[float]] = [[] for _ in contenders]
        for turn in range(turns):
            pair = pairs[turn % len(pairs)]
            for rules, seconds in zip(contenders, spent, strict=True):
                self.compile(rules)
                began = time.perf_counter()
                self.adapter.checked_rollout(*pair)
                seconds.append(time.perf_counter() - began)
                if after is not None:
                    after()
        return spent

    def compare(self, samples: Sequence[Tensor] | None, pairs: Sequence[tuple[str, int]]) -> Quality:
        """Quality of samples of ``pairs`` against their references; ``FAILED`` where there are none."""
        return FAILED if samples is None else compare(samples, [self.references[pair] for pair in pairs])

    def quality(self, rules: Sequence[Rule], pairs: Sequence[tuple[str, int]]) -> tuple[Quality, float]:
        """Quality of ``rules`` on ``pairs``, and the mean seconds of a generation; ``FAILED`` as ``compare`` has it."""
        samples, seconds = self.samples(rules, pairs)
        return self.compare(samples, pairs), seconds
