"""How much an output error of a step moves the final sample: measured by planted errors in real rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditopt.decisions import Reuse
from ditopt.measure import Evaluator
from ditopt.plan import Rule
from ditopt.profile import NetworkProfile
from ditopt.sites import STEP

PLANTS = (0.1, 0.3, 0.55, 0.8)
"""Where in the schedule errors are planted, as shares of its length; factors between are interpolated."""


def plant_steps(steps: int) -> tuple[int, ...]:
    """The steps in which errors are planted."""
    return tuple(sorted({min(max(1, round(share * steps)), steps - 1) for share in PLANTS}))


def measure_sensitivity(
    evaluator: Evaluator,
    network: str,
    profile: NetworkProfile,
    pair: tuple[str, int],
    prompt_index: int,
    planted: Sequence[int],
) -> tuple[float, ...]:
    """The factor ``||change of the final sample|| / (step width * ||output error||)`` for every step.

    In each planted step the output is replaced by that of the step before (a reuse), whose error the
    Gram matrix knows; the factors are interpolated in the logarithm. One rollout per planted step.
    """
    gram = profile.grams[STEP].effective(profile.branch_weights)[prompt_index]
    reference = evaluator.references[pair].double()
    found = []
    for step in planted:
        rule = Rule(sites=STEP, steps=(step,), do=Reuse(), network=network)
        evaluator.bind([rule])
        moved = float((evaluator.adapter.checked_rollout(*pair).double() - reference).norm())
        error = float(np.sqrt(max(gram[step, step] - 2 * gram[step, step - 1] + gram[step - 1, step - 1], 1e-30)))
        found.append(max(moved, 1e-12) / max(profile.step_widths[step] * error, 1e-12))
    steps = np.arange(len(profile.timesteps))
    return tuple(np.exp(np.interp(steps, planted, np.log(found))).tolist())
