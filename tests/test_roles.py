"""Heads and blocks get the roles that were planted; heads between two roles are told with little confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from ditopt.block_roles import block_role
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.roles import ROLES, head_roles
from tests.profiler.planted import watched

UNIFORM = {
    "mass_text": 0.02,
    "mass_sinks": 0.01,
    "mass_first_frame": 0.2,
    "mass_same_pixel": 0.011,
    "mass_self": 0.001,
    "mass_near_pixel": 0.1,
    "mass_near": [0.02, 0.08, 0.3],
    "mass_in_frame": 0.2,
}


def masses(heads: Sequence[Mapping[str, Any]], steps: int = 4, kind: str = "joint", **other: Any) -> Table:
    """A table of heads that give some regions so much mass, the same everywhere; other regions have what is uniform."""
    measures = {}
    for name, uniform in UNIFORM.items():
        values = np.array([head.get(name, uniform) for head in heads], dtype=np.float32)
        near = ("distance",) if name == "mass_near" else ()
        full = np.broadcast_to(values, (2, steps, 1, *values.shape)).copy()
        measures[name] = Measure(("prompt", "step", "branch", "head", *near), full, partial=True)
    return Table({**measures, **other}, {"distance": (1, 2, 4)}, {"kind": kind, "uniform": UNIFORM})


def shares(values: Sequence[float], steps: int = 4) -> Table:
    full = np.broadcast_to(np.array(values), (2, steps, 1, len(values))).copy()
    return Table({"share": Measure(("prompt", "step", "branch", "head"), full, partial=True)})


PURE: dict[str, dict[str, Any]] = {
    "text": {"mass_text": 0.9},
    "stripe": {"mass_sinks": 0.8},
    "temporal": {"mass_same_pixel": 0.95, "mass_self": 0.1, "mass_near": [0.3, 0.5, 0.9]},
    "local": {"mass_near": [0.3, 0.9, 0.97], "mass_in_frame": 0.6, "mass_same_pixel": 0.2, "mass_self": 0.1},
    "spatial": {"mass_in_frame": 0.97, "mass_near": [0.02, 0.08, 0.3]},
    "global": {},
}


def test_a_head_that_looks_next_to_its_pixel_in_other_frames_is_temporal() -> None:
    (head,) = head_roles(masses([{"mass_near_pixel": 0.9, "mass_near": [0.1, 0.3, 0.6]}])).heads
    assert head.role == "temporal"


@pytest.mark.parametrize("role", PURE)
def test_a_pure_head_gets_its_role(role: str) -> None:
    (head,) = head_roles(masses([PURE[role]])).heads
    assert head.role == role
    assert head.confidence > 0.5
    assert (head.over_steps, head.over_prompts) == (1, 1)
    assert head.by_step == (role,) * 4


def test_confidence_is_twice_the_least_distance_from_a_half() -> None:
    """An excess of (0.7 - 0.2) / 0.8 = 0.625 in the frame is 0.125 above; 0.4 of text, passed over, is 0.1 below."""
    text = 0.02 + 0.4 * 0.98
    heads = head_roles(masses([{"mass_in_frame": 0.7}, {"mass_in_frame": 0.7, "mass_text": text}])).heads
    assert [head.role for head in heads] == ["spatial", "spatial"]
    assert [head.confidence for head in heads] == pytest.approx([0.25, 0.2], abs=1e-6)


def test_a_head_between_two_roles_is_told_with_little_confidence() -> None:
    heads = head_roles(masses([{"mass_in_frame": 0.55, "mass_text": 0.5}, {"mass_text": 0.52}, {"mass_sinks": 0.47}]))
    assert all(head.confidence < 0.15 for head in heads.heads)


def test_regions_of_the_same_role_do_not_make_each_other_doubtful() -> None:
    """Half of the mass within 1, nearly all within 2: local either way."""
    (head,) = head_roles(masses([{"mass_near": [0.5, 0.95, 0.97], "mass_in_frame": 0.6}])).heads
    assert head.role == "local"
    assert head.confidence == pytest.approx(2 * (0.97 - 0.3) / 0.7 - 1, abs=1e-3)


def test_text_is_text_however_few_tokens_and_the_first_frame_is_a_stripe() -> None:
    heads = head_roles(masses([{"mass_text": 0.9, "mass_sinks": 0.9}, {"mass_first_frame": 0.9}]))
    assert heads.roles == ("text", "stripe")


def test_a_head_that_looks_at_itself_is_local_and_not_temporal() -> None:
    itself = {"mass_same_pixel": 0.97, "mass_self": 0.96, "mass_near": [0.98, 0.99, 1.0], "mass_in_frame": 0.97}
    assert head_roles(masses([itself])).roles == ("local",)


def test_idle_is_a_small_share_of_the_output_whatever_the_masses() -> None:
    heads = head_roles(masses([PURE["text"]] * 4), shares([0.5, 0.001, 0.019, 0.021])).heads
    assert [head.role for head in heads] == ["text", "idle", "idle", "text"]
    assert [head.confidence for head in heads] == pytest.approx([0.8 / 0.98 - 0.02 / 0.98, 0.95, 0.05, 0.05], abs=0.03)


def test_cross_attention_is_stripe_global_or_idle() -> None:
    heads = [{"mass_sinks": 0.9}, {"mass_text": 1.0, "mass_in_frame": 1.0}, {}]
    found = head_roles(masses(heads, kind="cross"), shares([0.4, 0.4, 0.01]))
    assert found.roles == ("stripe", "global", "idle")
    assert found.counts == {"stripe": 1, "global": 1, "idle": 1}


def test_stability_is_the_share_of_steps_and_prompts_with_the_same_role() -> None:
    table = masses([PURE["global"]] * 2)
    text = table["mass_text"].values
    text[:, 1:, :, 0] = 0.98  # text in three of four steps of both prompts
    text[1, :, :, 1] = 0.8  # text in all steps of the second
    first, second = head_roles(table).heads
    assert first.role == "text"
    assert (first.over_steps, first.over_prompts) == (0.75, 1.0)
    assert first.by_step == ("global", "text", "text", "text")
    assert second.role == "global"
    assert (second.over_steps, second.over_prompts) == (1.0, 0.5)


def test_a_step_that_was_not_measured_counts_for_nothing() -> None:
    table = masses([PURE["text"]])
    for measure in table.measures.values():
        measure.values[:, 2] = np.nan
    (head,) = head_roles(table).heads
    assert (head.role, head.over_steps, head.by_step) == ("text", 1.0, ("text", "text", None, "text"))


def test_regions_of_more_than_half_of_the_keys_say_nothing() -> None:
    """In an image all keys are in the frame."""
    table = masses([{"mass_in_frame": 1.0, "mass_first_frame": 1.0, "mass_near": [0.02, 0.08, 0.9]}])
    uniform = {**UNIFORM, "mass_in_frame": 1.0, "mass_first_frame": 1.0, "mass_near": [0.02, 0.08, 0.6]}
    assert head_roles(Table(table.measures, table.labels, {"uniform": uniform})).roles == ("global",)


def test_tables_without_masses_are_refused_and_without_geometry_are_not() -> None:
    with pytest.raises(InputError, match="no table of masses: it has entropy"):
        head_roles(Table({"entropy": Measure(("prompt",), np.ones(1))}))
    table = masses([{"mass_sinks": 0.9}])
    sinks = {"mass_sinks": 0.01}
    with pytest.raises(InputError, match="uniform attention would have for mass_text"):
        head_roles(Table(table.measures, facts={"uniform": sinks}))
    unknown = {name: Measure(m.axes, m.values * np.nan, partial=True) for name, m in table.measures.items()}
    unknown["mass_sinks"] = table["mass_sinks"]
    assert head_roles(Table(unknown, facts={"uniform": sinks})).roles == ("stripe",)
    with pytest.raises(InputError, match="do not belong"):
        head_roles(table, shares([0.1, 0.2]))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(6, 8, 10),
        Geometry(5, 12, 8, 12, text_first=True),
        Geometry(7, 6, 9, 20),
        Geometry(8, 16, 12, 10, text_first=True),  # of its queries a quarter is looked at
    ],
    ids=str,
)
def test_planted_heads_are_read_back(geometry: Geometry) -> None:
    roles = [role for role in ROLES if role != "text" or geometry.text]
    _, collectors = watched(roles, geometry, geometry)
    attention, patterns = (collector.tables()["blocks.0"] for collector in collectors)
    assert not any(collector.reasons for collector in collectors)
    found = head_roles(attention, patterns)
    assert found.roles == tuple(roles)
    assert min(head.confidence for head in found.heads) > 0.5
    assert all(head.over_steps == 1 for head in found.heads)


def changes(values: Sequence[float], steps: int = 8, **facts: int) -> Table:
    """Each cell changes as told in the middle of the steps, by 0.1 in the first and the last step."""
    full = np.full((1, steps, 1, len(values)), 0.1, dtype=np.float16)
    full[:, 1:-1] = np.array(values)
    full[:, 0] = np.nan
    return Table({"change": Measure(("prompt", "step", "branch", "cell"), full, partial=True)}, facts=facts)


def gathering(anchors: Sequence[Sequence[float]], keys: int) -> Table:
    full = np.array(anchors, dtype=np.float16)[None, :, None]
    measure = Measure(("prompt", "anchor", "branch", "key_cell"), full, partial=True)
    return Table({"gathered": measure}, facts={"keys": keys})


MOVING = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_a_block_that_looks_at_what_changes_has_foreground_focus() -> None:
    tokens = changes(MOVING, frames=2, rows=2, columns=2)
    geometry = Geometry(2, 2, 2)
    ahead = [0.2, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1]
    behind = [0.05, 0.15, 0.15, 0.15, 0.05, 0.15, 0.15, 0.15]
    front = block_role(gathering([ahead, ahead], 8), tokens, geometry)
    assert front is not None
    assert (front.role, front.over_steps) == ("foreground", 1.0)
    assert front.score == pytest.approx(0.4 / 0.25, rel=1e-2)
    back = block_role(gathering([behind, behind, behind, [0.125] * 8], 8), tokens, geometry)
    assert back is not None
    assert (back.role, back.over_steps) == ("background", 0.75)
    assert back.by_step == ("background",) * 3 + ("even",)
    even = block_role(gathering([[0.125] * 8], 8), tokens, geometry)
    assert even is not None
    assert even.role == "even"
    assert even.score == pytest.approx(1, rel=1e-3)
    assert even.confidence == pytest.approx(1, abs=1e-2)


def test_text_is_left_out_of_what_a_block_gathers() -> None:
    """Six text tokens first, which gather half of the mass; of the rest the moving tokens gather half."""
    keys = [1 / 12] * 6 + [0.125 if moves else 0.25 / 6 for moves in MOVING]
    tokens = changes(MOVING, frames=2, rows=2, columns=2)
    found = block_role(gathering([keys], 14), tokens, Geometry(2, 2, 2, 6, text_first=True))
    assert found is not None
    assert found.score == pytest.approx(2, rel=1e-2)
    with pytest.raises(InputError, match="makes 8 tokens, the sequence has 14"):
        block_role(gathering([keys], 14), tokens, Geometry(2, 2, 2))


def test_cells_of_other_sizes_are_brought_together() -> None:
    """Keys are pooled in pairs along the sequence, changes over rows: 2 x 4 x 2 tokens in 2 x 2 x 2 cells."""
    tokens = changes(MOVING, frames=2, rows=2, columns=2)
    pairs = [0.25, 0.25, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0]  # the upper halves of both frames gather everything
    found = block_role(gathering([pairs], 16), tokens, Geometry(2, 4, 2))
    assert found is not None
    assert found.score == pytest.approx(2, rel=1e-3)  # their left quarter of all tokens has half
    line = block_role(gathering([pairs], 16), changes(MOVING, cells=8))
    assert line is not None
    assert line.score == pytest.approx(2, rel=1e-3)


def test_a_block_where_nothing_changes_has_no_role_and_other_prompts_are_refused() -> None:
    assert block_role(gathering([[0.125] * 8], 8), changes([0.0] * 8, cells=8)) is None
    twice = Table({"gathered": Measure(("prompt", "anchor", "branch", "key_cell"), np.ones((2, 1, 1, 8)))})
    with pytest.raises(InputError, match="change over 1 prompts, attention was measured over 2"):
        block_role(twice, changes(MOVING, cells=8))
    with pytest.raises(InputError, match=r"cells of \(8,\), which do not divide tokens of \(2, 2, 2\)"):
        block_role(gathering([[0.125] * 8], 8), changes(MOVING, cells=8), Geometry(2, 2, 2))
