"""Published observations are read off tables whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ditopt import observations as o
from ditopt.errors import InputError
from ditopt.findings import Findings, describe
from ditopt.measures import Measure, Table
from ditopt.profile import NetworkProfile

STEPS, ANCHORS = 12, (0, 6, 11)
RECALL = ("prompt", "step", "branch", "head", "anchor")


def recalled(heads: Sequence[Any], kind: str = "self", blocks: float = 0.25, prompts: int = 2) -> Table:
    """Each head's recall is told by a function of step and anchor."""
    values = np.full((prompts, STEPS, 2, len(heads), len(ANCHORS)), np.nan, dtype=np.float32)
    for place, anchor in enumerate(ANCHORS):
        for step in range(STEPS):
            for head, recall in enumerate(heads):
                values[:, step, :, head, place] = recall(step, anchor)
    values[:, 1::2, 1] = np.nan  # the second branch runs in even steps only
    share = np.full((prompts, 2, len(heads), len(ANCHORS)), blocks)
    measures = {
        "recall": Measure(RECALL, values, partial=True),
        "recall_blocks": Measure(("prompt", "branch", "head", "anchor"), share, partial=True),
    }
    return Table(measures, {"anchor": ANCHORS}, {"kind": kind})


def steady(step: int, anchor: int) -> float:
    return 0.9


def fading(step: int, anchor: int) -> float:
    return 0.9 - 0.05 * abs(step - anchor)


def settling(step: int, anchor: int) -> float:
    return 0.4 if anchor < 4 and step != anchor else 0.9


def test_patterns_over_steps_are_told_by_lag_and_by_heads_that_hold_to_the_end() -> None:
    tables = {"a": recalled([steady, fading]), "b": recalled([settling], blocks=0.75), "x": recalled([fading], "cross")}
    found = o.over_steps(tables)
    assert found is not None
    assert found.heads == 3
    assert found.by_lag[1] == pytest.approx((2 * 0.9 + 2 * 0.85 + 0.4 + 0.9) / 6)  # anchors 0 and 6
    assert found.by_lag[11] == pytest.approx((0.9 + 0.35 + 0.4) / 3)
    assert set(found.by_lag) == set(range(1, 12))
    assert found.holding == {0: pytest.approx(1 / 3), 6: pytest.approx(2 / 3)}  # no step follows the anchor 11
    assert found.after_anchor[6] == pytest.approx((np.mean([0.9] * 5 + [0.85, 0.8, 0.75, 0.7, 0.65]) + 0.9) / 2)
    assert found.blocks == pytest.approx(0.5)
    assert o.over_steps({"x": recalled([fading], "cross")}) is None
    assert o.over_steps({}) is None


def test_early_steps_are_compared_with_later_ones_at_the_same_lags() -> None:
    found, same = o.early_steps({"a": recalled([settling])}), o.early_steps({"a": recalled([fading])})
    assert found is not None
    assert same is not None
    assert [found.early, found.late, found.lag] == pytest.approx([0.4, 0.9, 2])
    assert [same.early, same.late, same.lag] == pytest.approx([0.825, 0.825, 2])
    assert o.early_steps({}) is None


def maps(prompts: Sequence[Sequence[Sequence[float]]]) -> Table:
    """Maps ``[prompts, heads, K]`` of one query block, at one anchor in one of two branches."""
    values = np.full((len(prompts), 1, 2, len(prompts[0]), 1, len(prompts[0][0])), np.nan, dtype=np.float16)
    values[:, 0, 0, :, 0] = np.array(prompts)
    axes = ("prompt", "anchor", "branch", "head", "query_block", "key_block")
    return Table({"map": Measure(axes, values, partial=True)}, facts={"kind": "joint"})


