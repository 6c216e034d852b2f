"""Rests kept from an earlier step: against the published rules written out in float64, and dense attention at age 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditopt.kernels.block_sparse_attention import cpu, reference
from ditopt.kernels.block_sparse_attention.kept import MERGE, NO_REST, RATIO, RESIDUAL, other_lists, shares
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks
from ditopt.kernels.ops import ADD_REST, KEEP_REST
from ditopt.kernels.patterns.kept import FORMS, Kept
from tests.kernels.block_sparse import ROUNDING, Operands, operands
from tests.kernels.test_block_sparse_attention import poisoned
from tests.literal_kept import LITERAL, Step, dense

SCALE = 0.2
LEAST = torch.finfo(torch.float32).min
Part = tuple[Tensor, Tensor]


def codes(*forms: int) -> Tensor:
    return torch.tensor(forms, dtype=torch.int32)


def attend(parts: Operands, lists: BlockLists, mask: Tensor | None = None) -> Part:
    with poisoned():
        return cpu.block_sparse_attention(
            *parts, lists.indices, lists.counts, lists.query_block, lists.key_block, SCALE, mask=mask
        )


def both(parts: Operands, attended: Tensor, forms: Tensor, mask: Tensor | None = None) -> tuple[Part, Part]:
    """What lists of a map give, and what those of all other blocks."""
    return (
        attend(parts, BlockLists.from_map(attended, 64, 64), mask),
        attend(parts, other_lists(attended, forms != NO_REST, 64, 64), mask),
    )


def by_reference(parts: Operands, attended: Tensor, forms: Tensor, mask: Tensor) -> tuple[Part, Part]:
    """The same of the plain kernel."""
    lists = BlockLists.from_map(attended, 64, 64), other_lists(attended, forms != NO_REST, 64, 64)
    own, others = (reference.block_sparse_attention(*parts, each, SCALE, mask=mask) for each in lists)
    return own, others


def steps(parts: Operands, head: int) -> Step:
    query, key, value = parts
    group = query.shape[1] // key.shape[1]
    return query[0, head].double(), key[0, head // group].double(), value[0, head // group].double()


def by_token(attended: Tensor, tokens: tuple[int, int]) -> Tensor:
    """``[S, L]`` of a map ``[Qb, Kb]``."""
    return attended.repeat_interleave(64, 0)[: tokens[0]].repeat_interleave(64, 1)[:, : tokens[1]]


def drawn_map(heads: int, queries: int, keys: int, density: float) -> Tensor:
    shape = (1, heads, blocks(queries, 64), blocks(keys, 64))
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density


def moved(parts: Operands, by: float) -> Operands:
    """The same a little later."""
    generator = torch.Generator().manual_seed(9)
    query, key, value = (part + (by * torch.randn(part.shape, generator=generator)).to(part) for part in parts)
    return query, key, value


def budget(parts: Operands, *others: Operands) -> float:
    """What rounding allows of a result: of parts, their sums, what is kept and what comes out, in sizes of values."""
    size = max(float(each[2].abs().amax()) for each in (parts, *others))
    largest = max(SCALE * float(each[0].norm(dim=-1).amax() * each[1].norm(dim=-1).amax()) for each in (parts, *others))
    return (8 * ROUNDING[parts[0].dtype] + (64 * largest + 300) * 2**-24) * size


@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=8, deadline=None)
@given(
    group=st.integers(1, 2),
    queries=st.integers(1, 200),
    keys=st.integers(1, 300),
    depth=st.integers(1, 40),
    width=st.integers(1, 40),
    density=st.floats(0.0, 1.0),
    by=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_later_steps_are_as_published_and_a_refresh_is_dense(
    dtype: torch.dtype, group: int, queries: int, keys: int, depth: int, width: int, density: float, by: float
) -> None:
    earlier = operands((1, 4, 4 // group, queries, keys, depth, width), dtype)
    now = moved(earlier, by)
    attended = drawn_map(4, queries, keys, density)
    forms = codes(MERGE, RESIDUAL, RATIO, NO_REST)
    own, others = both(earlier, attended, forms)
    whole, kept, stat = KEEP_REST(*own, *others, forms)
    assert whole.dtype == kept.dtype == dtype and stat.dtype == torch.float32
    assert whole.stride() == own[0].stride() and kept.is_contiguous()
    later = attend(now, BlockLists.from_map(attended, 64, 64))
    added = ADD_REST(*later, forms, kept, stat)
    allowed = budget(earlier, now)
    for head, form in enumerate(FORMS):
        mask = by_token(attended[0, head], (queries, keys))
        torch.testing.assert_close(whole[0, head].double(), dense(steps(earlier, head), SCALE), atol=allowed, rtol=0)
        expected = LITERAL[form](steps(earlier, head), steps(now, head), mask, SCALE)
        torch.testing.assert_close(added[0, head].double(), expected, atol=allowed, rtol=0)
    assert torch.equal(whole[0, 3], own[0][0, 3]) and torch.equal(added[0, 3], later[0][0, 3])
    assert not kept[0, 3].any()


def test_at_age_0_every_form_gives_dense_attention() -> None:
    parts = operands((1, 3, 3, 200, 200, 32, 32))
    attended, forms = drawn_map(3, 200, 200, 0.4), codes(MERGE, RESIDUAL, RATIO)
    own, others = both(parts, attended, forms)
    whole, kept, stat = KEEP_REST(*own, *others, forms)
    added = ADD_REST(*own, forms, kept, stat)
    assert torch.equal(added[0, 0], whole[0, 0]), "merged in the same way"
    for head in range(3):
        torch.testing.assert_close(
            added[0, head].double(), dense(steps(parts, head), SCALE), atol=budget(parts), rtol=0
        )
    assert (own[0] - whole).abs().amax() > 0.1, "what the lists leave out matters"


def test_what_is_kept_is_as_large_as_the_rest_of_the_softmax() -> None:
    parts = operands((1, 3, 3, 128, 128, 16, 16))
    attended, forms = torch.ones(1, 3, 2, 2, dtype=torch.bool), codes(MERGE, RESIDUAL, RATIO)
    attended[:, :, 0, 1] = attended[:, :, 1] = False  # the first 64 queries half, the others nothing
    own, others = both(parts, attended, forms)
    whole, kept, stat = KEEP_REST(*own, *others, forms)
    share, rest = shares(own[1], others[1])
    torch.testing.assert_close(share + rest, torch.ones(1, 3, 128))
    assert torch.equal(kept[0, 0], others[0][0, 0]) and torch.equal(stat[0, 0], others[1][0, 0])
    assert torch.equal(stat[0, 2], share[0, 2]) and not stat[0, 1].any()
    torch.testing.assert_close(kept[0, 1], (whole - own[0])[0, 1], atol=1e-6, rtol=0)
    for head in range(3):  # of queries whose lists are empty, all of the dense result is kept
        assert torch.equal(kept[0, head, 64:], whole[0, head, 64:])


def test_a_query_without_any_key_stays_zero() -> None:
    """As where the model's mask hides all."""
    out, lse = torch.zeros(1, 3, 4, 8), torch.full((1, 3, 4), -math.inf)
    forms = codes(MERGE, RESIDUAL, RATIO)
    whole, kept, stat = KEEP_REST(out, lse, out, lse, forms)
    added = ADD_REST(out, lse, forms, kept, stat)
    assert not whole.any() and not kept.any() and not added.any() and not stat.isnan().any()
    later = torch.ones(1, 3, 4, 8), torch.zeros(1, 3, 4)
    assert torch.equal(ADD_REST(*later, forms, kept, stat)[0, :2], later[0][0, :2]), "nothing is added to what comes"


