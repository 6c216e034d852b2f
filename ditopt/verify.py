"""Search with the last word on prompts that were not searched on: their quality and whole-generation seconds decide."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ditopt.adapters import DiffusersAdapter
from ditopt.aim import Aim
from ditopt.console import Reporter
from ditopt.cost_models.measured import FULL, form_name
from ditopt.exact import Hoisting
from ditopt.measure import Evaluator
from ditopt.outcome import Found, Row
from ditopt.plan import Rule, cast_rules
from ditopt.profile import NetworkProfile, Profile
from ditopt.profiler.run import TUNING_PROMPTS
from ditopt.quality import LEVELS, compare
from ditopt.recipes import Recipe
from ditopt.search import Solution
from ditopt.search.restrict import told
from ditopt.search.with_heads import NEEDED_TABLES
from ditopt.sparsify import Sparsify
from ditopt.target import Target
from ditopt.tune import Tuner

Pairs = Sequence[tuple[str, int]]

VERIFY_ROUNDS = 3
TIMED_GENERATIONS = 3, 5
"""At least and at most so many of plan and dense each are timed, ..."""
TIMED_SECONDS = 45.0
"""... as many as this time has room for."""
HOIST_SECONDS = 30.0
"""What timing a plan with and without what is computed ahead may take."""
TRIAL_SECONDS = 120.0
"""What the plans tried by rollouts may take together where the caller sets no budget."""
LEAST_TRIALS = 4
"""So many are tried however long a generation takes."""
CLEARLY = 1.07
"""A plan that is this much faster than asked for, by generations that were not timed in turn, is fast enough."""
SPARE_DB = 0.7
"""A plan that exceeds the target by less than this on the held-out prompts is fast enough."""
FLOOR_DB = min(LEVELS.values())
"""A search for speed does not go on below this mean PSNR, where none is asked for."""


def affordable_trials(profile: Profile) -> int:
    """How many plans to try, from ``LEAST_TRIALS`` to 16: by the time of a generation at half the dense cost."""
    dense = sum(map(_full_seconds, profile.networks.values()))
    return min(16, max(LEAST_TRIALS, round(TRIAL_SECONDS / (TUNING_PROMPTS * dense / 2 + 1e-3))))


@dataclass
class VerifiedSearch:
    """Searches network after network for one target; ``reasons`` says what was missed, ``state_bytes`` of slots.

    ``second_order``: whether computed steps may have a share of that formula, ``sparse``: whether heads may attend to
    less than all, as a ``recipe`` says where there is one; ``all_computed``: whether they are all that is looked for,
    with every step computed; ``hoist``: whether what is the same in many steps may be computed ahead, and ``ahead``
    what was. ``dense_seconds``: of a dense generation, where one was timed in this run; 0 where none was.
    ``rival_sample`` is what the first held-out prompt gives with fewer steps. ``without_heads`` and ``with_heads`` are
    the plans before and behind the choice of sparse heads, where they were looked at.
    """

    evaluator: Evaluator
    profile: Profile
    target: Target
    profiled: Pairs
    held_out: Pairs
    reporter: Reporter
    budget: int
    max_variants: int
    techniques: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    second_order: bool = True
    sparse: bool = False
    reasons: list[str] = field(default_factory=list)
    dense_seconds: float = 0.0
    state_bytes: int = 0
    rival_sample: Tensor | None = None
    all_computed: bool = False
    recipe: Recipe | None = None
    hoist: bool = False
    ahead: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    without_heads: Found | None = None
    with_heads: Found | None = None

    def __post_init__(self) -> None:
        self._plan_seconds = math.inf
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
                self.dtypes,
                self.recipe,
            )
            for name in self.evaluator.sessions
        }
        if self.recipe is not None and self.recipe.loop is not None:
            problems = [tuner.problem for tuner in self._tuners.values()]
            self.reasons += [told(each, self.recipe.loop, self.recipe.name) for each in problems]

    def __call__(self) -> Found | None:
        """The plan that met the target on the held-out prompts (for speed: the one that came nearest), or None."""
        found = self._searched()
        if found is not None and not self.evaluator.fits(found.rules):
            found = None
        self.reasons += [reason for reason in self.evaluator.reasons if reason not in self.reasons]
        return None if found is None else self._hoist(found)

    def _searched(self) -> Found | None:
        if self.all_computed:
            found = self._every_step()
            return found if found is not None and found.rules else None
        found = self._for_quality() if self.target.speedup is None else self._for_speed(self.target.speedup)
        both = self.target.speedup is not None and self.target.min_psnr is not None
        if both and (found is None or self.target.missing_db(found.quality) > 0):
            found = self._for_quality_instead()
        return None if found is None else self._aim(self._sparsify(found))

    def _every_step(self) -> Found | None:
        """Sparse heads beside a schedule that computes every step; without rules where none was good enough."""
        if len(self._tuners) != 1:
            return None
        ((name, tuner),) = self._tuners.items()
        solution = tuner.every_step()
        quality, self._plan_seconds = self.evaluator.quality(solution.rules, self.held_out)
        return self._sparsify(Found(solution.rules, quality, {name: solution}, self._tuners))

    def _for_quality_instead(self) -> Found | None:
        """Where no plan has the speed that was asked for at the PSNR beside it: the fastest that has the PSNR."""
        self.reporter.say(f"  searching for the fastest plan of {self.target.min_psnr:g} dB")
        for tuner in self._tuners.values():
            tuner.target = replace(self.target, speedup=None)
            tuner.budget += self.budget
        found = self._for_quality()
        if found is not None:
            self._say(f"the fastest plan of {self.target.min_psnr:g} dB was taken")
        return found

    def _hoist(self, found: Found) -> Found:
        """Compute ahead of the steps what is the same in many, where generations are faster so."""
        if not self.hoist:
            return found
        hoisted = Hoisting(self.evaluator, self.held_out, self.reporter, HOIST_SECONDS)(found.rules)
        if hoisted.reason is not None:
            self.reasons.append(f"hoist: {hoisted.reason}")
            return found
        self.ahead = hoisted.work
        return replace(found, rules=hoisted.rules, seconds=None)

    def _sparsify(self, found: Found) -> Found:
        """Let heads attend to less where that is faster at the target, or better at the speed."""
        if not self.sparse or len(found.solutions) != 1 or len(self._tuners) != 1:
            return found
        ((name, tuner),) = self._tuners.items()
        if not self.profile.networks[name].tables.keys() >= NEEDED_TABLES:
            return found
        # where the speed asked for was out of reach, plans were searched for the PSNR beside it
        target = replace(self.target, speedup=None) if tuner.target.speedup is None else self.target
        sparsify = Sparsify(
            self.evaluator,
            target,
            self.held_out,
            self.reporter,
            self.max_variants,
            self.reasons,
            None if self.recipe is None else self.recipe.of_heads,
            self.all_computed,
        )
        self.without_heads, self.with_heads = found, sparsify(found, tuner)
        return self.with_heads

    def _aim(self, found: Found) -> Found:
        """Spend what quality there is to spare on samples as near to a finer sampler's as the dense ones are."""
        if len(found.solutions) != 1 or len(self._tuners) != 1:
            return found
        aim = Aim(
            self.evaluator,
            self.target,
            self.held_out,
            self.reporter,
            self.max_variants,
            self.second_order,
            self.reasons,
        )
        return aim(found, *self._tuners.values())

    def _for_quality(self) -> Found | None:
        """Where the held-out prompts miss the target, aim higher and search again; where they exceed it, lower."""
        best: Found | None = None
        margin, missing = 0.0, 0.0
        for _ in range(VERIFY_ROUNDS):
            found = self._search(margin)
            if found is None:
                return best
            missing = self.target.missing_db(found.quality)
            name, last = list(self._tuners.items())[-1]
            solution = found.solutions.get(name)
            if missing > 0:
                last.refuse(solution)
            if best is not None and (missing > 0 or _network_seconds(found) >= _network_seconds(best)):
                return best
            gap = missing - last.missing_db(solution)
            if missing <= 0:
                best = found
                if -missing < SPARE_DB:
                    return best
                margin = gap + 0.3  # what the tuning prompts promised too little
                self.reporter.say(f"  {-missing:.1f} dB to spare: searching for a faster plan")
            else:
                margin = max(margin, gap) + 0.1  # what they promised too much
                self.reporter.say(
                    f"  short of the target by {missing:.1f} dB: searching again with {margin:.1f} dB in hand"
                )
            self._allow_more()
        if best is None:
            self.reasons.append(
                f"after {VERIFY_ROUNDS} searches the held-out prompts still miss the target by {missing:.1f} dB"
            )
        return best

    def _for_speed(self, speedup: float) -> Found | None:
        """Where whole generations are slower than asked for, aim at more speed and search again.

        Generations made for quality tell a plan that is clearly fast enough, which is timed against dense at the end.
        Every search aims at one computed step fewer than the last plan has, or at more where the shortfall asks for it.
        None follows on a plan below the floor (``FLOOR_DB``, or the PSNR asked for as well), and such a plan does not
        take the place of one above it.
        """
        floor = self._floor
        best: Found | None = None
        last: Found | None = None
        wanted, searches = self._of_networks(speedup), 0
        ended = "more searches are not made"
        while searches < VERIFY_ROUNDS:
            for tuner in self._tuners.values():
                tuner.target = replace(self.target, speedup=wanted)
            found = self._search(0.0)
            searches += 1
            below = found is not None and found.quality.psnr < floor
            if (found is None or below) and best is None and wanted > speedup:  # what is asked beyond it was a guess
                what = f"that is below the floor of {floor:g} dB" if below else "no plan was found"
                self.reporter.say(f"  {what}: searching again for {speedup:g}x")
                wanted = speedup
                self._allow_more()
                continue
            if found is None:
                ended = "no faster plan was found"
                break
            if below and best is not None:
                ended = f"the next plan had {found.quality.psnr:.1f} dB, below the floor of {floor:g} dB"
                self.reporter.say(f"  that is below the floor of {floor:g} dB: the plan before it stays")
                break
            same = last is not None and found.rules == last.rules
            if last is not None and same:
                last = replace(found, seconds=last.seconds)  # known already
            elif not below and self.dense_seconds and self.dense_seconds >= CLEARLY * speedup * self._plan_seconds:
                return found  # not timed in turn yet
            else:
                last = replace(found, seconds=self.time_in_turn(found.rules))
            if best is None or last.speedup > best.speedup:
                best = last
            if last.speedup >= speedup:
                break
            if below:
                ended = f"the search ends below the floor of {floor:g} dB"
                break
            further = wanted * 1.02 * speedup / last.speedup if same else self._without_excess(last, speedup)
            wanted = max(further, self._one_step_fewer(last))
            if searches < VERIFY_ROUNDS:
                self.reporter.say(
                    f"  {last.speedup:.2f}x over whole generations is short of {speedup:g}x: searching again for "
                    f"{wanted:.2f}x"
                )
                self._allow_more()
        self._say_what_speed_cost(speedup, best, searches, ended)
        return best

    @property
    def _floor(self) -> float:
        """The least mean PSNR that a search for speed goes down to."""
        return FLOOR_DB if self.target.min_psnr is None else self.target.min_psnr

    def _of_networks(self, speedup: float) -> float:
        """The speed-up of the networks that makes generations as fast as asked for, by the times of dense ones.

        What the loop takes beside the networks stays. Times of moments when the machine was slower ask for at most a
        twentieth more.
        """
        networks = sum(map(_full_seconds, self.profile.networks.values()))
        beside = max(self.dense_seconds - networks, 0.0)
        planned = (networks + beside) / speedup - beside
        return networks / max(planned, 0.95 * networks / speedup)

    def _without_excess(self, found: Found, speedup: float) -> float:
        """The speed-up of the networks at which generations would have been as fast as asked for.

        What the loop takes beside them is taken to stay; at most half of their time is taken away at once.
        """
        assert found.seconds is not None
        plan_seconds, dense_seconds = found.seconds
        networks = self.profile.networks
        dense = sum(map(_full_seconds, networks.values()))
        others = sum(_full_seconds(part) for name, part in networks.items() if name not in found.solutions)
        planned = others + _network_seconds(found)
        return dense / max(planned - (plan_seconds - dense_seconds / speedup), planned / 2)

    def _one_step_fewer(self, found: Found) -> float:
        """The least speed-up at which some network has to compute a step less than under ``found``; 0 if none can."""
        speeds = []
        for name, solution in found.solutions.items():
            part = self.profile.networks[name]
            predicted = self._tuners[name].problem.seconds_predicted
            if predicted is not None and len(solution.kept) > 1:
                total, full = len(part.timesteps), part.seconds[FULL]
                computed = self._tuners[name].problem.seconds_full  # in the form of the plan
                kept = len(solution.kept) - 1 + 1e-6  # so that rounding does not cost another step
                speeds.append(total * full / (total * predicted + kept * (computed - predicted)))
        return min(speeds, default=0.0)

    def _say_what_speed_cost(self, speedup: float, best: Found | None, searches: int, ended: str) -> None:
        said = []
        if best is None:
            whole = all("predicted" in part.seconds for part in self.profile.networks.values())
            why = (
                "even one computed step takes too long" if whole else "too little can be predicted between graph breaks"
            )
            said.append(f"no plan for {speedup:g}x was found: {why}")
        elif best.speedup < speedup:
            said.append(
                f"asked for {speedup:g}x, measured {best.speedup:.2f}x over whole generations; after {searches} "
                f"search{'es' if searches > 1 else ''}: {ended}"
            )
        if best is not None and best.quality.psnr < self._floor:
            said.append(f"at this speed the held-out prompts have {best.quality.psnr:.1f} dB, below {self._floor:g} dB")
        for text in said:
            self._say(text)

    def _say(self, reason: str) -> None:
        """Keep a reason, and tell it now."""
        self.reasons.append(reason)
        self.reporter.say(f"  {reason}")

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
        quality, self._plan_seconds = self.evaluator.quality(rules, self.held_out)
        self.reporter.say(
            f"  held-out prompts: {quality.psnr:.1f} dB (worst {quality.worst_psnr:.1f}), relative L2 "
            f"{quality.rel_l2:.4f}"
        )
        return Found(rules, quality, solutions, self._tuners)

    def _allow_more(self) -> None:
        for tuner in self._tuners.values():
            tuner.budget += max(2, self.budget // 4)

    def timed(self, found: Found) -> Found:
        """``found`` with its seconds; tells where these miss the speed that was asked for."""
        found = replace(found, seconds=self.time_in_turn(found.rules))
        asked = self.target.speedup or 0.0
        if found.speedup < asked:
            self._say(f"asked for {asked:g}x, measured {found.speedup:.2f}x when it was timed at the end")
        return found

    def time_in_turn(self, rules: Sequence[Rule]) -> tuple[float, float]:
        """Median seconds of a generation under ``rules`` and dense, measured alternately."""
        least, most = TIMED_GENERATIONS
        in_turn = sum(map(_full_seconds, self.profile.networks.values())) * 1.4
        turns = min(most, max(least, int(TIMED_SECONDS / max(in_turn, 1e-6))))
        with self.reporter.stage("timing dense and plan in turn", 2 * turns) as stage:

            def after() -> None:
                self._note_state()
                stage.advance()

            plan_seconds, dense_seconds = self.evaluator.time_in_turn([rules, ()], self.held_out, turns, after)
        return plan_seconds, dense_seconds

    def fewer_steps(self, found: Found) -> list[Row]:
        """The honest rival: the same sampler with as many steps as the plan's time pays for (rounded up).

        Where the plan computes in a dtype of its own the rival does too: of the two that ``ditopt bench`` has then, it
        is the harder one, ``fewer_steps_cast``.
        """
        adapter, evaluator = self.evaluator.adapter, self.evaluator
        if not isinstance(adapter, DiffusersAdapter) or "num_inference_steps" not in adapter.accepted:
            self.reasons.append(
                "fewer steps: not measured, a bare rollout does not say how to change its number of steps"
            )
            return []
        assert found.seconds is not None
        plan_seconds, dense_seconds = found.seconds
        rules = [rule for rule, _ in cast_rules(found.rules)]
        dtypes = [self._tuners[name].problem.dtype for name in found.solutions]
        dtype = next((each for each in dtypes if each is not None), None)
        share = self._share_in_dtype(found)
        steps = min(adapter.steps, math.ceil(adapter.steps * plan_seconds / (dense_seconds * share)))
        evaluator.bind(rules)
        evaluator.retarget(bool(rules))
        with self.reporter.stage(f"rival: {steps} steps", len(self.held_out)) as stage:
            samples, spent = [], []
            for prompt, seed in self.held_out:
                began = time.perf_counter()
                samples.append(adapter.checked_rollout(prompt, seed, num_inference_steps=steps))
                spent.append(time.perf_counter() - began)
                stage.advance()
            seconds = statistics.median_low(spent)  # the first may compile a graph
        evaluator.retarget(False)
        self.rival_sample = samples[0]
        quality = compare(samples, [evaluator.references[pair] for pair in self.held_out])
        name = f"dense, {steps} steps" + (f", {dtype}" if dtype else "")
        return [Row(name, seconds, dense_seconds / seconds, quality.psnr, quality.worst_psnr, steps, dtype)]

    def _share_in_dtype(self, found: Found) -> float:
        """What a dense generation's evaluations take in the dtypes of a plan, as a share of what they take as it is."""
        networks = self.profile.networks
        plain = {name: _full_seconds(part) for name, part in networks.items()}
        cast = {name: self._cast_share(name) * plain[name] for name in found.solutions}
        return sum({**plain, **cast}.values()) / sum(plain.values())

    def _cast_share(self, name: str) -> float:
        """What a step in the dtype of a network's plan is estimated to take, of what it takes as it is.

        Rivals are not simplified.
        """
        seconds = self.profile.networks[name].seconds
        return seconds[form_name(self._tuners[name].problem.dtype)] / seconds[FULL]

    def _note_state(self) -> None:
        """Keep the most memory that slots have taken under the plan that is bound."""
        programs = (program for session in self.evaluator.sessions.values() for program in session.programs)
        self.state_bytes = max(self.state_bytes, sum(program.statistics.peak_slot_bytes for program in programs))


def _full_seconds(part: NetworkProfile) -> float:
    """Seconds of all evaluations of a network in a dense generation."""
    return len(part.timesteps) * part.seconds[FULL]


def _network_seconds(found: Found) -> float:
    """Seconds of all network evaluations of a generation, as predicted from measured times of the variants."""
    return sum(solution.predicted_seconds for solution in found.solutions.values())
