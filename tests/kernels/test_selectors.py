"""What blocks are chosen by: each selector against its definition token by token, and what it does at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import selectors
from ditopt.kernels.block_sparse_attention.draft import draft_lists
from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.block_sparse_attention.selectors import SCORES, draft_scores
from ditopt.kernels.ops import DRAFT_LISTS
from ditopt.kernels.patterns.draft import SELECTORS, Draft, Selector
from tests.kernels.test_draft_lists import LITERAL, literal

LOWEST, LARGEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
SIZES = ((2, 4, 2, 130, 70, 8, 64, 16), (1, 2, 2, 7, 33, 4, 64, 8), (1, 1, 1, 128, 64, 16, 64, 64))
"""Batch, heads, heads of keys, queries, keys, depth, blocks of queries and keys; short last blocks, and none."""


def operands(sizes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys, depth, *_ = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, depth), (batch, key_heads, keys, depth), (batch, key_heads, keys, depth + 3))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("by", SELECTORS)
@pytest.mark.parametrize("sizes", SIZES)
def test_scores_are_those_of_the_definition(by: Selector, sizes: tuple[int, ...]) -> None:
    query, key, value = operands(sizes)
    found = draft_scores(query, key, sizes[6], sizes[7], 0.3, value, None, (by,))
    group = sizes[1] // sizes[2]
    for sample in range(sizes[0]):
        for head in range(sizes[1]):
            parts = (query[sample, head], key[sample, head // group], value[sample, head // group])
            expected = torch.tensor(LITERAL[by](*parts, (sizes[6], sizes[7]), 0.3)).clamp(min=LOWEST)
            torch.testing.assert_close(found[sample, head].double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_every_selector_is_tested_and_registered() -> None:
    assert set(LITERAL) == set(SCORES) == set(SELECTORS)


@pytest.mark.parametrize("slab", [1, 1 << 13, 1 << 20])
def test_masses_are_a_distribution_however_many_rows_are_held_at_once(
    slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, _ = operands((1, 2, 1, 300, 1000, 8, 64, 64))
    whole = draft_scores(query, key, 64, 64, 0.3, None, None, ("mass",))
    monkeypatch.setattr(selectors, "SLAB", slab)
    found = draft_scores(query, key, 64, 64, 0.3, None, None, ("mass",))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(1, 2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", SELECTORS)
def test_they_are_computed_in_float32(dtype: torch.dtype, by: Selector) -> None:
    parts = [part.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for part in operands((2, 2, 1, 130, 70, 8))]
    found = draft_scores(parts[0], parts[1], 64, 16, 0.3, parts[2], None, (by,))
    query, key, value = (part.float() for part in parts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, draft_scores(query, key, 64, 16, 0.3, value, None, (by,)), rtol=1e-4, atol=1e-4)


def test_the_error_is_what_means_leave_out_to_first_order() -> None:
    """Of keys close to their mean; the bound is met where they differ along the query alone."""
    generator = torch.Generator().manual_seed(0)
    query, mean = torch.randn(4, generator=generator).double(), torch.randn(4, generator=generator).double()
    along = 1e-3 * torch.randn(16, generator=generator).double()[:, None] * query
    value = torch.randn(16, 3, generator=generator).double()
    key = mean + along - along.mean(0)
    parts = (part[None, None].float() for part in (query[None], key, value))
    given_query, given_key, given_value = parts
    score = draft_scores(given_query, given_key, 64, 16, 0.5, given_value, None, ("error",))
    exact = ((0.5 * key @ query).exp()[:, None] * value).sum(0)
    error = (exact - math.exp(0.5 * mean @ query) * value.sum(0)).norm()
    bound = 0.5 * query.norm() * score[0, 0, 0, 0].double().exp()
    assert error == pytest.approx(float(bound), rel=1e-2)


def test_blocks_that_means_stand_for_exactly_are_chosen_last() -> None:
    query, key, value = operands((1, 1, 1, 64, 64, 8))
    key[:, :, 16:32], value[:, :, 32:48] = 5 * key[:, :, 16:17], 0.0
    scores = draft_scores(query, key, 64, 16, 0.3, value, None, ("error",)).flatten()
    assert scores[2] == LOWEST and scores[1] < scores[[0, 3]].min() - 5, "of rounding's size"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_by_mass_and_error_blocks_with_keys_that_are_no_numbers_come_first(bad: float) -> None:
    query, key, value = operands((1, 2, 2, 130, 70, 8))
    clean = {by: draft_scores(query, key, 64, 16, 0.3, value, None, (by,)) for by in ("mass", "error")}
    key[0, 1, 40, 3] = bad
    for by, before in clean.items():
        found = draft_scores(query, key, 64, 16, 0.3, value, None, (by,))  # type: ignore[arg-type]  # a selector
        assert (found[0, 1, :, 2] == LARGEST).all() and (found[0, 1, :, [0, 1, 3, 4]] < LARGEST).all()
        assert torch.equal(found[0, 0], before[0, 0]), "another head does not see it"


def test_a_value_that_is_no_number_is_an_error_to_be_seen() -> None:
    query, key, value = operands((1, 1, 1, 64, 64, 8))
    value[0, 0, 20, 0] = math.nan
    assert draft_scores(query, key, 64, 16, 0.3, value, None, ("error",)).flatten().argmax() == 1


def called(by: list[str], computed: str, **changed: Any) -> Tensor:
    """The operator's lists as a map ``[B, H, Qb, Kb]``, of heads that keep 2 blocks and nothing always."""
    query, key, value = operands(SIZES[0])
    lists = BlockLists.from_map(torch.zeros(1, 4, 3, 5, dtype=torch.bool), 64, 16, 5)
    codes = torch.tensor([SELECTORS.index(each) for each in by], dtype=torch.int32)
    limits = (torch.full((4,), 2, dtype=torch.int32), torch.full((4,), math.inf))
    given = {"value": value, "codes": codes, "selectors": computed, **changed}
    given["by"] = given.pop("codes")
    indices, counts = DRAFT_LISTS(query, key, lists.indices, lists.counts, *limits, 64, 16, 0.3, **given)
    return BlockLists(indices, counts, 64, 16).to_map(5)