@pytest.mark.parametrize("of_kernel", [both, by_reference])
@pytest.mark.parametrize("lowest", [LEAST, -1e9, -1e6, -65504.0, -1e4, -math.inf])
def test_beside_a_mask_parts_count_by_their_keys_in_rows_of_nothing_but_low_numbers(
    lowest: float, of_kernel: Callable[..., tuple[Part, Part]]
) -> None:
    """A query of padding, whose shares are equal in dense attention, or as scores are where they have digits."""
    parts, forms = operands((1, 3, 3, 250, 300, 16, 16)), codes(MERGE, RESIDUAL, RATIO)
    attended = torch.eye(4, 5, dtype=torch.bool).expand(1, 3, 4, 5)
    mask = torch.zeros(1, 1, 250, 300)
    mask[..., 280:] = lowest
    mask[..., 100:, :] = lowest  # in these rows there is nothing else
    own, others = of_kernel(parts, attended, forms, mask)
    whole, kept, stat = KEEP_REST(*own, *others, forms)
    assert stat.dtype == own[1].dtype == torch.float64
    found = ADD_REST(*own, forms, kept, stat)
    dense = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=SCALE)
    rounding = abs(lowest) * 2**-22 if lowest > -1e7 else 0.0  # of a score beside it, where it has digits
    for each in (whole, found):
        torch.testing.assert_close(each, dense.nan_to_num(), atol=budget(parts) + rounding, rtol=0)
    assert (own[0] - whole)[..., 100:, :].abs().amax() > 0.1 or lowest == -math.inf, "what the lists leave out matters"


