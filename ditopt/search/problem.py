"""The search problem of one network: its measured profile as numbers, and the error tables made from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ditopt.errors import InputError
from ditopt.profile import Array, NetworkProfile
from ditopt.search.space import TECHNIQUES, Candidate, candidates
from ditopt.search.table import ErrorTable, with_histories
from ditopt.sites import STEP

Additive = Literal["squares", "norms"]
Position = tuple[int, int]


@dataclass(frozen=True)
class RangeProblem:
    """A contiguous range of blocks that a computed step may skip.

    ``gram`` is ``[P, T, T]`` of the range's residual (what it adds to the stream); ``weight`` ``[T]`` the factor
    from an error in that residual to one in the network's output; ``seconds_saved`` what skipping it saves in a
    step; ``first`` and ``last`` its ends in execution order, (stack, index in it).
    """

    name: str
    gram: Array
    weight: Array
    seconds_saved: float
    first: Position
    last: Position


@dataclass(frozen=True)
class SearchProblem:
    """All that the search knows of one network.

    Args:
        times: coordinate of each of the T steps (sigma), for true distances.
        widths: ``[T]``, how far a step moves the latents per unit of output.
        sensitivity: ``[T]``, growth of an error of that step up to the final sample.
        gram: ``[P, T, T]``, or ``[P, 2T, 2T]`` with the latents, of the effective (guided) output.
        seconds_full: of one computed step.
        seconds_predicted: of one predicted step; None where graph breaks cut the network, so that ranges of blocks
            can be predicted and whole steps cannot.
        ranges: what a computed step may skip.
        techniques: see ``space.candidates``.
        additive: whether a schedule is priced by the sum of its steps' errors' norms, or of their squares. Errors of
            neighbouring forecasts point the same way, so norms are the better guess.
        ridge: of the fits, relative.
        sample_norm: norm of the final sample; errors are reported relative to it.
        groups: steps with different values ran different branches and cannot predict each other.
        network: the name that rules are written for.
        simplify: whether computed steps run simplified, as ``Dense.simplify``.
        simplify_reason: what speaks against the other; empty where there was no choice.
        dtype: what computed steps' products run in, None where that is the model's own dtype.
        dtype_tried: the dtype that was considered; None where there was no choice.
        dtype_reason: what speaks against the one not taken.
        second_order: share of the second-order formula in computed steps, as ``Dense.second_order``.
        schedules: the sets of computed steps that a recipe allows, whose predicted steps all do alike; None: all sets.
        site: of what "whole steps" are predicted: a recipe may predict a range of blocks in their place.
        max_history: the most features of ``site`` that predictors may read; None: as many as T allows.
    """

    times: tuple[float, ...]
    widths: Array
    sensitivity: Array
    gram: Array
    seconds_full: float
    seconds_predicted: float | None
    ranges: Mapping[str, RangeProblem] = field(default_factory=dict)
    techniques: tuple[str, ...] = TECHNIQUES
    additive: Additive = "norms"
    ridge: float = 1e-6
    sample_norm: float = 1.0
    groups: tuple[int, ...] = ()
    network: str = "*"
    simplify: bool = False
    simplify_reason: str = ""
    dtype: str | None = None
    dtype_tried: str | None = None
    dtype_reason: str = ""
    second_order: float | None = None
    schedules: tuple[tuple[int, ...], ...] | None = None
    site: str = STEP
    max_history: int | None = None

    def __post_init__(self) -> None:
        """Check the shapes. Raises InputError naming what disagrees."""
        total = self.steps
        if not total:
            raise InputError("the search problem has no steps")
        if self.gram.ndim != 3 or self.gram.shape[1:] not in {(total, total), (2 * total, 2 * total)}:
            wanted = f"[P, {total}, {total}] or twice that"
            raise InputError(f"the Gram matrix has shape {self.gram.shape}; {total} steps need {wanted}")
        named = {"widths": self.widths, "sensitivity": self.sensitivity}
        for name, values in named.items():
            if values.shape != (total,):
                raise InputError(f"{name} has shape {values.shape}; {total} steps need [{total}]")
        for name, values in {**named, "gram": self.gram}.items():
            if not np.isfinite(values).all():
                raise InputError(f"{name} contains NaN or infinite values; profile again")

    @classmethod
    def from_profile(
        cls,
        profile: NetworkProfile,
        techniques: Iterable[str] = TECHNIQUES,
        *,
        range_weights: Mapping[str, Sequence[float]] | None = None,
        additive: Additive = "norms",
        ridge: float = 1e-6,
        sample_norm: float = 1.0,
        network: str = "*",
    ) -> SearchProblem:
        """The problem that a measured profile poses.

        Ranges without an entry in ``profile.seconds`` save nothing and are left out. A range without an
        entry in ``range_weights`` is taken to pass its *relative* error on to the output.

        Raises:
            InputError: the profile lacks the step site or the seconds of a full step.
        """
        for key, name, found in (("grams", STEP, profile.grams), ("seconds", "full", profile.seconds)):
            if name not in found:
                raise InputError(f"the profile's {key} have no entry {name!r}; they have {sorted(found)}")
        step = profile.grams[STEP]
        gram = step.effective(profile.branch_weights)
        energy = np.einsum("ptt->t", gram[:, : step.steps, : step.steps])
        patterns = [tuple(column) for column in step.present.T]
        numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns))}
        stacks: dict[str, int] = {}
        ranges = {}
        for name, site in profile.grams.items():
            if name == STEP or name not in profile.seconds:
                continue
            values = site.effective(profile.branch_weights)
            relative = np.sqrt(energy / np.maximum(np.einsum("ptt->t", values), 1e-30))
            weight = np.asarray((range_weights or {}).get(name, relative))
            ranges[name] = RangeProblem(name, values, weight, profile.seconds[name], *_ends(name, stacks))
        return cls(
            times=tuple(profile.sigmas[: step.steps]),
            widths=np.asarray(profile.step_widths, dtype=float),
            sensitivity=np.asarray(profile.sensitivity, dtype=float),
            gram=gram,
            seconds_full=profile.seconds["full"],
            seconds_predicted=profile.seconds.get("predicted"),
            ranges=ranges,
            techniques=tuple(techniques),
            additive=additive,
            ridge=ridge,
            sample_norm=sample_norm,
            groups=tuple(numbers[pattern] for pattern in patterns),
            network=network,
        )

    def holding(self, most: Mapping[str, int]) -> tuple[SearchProblem, tuple[str, ...]]:
        """The problem where of each site no more features than ``most`` may be held at once, and what was left out."""
        told = []
        depth = most.get(self.site, 0)
        if self.seconds_predicted is not None and depth < 3:
            told.append(f"{self.site}: of its features {depth} fit into max_state_bytes, so no more are read")
        none = [name for name in self.ranges if not most.get(name)]
        if none:
            told.append(f"{', '.join(none)}: left out, as a feature takes more than max_state_bytes")
        kept = {name: site for name, site in self.ranges.items() if name not in none}
        predicted = self.seconds_predicted if depth else None
        return replace(self, ranges=kept, max_history=depth, seconds_predicted=predicted), tuple(told)

    @property
    def steps(self) -> int:
        """T, the number of network evaluations in the dense schedule."""
        return len(self.times)

    @cached_property
    def weights(self) -> Array:
        """``[T]``: growth of an output error of each step up to the final sample, in units of its norm."""
        return np.asarray(self.widths * self.sensitivity / self.sample_norm)

    def price(self, growth: Array) -> Array:
        """What a table entry counts in a step whose errors grow by ``growth``: squared where squares are added."""
        return np.asarray(growth**2 if self.additive == "squares" else np.abs(growth))

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The predictors allowed for whole steps; fewer features of history where T makes them costly."""
        if self.seconds_predicted is None:
            return ()
        depth = 3 if self.steps <= 50 else 2 if self.steps <= 200 else 1
        depth = depth if self.max_history is None else min(depth, self.max_history)
        return candidates(self.techniques, depth, latents=self.gram.shape[1] == 2 * self.steps)

    @cached_property
    def range_candidates(self) -> tuple[Candidate, ...]:
        """The predictors allowed for ranges of blocks."""
        return candidates(self.techniques, 2 if self.steps <= 200 else 1, latents=False)

    @cached_property
    def table(self) -> ErrorTable:
        """The errors of whole-step predictions."""
        return ErrorTable.build(self.times, self.gram, self.candidates, self.additive, self.ridge, self.groups)

    @cached_property
    def allowed(self) -> tuple[tuple[tuple[int, ...], dict[int, Candidate], float], ...]:
        """Of ``schedules`` those that one predictor can carry out: computed steps, predictors, the additive error.

        Every step has the same predictor, or where its history is too short the deepest simpler one.
        """
        found, price = [], self.price(self.weights)
        for kept in self.schedules or ():
            histories = with_histories(kept, self.steps)
            for candidate in self.candidates:
                simpler = [other for other in self.candidates if other.history < candidate.history]
                options = [candidate, *sorted(simpler, key=lambda other: -other.history)]
                families, error = {}, 0.0
                for step, past in histories.items():
                    told = [(each, self.table.error(self.candidates.index(each), step, past)) for each in options]
                    family, own = next((pair for pair in told if np.isfinite(pair[1])), (candidate, np.inf))
                    families[step] = family
                    error += float(price[step]) * own
                if np.isfinite(error):
                    found.append((kept, families, error))
        return tuple(found)

    @cached_property
    def range_tables(self) -> dict[str, ErrorTable]:
        """The errors of predicting each range."""
        return {
            name: ErrorTable.build(self.times, site.gram, self.range_candidates, self.additive, self.ridge, self.groups)
            for name, site in self.ranges.items()
        }


def _ends(name: str, stacks: dict[str, int]) -> tuple[Position, Position]:
    """First and last block of a range's name; ``stacks`` numbers block stacks in order of mention."""
    first, _, last = name.partition("..")
    stem = first.rpartition(".")[0]
    last = f"{stem}.{last}" if re.fullmatch(r"\d+", last) else last or first
    ends = []
    for block in (first, last):
        stack, _, number = block.rpartition(".")
        stack, index = (stack, int(number)) if number.isdigit() else (block, 0)
        ends.append((stacks.setdefault(stack, len(stacks)), index))
    return ends[0], ends[1]
