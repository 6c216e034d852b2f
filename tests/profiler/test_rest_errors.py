"""Errors of heads that see what a pattern skips by means of groups: against sums over keys and groups written out."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.ops import ATTENTION
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.registry import DYNAMIC, FROM_FILE, pattern_from_data
from ditopt.kernels.patterns.whole import Nothing
from ditopt.measures import Table
from ditopt.passes.attention import first_order_refusal, rest_refusal
from ditopt.profiler.moments import compensated_of
from ditopt.profiler.rows import pool_size
from ditopt.search.heads import SKIP
from tests.literal_rest import mean_of_outer
from tests.profiler.attention_rig import operands, planted
from tests.profiler.test_draft_blocks import kept
from tests.profiler.test_pattern_errors import attend, heads_weight, measured, norm, of_video, total

LINE = Geometry(2, 3, 7)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)
LARGER = Geometry(3, 8, 7)  # blocks of 16, the last one short


def rests(table: Table) -> dict[str, int]:
    """Where candidates in raster order and with a rest by means stand in a table, but those with int8 scores."""
    found = {}
    for at, name in enumerate(map(str, table.labels["candidate"])):
        settings = json.loads(name)
        rest = settings.get("rest")
        if not {"order", "qk"} & settings.keys() and rest not in (None, "linear") and "kept" not in rest:
            found[name] = at
    return found


def with_means(
    x: Tensor,
    heads: tuple[int, int],
    attended: Tensor,
    block: int,
    pool: int,
    first_order: bool = False,
    products: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """``[H, S, E]``: attention to the keys of listed blocks ``[H, Qb, Kb]``, and to means of the others' groups.

    ``products`` of queries and keys ``[S, S]``; None: exact ones.
    """
    query, key, value = (part[0].double() for part in x[:1].split((heads[0], heads[1], heads[1]), 1))
    out = torch.zeros(heads[0], *value.shape[1:], dtype=torch.float64)
    tokens = key.shape[1]
    for head in range(heads[0]):
        k, v = key[head * heads[1] // heads[0]], value[head * heads[1] // heads[0]]
        linear = query[head] * 8**-0.5 @ mean_of_outer(k, v, pool)
        of_keys = query[head] @ k.T if products is None else products(query[head], k)
        for row in range(tokens):
            numerators, values, rest = [], [], []
            for first in range(0, tokens, pool):
                group = slice(first, min(first + pool, tokens))
                if attended[head, row // block, first // block]:
                    numerators += torch.exp(of_keys[row, group] * 8**-0.5).tolist()
                    rest += [0.0] * len(v[group])
                    values += list(v[group])
                else:
                    count = group.stop - group.start
                    numerators.append(count * float(torch.exp(k[group].mean(0) @ query[head, row] * 8**-0.5)))
                    values.append(v[group].mean(0))
                    rest.append(float(first_order))
            shares = torch.tensor(numerators, dtype=torch.float64)
            shares /= shares.sum()
            out[head, row] = (
                shares @ torch.stack(values) + shares @ torch.tensor(rest, dtype=shares.dtype) * linear[row]
            )
    return out


@pytest.mark.parametrize(("geometry", "heads"), [(LINE, (2, 2)), (BEFORE, (4, 2)), (LARGER, (2, 2))])
def test_errors_are_those_of_attention_to_keys_and_means(geometry: Geometry, heads: tuple[int, int]) -> None:
    settings = {"enable_gqa": True} if heads[0] != heads[1] else {}
    x = operands(geometry.tokens, heads, sharp=1.5)
    captured = planted(x, None, heads, **settings)
    table = measured(captured, geometry, x)
    weight, video, block = heads_weight(captured, heads[0]), of_video(geometry), table.facts["block_queries"]
    pool, dense = pool_size(block), attend(x, heads)[:, video]
    places = rests(table)
    assert {json.loads(name)["pattern"] for name in places} >= {"skip", "temporal", "spatial", "draft"}
    tried = list(places.items()) if geometry is not LARGER else list(places.items())[::4]
    for name, at in tried:
        written = {key: each for key, each in json.loads(name).items() if key != "rest"}
        if written["pattern"] in FROM_FILE:
            assert np.isnan(table["error"].values[..., at]).all(), "lists are chosen by earlier prompts"
            continue
        if written["pattern"] in DYNAMIC:
            attended = kept(x, heads, geometry, block, pattern_text(written))
        else:
            one = torch.from_numpy(pattern_from_data(written).block_map(geometry, block))
            attended = one.expand(heads[0], -1, -1)
        first_order = "taylor" in json.dumps(json.loads(name)["rest"])
        error = with_means(x, heads, attended, block, pool, first_order)[:, video] - dense
        expected = norm(error, weight) / total(dense, weight)
        np.testing.assert_allclose(table["error"].values[0, 0, 0, :, at], expected, atol=2e-5, err_msg=name)
        share = min(float(attended.float().mean()) + 1 / pool, 1.0)
        assert table["density"].values[at] == pytest.approx(share, rel=1e-5)


def test_labels_are_those_of_decisions_that_have_one_pool() -> None:
    table = measured(planted(operands(LARGER.tokens)), LARGER, operands(LARGER.tokens))
    choices = [SparseChoice.from_data(Sparse(pattern=name).settings) for name in rests(table)]
    assert [pattern_text(choice.to_data()) for choice in choices] == list(rests(table))
    assert {choice.pooled.of(16) for choice in choices if choice.pooled is not None} == {4}
    linear = [choice.pattern for choice in choices if choice.pooled is not None and choice.pooled.first_order]
    assert len(linear) == 4 and isinstance(linear[0], Nothing)
    assert [each.by for each in linear[1:] if isinstance(each, Draft)] == ["error"] * 3


def test_without_a_kernel_for_it_nothing_is_tried_to_first_order() -> None:
    names = tuple(
        pattern_text(each) for each in ({"pattern": "skip"}, {"pattern": "draft", "keep": 0.5, "by": "error"})
    )
    assert compensated_of(names, 64, 16).which == (0, 1, 0, 1)
    without = compensated_of(names, 64, 16, False)
    assert without.which == (0, 1) and without.linear == 0 and not any("taylor" in name for name in without.names)
    graph = fx.Graph()
    node = graph.create_node("call_function", ATTENTION, tuple(map(graph.placeholder, "qkv")))
    for part in node.all_input_nodes:
        part.meta["val"] = torch.empty(1, 2, 64, 8)
    assert first_order_refusal(node) is None
    for part in node.all_input_nodes:
        part.meta["val"] = torch.empty(1, 2, 64, 8, device="meta")
    assert first_order_refusal(node) is not None and rest_refusal(node) is None


def test_keys_and_values_that_are_constant_within_groups_lose_nothing() -> None:
    x = operands(LARGER.tokens)
    pool = pool_size(16)
    groups = torch.arange(LARGER.tokens) // pool * pool
    x[:, 2:] = x[:, 2:, groups]
    table = measured(planted(x), LARGER, x)
    errors = table["error"].values[0, 0, 0]
    known = [at for name, at in rests(table).items() if json.loads(name)["pattern"] not in FROM_FILE]
    assert errors[:, known].max() < 1e-5
    assert errors[:, table.position("candidate", SKIP)].min() > 0.1, "without means it is lost"