def test_rows_of_any_log_sum_exp_are_merged_without_overflow() -> None:
    own, others = torch.ones(1, 1, 5, 2), torch.full((1, 1, 5, 2), 3.0)
    lse = torch.tensor([[[1e30, -1e30, 500.0, -500.0, -math.inf]]])
    other = torch.tensor([[[0.0, 0.0, 500.0, 500.0, 7.0]]])
    whole, *_ = KEEP_REST(own, lse, others, other, codes(MERGE))
    assert whole[0, 0, :, 0].tolist() == [1.0, 3.0, 2.0, 3.0, 3.0]


def test_heads_that_read_go_on_with_what_they_kept() -> None:
    earlier, forms = operands((1, 4, 4, 100, 150, 16, 24)), codes(MERGE, RATIO, RESIDUAL, NO_REST)
    now, attended = moved(earlier, 0.3), drawn_map(4, 100, 150, 0.5)
    _, before, stat = KEEP_REST(*both(earlier, attended, forms)[0], *both(earlier, attended, forms)[1], forms)
    reads = torch.tensor([False, True, False, True])
    own = attend(now, BlockLists.from_map(attended, 64, 64))
    others = attend(now, other_lists(attended, ~reads & (forms != NO_REST), 64, 64))
    mixed = KEEP_REST(*own, *others, forms, reads, before, stat)
    fresh = KEEP_REST(*own, *both(now, attended, forms)[1], forms)
    added = ADD_REST(*own, forms, before, stat)
    assert mixed[0].stride() == own[0].stride() and mixed[1].is_contiguous()
    for head, read in enumerate(reads.tolist()):
        wanted = (added, before, stat) if read else fresh
        assert all(torch.equal(one[0, head], other[0, head]) for one, other in zip(mixed, wanted, strict=True))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_what_is_kept_of_some_heads_is_as_of_all(dtype: torch.dtype) -> None:
    """The others, which keep none, have what their lists give."""
    earlier, forms = operands((2, 5, 5, 100, 150, 16, 24), dtype), codes(NO_REST, MERGE, NO_REST, RATIO, RESIDUAL)
    heads, reads = torch.tensor([1, 3, 4]), torch.tensor([False, True, False, False, True])
    now, attended = moved(earlier, 0.3), drawn_map(5, 100, 150, 0.5)
    own, others = both(earlier, attended, forms)
    of_all, of_some = KEEP_REST(*own, *others, forms), KEEP_REST(*own, *others, forms, heads=heads)
    assert of_some[0].stride() == own[0].stride() and of_some[1].is_contiguous()
    check(of_some, of_all, heads)
    alone = torch.tensor([0, 2])
    assert torch.equal(of_some[0][:, alone], own[0][:, alone])
    later, rest = both(now, attended, forms)
    added = ADD_REST(*later, forms, *of_some[1:], heads=heads)
    assert added.stride() == later[0].stride()
    check((added,), (ADD_REST(*later, forms, *of_all[1:]),), heads)
    mixed = KEEP_REST(*later, *rest, forms, reads, *of_some[1:], heads=heads)
    check(mixed, KEEP_REST(*later, *rest, forms, reads, *of_all[1:]), heads)


def check(found: Sequence[Tensor], expected: Sequence[Tensor], heads: Tensor) -> None:
    """A whole result is that of all heads, what is kept that of some; but for rounding of products in other lanes."""
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        rounding = 4 * ROUNDING[one.dtype]
        torch.testing.assert_close(one, other[:, heads] if place else other, atol=8 * rounding, rtol=rounding)


def test_what_is_not_finite_stays_seen() -> None:
    parts = operands((1, 3, 3, 128, 128, 16, 16))
    parts[1][0, :, 100, 3] = math.nan  # a key that no list of the first queries names
    attended, forms = torch.eye(2, dtype=torch.bool).expand(1, 3, 2, 2), codes(MERGE, RESIDUAL, RATIO)
    whole, kept, stat = KEEP_REST(*both(parts, attended, forms)[0], *both(parts, attended, forms)[1], forms)
    assert whole.isnan().all(), "as dense attention has it"
    clean = operands((1, 3, 3, 128, 128, 16, 16))
    assert ADD_REST(*attend(clean, BlockLists.from_map(attended, 64, 64)), forms, kept, stat)[0].isnan().all()


