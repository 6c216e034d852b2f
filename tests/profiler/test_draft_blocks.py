"""Errors of heads that find their blocks in the call: against masks by the definition, on full maps."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.registry import DYNAMIC
from ditopt.measures import Table, joined
from ditopt.profiler.draft_blocks import drafts_of
from ditopt.profiler.head_edits import middling
from ditopt.profiler.pattern_errors import PatternCollector
from ditopt.profiler.tried import candidates_of
from tests.kernels.test_draft_lists import literal
from tests.profiler.attention_rig import SITE, operands, planted, steps, trace_of
from tests.profiler.test_pattern_errors import attend, heads_weight, measured, norm, of_video, total

LABELS = tuple(
    pattern_text({"pattern": "draft", **settings})
    for settings in (
        *({"keep": 0.5}, {"keep": 0.25}, {"keep": 0.125}, {"mass": 0.9}),
        *({"by": "error", "keep": 0.5}, {"by": "error", "keep": 0.25}, {"by": "error", "keep": 0.125}),
    )
)
LINE = Geometry(2, 3, 7)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)  # the second block holds text and video
BEHIND = Geometry(2, 5, 4, text=5)


def dynamic(table: Table) -> dict[str, int]:
    """Where the drafts in raster order and without a rest stand among a table's candidates."""
    found = {str(name): (at, json.loads(str(name))) for at, name in enumerate(table.labels["candidate"])}
    plain = {name: at for name, (at, each) in found.items() if not {"rest", "order", "qk"} & each.keys()}
    return {name: at for name, at in plain.items() if json.loads(name)["pattern"] in DYNAMIC}


def kept(x: Tensor, heads: tuple[int, int], geometry: Geometry, block: int, name: str) -> Tensor:
    """``[H, Qb, Kb]``: the blocks that a draft keeps of every head, by the definition."""
    settings = json.loads(name)
    query, key, value = x[:1].double().split((heads[0], heads[1], heads[1]), 1)
    own = torch.eye(geometry.tokens, dtype=torch.bool)
    text = slice(0, geometry.text) if geometry.text_first else slice(geometry.video, None)
    own[text], own[:, text] = True, True
    parts = torch.stack([
        torch.stack([part.any() for part in rows.split(block, 1)]) for rows in own.split(block, 0)
    ])  # fmt: skip
    room = math.ceil(settings.get("keep", 0.5) * parts.shape[1])
    limits = [room] * heads[0], [settings.get("mass", math.inf)] * heads[0]
    always = parts.expand(1, heads[0], -1, -1)
    by = [settings.get("by", "means")] * heads[0]
    found = literal(query, key, always, (block, block), *limits, 8**-0.5, value, by)
    return torch.tensor(found).view(always.shape[1:])


def expanded(blocks: Tensor, block: int, tokens: int) -> Tensor:
    return blocks.repeat_interleave(block, -2)[..., :tokens, :].repeat_interleave(block, -1)[..., :tokens]


@pytest.mark.parametrize(
    ("geometry", "heads"), [(LINE, (2, 2)), (BEFORE, (4, 2)), (BEHIND, (2, 2)), (Geometry(4, 8, 8), (2, 2))]
)
def test_errors_are_those_of_attention_under_the_blocks_found(geometry: Geometry, heads: tuple[int, int]) -> None:
    """In every step by the queries and keys of that step."""
    settings = {"enable_gqa": True} if heads[0] != heads[1] else {}
    inputs = [operands(geometry.tokens, heads, sharp=1.5, seed=seed) for seed in range(2)]
    captured = planted(inputs[0], None, heads, **settings)
    table = measured(captured, geometry, *inputs, calls=steps(2))
    weight, video, block = heads_weight(captured, heads[0]), of_video(geometry), table.facts["block_queries"]
    places = dynamic(table)
    assert set(places) <= set(LABELS) and len(places) >= 3
    for name, at in places.items():
        shares = []
        for step, x in enumerate(inputs):
            blocks = kept(x, heads, geometry, block, name)
            dense = attend(x, heads)[:, video]
            error = attend(x, heads, expanded(blocks, block, geometry.tokens))[:, video] - dense
            expected = norm(error, weight) / total(dense, weight)
            np.testing.assert_allclose(table["error"].values[0, step, 0, :, at], expected, atol=1e-5, err_msg=name)
            shares.append(float(blocks.float().mean()))
        assert table["density"].values[at] == pytest.approx(np.mean(shares), rel=1e-5)


