"""Search with the last word on prompts that were not searched on: their quality and whole-generation seconds decide."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ditopt.adapters import DiffusersAdapter
from ditopt.console import Reporter
from ditopt.measure import Evaluator
from ditopt.outcome import Found, Row
from ditopt.plan import Rule
from ditopt.profile import Profile
from ditopt.profiler.run import TUNING_PROMPTS
from ditopt.quality import LEVELS, compare
from ditopt.search import Solution
from ditopt.target import Target
from ditopt.tune import Tuner

Pairs = Sequence[tuple[str, int]]

VERIFY_ROUNDS = 3
TIMED_GENERATIONS = 3
TRIAL_SECONDS = 220.0
"""What the plans tried by rollouts may take together where the caller sets no budget."""
FLOOR_DB = min(LEVELS.values())
"""A search for speed does not go on below this mean PSNR."""


def affordable_trials(profile: Profile) -> int:
    """How many plans to try, from 6 to 16: by the time of a generation at half the dense cost."""
    dense = sum(len(part.timesteps) * part.seconds["full"] for part in profile.networks.values())
    return min(16, max(6, round(TRIAL_SECONDS / (TUNING_PROMPTS * dense / 2 + 1e-3))))


@dataclass
class VerifiedSearch:
    """Searches network after network for one target; ``reasons`` says what was missed, ``state_bytes`` of slots."""

    evaluator: Evaluator
    profile: Profile
    target: Target
    profiled: Pairs
    held_out: Pairs
    reporter: Reporter
    budget: int
    max_variants: int
    techniques: tuple[str, ...]
    reasons: list[str] = field(default_factory=list)
    state_bytes: int = 0

    def __post_init__(self) -> None:
        self._tuners = {
            name: Tuner(
                name,
                self.profile,
                self.evaluator,
                self.target,
                self.profiled[:TUNING_PROMPTS],
                self.reporter,
                self.budget,
                self.max_variants,
                self.techniques,
            )
            for name in self.evaluator.sessions
        }

    def __call__(self) -> Found | None:
        """The plan that met the target on the held-out prompts (for speed: the one that came nearest), or None."""
        return self._for_quality() if self.target.speedup is None else self._for_speed(self.target.speedup)

    def _for_quality(self) -> Found | None:
        """Where the held-out prompts miss the target, aim higher and search again."""
        margin, missing = 0.0, 0.0
        for _ in range(VERIFY_ROUNDS):
            found = self._search(margin)
            if found is None:
                return None
            missing = self.target.missing_db(found.quality)
            if missing <= 0:
                return found
            last = list(self._tuners)[-1]
            gap = missing - self._tuners[last].missing_db(found.solutions.get(last))
            margin = max(margin + 0.3, gap + 0.3)  # what the tuning prompts promised too much
            self.reporter.say(
                f"  short of the target by {missing:.1f} dB: searching again with {margin:.1f} dB in hand"
            )
            self._allow_more()
        self.reasons.append(
            f"after {VERIFY_ROUNDS} searches the held-out prompts still miss the target by {missing:.1f} dB"
        )
        return None

    def _for_speed(self, speedup: float) -> Found | None:
        """Where whole generations are slower than asked for, aim at more speed and search again.

        A plan below ``FLOOR_DB`` does not take the place of one above it.
        """
        best: Found | None = None
        wanted, fastest = speedup, 0.0
        for _ in range(VERIFY_ROUNDS):
            for tuner in self._tuners.values():
                tuner.target = replace(self.target, speedup=wanted)
            found = self._search(0.0)
            if found is None or (best is not None and found.rules == best.rules):
                break
            if best is not None and found.quality.psnr < FLOOR_DB <= best.quality.psnr:
                self.reporter.say(f"  that is below the floor of {FLOOR_DB:g} dB: the plan before it stays")
                break
            found = replace(found, seconds=self.time_in_turn(found.rules))
            measured = found.speedup
            if measured > fastest:
                best, fastest = found, measured
            if measured >= speedup:
                break
            wanted *= 1.02 * max(speedup / measured, 1.0)
            self.reporter.say(
                f"  {measured:.2f}x over whole generations is short of {speedup:g}x: searching again for {wanted:.2f}x"
            )
            self._allow_more()
        self._say_what_speed_cost(speedup, fastest, best)
        return best

    def _say_what_speed_cost(self, speedup: float, fastest: float, best: Found | None) -> None:
        said = []
        if best is None:
            said.append(f"no plan for {speedup:g}x was found: predicted steps alone take too long")
        elif fastest < speedup:
            said.append(
                f"asked for {speedup:g}x, measured {fastest:.2f}x over whole generations: it cannot be met at "
                f"{FLOOR_DB:g} dB or better within {VERIFY_ROUNDS} searches"
            )
        if best is not None and best.quality.psnr < FLOOR_DB:
            said.append(f"at this speed the held-out prompts have {best.quality.psnr:.1f} dB, below {FLOOR_DB:g} dB")
        for text in said:
            self.reasons.append(text)
            self.reporter.say(f"  {text}")

    def _search(self, margin: float) -> Found | None:
        """One search of every network, with ``margin`` dB in hand, judged on the held-out prompts."""
        solutions: dict[str, Solution] = {}
        rules: tuple[Rule, ...] = ()
        for position, (name, tuner) in enumerate(self._tuners.items()):
            tuner.fixed = rules
            later = len(self._tuners) - 1 - position  # what is left to spend is shared with the networks still to come
            solution = tuner.find(margin + 3.0 * later)
            if solution is not None:
                solutions[name] = solution
                rules += solution.rules
        if not rules:
            return None
        quality, _ = self.evaluator.quality(rules, self.held_out)
        self.reporter.say(
            f"  held-out prompts: {quality.psnr:.1f} dB (worst {quality.worst_psnr:.1f}), relative L2 "
            f"{quality.rel_l2:.4f}"
        )
        return Found(rules, quality, solutions, self._tuners)

    def _allow_more(self) -> None:
        for tuner in self._tuners.values():
            tuner.budget += max(3, self.budget // 3)

    def time_in_turn(self, rules: Sequence[Rule]) -> tuple[float, float]:
        """Median seconds of a generation under ``rules`` and dense, measured alternately."""
        spent: dict[bool, list[float]] = {True: [], False: []}
        with self.reporter.stage("timing dense and plan in turn", 2 * TIMED_GENERATIONS) as stage:
            for turn in range(TIMED_GENERATIONS):
                pair = self.held_out[turn % len(self.held_out)]
                for planned in (True, False):
                    self.evaluator.bind(rules if planned else ())
                    began = time.perf_counter()
                    self.evaluator.adapter.checked_rollout(*pair)
                    spent[planned].append(time.perf_counter() - began)
                    self._note_state()
                    stage.advance()
        return statistics.median(spent[True]), statistics.median(spent[False])

    def fewer_steps(self, found: Found) -> list[Row]:
        """The honest rival: the same sampler with as many steps as the plan's time pays for (rounded up)."""
        adapter, evaluator = self.evaluator.adapter, self.evaluator
        if not isinstance(adapter, DiffusersAdapter) or "num_inference_steps" not in adapter.accepted:
            self.reasons.append(
                "fewer steps: not measured, a bare rollout does not say how to change its number of steps"
            )
            return []
        assert found.seconds is not None
        plan_seconds, dense_seconds = found.seconds
        steps = math.ceil(adapter.steps * plan_seconds / dense_seconds)
        evaluator.bind(())
        with self.reporter.stage(f"rival: {steps} steps", len(self.held_out)) as stage:
            samples = []
            began = time.perf_counter()
            for prompt, seed in self.held_out:
                samples.append(adapter.checked_rollout(prompt, seed, num_inference_steps=steps))
                stage.advance()
            seconds = (time.perf_counter() - began) / len(self.held_out)
        quality = compare(samples, [evaluator.references[pair] for pair in self.held_out])
        return [Row(f"dense, {steps} steps", seconds, dense_seconds / seconds, quality.psnr, quality.worst_psnr, steps)]

    def _note_state(self) -> None:
        """Keep the most memory that slots have taken under the plan that is bound."""
        programs = (program for session in self.evaluator.sessions.values() for program in session.programs)
        self.state_bytes = max(self.state_bytes, sum(program.statistics.peak_slot_bytes for program in programs))