def test_the_other_lists_are_all_other_blocks_of_the_heads_that_keep() -> None:
    attended = drawn_map(3, 200, 300, 0.4)
    lists = other_lists(attended, torch.tensor([True, False, True]), 64, 64, 5)
    assert lists.indices.shape[-1] == 5
    found = lists.to_map(5)
    assert torch.equal(found[0, ::2], ~attended[0, ::2]) and not found[0, 1].any()
    nothing = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    everything = other_lists(nothing, torch.tensor([True]), 64, 64)
    assert everything.indices.shape[-1] == 1 and everything.counts.tolist() == [[[5, 5]]], "all blocks need no entries"


def test_operators_are_described_as_they_are() -> None:
    parts, forms = operands((2, 2, 2, 70, 130, 8, 8), torch.bfloat16), codes(MERGE, RESIDUAL)
    attended = drawn_map(2, 70, 130, 0.5)
    own, others = both(parts, attended, forms)
    kept = KEEP_REST(*own, *others, forms)[1:]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(KEEP_REST, (*own, *others, forms), test_utils=checks)
    torch.library.opcheck(KEEP_REST, (*own, *others, forms, torch.tensor([False, True]), *kept), test_utils=checks)
    torch.library.opcheck(ADD_REST, (*own, forms, *kept), test_utils=checks)
    alone, one = codes(0, RESIDUAL), {"heads": torch.tensor([1])}
    slot = KEEP_REST(*own, *others, alone, **one)[1:]
    torch.library.opcheck(KEEP_REST, (*own, *others, alone), one, test_utils=checks)
    torch.library.opcheck(ADD_REST, (*own, alone, *slot), one, test_utils=checks)


def test_what_does_not_fit_is_told() -> None:
    out, lse, forms = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4), codes(MERGE, RATIO)
    with pytest.raises(ValueError, match=r"keep_rest: forms is \[3\] of torch\.int32, not \[2\]"):
        KEEP_REST(out, lse, out, lse, codes(1, 1, 1))
    with pytest.raises(ValueError, match=r"add_rest: forms is \[2\] of torch\.int64, not \[2\] of torch\.int32"):
        ADD_REST(out, lse, forms.long(), out, lse)
    with pytest.raises(ValueError, match=r"keep_rest: others is \[1, 2, 4, 9\] .* the result is \[1, 2, 4, 8\]"):
        KEEP_REST(out, lse, torch.zeros(1, 2, 4, 9), lse, forms)
    with pytest.raises(ValueError, match=r"add_rest: kept is .* of torch\.float64, the result is .* torch\.float32"):
        ADD_REST(out, lse, forms, out.double(), lse)
    with pytest.raises(ValueError, match=r"beside kept is \[1, 2, 5\], not \[1, 2, 4\]"):
        ADD_REST(out, lse, forms, out, torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="which heads read, what they kept and its stat go together"):
        KEEP_REST(out, lse, out, lse, forms, torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"keep_rest: reads is \[2\] of torch\.int32, not \[2\] of torch\.bool"):
        KEEP_REST(out, lse, out, lse, forms, codes(1, 0), out, lse)


def test_heads_without_room_for_what_they_keep_are_told() -> None:
    out, lse, forms = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4), codes(MERGE, RATIO)
    with pytest.raises(ValueError, match=r"keep_rest: head 0 keeps a rest and is none of \[1\]"):
        KEEP_REST(out, lse, out, lse, forms, heads=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"add_rest: head 1 keeps a rest and is none of \[0\]"):
        ADD_REST(out, lse, forms, out[:, :1], lse[:, :1], heads=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"add_rest: heads is \[1\] of torch\.int32, not \[K\] of torch\.int64"):
        ADD_REST(out, lse, forms, out, lse, heads=codes(0))
    with pytest.raises(ValueError, match=r"add_rest: kept is \[1, 2, 4, 8\] .* the result is \[1, 1, 4, 8\]"):
        ADD_REST(out, lse, codes(MERGE, 0), out, lse, heads=torch.tensor([0]))


def test_codes_are_those_of_forms() -> None:
    assert {form: Kept(form, 2).code for form in FORMS} == {"merge": MERGE, "residual": RESIDUAL, "ratio": RATIO}
    assert NO_REST == 0
