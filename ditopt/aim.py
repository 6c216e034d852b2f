"""The aim: what quality a plan has to spare is spent on being as near to a finer sampler's samples as dense ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ditopt.console import Reporter
from ditopt.measure import Evaluator
from ditopt.outcome import Found
from ditopt.quality import LEVELS, Quality
from ditopt.target import Target
from ditopt.tune import Tuner

AIMS = ((0.1, 0.05), (0.25, 0.1), (0.5, 0.1), (0.5, 0.25), (0.6, 0.35), (0.75, 0.5), (1.0, 1.0))
"""How far fits aim from the dense path to the second-order one, and what share of that formula computed steps have."""
AIM_SPARE_DB = 2.0
"""How much nearer to the second-order samples than dense a plan has to be on the tuning prompts to be near enough.

The factors were fitted to these prompts, and second-order samples are not converged ones.
"""
AIM_DB = 3.0
"""What a search for speed alone gives up of the PSNR to dense to come nearer to the second-order samples."""
NEAR_DB = 9.0
"""A plan this much nearer to dense than dense is to the second-order samples has more than that to give up."""


@dataclass
class Aim:
    """Refits the plan of one network towards second-order paths, judged on ``held_out``; says why not in ``reasons``.

    ``second_order``: whether computed steps may have a share of that formula.
    """

    evaluator: Evaluator
    target: Target
    held_out: Sequence[tuple[str, int]]
    reporter: Reporter
    max_variants: int
    second_order: bool
    reasons: list[str]

    def __call__(self, found: Found, tuner: Tuner) -> Found:
        """The aimed plan, not timed yet; or ``found``.

        Where the dense samples have an error of their own, that of a plan adds to it. The same schedule is refitted to
        paths further and further towards the second-order ones, and its computed steps get a share of that formula
        themselves, until the tuning prompts' samples are nearer to these than dense ones are (by ``AIM_SPARE_DB``), or
        the held-out prompts would have too little left: the target, by a standard error of their mean where that is a
        PSNR; for speed alone what ``least_psnr`` says. How far is bisected: what is nearer to second order is
        farther from dense.
        """
        ((name, solution),) = found.solutions.items()
        dense, least = tuner.finer_psnr, tuner.finer_of(solution)
        if dense is None:  # the profile has said why
            return found
        predicts = tuner.predicts(solution)
        aims = self._aims(predicts)
        why = tuner.obstacle(solution)
        if not aims:
            why = "every step is computed, and techniques leave 'second_order' out"
        if least is None or why is not None:
            self.reasons.append(f"not refitted towards a second-order path: {why}")
            return found
        best, nearest, enough = found, least, dense + AIM_SPARE_DB
        first, end = 0, len(aims) if nearest < enough else 0
        with self.reporter.stage("aim: towards a second-order path", end.bit_length()) as stage:
            while first < end:
                middle = (first + end) // 2
                share, second_order = aims[middle]
                aimed = tuner.aim(solution, share, second_order)
                if aimed is None and second_order is not None and predicts:  # without it a graph less is needed
                    aimed = tuner.aim(solution, share, None)
                reached = tuner.finer_of(aimed)
                if aimed is None or reached is None:
                    self.reasons.append(
                        f"not refitted {_way(share, second_order)} to a second-order path: more than "
                        f"{self.max_variants} graphs would be needed, or a generation had NaN or infinite values"
                    )
                    end = middle
                    continue
                enough_before = nearest >= enough
                if reached < enough if enough_before else reached <= nearest:
                    stage.advance(f"{reached:.1f} dB to it, not near enough")
                    first, end = (middle + 1, end) if enough_before else (first, middle)  # too near, or too far
                    continue
                quality, _ = self.evaluator.quality(aimed.rules, self.held_out)
                stage.advance(f"{reached:.1f} dB to it, dense {dense:.1f}")
                if self.target.missing_db(quality) > 0 or quality.psnr < self.least_psnr(quality, found, dense):
                    end = middle
                    continue
                best = replace(found, rules=aimed.rules, quality=quality, solutions={name: aimed}, seconds=None)
                nearest = reached
                first, end = (first, middle) if reached >= enough else (middle + 1, end)
        if best is not found:
            self.reporter.say(
                f"  refitted towards a second-order path: {least:.1f} dB to it before, {nearest:.1f} now, dense "
                f"{dense:.1f}; held-out prompts: {best.quality.psnr:.1f} dB"
            )
        return best

    def _aims(self, predicts: bool) -> list[tuple[float, float | None]]:
        """The rungs for a plan: without predicted steps there are no fits to aim, only the formula's share is left."""
        aims = [(share if predicts else 0.0, part if self.second_order else None) for share, part in AIMS]
        return [aim for aim in dict.fromkeys(aims) if any(aim)]

    def least_psnr(self, quality: Quality, found: Found, dense: float) -> float:
        """What an aimed plan of ``quality``, that was ``found`` before, has to have; ``dense`` is near to second order.

        Other prompts than the held-out ones will have another mean, so a target for PSNR is held with its standard
        error. For speed alone: the quality level that was reached, and ``AIM_DB`` less than before, or ``NEAR_DB`` more
        than ``dense`` (of the tuning prompts, so a rough bound) where that is less still.
        """
        if self.target.min_psnr is not None:
            spread = statistics.stdev(quality.per_prompt) if len(quality.per_prompt) > 1 else 0.0
            return self.target.min_psnr + spread / math.sqrt(max(len(quality.per_prompt), 1))
        if self.target.speedup is None:
            return -math.inf
        reached_levels = [level for level in LEVELS.values() if level <= found.quality.psnr]
        return max([min(found.quality.psnr - AIM_DB, dense + NEAR_DB), *reached_levels])


def _way(share: float, second_order: float | None) -> str:
    return f"{share:g} of the way" if share else f"by a share of {second_order:g}"
