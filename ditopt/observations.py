"""Observations: the findings of ``ditopt.findings``, read off a profile. Data only; numpy, no torch.

Each function takes a network's tables of one collector by site and says one of these; None where the tables do not hold
what it needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ditopt.errors import InputError
from ditopt.findings import (
    HOLDS,
    TOP,
    Branches,
    EarlySteps,
    Findings,
    OverPrompts,
    OverSteps,
    Roles,
    Sensitivity,
    Similarity,
    SparseHeads,
)
from ditopt.measures import PROMPT, Measure, Numbers, Table, growth_over_prompts
from ditopt.profile import NetworkProfile
from ditopt.roles import ROLES, HeadRole, head_roles

Tables = Mapping[str, Table]
LIMITS = (0.01, 0.02, 0.05)
"""Relative output errors of a head's pattern."""
NO_PATTERNS = ("skip", "dense")
"""Candidates that are no sparse pattern, unless they have a rest."""


def findings_of(network: NetworkProfile) -> Findings:
    """What a network's tables of the collectors ``attention``, ``patterns``, ``features`` and ``sensitivity`` say."""
    attention, patterns = network.tables.get("attention", {}), network.tables.get("patterns", {})
    return Findings(
        over_steps(attention),
        early_steps(attention),
        over_prompts(attention),
        branches(attention),
        roles({site: table for site, table in attention.items() if table.facts.get("kind") != "cross"}, patterns),
        sparse_heads(patterns),
        similarity(network.tables.get("features", {})),
        _planted(network),
    )


def over_steps(attention: Tables) -> OverSteps | None:
    """From ``recall`` [prompt, step, branch, head, anchor] and ``recall_blocks``, of self- and joint attention."""
    by_lag: dict[int, list[float]] = {}
    after: dict[int, list[float]] = {}
    holds: dict[int, list[bool]] = {}
    blocks, heads = [], 0
    for table in _own(attention, "recall"):
        recall = _recall(table)
        heads += recall.shape[1]
        if "recall_blocks" in table.measures:
            blocks.append(_mean(table["recall_blocks"].values))
        for place, anchor in enumerate(_anchors(table)):
            later = recall[anchor + 1 :, :, place]
            for lag, values in enumerate(later, 1):
                by_lag.setdefault(lag, []).extend(values[~np.isnan(values)].tolist())
            known = ~np.isnan(later)
            if known.any():
                after.setdefault(anchor, []).append(_mean(later))
                lowest = np.where(known, later, np.inf).min(0)
                holds.setdefault(anchor, []).extend((lowest[known.any(0)] >= HOLDS).tolist())
    if not any(by_lag.values()):
        return None
    lags = {lag: float(np.mean(values)) for lag, values in sorted(by_lag.items()) if values}
    shares = {anchor: float(np.mean(found)) for anchor, found in sorted(holds.items())}
    means = {anchor: float(np.mean(values)) for anchor, values in sorted(after.items())}
    return OverSteps(lags, means, shares, _mean(blocks), heads)


