"""Roles of attention heads: what they look at. Data only; numpy, no torch.

A documented rule on measured masses, nothing learned. A *region* is a set of keys that a query may prefer: text, the
keys that gather most (sinks), the first frame, the same pixel of other frames (or what is next to it), what is near,
the own frame. With ``m`` the mean mass that queries give a region and ``u`` the mass that uniform attention would give,

    excess = (m - u) / (1 - u)

is 0 for uniform attention and 1 where all mass lies in the region. The regions that hold text first and then from the
smallest ``u`` to the largest, **the first whose excess is at least 1/2 gives the head its role**:

    text      text tokens, however few of them
    stripe    sinks, or the first frame: the same columns of the map for every query
    temporal  the same pixel of other frames (the mass at a token itself is taken off)
    local     within 1, 2 or 4 tokens in space and time
    spatial   the own frame
    global    no region holds half; what the head looks at moves with the content, or is everything

Nested regions (what is near is partly in the own frame) go to the smallest that explains the head. A region that is
more than half of all keys says nothing and is left out: an image has no spatial heads. A head whose ``share`` of the
site's projected output is below 2% is **idle**, whatever it looks at. Keys of cross-attention have no place in space
and are all text, so its heads are stripe, global or idle only.

Confidence, 0 to 1, is the least distance of what was decided from its threshold: ``2 |excess - 1/2|`` of the role that
won (of its best region) and of each region of another role that was passed over, and ``|share / 2% - 1|`` (at most 1)
for idle or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ditopt.errors import InputError
from ditopt.measures import PROMPT, Measure, Numbers, Table, nanmean

ROLES = ("spatial", "temporal", "local", "stripe", "text", "global", "idle")
HALF = 0.5
"""The least excess of a region that gives a head its role."""
IDLE_SHARE = 0.02
"""A head with less of the projected output than this, by norm, is idle."""
WIDEST = 0.5
"""The largest share of keys that a region may be."""

REGIONS = {
    "mass_text": "text",
    "mass_sinks": "stripe",
    "mass_first_frame": "stripe",
    "mass_same_pixel": "temporal",
    "mass_near_pixel": "temporal",
    "mass_near": "local",
    "mass_in_frame": "spatial",
}
OF_CROSS = ("mass_sinks",)
OWN = "mass_self"
ALONG = (PROMPT, "step", "branch", "head")
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class HeadRole:
    """What one head does.

    ``role`` is by the masses over all steps, prompts and branches, ``by_step`` by those of one step (None: not
    measured); ``over_steps`` and ``over_prompts`` are the shares of steps and prompts in which the same rule gives the
    same role.
    """

    role: str
    confidence: float
    over_steps: float
    over_prompts: float
    by_step: tuple[str | None, ...]


@dataclass(frozen=True)
class HeadRoles:
    """The roles of one attention site's heads."""

    heads: tuple[HeadRole, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of every head."""
        return tuple(head.role for head in self.heads)

    @property
    def counts(self) -> dict[str, int]:
        """How many heads have each role, in the order of ``ROLES``."""
        found = Counter(self.roles)
        return {role: found[role] for role in ROLES if found[role]}


def head_roles(attention: Table, patterns: Table | None = None) -> HeadRoles:
    """The role of every head of a site, from its tables of the collectors ``attention`` and ``patterns``.

    Without ``patterns`` no head is told to be idle.

    Raises:
        InputError: the table has none of the masses, or does not say what uniform attention would have.
    """
    excess = _excess(attention)
    share = None
    if patterns is not None and "share" in patterns.measures:
        share = patterns["share"].ordered(*ALONG).astype(float)
        if share.shape != excess.shape[1:]:
            raise InputError(
                f"shares of {list(share.shape)} prompts, steps, branches and heads do not belong to masses of "
                f"{list(excess.shape[1:])}"
            )
    regions = _regions(attention)
    found, sure = _judged(regions, *_means(excess, share, PROMPT, "step", "branch"))
    if (found < 0).any():
        raise InputError(f"head {int(np.argmin(found))} was not measured in any step")
    steps, _ = _judged(regions, *_means(excess, share, PROMPT, "branch"))
    prompts, _ = _judged(regions, *_means(excess, share, "step", "branch"))
    return HeadRoles(
        tuple(
            HeadRole(
                ROLES[found[head]],
                float(sure[head]),
                _agreement(steps[:, head], found[head]),
                _agreement(prompts[:, head], found[head]),
                tuple(ROLES[role] if role >= 0 else None for role in steps[:, head]),
            )
            for head in range(len(found))
        )
    )


def _parts(attention: Table) -> list[tuple[str, float, Numbers]]:
    """(role, mass under uniform attention, measured mass ``[P, T, B, H]``) of the regions, in the order of the rule."""
    uniform = attention.facts.get("uniform", {})
    names = OF_CROSS if attention.facts.get("kind") == "cross" else tuple(REGIONS)
    found: list[tuple[str, float, Numbers]] = []
    measured = [name for name in names if name in attention.measures]
    if not measured:
        raise InputError(f"no table of masses: it has {', '.join(attention.measures) or 'no measures'}")
    if all(np.isnan(attention[name].values).all() for name in measured):
        raise InputError("no mass was measured at this site: its attention was left out")
    for name in measured:
        if np.isnan(attention[name].values).all():  # no geometry
            continue
        if name not in uniform:
            raise InputError(f'the fact "uniform" does not say what mass uniform attention would have for {name}')
        measure = attention[name]
        if "distance" in measure.axes:
            near = [measure.at(distance=i).ordered(*ALONG) for i in range(measure.size("distance"))]
            found += [
                (REGIONS[name], float(u), mass.astype(float)) for u, mass in zip(uniform[name], near, strict=True)
            ]
            continue
        mass, u = measure.ordered(*ALONG).astype(float), float(uniform[name])
        if name == "mass_same_pixel" and OWN in attention.measures:
            mass, u = mass - attention[OWN].ordered(*ALONG), u - float(uniform[OWN])
        found.append((REGIONS[name], u, mass))
    return sorted((part for part in found if part[1] <= WIDEST), key=lambda part: (part[0] != "text", part[1]))


def _regions(attention: Table) -> list[int]:
    return [ROLES.index(role) for role, _, _ in _parts(attention)]


def _excess(attention: Table) -> Numbers:
    """``[regions, P, T, B, H]``; a table whose regions are all too wide has none."""
    parts = _parts(attention)
    name = next(name for name in REGIONS if name in attention.measures)
    measure: Measure = attention[name]
    sizes = [measure.size(axis) for axis in ALONG]
    return np.array([(mass - u) / (1 - u) for _, u, mass in parts]).reshape(len(parts), *sizes)


def _means(excess: Numbers, share: Numbers | None, *axes: str) -> tuple[Numbers, Numbers | None]:
    along = tuple(ALONG.index(axis) for axis in axes)
    return nanmean(excess, tuple(a + 1 for a in along)), None if share is None else nanmean(share, along)


def _judged(regions: Sequence[int], excess: Numbers, share: Numbers | None) -> tuple[Indices, Numbers]:
    """(positions in ``ROLES``, -1: not measured; confidence), both ``[..., H]``, of ``[regions, ..., H]``."""
    shape = excess.shape[1:]
    role = np.full(shape, ROLES.index("global"))
    winner = np.full(shape, len(regions))
    for number, (region, values) in reversed(list(enumerate(zip(regions, excess, strict=True)))):
        wins = values >= HALF
        role[wins], winner[wins] = region, number
    sure = np.ones(shape)
    for number, (region, values) in enumerate(zip(regions, excess, strict=True)):
        alike = [other for of, other in zip(regions, excess, strict=True) if of == region]
        sure = np.where(winner == number, np.minimum(sure, 2 * (np.max(alike, axis=0) - HALF)), sure)
        passed = (number < winner) & (role != region)
        sure = np.where(passed, np.minimum(sure, 2 * (HALF - values)), sure)
    unknown = np.isnan(excess).any(axis=0)
    if share is not None:
        role[share < IDLE_SHARE] = ROLES.index("idle")
        apart = np.minimum(1.0, np.abs(share / IDLE_SHARE - 1))
        sure = np.where(share < IDLE_SHARE, apart, np.minimum(sure, apart))
        unknown |= np.isnan(share)
    role[unknown] = -1
    return role, sure


def _agreement(roles: Indices, role: int) -> float:
    known = roles[roles >= 0]
    return float((known == role).mean()) if known.size else float("nan")
