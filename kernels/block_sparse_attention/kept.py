"""Rests kept from an earlier step: what a head's lists do not name counts as it did when it was last attended to.

In a step that refreshes it, a head attends to the blocks that its list names and, by a second list, to all others; from
the results of both, each with its log-sum-exp, follows what dense attention gives, and what is kept for later steps:

- ``merge``: the others' result and log-sum-exp; a later step merges them with its own by log-sum-exp (FlashBlock).
- ``residual``: what dense attention gives less what the list alone gives; a later step adds it (DiTFastAttn, arXiv
  2406.08552).
- ``ratio``: the share rho of the softmax's sum that the list has, and the others' part of the dense result; a later
  step scales its own result by rho and adds that part (Re-ttention, arXiv 2505.22918, equations 8 to 10; its rho does
  not grow between refreshes here: the ramp ``lambda`` is 0).

``ditopt::keep_rest`` is the one kind of step, ``ditopt::add_rest`` the other. Plain torch, for any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import BlockLists
from ditopt.kernels.ops import LIBRARY
from ditopt.kernels.patterns.kept import FORMS

NO_REST = 0
"""The code of heads that keep none."""
MERGE, RESIDUAL, RATIO = range(1, len(FORMS) + 1)


def other_blocks(attended: Tensor, heads: Tensor) -> Tensor:
    """What a map ``[B or 1, H, Qb, Kb]`` leaves out, nothing for heads that are not ``heads``, ``[H]`` boolean."""
    return ~attended & heads[:, None, None]


def other_lists(
    attended: Tensor, heads: Tensor, query_block: int, key_block: int, width: int | None = None
) -> BlockLists:
    """The lists of ``other_blocks``, padded to ``width`` (None: to the longest)."""
    return BlockLists.from_map(other_blocks(attended, heads), query_block, key_block, width)


def keep_rest(
    out: Tensor,
    lse: Tensor,
    others: Tensor,
    others_lse: Tensor,
    forms: Tensor,
    reads: Tensor | None = None,
    kept: Tensor | None = None,
    stat: Tensor | None = None,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense result, which lies as ``out``, and what is kept of it: ``[B, H, S, E]``, and ``[B, H, S]`` as ``lse``.

    ``out`` and ``lse`` are what a head's lists give, ``others`` and ``others_lse`` what all other blocks give; a head
    that keeps nothing (``forms`` ``[H]`` int32: 0) has nothing there, so that its result is ``out``. Heads of which
    ``reads`` ``[H]`` (boolean) is true go on with what they ``kept`` and its ``stat``, as in ``add_rest``. With
    ``heads`` ``[K]`` (int64, none twice) what is kept is of these heads alone, ``[B, K, S, E]`` and ``[B, K, S]``; no
    other may keep any.

    Raises:
        ValueError: shapes or dtypes do not fit; on processors also: a head keeps a rest and is none of ``heads``.
    """
    if heads is not None:
        _check_heads("keep_rest", heads, forms, out)
        mine = [_of(heads, each, 1) for each in (out, lse, others, others_lse)]
        of_forms, of_reads = _of(heads, forms), None if reads is None else _of(heads, reads)
        part, fresh, told = keep_rest(mine[0], mine[1], mine[2], mine[3], of_forms, of_reads, kept, stat)
        return torch.empty_like(out).copy_(out).index_copy_(1, heads, part), fresh, told
    _check("keep_rest", out, lse, forms, ("others", others, others_lse))
    given = [each is not None for each in (reads, kept, stat)]
    if any(given) and not all(given):
        raise ValueError("ditopt::keep_rest: which heads read, what they kept and its stat go together")
    share, rest = shares(lse, others_lse)
    codes = forms[:, None]
    whole = _combined(torch.empty_like(out), out, share, others, rest)
    of_others = torch.where(codes == MERGE, 1.0, rest) * (codes != NO_REST)
    of_own = torch.where(codes == RESIDUAL, -rest, 0.0)
    fresh = _combined(out.new_empty(out.shape), out, of_own, others, of_others)
    told = torch.where(codes == MERGE, others_lse, torch.where(codes == RATIO, share, 0.0))
    if reads is None or kept is None or stat is None:
        return whole, fresh, told
    _of_heads("keep_rest", "reads", reads, out, torch.bool)
    before, added = reads[:, None], add_rest(out, lse, forms, kept, stat)
    whole.copy_(torch.where(before[..., None], added, whole))
    fresh.copy_(torch.where(before[..., None], kept, fresh))
    return whole, fresh, torch.where(before, stat, told)


