"""Findings: what others have observed on diffusion transformers, as numbers and sentences. Data only; no torch.

Patterns of heads hold over steps and prompts; early steps differ; guidance branches look alike; some heads are idle;
errors matter more at some depths and steps; features of neighbouring steps are close. ``ditopt.observations`` reads
these off a profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

TOP = 0.9
"""Top blocks of a row of blocks: the fewest that hold so much of its mass."""
HOLDS = 0.8
"""A pattern holds where top blocks of elsewhere keep at least so much mass."""


def _others(count: int) -> str:
    return "another" if count == 1 else f"{count} others"


@dataclass(frozen=True)
class OverSteps:
    """How long the pattern of a head lasts: mass of later steps in the top blocks of an earlier one (the anchor).

    ``by_lag[n]``: mean mass kept n steps after an anchor, over anchors, heads, sites, prompts and branches;
    ``after_anchor``: by anchor step, the mean over all later steps; ``holding``: by anchor step, the share of heads of
    which at least 80% is kept in *every* later step (mean over prompts and branches); ``blocks``: the mean share of all
    blocks that the top blocks are, which an aimless choice of blocks would keep of the mass.
    """

    by_lag: Mapping[int, float]
    after_anchor: Mapping[int, float]
    holding: Mapping[int, float]
    blocks: float
    heads: int

    def __str__(self) -> str:
        first, last = min(self.by_lag), max(self.by_lag)
        chosen = ", ".join(f"{share:.0%} if chosen at step {anchor}" for anchor, share in self.holding.items())
        return (
            f"Patterns over steps: the blocks with {TOP:.0%} of a head's mass ({self.blocks:.0%} of all blocks) keep "
            f"{self.by_lag[first]:.0%} of the mass at lag {first} and {self.by_lag[last]:.0%} of it at lag {last}; of "
            f"{self.heads} heads, {HOLDS:.0%} or more is kept to the end for {chosen}."
        )


@dataclass(frozen=True)
class EarlySteps:
    """Whether early steps differ: mass kept up to ``lag`` steps after anchors in the first third of steps, and later.

    ``early`` and ``late`` are means over heads, sites, prompts and branches.
    """

    early: float
    late: float
    lag: int

    def __str__(self) -> str:
        return (
            f"Early steps: up to {self.lag} steps later, blocks chosen in the first third of steps keep "
            f"{self.early:.0%} of the mass, blocks chosen later {self.late:.0%}."
        )


@dataclass(frozen=True)
class OverPrompts:
    """Whether patterns are those of the model: mass of other prompts in the top blocks of the first one's maps.

    ``kept``: mean over heads, sites, anchors, branches and prompts but the first; ``own``: the mass of the first prompt
    itself in them; ``holding``: the share of heads of which at least 80% is kept for every other prompt (mean over
    anchors and branches); ``blocks``: the mean share of all blocks that the top blocks are.
    """

    kept: float
    own: float
    holding: float
    blocks: float
    prompts: int

    def __str__(self) -> str:
        return (
            f"Patterns over prompts: the blocks with {self.own:.0%} of one prompt's mass ({self.blocks:.0%} of all "
            f"blocks) keep {self.kept:.0%} of the mass of {_others(self.prompts - 1)}, and {HOLDS:.0%} or more of each "
            f"for {self.holding:.0%} of heads."
        )


@dataclass(frozen=True)
class Branches:
    """Whether guidance branches look alike: mass of branch 1 in the top blocks of branch 0 in the same step.

    ``kept``: mean over heads, sites, prompts and steps; ``holding``: the share of heads with at least 80% in the mean
    over steps and prompts; ``early`` and ``late``: ``kept`` in the first third of steps, and later.
    """

    kept: float
    holding: float
    early: float
    late: float

    def __str__(self) -> str:
        return (
            f"Guidance branches: the blocks with {TOP:.0%} of the mass of one keep {self.kept:.0%} of the other's "
            f"({self.early:.0%} in the first third of steps, {self.late:.0%} later), and {HOLDS:.0%} or more for "
            f"{self.holding:.0%} of heads."
        )


@dataclass(frozen=True)
class Roles:
    """The roles of heads: how many of all have each, and by site; how sure and how stable they are.

    ``confidence``, ``over_steps`` and ``over_prompts`` are means over all heads (see ``ditopt.roles``); ``idle`` is the
    share of idle heads among those whose share of the output was measured (NaN: of none).
    """

    counts: Mapping[str, int]
    by_site: Mapping[str, Mapping[str, int]]
    confidence: float
    over_steps: float
    over_prompts: float
    idle: float

    @property
    def heads(self) -> int:
        """All heads."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {role}" for role, count in self.counts.items())
        idle = "" if math.isnan(self.idle) else f" {self.idle:.0%} of heads are idle."
        return (
            f"Roles of {self.heads} heads: {counts}; confidence {self.confidence:.2f} in the mean, the same role in "
            f"{self.over_steps:.0%} of steps and {self.over_prompts:.0%} of prompts.{idle}"
        )