@pytest.mark.parametrize("by", [["means", "mass", "error", "mass"], ["error"] * 4, ["mass", "means"] * 2])
def test_heads_of_one_call_choose_by_what_each_is_told(by: list[str]) -> None:
    sizes = SIZES[0]
    query, key, value = operands(sizes)
    computed = ",".join(each for each in SELECTORS if each in by)
    always = torch.zeros(1, 4, 3, 5, dtype=torch.bool)
    expected = literal(query, key, always, (64, 16), [2] * 4, [math.inf] * 4, 0.3, value, by)
    found = called(by, computed)
    assert found.flatten(0, 2).tolist() == expected
    assert torch.equal(called(by, "error,mass,means"), found), "what no head asks for changes nothing"


def test_a_single_selector_needs_no_codes_and_only_the_error_values() -> None:
    for by in ("mass", "means"):
        assert torch.equal(called([by] * 4, by, codes=None, value=None), called([by] * 4, by))
    assert torch.equal(called(["error"] * 4, "error", codes=None), called(["error"] * 4, "means,error"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"selectors": "means,maas"}, "selectors 'means,maas'; name some of means, mass, error, once each"),
        ({"selectors": "mass,mass"}, "selectors 'mass,mass'; name some of"),
        ({"value": None}, "blocks are chosen by the error of their means, but no values are given"),
        ({"codes": None}, "blocks are chosen by means,error, but nothing says which head's by which"),
        ({"codes": torch.zeros(3, dtype=torch.int32)}, r"by is \[3\] of torch.int32, not \[4\]"),
        ({"codes": torch.zeros(4)}, r"by is \[4\] of torch.float32, not \[4\] of torch.int32"),
        ({"codes": torch.tensor([0, 2, 1, 0], dtype=torch.int32)}, r"head 2 is to choose by 1; what is computed is me"),
        ({"value": torch.randn(2, 2, 69, 8)}, "heads, tokens or channels do not match"),
    ],
)
def test_what_does_not_fit_is_told(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"ditopt::draft_lists: .*{told}"):
        called(["means"] * 4, "means,error", **changed)


def test_what_is_described_is_what_is_given() -> None:
    query, key, value = operands(SIZES[0])
    lists = BlockLists.from_map(torch.ones(1, 4, 3, 5) > 0, 64, 16, width=5)
    limits = (torch.ones(4, dtype=torch.int32), torch.ones(4))
    codes = torch.zeros(4, dtype=torch.int32)
    given = (query, key, lists.indices, lists.counts, *limits, 64, 16, 0.35, value, codes, "means,mass,error")
    torch.library.opcheck(DRAFT_LISTS, given, test_utils=("test_schema", "test_faketensor"))
    assert draft_lists(*given)[0].shape == (2, 4, 3, 5)


def test_a_pattern_says_by_what() -> None:
    assert Draft(keep=0.5).by == "means"
    with pytest.raises(ValueError, match="'means', 'mass' or 'error'"):
        Draft(keep=0.5, by="sum")  # type: ignore[arg-type]  # what is tested