def early_steps(attention: Tables) -> EarlySteps | None:
    """From ``recall``; steps up to a sixth of all (at least one) behind each anchor are looked at."""
    early: list[Numbers] = []
    late: list[Numbers] = []
    lag = 1
    for table in _own(attention, "recall"):
        recall = _recall(table)
        steps = len(recall)
        lag = max(1, steps // 6)
        for place, anchor in enumerate(_anchors(table)):
            (early if 3 * anchor < steps else late).append(recall[anchor + 1 : anchor + 1 + lag, :, place].ravel())
    found = EarlySteps(_mean(np.concatenate([*early, []])), _mean(np.concatenate([*late, []])), lag)
    return None if math.isnan(found.early) or math.isnan(found.late) else found


def over_prompts(attention: Tables) -> OverPrompts | None:
    """From ``map`` [prompt, anchor, branch, head, query_block, key_block] of self- and joint attention."""
    kept: list[float] = []
    own: list[float] = []
    blocks: list[float] = []
    holds: list[bool] = []
    prompts = 0
    for table in _own(attention, "map"):
        measure = table["map"]
        prompts = measure.size(PROMPT)
        if prompts < 2:
            continue
        axes = (PROMPT, "anchor", "branch", "head", "query_block", "key_block")
        maps = measure.ordered(*axes).astype(np.float32)
        top = top_blocks(maps[0])
        mass = np.where(top, maps, 0).sum(-1).mean(-1)  # [prompt, anchor, branch, head]; NaN is kept below
        mass = np.where(np.isnan(maps).any((-2, -1)) | np.isnan(maps[0]).any((-2, -1)), np.nan, mass)
        own.append(_mean(mass[0]))
        kept.append(_mean(mass[1:]))
        blocks.append(_mean(np.where(np.isnan(mass[0]), np.nan, top.mean((-2, -1)))))
        by_head = Measure((PROMPT, "anchor", "branch", "head"), mass[1:], True).mean("anchor", "branch").values
        holds += (by_head.min(0) >= HOLDS).tolist()
    if math.isnan(_mean(kept)):
        return None
    return OverPrompts(_mean(kept), _mean(own), _mean(holds), _mean(blocks), prompts)


def branches(attention: Tables) -> Branches | None:
    """From ``between_branches`` [prompt, step, head] of self- and joint attention."""
    tables = [table["between_branches"] for table in _own(attention, "between_branches")]
    tables = [measure for measure in tables if not np.isnan(measure.values).all()]
    if not tables:
        return None
    by_step = [measure.mean(PROMPT).ordered("step", "head") for measure in tables]
    by_head = np.concatenate([measure.mean(PROMPT, "step").values for measure in tables])
    early, late = _early_and_late(by_step)
    values = np.concatenate([each.ravel() for each in by_step])
    return Branches(_mean(values), _mean(by_head[~np.isnan(by_head)] >= HOLDS), early, late)


def roles(attention: Tables, patterns: Tables) -> Roles | None:
    """The rule of ``ditopt.roles`` at every site; sites that have no table of masses are left out."""
    by_site: dict[str, dict[str, int]] = {}
    heads: list[HeadRole] = []
    measured: list[str] = []
    for site, table in attention.items():
        if not any(name.startswith("mass_") for name in table.measures):
            continue
        try:
            found = head_roles(table, patterns.get(site))
        except InputError:  # attention that was left out: the profile's reasons say why
            continue
        by_site[site] = found.counts
        heads += found.heads
        if site in patterns and "share" in patterns[site].measures:
            measured += found.roles
    if not heads:
        return None
    counts = {role: sum(count.get(role, 0) for count in by_site.values()) for role in ROLES}
    return Roles(
        {role: count for role, count in counts.items() if count},
        by_site,
        _mean([head.confidence for head in heads]),
        _mean([head.over_steps for head in heads]),
        _mean([head.over_prompts for head in heads]),
        measured.count("idle") / len(measured) if measured else math.nan,
    )


def sparse_heads(patterns: Tables, limits: Sequence[float] = LIMITS) -> SparseHeads | None:
    """From ``error`` [prompt, step, branch, head, candidate] and ``density`` [candidate]."""
    best: dict[float, list[tuple[float, str] | None]] = {limit: [] for limit in limits}
    for table in _own(patterns, "error"):
        families = [_family(json.loads(str(label))) for label in table.labels["candidate"]]
        used = [i for i, family in enumerate(families) if family not in NO_PATTERNS]
        if not used:
            continue
        error = table["error"].mean(PROMPT, "step", "branch").ordered("head", "candidate")
        shares = table["density"].values.tolist()
        for limit, chosen in best.items():
            for head in error:
                fitting = [(float(shares[i]), families[i]) for i in used if head[i] <= limit]
                chosen.append(min(fitting, default=None))
    heads = len(best[limits[0]])
    if not heads:
        return None
    found = {limit: [each for each in chosen if each is not None] for limit, chosen in best.items()}
    names = {limit: [family for _, family in fits] for limit, fits in found.items()}
    return SparseHeads(
        {limit: len(fits) / heads for limit, fits in found.items()},
        {limit: _mean([density for density, _ in fits]) for limit, fits in found.items()},
        {limit: _mean([each[0] if each is not None else 1.0 for each in chosen]) for limit, chosen in best.items()},
        {limit: {family: every.count(family) for family in sorted(set(every))} for limit, every in names.items()},
        heads,
    )


def _family(candidate: Mapping[str, object]) -> str:
    """A candidate's pattern, and whether what it skips counts by means, or as an earlier step had it."""
    name, rest = str(candidate.get("pattern")), candidate.get("rest")
    if rest is None:
        return name
    counts = "kept rest" if isinstance(rest, Mapping) and "kept" in rest else "means"
    return f"{counts} alone" if name == "skip" else f"{name} and {counts}"


def similarity(features: Tables) -> Similarity | None:
    """From ``plain`` [prompt, step, branch, lag] at lag 1, by the fact ``kind``."""
    by_kind: dict[str, list[Numbers]] = {}
    for table in features.values():
        if "plain" in table.measures and 1 in table.labels.get("lag", ()):
            errors = table["plain"].at(lag=table.position("lag", 1)).mean(PROMPT, "branch").values
            if not np.isnan(errors).all():
                by_kind.setdefault(str(table.facts.get("kind", "")), []).append(errors)
    if not by_kind:
        return None
    parts = {kind: _early_and_late(errors) for kind, errors in by_kind.items()}
    return Similarity(
        {kind: _mean(np.concatenate(errors)) for kind, errors in by_kind.items()},
        {kind: early for kind, (early, _) in parts.items()},
        {kind: late for kind, (_, late) in parts.items()},
        {kind: float(np.nanmax(np.concatenate(errors))) for kind, errors in by_kind.items()},
    )


def _planted(network: NetworkProfile) -> Sensitivity | None:
    """By block and step: noise planted in a module's output, up to the network's output and on to the sample."""
    blocks: dict[str, list[Numbers]] = {}
    steps: tuple[int, ...] = ()
    for site, table in network.tables.get("sensitivity", {}).items():
        if "to_output" in table.measures and "noise" in table.labels.get("error", ()):
            steps = tuple(int(step) for step in table.labels["anchor"])
            growth = growth_over_prompts(table["to_output"]).at(error=table.position("error", "noise")).values
            blocks.setdefault(site.rpartition(".")[0], []).append(growth)
    if not blocks:
        return None
    further = np.array([network.step_widths[step] * network.sensitivity[step] for step in steps])
    of_blocks = [Measure(("module", "step"), np.array(each), True).geometric_mean("module") for each in blocks.values()]
    factors = [each.values * further for each in of_blocks]
    return None if np.isnan(factors).all() else sensitivity(list(blocks), steps, factors)


def sensitivity(groups: Sequence[str], steps: Sequence[int], factors: npt.ArrayLike) -> Sensitivity:
    """From factors ``[groups, steps]`` by which errors grow to the final latents; groups from shallow to deep.

    NaN: not measured.

    Raises:
        InputError: the factors are not of so many groups and steps, or none is known.
    """
    values = np.asarray(factors, dtype=float)
    if values.shape != (len(groups), len(steps)) or np.isnan(values).all():
        wanted = f"of {len(groups)} groups and {len(steps)} steps, not all NaN"
        raise InputError(f"factors of shape {list(values.shape)} have to be {wanted}")
    by_group = Measure(("group", "step"), values, True).mean("step").values
    by_step = Measure(("group", "step"), values, True).mean("group").values
    smallest = float(np.nanmin(values))
    return Sensitivity(
        dict(zip(groups, by_group.tolist(), strict=True)),
        dict(zip(steps, by_step.tolist(), strict=True)),
        _last_over_first(by_group),
        _last_over_first(by_step),
        float(np.nanmax(values)) / smallest if smallest > 0 else math.inf,
    )


def top_blocks(maps: Numbers, share: float = TOP) -> npt.NDArray[np.bool_]:
    """``[..., Q, K]``: of every row of blocks the fewest that hold ``share`` of its mass; ties go to the first."""
    order = np.argsort(-maps, axis=-1, kind="stable")
    ordered = np.take_along_axis(maps, order, -1)
    before = np.cumsum(ordered, -1) - ordered
    found = np.zeros(maps.shape, dtype=bool)
    np.put_along_axis(found, order, before < share * ordered.sum(-1, keepdims=True), -1)
    return found


def _own(tables: Tables, measure: str) -> Iterator[Table]:
    """The tables of self- and joint attention that have a measure."""
    for table in tables.values():
        if table.facts.get("kind") != "cross" and measure in table.measures:
            yield table


def _recall(table: Table) -> Numbers:
    """``[step, head, anchor]``: means over prompts and branches."""
    return table["recall"].mean(PROMPT, "branch").ordered("step", "head", "anchor")


def _anchors(table: Table) -> list[int]:
    return [int(label) for label in table.labels["anchor"]]


def _early_and_late(by_step: Sequence[Numbers]) -> tuple[float, float]:
    """Means of arrays ``[step, ...]`` over the first third of steps and over the others."""
    thirds = [max(1, round(len(values) / 3)) for values in by_step]
    early = [values[:third].ravel() for third, values in zip(thirds, by_step, strict=True)]
    late = [values[third:].ravel() for third, values in zip(thirds, by_step, strict=True)]
    return _mean(np.concatenate(early)), _mean(np.concatenate(late))


def _last_over_first(values: Numbers) -> float:
    third = max(1, round(len(values) / 3))
    first = _mean(values[:third])
    return _mean(values[-third:]) / first if first > 0 else math.nan


def _mean(values: npt.ArrayLike) -> float:
    """The mean of what is known; NaN of nothing."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else math.nan