def test_patterns_over_prompts_are_those_of_the_first_one() -> None:
    first = [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    second = [[0.4, 0.6, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    third = [[0.5, 0.4, 0.1, 0.0], [0.75, 0.0, 0.0, 0.25]]
    found = o.over_prompts({"a": maps([first, second, third])})
    assert found is not None
    assert found.kept == pytest.approx((1.0 + 0.5 + 0.9 + 0.75) / 4, abs=1e-3)
    assert found.own == pytest.approx(1.0, abs=1e-3)
    assert found.holding == 0.5
    assert found.blocks == pytest.approx((0.5 + 0.25) / 2)
    assert found.prompts == 3
    assert o.over_prompts({"a": maps([first])}) is None


def test_top_blocks_are_the_fewest_with_the_mass_and_ties_go_to_the_first() -> None:
    rows = np.array([[0.25, 0.25, 0.25, 0.25], [0.05, 0.9, 0.05, 0.0], [0.5, 0.35, 0.1, 0.05]])
    assert o.top_blocks(rows, 0.7).tolist() == [
        [True, True, True, False],
        [False, True, False, False],
        [True, True, False, False],
    ]


def test_branches_are_alike_by_what_one_keeps_of_the_other() -> None:
    values = np.full((1, 6, 2), 0.9, dtype=np.float32)
    values[:, :, 1] = 0.6
    values[:, :2] -= 0.3
    values[:, 5] = np.nan
    tables = {
        "a": Table({"between_branches": Measure(("prompt", "step", "head"), values, True)}, facts={"kind": "self"})
    }
    found = o.branches(tables)
    assert found is not None
    assert [found.early, found.late] == pytest.approx([0.45, 0.75])
    assert found.kept == pytest.approx((2 * 0.45 + 3 * 0.75) / 5)
    assert found.holding == 0.0  # 0.78 and 0.48
    alone = Table({"between_branches": Measure(("prompt", "step", "head"), values * np.nan, True)})
    assert o.branches({"a": alone}) is None


def attention(texts: Sequence[float]) -> Table:
    values = np.broadcast_to(np.array(texts), (2, 3, 1, len(texts))).copy()
    mass = Measure(("prompt", "step", "branch", "head"), values, True)
    return Table({"mass_text": mass}, facts={"kind": "joint", "uniform": {"mass_text": 0.0}})


def test_roles_are_counted_by_site_and_idle_heads_among_those_with_a_share() -> None:
    share = Measure(("prompt", "step", "branch", "head"), np.broadcast_to([0.001, 0.5, 0.5, 0.5], (2, 3, 1, 4)).copy())
    tables = {"a": attention([1.0, 1.0, 0.0, 0.9]), "b": attention([1.0, 1.0]), "plain": Table({})}
    found = o.roles(tables, {"a": Table({"share": share})})
    assert found is not None
    assert dict(found.counts) == {"text": 4, "global": 1, "idle": 1}
    assert found.heads == 6
    assert found.by_site == {"a": {"text": 2, "global": 1, "idle": 1}, "b": {"text": 2}}
    assert found.idle == 0.25
    assert found.confidence == pytest.approx((0.95 + 1 + 1 + 0.8 + 1 + 1) / 6)
    assert (found.over_steps, found.over_prompts) == (1, 1)
    unshared = o.roles({"b": tables["b"]}, {})
    assert unshared is not None
    assert math.isnan(unshared.idle)
    assert o.roles({"plain": Table({})}, {}) is None


def patterns(errors: Sequence[Sequence[float]], kind: str = "self") -> Table:
    """Errors ``[heads, candidates]`` in the mean; the second step is twice as bad as the first."""
    names = tuple(json.dumps({"pattern": name}) for name in ("skip", "window", "temporal", "dense"))
    values = np.array(errors)[None, None, None] * np.array([2 / 3, 4 / 3])[None, :, None, None, None]
    axes = ("prompt", "step", "branch", "head", "candidate")
    measures = {
        "error": Measure(axes, values, True),
        "density": Measure(("candidate",), np.array([0.0, 0.5, 0.25, 1.0])),
    }
    return Table(measures, {"candidate": names}, {"kind": kind})


def test_sparse_patterns_serve_heads_whose_mean_error_is_within_a_limit() -> None:
    tables = {
        "a": patterns([[0.001, 0.005, 0.5, 0.0], [0.5, 0.015, 0.018, 0.0]]),
        "b": patterns([[0.5, 0.9, 0.04, 0.0], [0.5, 0.9, 0.9, 0.0]]),
        "x": patterns([[0.0] * 4], "cross"),
    }
    found = o.sparse_heads(tables)
    assert found is not None
    assert found.heads == 4
    assert found.serves == {0.01: 0.25, 0.02: 0.5, 0.05: 0.75}
    assert found.density == pytest.approx({0.01: 0.5, 0.02: 0.375, 0.05: 1 / 3})
    assert found.overall == pytest.approx({0.01: 3.5 / 4, 0.02: 2.75 / 4, 0.05: 2 / 4})
    assert found.families == {
        0.01: {"window": 1},
        0.02: {"temporal": 1, "window": 1},
        0.05: {"temporal": 2, "window": 1},
    }
    assert o.sparse_heads({"x": tables["x"]}) is None


def test_with_a_rest_a_skipped_head_is_served_too() -> None:
    plain = patterns([[0.5, 0.9, 0.04, 0.0], [0.5, 0.9, 0.9, 0.0]])
    rests = tuple(json.dumps({"pattern": name, "rest": "pooled"}) for name in ("skip", "window", "temporal", "dense"))
    error = np.concatenate(
        [plain["error"].values, patterns([[0.5, 0.9, 0.01, 0], [0.01, 0.9, 0.9, 0]])["error"].values], -1
    )
    density = np.append(plain["density"].values, [0.02, 0.52, 0.27, 1.0])
    measures = {"error": Measure(plain["error"].axes, error, True), "density": Measure(("candidate",), density)}
    table = Table(measures, {"candidate": (*plain.labels["candidate"], *rests)}, plain.facts)
    found = o.sparse_heads({"a": table})
    assert found is not None and found.serves == {0.01: 1, 0.02: 1, 0.05: 1}
    assert found.families[0.02] == {"means alone": 1, "temporal and means": 1}
    assert found.families[0.05] == {"means alone": 1, "temporal": 1}
    assert found.density[0.02] == pytest.approx((0.02 + 0.27) / 2)


def test_a_limit_that_no_pattern_keeps_serves_nobody() -> None:
    found = o.sparse_heads({"a": patterns([[0.0, 0.9, 0.9, 0.0]])}, limits=(0.01,))
    assert found is not None
    assert (found.serves, found.overall, found.families) == ({0.01: 0}, {0.01: 1}, {0.01: {}})
    assert math.isnan(found.density[0.01])
    assert "0% within 1%." in describe(Findings(sparse=found))[0]


def features(errors: Sequence[float], kind: str) -> Table:
    values = np.array(errors)[None, :, None, None] * np.array([1.0, 3.0])
    return Table({"plain": Measure(("prompt", "step", "branch", "lag"), values, True)}, {"lag": (1, 2)}, {"kind": kind})


def test_similarity_of_neighbouring_steps_is_told_by_kind() -> None:
    nan = math.nan
    tables = {
        "a": features([nan, 0.4, 0.1, 0.1, 0.1, 0.1], "self"),
        "b": features([nan, 0.2, 0.3, 0.1, 0.1, 0.1], "self"),
        "c": features([nan, 0.02, 0.01, 0.01, 0.01, 0.01], "mlp"),
        "d": features([nan] * 6, "cross"),
    }
    found = o.similarity(tables)
    assert found is not None
    assert found.error == pytest.approx({"self": 1.6 / 10, "mlp": 0.012})
    assert found.early == pytest.approx({"self": 0.3, "mlp": 0.02})
    assert found.late == pytest.approx({"self": 1.0 / 8, "mlp": 0.01})
    assert found.worst == pytest.approx({"self": 0.4, "mlp": 0.02})
    assert o.similarity({"d": tables["d"]}) is None


def test_sensitivity_is_told_by_depth_and_by_step() -> None:
    factors = [[4.0, 2.0, 1.0], [2.0, 1.0, math.nan], [1.0, 0.5, 0.25]]
    found = o.sensitivity(["blocks.0..1", "blocks.2..3", "blocks.4..5"], [0, 10, 20], factors)
    assert found.by_group == pytest.approx({"blocks.0..1": 7 / 3, "blocks.2..3": 1.5, "blocks.4..5": 1.75 / 3})
    assert found.by_step == pytest.approx({0: 7 / 3, 10: 3.5 / 3, 20: 0.625})
    assert found.over_depth == pytest.approx(0.25)
    assert found.over_steps == pytest.approx(0.625 / (7 / 3))
    assert found.spread == 16
    with pytest.raises(InputError, match=r"shape \[3, 3\] have to be of 1 groups and 3 steps"):
        o.sensitivity(["a"], [0, 1, 2], factors)
    with pytest.raises(InputError, match="not all NaN"):
        o.sensitivity(["a"], [0], [[math.nan]])


def test_a_network_without_tables_has_no_findings() -> None:
    assert o.findings_of(NetworkProfile((), (), (), (), (), {})) == Findings()
    assert describe(Findings()) == []


def test_all_findings_of_a_network_are_told_in_sentences() -> None:
    first = [[0.5, 0.5, 0.0, 0.0]]
    both = {
        "recall": recalled([settling])["recall"],
        "recall_blocks": recalled([settling])["recall_blocks"],
        "map": maps([first, [[0.4, 0.4, 0.2, 0.0]]])["map"],
        "between_branches": Measure(("prompt", "step", "head"), np.full((2, STEPS, 1), 0.85), True),
        "mass_text": Measure(("prompt", "step", "branch", "head"), np.ones((2, STEPS, 2, 1)), True),
    }
    table = Table(both, {"anchor": ANCHORS}, {"kind": "joint", "uniform": {"mass_text": 0.1}})
    share = Measure(("prompt", "step", "branch", "head"), np.ones((2, STEPS, 2, 1)))
    sparse = patterns([[0.5, 0.015, 0.9, 0.0]])
    network = NetworkProfile(
        *((), (), (), (), (), {}),
        tables={
            "attention": {"a": table},
            "patterns": {"a": Table({**sparse.measures, "share": share}, sparse.labels, sparse.facts)},
            "features": {"a": features([math.nan, 0.4, 0.1, 0.1, 0.1, 0.1], "self")},
        },
    )
    told = describe(
        replace(o.findings_of(network), sensitivity=o.sensitivity(["a", "b"], [0, 1], [[1.0, 0.5], [3.0, 1.5]]))
    )
    assert told == [
        "Patterns over steps: the blocks with 90% of a head's mass (25% of all blocks) keep 65% of the mass at lag 1 "
        "and 40% of it at lag 11; of 1 heads, 80% or more is kept to the end for 0% if chosen at step 0, 100% if "
        "chosen at step 6.",
        "Early steps: up to 2 steps later, blocks chosen in the first third of steps keep 40% of the mass, blocks "
        "chosen later 90%.",
        "Patterns over prompts: the blocks with 100% of one prompt's mass (50% of all blocks) keep 80% of the mass of "
        "another, and 80% or more of each for 0% of heads.",
        "Guidance branches: the blocks with 90% of the mass of one keep 85% of the other's (85% in the first third of "
        "steps, 85% later), and 80% or more for 100% of heads.",
        "Roles of 1 heads: 1 text; confidence 1.00 in the mean, the same role in 100% of steps and 100% of prompts. "
        "0% of heads are idle.",
        "Sparse patterns serve, of 1 heads, by error of their site's output: 0% within 1%, 100% within 2% (with 50% of "
        "their work), 100% within 5% (with 50% of their work).",
        "Features differ from one step to the next by: self 16.0% (40.0% in the first third, 10.0% later).",
        "Errors of one size in the last third of the depth move the sample 3 times as much as in the first; in step 1 "
        "0.5 times as much as in step 0; the extremes are 6 times apart.",
    ]


def test_planted_noise_is_told_by_depth_and_step() -> None:
    """At the output an error has 1/4 and 1/2 of its size in the blocks; the second step's are 3 times as harmful."""

    def planted(growth: float) -> Table:
        values = np.array([[growth, 9.0], [growth, 9.0]])
        return Table(
            {"to_output": Measure(("anchor", "error"), values)}, {"anchor": (0, 1), "error": ("noise", "head")}
        )

    network = NetworkProfile(
        *((2.0, 1.0), (1.0, 0.5), (0.5, 0.5), (1.0, 3.0), (1.0,), {}),
        tables={"sensitivity": {"b.0.mlp": planted(0.25), "b.1.mlp": planted(0.5), "rollouts": Table({})}},
    )
    found = o.findings_of(network).sensitivity
    assert found is not None
    assert found.over_depth == pytest.approx(2)
    assert found.over_steps == pytest.approx(3)