def test_each_branch_finds_its_own_and_density_is_the_mean() -> None:
    inputs = [operands(42, seed=seed, sharp=1.5) for seed in range(2)]
    together = torch.cat(inputs)
    table = measured(planted(together), LINE, calls=steps(1, 2, batched=True))
    alone = [measured(planted(x), LINE) for x in inputs]
    for at in dynamic(table).values():
        for branch, each in enumerate(alone):
            np.testing.assert_allclose(
                table["error"].values[0, 0, branch, :, at], each["error"].values[0, 0, 0, :, at], atol=1e-6
            )
        mean = np.mean([each["density"].values[at] for each in alone])
        assert table["density"].values[at] == pytest.approx(mean)
    prompts = joined(alone)
    np.testing.assert_allclose(prompts["density"].values, table["density"].values, rtol=1e-6)
    assert prompts["density"].axes == ("candidate",)


def kept_names(table: Table) -> dict[str, int]:
    """Where the drafts that keep their blocks between steps stand."""
    return {name: at for name, at in dynamic(table).items() if "refresh" in json.loads(name)}


@pytest.mark.parametrize("batched", [False, True])
def test_blocks_that_are_kept_are_those_of_the_step_that_found_them(batched: bool) -> None:
    """In every fourth step they are found anew; of each branch its own."""
    count, branches = 6, 1 + batched
    inputs = [operands(LINE.tokens, seed=seed, sharp=1.5, batch=branches) for seed in range(count)]
    captured = planted(inputs[0])
    table = measured(captured, LINE, *inputs, calls=steps(count, branches, batched=batched))
    weight, video, block = heads_weight(captured), of_video(LINE), table.facts["block_queries"]
    places = kept_names(table)
    assert {json.loads(name)["keep"] for name in places} == {0.125, 0.25}, places
    assert {json.loads(name)["refresh"] for name in places} == {4}, "of six steps the eighth is none"
    moved = 0
    for name, at in places.items():
        for step, branch in product(range(count), range(branches)):
            then, now = (inputs[at][branch : branch + 1] for at in (step - step % 4, step))
            blocks = kept(then, (2, 2), LINE, block, name)
            moved += not torch.equal(blocks, kept(now, (2, 2), LINE, block, name))
            dense = attend(now)[:, video]
            error = attend(now, mask=expanded(blocks, block, LINE.tokens))[:, video] - dense
            expected = norm(error, weight) / total(dense, weight)
            np.testing.assert_allclose(
                table["error"].values[0, step, branch, :, at], expected, atol=1e-5, err_msg=f"{name} {step}"
            )
    assert moved > 0


def test_more_kept_blocks_than_a_site_may_hold_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    x, held = operands(LINE.tokens), 2 * 2 * -(-11 * 11 // 8)
    captured = planted(x)
    assert drafts_of(LINE, 4, steps=4).bytes_kept(heads=2, branches=1) == held
    for most in (held, held - 1):
        for module in ("tried", "pattern_errors"):
            monkeypatch.setattr(f"ditopt.profiler.{module}.KEPT_BYTES", most)
        collector = PatternCollector(trace_of(captured), steps(4), LINE)
        names = kept_names(collector.tables()[SITE])
        told = [reason for reason in collector.reasons if "to keep between steps; no draft with a refresh" in reason]
        assert (len(names), len(told)) == ((2, 0) if most == held else (0, 1))


def test_what_no_call_was_seen_of_has_the_density_that_it_has_room_for() -> None:
    x = operands(42)
    table = PatternCollector(trace_of(planted(x)), steps(1), LINE).tables()[SITE]
    for name, at in dynamic(table).items():
        room = math.ceil(json.loads(name).get("keep", 0.5) * 11)
        assert table["density"].values[at] == pytest.approx(room / 11)


@pytest.mark.parametrize(
    ("geometry", "names"),
    [
        (Geometry(4, 16, 16), LABELS),
        (Geometry(1, 1, 8), (LABELS[0], *LABELS[3:5])),  # one block of two is half of them, a quarter and an eighth
        (Geometry(1, 1, 12), (*LABELS[:2], *LABELS[3:6])),
        (Geometry(1, 1, 4), ()),
    ],
)
def test_labels_are_those_of_decisions_and_distinct(geometry: Geometry, names: tuple[str, ...]) -> None:
    assert drafts_of(geometry, 64 if geometry.tokens >= 1024 else 4).names == names


def test_errors_that_are_planted_stay_under_static_patterns() -> None:
    """Their blocks are told before the call."""
    found = candidates_of(Geometry(4, 16, 16), 64)
    chosen = middling(found)
    assert chosen is not None and json.loads(chosen[0])["pattern"] not in DYNAMIC
    assert not any(json.loads(name)["pattern"] in DYNAMIC for name in found.names)