def add_rest(
    out: Tensor, lse: Tensor, forms: Tensor, kept: Tensor, stat: Tensor, heads: Tensor | None = None
) -> Tensor:
    """``[B, H, S, E]``: what a head's lists give, and what it kept in an earlier step as its form has it.

    ``heads`` are those that something is kept of, as in ``keep_rest``.

    Raises:
        ValueError: shapes or dtypes do not fit; on processors also: a head keeps a rest and is none of ``heads``.
    """
    if heads is not None:
        _check_heads("add_rest", heads, forms, out)
        part = add_rest(_of(heads, out, 1), _of(heads, lse, 1), _of(heads, forms), kept, stat)
        return torch.empty_like(out).copy_(out).index_copy_(1, heads, part)
    _check("add_rest", out, lse, forms, ("kept", kept, stat))
    share, rest = shares(lse, stat)
    codes = forms[:, None]
    own = torch.where(codes == MERGE, share, torch.where(codes == RATIO, stat, 1.0))
    of_kept = torch.where(codes == MERGE, rest, 1.0) * (codes != NO_REST)
    return _combined(torch.empty_like(out), out, own, kept, of_kept)


def shares(lse: Tensor, others_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Of two parts' log-sum-exps ``[B, H, S]`` the share of each; both 0 where neither has a key."""
    apart, nothing = lse - others_lse, (lse == -torch.inf) & (others_lse == -torch.inf)
    return apart.sigmoid().masked_fill(nothing, 0.0), apart.neg().sigmoid().masked_fill(nothing, 0.0)


def _combined(into: Tensor, out: Tensor, own: Tensor, other: Tensor, of_other: Tensor) -> Tensor:
    """``own * out + of_other * other``, row by row, in float32 and rounded once."""
    wide = torch.promote_types(out.dtype, torch.float32)
    own, of_other = (each[..., None].to(wide) for each in (own, of_other))
    return into.copy_(torch.addcmul(out.to(wide) * own, other.to(wide), of_other))


def _check(operator: str, out: Tensor, lse: Tensor, forms: Tensor, other: tuple[str, Tensor, Tensor]) -> None:
    """That results of two lists, and which heads keep a rest, are of the same sizes and dtypes."""
    name, result, told = other
    _of_heads(operator, "forms", forms, out, torch.int32)
    if result.shape != out.shape or result.dtype != out.dtype:
        raise ValueError(
            f"ditopt::{operator}: {name} is {list(result.shape)} of {result.dtype}, the result is {list(out.shape)} of "
            f"{out.dtype}"
        )
    for each in (lse, told):
        if each.shape != out.shape[:3]:
            raise ValueError(
                f"ditopt::{operator}: a log-sum-exp or what is kept beside {name} is {list(each.shape)}, not "
                f"{list(out.shape[:3])} [B, H, S]"
            )


def _of(heads: Tensor, each: Tensor, dim: int = 0) -> Tensor:
    return each.index_select(dim, heads)


def _check_heads(operator: str, heads: Tensor, forms: Tensor, out: Tensor) -> None:
    """That what is kept has room for every head that keeps some; numbers are looked at on processors alone."""
    _of_heads(operator, "forms", forms, out, torch.int32)
    if heads.ndim != 1 or heads.dtype != torch.int64:
        raise ValueError(f"ditopt::{operator}: heads is {list(heads.shape)} of {heads.dtype}, not [K] of torch.int64")
    if heads.device.type == "cpu":
        without = [head for head, form in enumerate(forms.tolist()) if form != NO_REST and head not in heads.tolist()]
        if without:
            raise ValueError(f"ditopt::{operator}: head {without[0]} keeps a rest and is none of {heads.tolist()}")


def _of_heads(operator: str, name: str, given: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    if given.shape != out.shape[1:2] or given.dtype != dtype:
        raise ValueError(
            f"ditopt::{operator}: {name} is {list(given.shape)} of {given.dtype}, not [{out.shape[1]}] of {dtype}, one "
            "for each head"
        )


LIBRARY.impl("keep_rest", keep_rest, "CompositeExplicitAutograd")
LIBRARY.impl("add_rest", add_rest, "CompositeExplicitAutograd")
