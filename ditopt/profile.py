"""The profile: what was measured on calibration rollouts. Data only; numpy, no torch.

Its core is the Gram matrix of each site's feature over steps: with the inner products alone, the
error of every linear predictor (reuse, forecast of any order, fitted combination) at every schedule
follows in closed form. Profiles of several runs merge by concatenating prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ditopt.errors import InputError, ProfileError
from ditopt.geometry import Geometry
from ditopt.measures import Table, joined
from ditopt.plan import Plan
from ditopt.sites import STEP

Array = npt.NDArray[np.float64]


LATENCY = "latency"
"""The name of the tables with seconds of attention, which are of one device."""


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

    def similarity(self, weights: tuple[float, ...]) -> Array:
        """Cosines ``[T, T]`` between the features of steps, over all prompts; ``weights`` as for ``effective``."""
        gram = self.effective(weights).sum(axis=0)[: self.steps, : self.steps]
        norms = np.sqrt(np.maximum(np.diag(gram), 1e-30))
        return np.asarray(gram / norms / norms[:, None])


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

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """``[branches, steps]``: whether a branch runs in a step."""
        return next(iter(self.grams.values())).present

    @property
    def prompts(self) -> int:
        """How many prompts were profiled."""
        return len(next(iter(self.grams.values())).values)

    def figures(self) -> dict[str, Any]:
        """What a plan's side file keeps of it."""
        return {
            "timesteps": self.timesteps,
            "sigmas": self.sigmas,
            "similarity": self.grams[STEP].similarity(self.branch_weights).round(5).tolist(),
            "sensitivity": self.sensitivity,
            "range_weights": self.range_weights,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Profile:
    """The networks' profiles and the norm of the final samples (for relative errors).

    ``plan`` is the data of a plan without rules that says what was profiled (model, sampler, geometry, device, inputs);
    ``sample`` facts of the finished samples, from which a relative error becomes a PSNR: ``peak`` (the range of values)
    and ``numel``; ``reasons`` what was left out, and why; ``weights`` tell fine-tunes of a model apart, by network.
    """

    networks: dict[str, NetworkProfile]
    prompts: tuple[str, ...]
    sample_norm: float
    plan: Mapping[str, Any] = field(default_factory=dict)
    sample: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the profile as one file; see ``ditopt.profile_file``, which raises what this does."""
        from ditopt.profile_file import save_profile

        save_profile(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read and check a profile file; see ``ditopt.profile_file``, which raises what this does."""
        from ditopt.profile_file import load_profile

        return load_profile(path)

    def template(self) -> Plan | None:
        """The plan without rules that says what was profiled; None where the profile does not say.

        Raises:
            ProfileError: it is malformed; the message names the field.
        """
        if not self.plan:
            return None
        try:
            return Plan.model_validate(dict(self.plan))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ProfileError(f"field plan.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def merge(first: Profile, *others: Profile) -> Profile:
    """The profile over the prompts of all; they must agree on model, sampler, schedule, geometry and branches.

    What was measured per prompt is put one behind the other. The rest is averaged by the numbers of prompts, growth
    factors (``sensitivity``, ``range_weights``) in the logarithm, as the profiler averages those of its prompts, and
    seconds only where they are of the device of ``first``. What some have not measured is left out, and the reasons say
    so. Merging is associative to rounding, but for seconds where profiles of several devices are merged.

    Raises:
        ProfileError: they differ in something that has to agree; the message says in what, and how.
    """
    merged = first
    for other in others:
        merged = _merged(merged, other)
    return merged


def _merged(one: Profile, two: Profile) -> Profile:
    counts = len(one.prompts), len(two.prompts)
    _agree("networks", list(one.networks), list(two.networks))
    reasons = [*one.reasons, *two.reasons, *_repeated(one.prompts, two.prompts)]
    plans = one.template(), two.template()
    for field_name, mine, theirs in _facts_of_plans(*plans):
        _agree(field_name, mine, theirs)
    for name in one.weights.keys() & two.weights.keys():
        _agree(f"weights of {name}", one.weights[name], two.weights[name])
    devices = [None if plan is None else plan.device.device for plan in plans]
    timed = None in devices or devices[0] == devices[1]
    if not timed:
        reasons.append(f"seconds measured on {devices[1]} are left out; those kept are of {devices[0]}")
    networks = {}
    for name, part in one.networks.items():
        left_out: list[str] = []
        networks[name] = _merged_network(f"networks.{name}", part, two.networks[name], counts, timed, left_out)
        reasons += [f"{name}: {reason}" for reason in left_out]
    if one.sample and two.sample:
        _agree("sample.numel", one.sample.get("numel"), two.sample.get("numel"))
    return Profile(
        networks,
        one.prompts + two.prompts,
        _mean(one.sample_norm, two.sample_norm, counts),
        one.plan or two.plan,
        {key: _mean(one.sample[key], two.sample[key], counts) for key in one.sample if key in two.sample},
        tuple(dict.fromkeys(reasons)),
        {**two.weights, **one.weights},
    )


def _merged_network(
    where: str, one: NetworkProfile, two: NetworkProfile, counts: tuple[int, int], timed: bool, left_out: list[str]
) -> NetworkProfile:
    for schedule in ("timesteps", "sigmas", "step_widths"):
        _agree_closely(f"{where}.{schedule}", getattr(one, schedule), getattr(two, schedule), 1e-6)
    _agree_closely(f"{where}.branch_weights", one.branch_weights, two.branch_weights, 1e-2)
    _agree(f"sites of {where}.grams", sorted(one.grams), sorted(two.grams))
    if one.geometry is not None and two.geometry is not None:
        _agree(f"{where}.geometry", one.geometry, two.geometry)
    weighed = _in_both("range weights of ", one.range_weights, two.range_weights, left_out)
    clocked = _in_both("seconds of ", one.seconds, two.seconds, left_out) if timed else ()
    return NetworkProfile(
        one.timesteps,
        one.sigmas,
        one.step_widths,
        _log_mean(f"{where}.sensitivity", one.sensitivity, two.sensitivity, counts),
        one.branch_weights,
        {site: _joined_gram(f"{where}.grams.{site}", gram, two.grams[site]) for site, gram in one.grams.items()},
        {key: _mean(one.seconds[key], two.seconds[key], counts) for key in clocked} if timed else dict(one.seconds),
        {
            site: _log_mean(f"{where}.range_weights.{site}", one.range_weights[site], two.range_weights[site], counts)
            for site in weighed
        },
        _joined_tables(where, one, two, counts, timed, left_out),
        one.geometry or two.geometry,
    )


def _joined_gram(where: str, one: FeatureGram, two: FeatureGram) -> FeatureGram:
    _agree(f"{where}.steps", one.steps, two.steps)
    _agree(f"{where}.branches", one.branches, two.branches)
    _agree(f"{where}.present", one.present.tolist(), two.present.tolist())
    _agree(f"{where}.has_latents", one.has_latents, two.has_latents)
    values = np.concatenate([one.values, two.values])
    return FeatureGram(one.site, one.steps, one.branches, values, one.present, one.has_latents)


def _joined_tables(
    where: str, one: NetworkProfile, two: NetworkProfile, counts: tuple[int, int], timed: bool, left_out: list[str]
) -> dict[str, dict[str, Table]]:
    found: dict[str, dict[str, Table]] = {}
    if not timed and LATENCY in one.tables:  # seconds of another device say nothing
        found[LATENCY] = dict(one.tables[LATENCY])
    ones, twos = ({name: each for name, each in part.tables.items() if name not in found} for part in (one, two))
    for collector in _in_both("tables of ", ones, twos, left_out):
        mine, theirs = ones[collector], twos[collector]
        found[collector] = {}
        for site in _in_both(f"{collector} tables of ", mine, theirs, left_out):
            try:
                found[collector][site] = joined([_plain(mine[site]), _plain(theirs[site])], counts)
            except InputError as error:
                raise ProfileError(f"profiles cannot be merged: {where}.tables.{collector}.{site}: {error}") from None
    return found


def _plain(table: Table) -> Table:
    """The table with facts as a file gives them back: lists for tuples."""
    return Table(table.measures, table.labels, json.loads(json.dumps(dict(table.facts), default=plain_number)))


def plain_number(value: object) -> object:
    """What JSON writes for a number of numpy; for ``json.dumps(default=...)``. Raises TypeError for anything else."""
    if isinstance(value, np.generic):
        number: object = value.item()
        return number
    raise TypeError(f"{type(value).__name__} {value!r} is no JSON")


def _in_both(what: str, one: Mapping[str, object], two: Mapping[str, object], left_out: list[str]) -> Iterator[str]:
    """The keys that both have; the others are left out, and that is told."""
    left_out += [f"{what}{key} are left out: not in all profiles merged" for key in sorted(one.keys() ^ two.keys())]
    return (key for key in one if key in two)


def _repeated(one: Sequence[str], two: Sequence[str]) -> list[str]:
    both = Counter(one).keys() & Counter(two).keys()
    return [
        f"prompt {prompt!r} is in more than one of the profiles merged and counts each time" for prompt in sorted(both)
    ]


def _facts_of_plans(one: Plan | None, two: Plan | None) -> Iterator[tuple[str, Any, Any]]:
    """What two plans have to agree on: field, and what it is in each."""
    if one is None or two is None:
        return
    yield "plan.model.structure", one.model.structure, two.model.structure
    yield "plan.model.class", one.model.class_name, two.model.class_name
    yield "plan.sampler.class", one.sampler.class_name, two.sampler.class_name
    yield "plan.sampler.guidance", one.sampler.guidance, two.sampler.guidance
    yield "plan.device.dtype", one.device.dtype, two.device.dtype
    for name in {**one.geometry, **two.geometry}:
        where = f"plan.geometry.{name} (but for the batch)"
        yield where, one.geometry.get(name, ())[1:], two.geometry.get(name, ())[1:]
    for name in {**one.settings, **two.settings}:
        yield f"plan.settings.{name}", one.settings.get(name), two.settings.get(name)


def _agree(what: str, mine: object, theirs: object) -> None:
    if mine != theirs:
        raise ProfileError(f"profiles cannot be merged: {what}: {mine} in one, {theirs} in the other")


def _agree_closely(what: str, mine: Sequence[float], theirs: Sequence[float], tolerance: float) -> None:
    _agree(f"the length of {what}", len(mine), len(theirs))
    apart = ~np.isclose(mine, theirs, rtol=tolerance, atol=1e-12)
    if apart.any():
        at = int(np.argmax(apart))
        _agree(f"{what}[{at}]", mine[at], theirs[at])


def _mean(one: float, two: float, counts: tuple[int, int]) -> float:
    return float(np.average([one, two], weights=counts))


def _log_mean(what: str, one: Sequence[float], two: Sequence[float], counts: tuple[int, int]) -> tuple[float, ...]:
    _agree(f"the length of {what}", len(one), len(two))
    logs = np.log(np.maximum([one, two], np.finfo(float).tiny))
    return tuple(np.exp(np.average(logs, axis=0, weights=counts)).tolist())
