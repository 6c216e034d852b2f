"""The profile: what was measured on calibration rollouts. Data only; numpy, no torch.

Its core is the Gram matrix of each site's feature over steps: with the inner products alone, the
error of every linear predictor (reuse, forecast of any order, fitted combination) at every schedule
follows in closed form. Profiles of several runs merge by concatenating prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ditopt.geometry import Geometry
from ditopt.measures import Table

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FeatureGram:
    """Inner products of one site's feature over branches and steps, per calibration prompt.

    ``values`` is ``[P, N, N]`` float64, N = branches * steps for block sites and
    (branches + 1) * steps for the step site, whose last ``steps`` rows are the latents that entered.
    Row ``b * steps + t`` is branch ``b`` in step ``t``; a branch that did not run in a step has zero
    rows and False in ``present`` (``[branches, steps]``).
    """

    site: str
    steps: int
    branches: tuple[str, ...]
    values: Array
    present: npt.NDArray[np.bool_]
    has_latents: bool = False

    def effective(self, weights: tuple[float, ...]) -> Array:
        """The Gram matrix ``[P, T, T]`` (``[P, 2T, 2T]`` with latents) of the branches' weighted sum.

        Under classifier-free guidance of scale s the weights are (s, 1 - s) for (cond, uncond): a linear
        predictor that uses the same coefficients in both branches predicts their guided sum. In steps that some
        branch skips (a guidance interval) the weights of the others are scaled to sum to one.
        """
        share = branch_shares(self.present, weights)
        mix = np.zeros((self.steps * (1 + self.has_latents), self.values.shape[-1]))
        rows = np.arange(self.steps)
        for branch in range(len(self.branches)):
            mix[rows, branch * self.steps + rows] = share[branch]
        if self.has_latents:
            mix[self.steps :, len(self.branches) * self.steps :] = np.eye(self.steps)
        return np.asarray(mix @ self.values @ mix.T)


def branch_shares(present: npt.NDArray[np.bool_], weights: tuple[float, ...]) -> Array:
    """``[branches, T]``: the weight of each branch in each step; those ``present`` in a step sum to one."""
    share = present * np.asarray(weights)[:, None]
    if not present.all():
        sums = share.sum(axis=0)
        share = share / np.where(np.abs(sums) > 1e-9, sums, 1.0)
    return np.asarray(share, dtype=float)


@dataclass(frozen=True)
class NetworkProfile:
    """What was measured of one network: its schedule, its features, how long its parts take.

    ``timesteps`` and ``sigmas`` are the evaluation values in call order; ``step_widths`` how far a step
    moves the latents per unit of output (|d sigma| for flow matching); ``sensitivity[t]`` the measured
    factor by which a planted output error of step t (times its width) grows up to the final sample;
    ``range_weights`` the measured factor, per step, from an error in a block range's residual to one in the output;
    ``seconds`` what a ``full`` and a ``predicted`` step take, what predicting a range saves, and, under a dtype's name,
    what a full step takes in it. ``tables`` hold what the collectors measured, by collector and site; ``geometry`` says
    how the tokens of its self-attention lie, None where that is not known.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    step_widths: tuple[float, ...]
    sensitivity: tuple[float, ...]
    branch_weights: tuple[float, ...]
    grams: dict[str, FeatureGram]
    seconds: dict[str, float] = field(default_factory=dict)
    range_weights: dict[str, tuple[float, ...]] = field(default_factory=dict)
    tables: dict[str, dict[str, Table]] = field(default_factory=dict)
    geometry: Geometry | None = None


@dataclass(frozen=True)
class Profile:
    """The networks' profiles and the norm of the final samples (for relative errors).

    ``plan`` is the data of a plan without rules that says what was profiled (model, sampler, geometry, device, inputs);
    ``sample`` facts of the finished samples, from which a relative error becomes a PSNR: ``peak`` (the range of values)
    and ``numel``; ``reasons`` what was left out, and why.
    """

    networks: dict[str, NetworkProfile]
    prompts: tuple[str, ...]
    sample_norm: float
    plan: Mapping[str, Any] = field(default_factory=dict)
    sample: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


def merge(first: Profile, second: Profile) -> Profile:
    """The profile over the prompts of both; they must agree on networks, schedules and branches.

    Raises:
        ValueError: they differ in one of these; the message says which.
    """
    if first.networks.keys() != second.networks.keys():
        raise ValueError(f"profiles are of networks {sorted(first.networks)} and {sorted(second.networks)}")
    networks = {}
    share = len(first.prompts) / (len(first.prompts) + len(second.prompts))
    for name, one in first.networks.items():
        two = second.networks[name]
        if one.timesteps != two.timesteps or one.grams.keys() != two.grams.keys():
            raise ValueError(f"profiles of network {name!r} were taken on other schedules or other sites")
        grams = {
            site: FeatureGram(
                site,
                gram.steps,
                gram.branches,
                np.concatenate([gram.values, two.grams[site].values]),
                gram.present,
                gram.has_latents,
            )
            for site, gram in one.grams.items()
        }
        sensitivity = tuple(share * a + (1 - share) * b for a, b in zip(one.sensitivity, two.sensitivity, strict=True))
        timed = [key for key in one.seconds if key in two.seconds]
        seconds = {key: share * one.seconds[key] + (1 - share) * two.seconds[key] for key in timed}
        networks[name] = NetworkProfile(
            one.timesteps,
            one.sigmas,
            one.step_widths,
            sensitivity,
            one.branch_weights,
            grams,
            seconds,
            one.range_weights,
        )
    return Profile(
        networks, first.prompts + second.prompts, share * first.sample_norm + (1 - share) * second.sample_norm
    )
