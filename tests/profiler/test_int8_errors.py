"""Errors of candidates with int8 scores: against queries and keys that are quantised step by step, in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ditopt._torch import has_byte_dot_products
from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.listed import Listed
from ditopt.measures import Table
from ditopt.profiler.pattern_errors import PatternCollector
from ditopt.profiler.rows import pool_size
from tests.literal_int8 import int8_scores
from tests.profiler.attention_rig import SITE, operands, planted, run, steps, trace_of
from tests.profiler.test_draft_blocks import kept
from tests.profiler.test_pattern_errors import attend, heads_weight, measured, norm, of_video, total
from tests.profiler.test_rest_errors import with_means

needs_bytes = pytest.mark.skipif(not has_byte_dot_products(), reason="no dot products of bytes (avx512_vnni)")
LINE = Geometry(2, 3, 7)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)  # the second block holds text and video
DENSE = '{"pattern": "dense", "qk": "int8"}'


def with_int8(table: Table) -> dict[str, int]:
    """Where candidates with int8 scores stand in a table."""
    names = map(str, table.labels["candidate"])
    return {name: at for at, name in enumerate(names) if "qk" in json.loads(name)}


def alone(name: str) -> str:
    """The same candidate without int8 scores."""
    return pattern_text({key: each for key, each in json.loads(name).items() if key != "qk"})


@needs_bytes
@pytest.mark.parametrize(("geometry", "heads"), [(LINE, (2, 2)), (BEFORE, (4, 2))])
def test_errors_are_those_of_quantised_attention_against_exact_dense(
    geometry: Geometry, heads: tuple[int, int]
) -> None:
    """With a pattern, its means, its order and the text; two heads to a key's; keys that share an offset."""
    x = operands(geometry.tokens, heads, sharp=1.5)
    x[:, heads[0] : sum(heads), :, ::3] += 4.0
    captured = planted(x, None, heads, **({"enable_gqa": True} if heads[0] != heads[1] else {}))
    table = measured(captured, geometry, x)
    weight, video, block = heads_weight(captured, heads[0]), of_video(geometry), table.facts["block_queries"]
    dense, errors = attend(x, heads), table["error"].values[0, 0, 0]
    places, moved = with_int8(table), []
    choices = {name: SparseChoice.from_data(Sparse(pattern=name).settings) for name in places}
    assert {choice.rest is None for choice in choices.values()} == {True, False}
    assert {choice.order is None for choice in choices.values()} == {True, False}
    for name, choice in choices.items():
        found = errors[:, places[name]]
        if isinstance(choice.pattern, Listed):
            assert np.isnan(found).all(), "lists are chosen by earlier prompts"
            continue
        order = torch.arange(geometry.tokens)
        if choice.order is not None:
            order = torch.from_numpy(choice.order.of_sequence(geometry, block))
        if isinstance(choice.pattern, Draft):
            blocks = kept(x[:, :, order], heads, geometry, block, pattern_text(SparseChoice(choice.pattern).to_data()))
        else:
            there = None if choice.order is None else choice.order.of_video(geometry, block)
            blocks = torch.from_numpy(choice.pattern.block_map(geometry, block, order=there)).expand(heads[0], -1, -1)
        pool, first_order = pool_size(block), choice.pooled is not None and choice.pooled.first_order
        made = []
        if choice.pooled is None:
            query, key, value = (part[0].double() for part in x[:1, :, order].split((heads[0], *[heads[1]] * 2), 1))
            hidden = ~blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)
            for head in range(heads[0]):
                group = head * heads[1] // heads[0]
                scores = int8_scores(query[head], key[group], block) * 8**-0.5
                scores = scores.masked_fill(hidden[head, : len(order), : len(order)], -torch.inf)
                made.append(scores.softmax(-1) @ value[group])
            out = torch.stack(made)
        else:
            out = with_means(
                x[:, :, order], heads, blocks, block, pool, first_order, lambda q, k: int8_scores(q, k, block)
            )
        error = (out[:, order.argsort()] - dense)[:, video]
        expected = norm(error, weight) / total(dense[:, video], weight)
        np.testing.assert_allclose(found, expected, atol=5e-5, err_msg=name)
        if name != DENSE:
            plain = table.position("candidate", alone(name))
            moved.append(np.abs(found - errors[:, plain]).max())
            assert table["density"].values[places[name]] == pytest.approx(table["density"].values[plain])
    assert errors[:, places[DENSE]].min() > 1e-3 and np.max(moved) > 1e-3, "int8 is not what plain scores give"
    assert table["density"].values[places[DENSE]] == 1.0


@needs_bytes
def test_every_pattern_that_multiplies_keys_is_tried_with_them_and_none_twice() -> None:
    table = measured(planted(operands(LINE.tokens)), LINE, operands(LINE.tokens))
    names = [str(name) for name in table.labels["candidate"]]
    assert len(set(names)) == len(names)
    found = with_int8(table)
    assert {pattern_text(SparseChoice.from_data(json.loads(name)).to_data()) for name in found} == {*found}
    others = [
        name
        for name in names
        if name not in found
        and json.loads(name)["pattern"] != "skip"
        and not ("kept" in name or "linear" in name or "clusters" in name)
    ]
    assert {alone(name) for name in found} == {*others, '{"pattern": "dense"}'}


@needs_bytes
def test_numbers_that_are_exact_as_int8_err_nothing() -> None:
    """Whole numbers of which the largest is 127, in every query and every block of keys whose mean is 0."""
    x = operands(16)
    generator = torch.Generator().manual_seed(0)
    x[:, :2] = torch.randint(-126, 127, (1, 2, 16, 8), generator=generator).float()
    x[:, :2, :, 0] = 127.0
    half = torch.randint(-126, 127, (1, 2, 8, 8), generator=generator).float()
    half[:, :, ::2, 0] = 127.0
    x[:, 2:4] = torch.stack([half, -half], 3).flatten(2, 3)
    x[:, :4] *= 2**-6
    geometry = Geometry(1, 4, 4)
    table = measured(planted(x), geometry, x)
    errors, places = table["error"].values[0, 0, 0], with_int8(table)
    assert errors[:, places[DENSE]].max() < 1e-5


def test_without_a_kernel_none_is_tried_and_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.kernels.ops.has_byte_dot_products", lambda: False)
    x = operands(LINE.tokens)
    captured = planted(x)
    collector = PatternCollector(trace_of(captured), steps(1), LINE)
    run(captured, steps(1), [collector], x)
    assert not with_int8(collector.tables()[SITE])
    (why,) = collector.reasons
    assert why.startswith(f"{SITE}: there is no kernel with int8 scores") and "no pattern is tried with int8" in why
