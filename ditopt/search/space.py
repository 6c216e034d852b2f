"""The search space of one step of one site: compute it, or predict it with one of these candidates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ditopt.decisions import Distances, Fit, Forecast, Formula, Predictor, Reuse
from ditopt.errors import InputError
from ditopt.profile import Array
from ditopt.search.predictors import Index, fit_coefficients, lagrange, regressors, taylor

Shape = tuple[int, bool]
"""What of a predictor is in the compiled graph: (features read, latents read). Its factors are inputs."""


@dataclass(frozen=True)
class Candidate:
    """A predictor family: the ``formula`` of ``order``, or, where that is None, a least-squares fit.

    ``distances`` and ``formula`` are those of ``Forecast``; Taylor's are tried only where they are asked for by name.
    """

    name: str
    history: int
    order: int | None = None
    latents: bool = False
    distances: Distances = "sigma"
    formula: Formula = "polynomial"

    @property
    def shape(self) -> Shape:
        """Features read and whether the latents are."""
        return self.history, self.latents

    @property
    def technique(self) -> str:
        """The kind of the decision: ``reuse``, ``forecast`` or ``fit``; or the formula that is asked for by name."""
        if self.formula != "polynomial":
            return self.formula
        return "fit" if self.order is None else "forecast" if self.order else "reuse"

    def coefficients(self, times: Array, gram: Array, steps: Index, sources: Index, ridge: float) -> Array:
        """Factors ``[M, k]`` for predicting ``steps`` ``[M]`` from ``sources`` ``[M, history]``.

        ``gram`` is ``[N, N]`` summed over prompts; only a fit looks at it.
        """
        if self.order is not None:
            extrapolate = taylor if self.formula == "taylor" else lagrange
            if self.distances == "steps":
                return extrapolate(sources.astype(float), steps.astype(float))
            return extrapolate(times[sources], times[steps])
        prior = np.zeros((len(steps), self.history + self.latents))
        straight = sources[:, :2]
        prior[:, : straight.shape[1]] = lagrange(times[straight], times[steps])
        read = regressors(steps, sources, len(times), self.latents)
        return fit_coefficients(gram, steps, read, prior, ridge)

    def decide(self, choices: Sequence[StepChoice]) -> Predictor:
        """The decision that carries out these choices, all of this candidate."""
        if self.order is not None:
            if not self.order:
                return Reuse()
            return Forecast(order=self.order, distances=self.distances, formula=self.formula)
        return Fit(
            history=self.history,
            latents=self.latents,
            coefficients={choice.step: choice.coefficients for choice in choices},
            sources={choice.step: choice.sources for choice in choices},
        )


CANDIDATES = (
    Candidate("reuse", 1, order=0),
    Candidate("forecast1", 2, order=1),
    Candidate("forecast2", 3, order=2),
    Candidate("forecast1-steps", 2, order=1, distances="steps"),
    Candidate("forecast2-steps", 3, order=2, distances="steps"),
    Candidate("taylor2", 3, order=2, distances="steps", formula="taylor"),
    Candidate("fit1", 1),
    Candidate("fit1+latents", 1, latents=True),
    Candidate("fit2", 2),
    Candidate("fit2+latents", 2, latents=True),
    Candidate("fit3", 3),
    Candidate("fit3+latents", 3, latents=True),
)
"""Simplest first: of equal errors the earlier wins."""

TECHNIQUES = ("reuse", "forecast", "fit")


def candidates(techniques: Iterable[str], depth: int = 3, latents: bool = True) -> tuple[Candidate, ...]:
    """The candidates that ``techniques`` (kinds such as ``fit``, or single names such as ``fit2``) allow.

    Raises:
        InputError: a technique is unknown, or none is left.
    """
    names = set(techniques)
    unknown = names - set(TECHNIQUES) - {candidate.name for candidate in CANDIDATES}
    if unknown:
        known = ", ".join(dict.fromkeys([*TECHNIQUES, *(candidate.name for candidate in CANDIDATES)]))
        raise InputError(f"techniques {sorted(unknown)} are unknown; choose from {known}")
    found = tuple(
        candidate
        for candidate in CANDIDATES
        if names & {candidate.name, candidate.technique} and candidate.history <= depth and candidate.latents <= latents
    )
    if not found:
        raise InputError(f"techniques {sorted(names)} leave no predictor that reads at most {depth} steps; add 'reuse'")
    return found


@dataclass(frozen=True)
class StepChoice:
    """What is done in one step of one site; ``candidate`` is None where it is computed.

    ``error`` is the predicted norm of what this step alone adds to the final sample, root mean square over
    prompts (mean, where the problem adds norms), in units of the sample norm.
    """

    step: int
    candidate: Candidate | None = None
    sources: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()
    error: float = 0.0