@dataclass(frozen=True)
class SparseHeads:
    """How many heads a sparse pattern could serve, per limit of the relative error of their site's output.

    A head counts at ``limit`` if a pattern's error, in the mean over prompts, steps and branches, is at most that;
    ``serves[limit]`` is the share of such heads, ``density[limit]`` the mean density of the sparsest such pattern over
    these heads (of blocks, and of means where it has a rest, against dense attention), ``families[limit]`` how often it
    is of each kind. ``overall[limit]`` is the mean density of all heads, those without a pattern being dense. Skipping
    a head without a rest is no pattern here.
    """

    serves: Mapping[float, float]
    density: Mapping[float, float]
    overall: Mapping[float, float]
    families: Mapping[float, Mapping[str, int]]
    heads: int

    def __str__(self) -> str:
        each = (
            f"{share:.0%} within {limit:.0%}" + (f" (with {self.density[limit]:.0%} of their work)" if share else "")
            for limit, share in self.serves.items()
        )
        return f"Sparse patterns serve, of {self.heads} heads, by error of their site's output: {', '.join(each)}."


@dataclass(frozen=True)
class Similarity:
    """How close a feature is to itself one step earlier, by kind of site.

    ``error[kind]``: the mean relative error of reading it unchanged, over sites, prompts, branches and steps;
    ``early`` and ``late``: in the first third of steps, and later; ``worst``: the largest mean over prompts and
    branches in a single step at a single site.
    """

    error: Mapping[str, float]
    early: Mapping[str, float]
    late: Mapping[str, float]
    worst: Mapping[str, float]

    def __str__(self) -> str:
        each = (
            f"{kind} {error:.1%} ({self.early[kind]:.1%} in the first third, {self.late[kind]:.1%} later)"
            for kind, error in self.error.items()
        )
        return f"Features differ from one step to the next by: {', '.join(each)}."


@dataclass(frozen=True)
class Sensitivity:
    """How much an error moves the final latents, by depth and by step; from planted errors.

    ``by_group``: mean over steps; ``by_step``: mean over groups, by step; ``over_depth`` and ``over_steps``: the last
    third's mean over the first third's, above 1 where later ones matter more; ``spread``: the largest of all factors
    over the smallest.
    """

    by_group: Mapping[str, float]
    by_step: Mapping[int, float]
    over_depth: float
    over_steps: float
    spread: float

    def __str__(self) -> str:
        steps = [step for step, factor in self.by_step.items() if not math.isnan(factor)]
        third = max(1, round(len(self.by_step) / 3))
        late, early = (" and ".join(map(str, some)) for some in (steps[-third:], steps[:third]))
        return (
            f"Errors of one size in the last third of the depth move the sample {self.over_depth:.2g} times as much as "
            f"in the first; in step {late} {self.over_steps:.2g} times as much as in step {early}; the extremes are "
            f"{self.spread:.2g} times apart."
        )


@dataclass(frozen=True)
class Findings:
    """All of them, for one network; None: not measured."""

    over_steps: OverSteps | None = None
    early_steps: EarlySteps | None = None
    over_prompts: OverPrompts | None = None
    branches: Branches | None = None
    roles: Roles | None = None
    sparse: SparseHeads | None = None
    similarity: Similarity | None = None
    sensitivity: Sensitivity | None = None


def describe(findings: Findings) -> list[str]:
    """Plain sentences with the numbers, one for each thing that was measured."""
    parts = (getattr(findings, part.name) for part in fields(findings))
    return [str(part) for part in parts if part is not None]
