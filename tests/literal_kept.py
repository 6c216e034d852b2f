"""What published systems make of the keys that a mask leaves out, from an earlier step: each as its paper writes it.

One head: ``earlier`` and ``now`` are query, key and value ``[S, D]`` of two steps in float64, ``mask`` ``[S, L]`` is
true for the keys of the sparse part. A row without any such key has a sparse part of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditopt.decisions import HeadDecision
from ditopt.plan import Plan
from ditopt.profiler.interpret import Edit, Watched
from ditopt.runtime.program import Program
from ditopt.sites import AttentionSite

Step = tuple[Tensor, Tensor, Tensor]


def exponentials(step: Step, scale: float) -> Tensor:
    """``[S, L]``: the numerators of the softmax."""
    query, key, _ = step
    return torch.exp(scale * query @ key.T)


def attention(step: Step, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``[S, E]`` and ``[S]``: softmax over the keys of a mask, times values; and the softmax's sum."""
    numerators = exponentials(step, scale) * mask
    total = numerators.sum(1)
    return numerators @ step[2] / total.clamp(min=1e-300)[:, None], total


def dense(step: Step, scale: float) -> Tensor:
    """``[S, E]``: attention to all keys."""
    return attention(step, torch.ones(len(step[0]), len(step[1]), dtype=torch.bool), scale)[0]


def flashblock(earlier: Step, now: Step, mask: Tensor, scale: float) -> Tensor:
    """FlashBlock: output and log-normaliser of what is outside are cached, what is inside is computed; merged."""
    outside, total_outside = attention(earlier, ~mask, scale)
    inside, total_inside = attention(now, mask, scale)
    log_outside, log_inside = total_outside.log()[:, None], total_inside.log()[:, None]
    together = torch.logaddexp(log_outside, log_inside)
    return torch.exp(log_inside - together) * inside + torch.exp(log_outside - together) * outside


def ditfastattn(earlier: Step, now: Step, mask: Tensor, scale: float) -> Tensor:
    """DiTFastAttn (arXiv 2406.08552): R = O - W where the full attention O is computed, later O = W + R."""
    residual = dense(earlier, scale) - attention(earlier, mask, scale)[0]
    return attention(now, mask, scale)[0] + residual


def rettention(earlier: Step, now: Step, mask: Tensor, scale: float) -> Tensor:
    """Re-ttention (arXiv 2505.22918), equations 5 and 8 to 10, with a ramp-up of lambda = 0."""
    numerators = exponentials(earlier, scale)
    rho = (numerators * mask).sum(1) / numerators.sum(1)
    residual = dense(earlier, scale) - rho[:, None] * attention(earlier, mask, scale)[0]
    return rho[:, None] * attention(now, mask, scale)[0] + residual


LITERAL: dict[str, Callable[[Step, Step, Tensor, float], Tensor]] = {
    "merge": flashblock,
    "residual": ditfastattn,
    "ratio": rettention,
}
"""By the form that a plan writes."""


class LiteralPlan(ABC):
    """One generation under a plan, whose heads have something of earlier steps: ``edit`` writes out what they do."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, program: Program, step: int, arguments: list[Any], skipped: tuple[str, ...] = ()) -> Tensor:
        """What the model gives in the next of its computed steps, of which the sites ``skipped`` have no part."""
        trace = program.variants.trace
        edits = {
            trace.site_nodes[site.name]: self.edit(site.name, self.plan.head_decisions(site.name)[step].of(site.heads))
            for site in trace.sites
            if isinstance(site, AttentionSite) and site.queries == site.keys and site.name not in skipped
        }
        with torch.no_grad():
            found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
        return found

    @abstractmethod
    def edit(self, site: str, decided: tuple[HeadDecision, ...]) -> Edit:
        """The attention of a site, whose heads do what is ``decided``, in the step that is next."""
