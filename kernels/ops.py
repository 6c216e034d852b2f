"""Schemas and fakes of ditopt's operators; no implementation beyond a call to the plain one.

``ditopt::attention`` stands for one attention call of the model while a graph is analysed, so that no
device decomposes it out of sight. The pass ``lower_attention`` turns it back before Inductor sees it, unless the pass
``flash`` has put ``ditopt::flash_attention`` in its place, of which ``refusal`` tells what its kernels do not take.
``ditopt::block_sparse_attention`` attends to listed blocks of keys only (``block_sparse_attention.lists``), and to the
means of the others where it is given them (``block_sparse_attention.pooled``); its Triton kernel for CUDA tensors is
imported when it is first called with some. ``ditopt::draft_lists`` makes such lists of the very queries, keys
and values (``block_sparse_attention.draft``), ``ditopt::cluster_order`` orders of queries and keys
(``block_sparse_attention.clusters``). ``ditopt::keep_rest`` and ``ditopt::add_rest`` put its result together with that
of the other blocks, of the same call or kept from an earlier one (``block_sparse_attention.kept``);
``ditopt::linear_rest`` is linear attention to these (``block_sparse_attention.linear``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt._torch import has_amx, has_bfloat16_dot_products, has_byte_dot_products
from ditopt.kernels.block_sparse_attention.gpu import WIDEST, gpu_refusal
from ditopt.kernels.block_sparse_attention.int8 import check_int8
from ditopt.kernels.block_sparse_attention.lists import QUERY_TASK, check
from ditopt.kernels.block_sparse_attention.lists import BlockLists as BlockLists
from ditopt.kernels.block_sparse_attention.masks import log_dtype
from ditopt.kernels.block_sparse_attention.pooled import PooledRest as PooledRest
from ditopt.kernels.block_sparse_attention.pooled import check_pooled
from ditopt.kernels.cpp import PAIRS, compiler_refusal
from ditopt.kernels.patterns.draft import SELECTORS, Selector

LIBRARY = torch.library.Library("ditopt", "DEF")
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor"
)
LIBRARY.define("flash_attention(Tensor query, Tensor key, Tensor value, float scale) -> Tensor")
LIBRARY.define(
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, int query_block, "
    "int key_block, float scale, Tensor? pooled_key=None, Tensor? pooled_value=None, Tensor? rest=None, int pool=0, "
    "Tensor? mask=None, Tensor? int8=None) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "draft_lists(Tensor query, Tensor key, Tensor indices, Tensor counts, Tensor keep, Tensor mass, int query_block, "
    "int key_block, float scale, Tensor? value=None, Tensor? by=None, str selectors='means', Tensor? mask=None) "
    "-> (Tensor, Tensor)"
)

LIBRARY.define(
    "cluster_order(Tensor query, Tensor key, Tensor order, Tensor clustered, int first, int last, int clusters, "
    "int rounds) -> (Tensor, Tensor, Tensor)"
)

LIBRARY.define(
    "keep_rest(Tensor out, Tensor lse, Tensor others, Tensor others_lse, Tensor forms, Tensor? reads=None, "
    "Tensor? kept=None, Tensor? stat=None, Tensor? heads=None) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("add_rest(Tensor out, Tensor lse, Tensor forms, Tensor kept, Tensor stat, Tensor? heads=None) -> Tensor")

LIBRARY.define(
    "linear_rest(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, Tensor projection, "
    "int query_block, int key_block) -> Tensor"
)

SETTINGS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
"""What attention takes behind its three operands, with its defaults, in order."""


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's attention: ``[B, H, S, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, E]`` -> ``[B, H, S, E]``."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _autocast_attention(device: str) -> object:
    """Under autocast the operands take its dtype, as torch's own attention does."""

    def call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: object) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            result: Tensor = torch.ops.ditopt.attention(query.to(dtype), key.to(dtype), value.to(dtype), mask, *rest)
        return result

    return call


LIBRARY.impl("attention", plain_attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention", _autocast_attention("cpu"), "AutocastCPU")
LIBRARY.impl("attention", _autocast_attention("cuda"), "AutocastCUDA")
torch.library.register_fake("ditopt::attention", plain_attention, lib=LIBRARY)

ATTENTION = torch.ops.ditopt.attention.default
FLASH_ATTENTION = torch.ops.ditopt.flash_attention.default
BLOCK_SPARSE_ATTENTION = torch.ops.ditopt.block_sparse_attention.default
DRAFT_LISTS = torch.ops.ditopt.draft_lists.default
CLUSTER_ORDER = torch.ops.ditopt.cluster_order.default
KEEP_REST = torch.ops.ditopt.keep_rest.default
ADD_REST = torch.ops.ditopt.add_rest.default
LINEAR_REST = torch.ops.ditopt.linear_rest.default


def _fake_flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)


torch.library.register_fake("ditopt::flash_attention", _fake_flash_attention, lib=LIBRARY)


def refusal(query: Tensor, key: Tensor, value: Tensor, scale: float, dtype: torch.dtype) -> str | None:
    """Why no kernel of ``ditopt::flash_attention`` takes these operands, were they of ``dtype``; None if one does."""
    parts = (query, key, value)
    elsewhere = _elsewhere(*parts)
    if elsewhere is not None:
        return elsewhere
    if dtype != torch.bfloat16:
        return f"there is a kernel for torch.bfloat16 only, not for {dtype}"
    if not has_bfloat16_dot_products():
        return "this processor has no dot products of bfloat16 pairs (avx512_bf16)"
    unbuilt = compiler_refusal(PAIRS)
    if unbuilt is not None:
        return unbuilt
    if has_amx():
        return "this processor has AMX, which torch's attention uses"
    if len({part.dtype for part in parts}) > 1:
        return f"operands are of several dtypes: {', '.join(str(part.dtype) for part in parts)}"
    mismatch = _mismatch(query, key, value, scale)
    if mismatch is not None:
        return mismatch
    odd = query.shape[3] % 2 or value.shape[3] % 2
    return f"an odd number of channels: {query.shape[3]}, {value.shape[3]}" if odd else None


def _fake_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    rest: Tensor | None = None,
    pool: int = 0,
    mask: Tensor | None = None,
    int8: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = _fake_flash_attention(query, key, value, scale)
    return out, query.new_empty(query.shape[:3], dtype=log_dtype(mask))


FIRST_ORDER_ON_GPU = "there is no kernel for GPUs that takes a rest to first order"
MASK_ON_GPU = "there is a mask, and no kernel for GPUs that takes one"
NO_BYTES = "there is no kernel with int8 scores (qk: int8)"
INT8_ON_CPU = f"{NO_BYTES} for processors without dot products of bytes (avx512_vnni)"
MASK_AND_REST = "there is a mask, under which what a pattern skips has no means (a rest)"


def _block_sparse_attention_in_triton(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    # the dispatcher passes all by position, up to the last that is no default
    given, further = given[:12], {**dict(zip(("mask", "int8"), given[12:], strict=False)), **named}
    refused = MASK_ON_GPU if further.pop("mask", None) is not None else gpu_refusal(given[0].device)
    if refused is not None:
        raise ValueError(f"ditopt::block_sparse_attention: {refused}")
    from ditopt.kernels.block_sparse_attention.triton import block_sparse_attention

    return block_sparse_attention(*given, **further)


torch.library.register_fake("ditopt::block_sparse_attention", _fake_block_sparse_attention, lib=LIBRARY)
LIBRARY.impl("block_sparse_attention", _block_sparse_attention_in_triton, "CUDA")


def block_sparse_refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    scale: float,
    rest: PooledRest | None = None,
    mask: Tensor | None = None,
    int8: Tensor | None = None,
) -> str | None:
    """Why no kernel of ``ditopt::block_sparse_attention`` takes these operands; None if one does."""
    parts = (query, key, value)
    pooled = () if rest is None else (rest.key, rest.value, rest.heads)
    eight = () if int8 is None else (int8,)
    elsewhere = _elsewhere(*parts, lists.indices, lists.counts, *pooled, *eight, kernels=("cpu", "cuda"))
    if elsewhere is None and query.is_cuda:
        elsewhere = MASK_ON_GPU if mask is not None else gpu_refusal(query.device)
    elif elsewhere is None and int8 is not None:
        elsewhere = int8_refusal(query.device)
    if elsewhere is not None:
        return elsewhere
    if len({part.dtype for part in parts}) > 1 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtypes = ", ".join(str(part.dtype) for part in parts)
        return f"operands are of {dtypes}; all of float32, of bfloat16 or of float16 are taken"
    mismatch = _mismatch(query, key, value, scale)
    if mismatch is not None:
        return mismatch
    if query.is_cuda and max(query.shape[3], value.shape[3]) > WIDEST:
        return f"heads of {query.shape[3]} and {value.shape[3]} channels; at most {WIDEST} are taken on a GPU"
    if lists.query_block % QUERY_TASK or lists.key_block % 2:
        sizes = f"blocks of {lists.query_block} queries and {lists.key_block} keys"
        return f"{sizes}: multiples of {QUERY_TASK} and of 2 are taken"
    if mask is not None:
        hidden = MASK_AND_REST if rest is not None else mask_mismatch(query, key, mask)
        if hidden is not None:
            return hidden
    wrong = check(lists, query.shape[0], query.shape[1], query.shape[2])
    if wrong is None and int8 is not None:
        wrong = check_int8(int8, query.shape[1])
    return wrong if wrong is not None or rest is None else check_pooled(rest, key, value, lists, query.shape[1])


def int8_refusal(device: torch.device) -> str | None:
    """Why no kernel on a device has int8 scores; None if one does, or it is not known what is there."""
    return INT8_ON_CPU if device.type == "cpu" and not has_byte_dot_products() else None


def mask_mismatch(query: Tensor, key: Tensor, mask: Tensor) -> str | None:
    """Why a mask is none of these queries and keys; None if it is one."""
    whole = (*query.shape[:3], key.shape[2])
    last = zip(reversed(mask.shape), reversed(whole), strict=False)
    if not 0 < mask.ndim <= 4 or any(size not in (1, full) for size, full in last):
        return f"a mask of shape {list(mask.shape)} does not broadcast to {list(whole)}"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"a mask of {mask.dtype}, which is neither boolean nor a bias"
    return None if mask.device == query.device else f"the mask is on {mask.device}, the operands are on {query.device}"


def _fake_draft_lists(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    counts: Tensor,
    keep: Tensor,
    mass: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    value: Tensor | None = None,
    by: Tensor | None = None,
    selectors: str = "means",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = (query.shape[0], *counts.shape[1:])
    return indices.new_empty((*rows, indices.shape[-1])), counts.new_empty(rows)


torch.library.register_fake("ditopt::draft_lists", _fake_draft_lists, lib=LIBRARY)


def _fake_cluster_order(
    query: Tensor, key: Tensor, order: Tensor, clustered: Tensor, first: int, last: int, clusters: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    made = [query.new_empty(query.shape[:3], dtype=torch.int64) for _ in range(3)]
    return made[0], made[1], made[2]


torch.library.register_fake("ditopt::cluster_order", _fake_cluster_order, lib=LIBRARY)


def _fake_keep_rest(
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
    keeping = out.shape[1] if heads is None else heads.shape[0]
    sizes = out.shape[0], keeping, *out.shape[2:]
    return torch.empty_like(out), out.new_empty(sizes), lse.new_empty(sizes[:3])


def _fake_add_rest(
    out: Tensor, lse: Tensor, forms: Tensor, kept: Tensor, stat: Tensor, heads: Tensor | None = None
) -> Tensor:
    return torch.empty_like(out)


torch.library.register_fake("ditopt::keep_rest", _fake_keep_rest, lib=LIBRARY)
torch.library.register_fake("ditopt::add_rest", _fake_add_rest, lib=LIBRARY)


def _fake_linear_rest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    projection: Tensor,
    query_block: int,
    key_block: int,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


torch.library.register_fake("ditopt::linear_rest", _fake_linear_rest, lib=LIBRARY)


def linear_refusal(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, projection: Tensor) -> str | None:
    """Why ``ditopt::linear_rest`` does not take these operands; None if it does."""
    wrong = _mismatch(query, key, value, 1.0) or check(lists, query.shape[0], query.shape[1], query.shape[2])
    wanted = (query.shape[1], value.shape[3], value.shape[3])
    if wrong is None and (projection.shape != wanted or projection.dtype != torch.float32):
        return f"projections are {projection.dtype} {list(projection.shape)}, not torch.float32 {list(wanted)}"
    return wrong


def cluster_refusal(
    query: Tensor, key: Tensor, order: Tensor, clustered: Tensor, first: int, last: int, clusters: int, rounds: int
) -> str | None:
    """Why ``ditopt::cluster_order`` does not take these operands; None if it does."""
    mismatch = _mismatch(query, key, key, 1.0)
    if mismatch is not None:
        return mismatch
    heads, tokens = query.shape[1:3]
    if key.shape[2] != tokens:
        return f"{tokens} queries and {key.shape[2]} keys; tokens are both"
    for name, each, shape, dtype in (
        ("order", order, (heads, tokens), torch.int64),
        ("clustered", clustered, (heads,), torch.int32),
    ):
        if each.shape != shape or each.dtype != dtype:
            return f"{name} is {list(each.shape)} of {each.dtype}, not {list(shape)} of {dtype}"
    if not 0 <= first < last <= tokens:
        return f"tokens from {first} up to {last} are to be ordered, of {tokens}"
    if not 1 <= clusters <= last - first or rounds < 0:
        return (
            f"{clusters} clusters of {last - first} tokens in {rounds} rounds; at least 1 and at most as many as tokens"
        )
    return None


def draft_refusal(
    query: Tensor,
    key: Tensor,
    lists: BlockLists,
    keep: Tensor,
    mass: Tensor,
    scale: float,
    value: Tensor | None = None,
    by: Tensor | None = None,
    selectors: str = "means",
    mask: Tensor | None = None,
) -> str | None:
    """Why ``ditopt::draft_lists`` does not take these operands; None if it does."""
    named = selectors_of(selectors)
    if not named or len(set(named)) < len(named) or not {*named} <= {*SELECTORS}:
        return f"selectors {selectors!r}; name some of {', '.join(SELECTORS)}, once each, with commas between them"
    if "error" in named and value is None:
        return "blocks are chosen by the error of their means, but no values are given"
    mismatch = _mismatch(query, key, key if value is None else value, scale)
    if mismatch is None and mask is not None:
        mismatch = mask_mismatch(query, key, mask)
    if mismatch is not None:
        return mismatch
    if len(named) > 1 and by is None:
        return f"blocks are chosen by {selectors}, but nothing says which head's by which"
    of_heads = [("keep", keep, torch.int32), ("mass", mass, torch.float32)]
    for name, each, dtype in (*of_heads, *([("by", by, torch.int32)] if by is not None else [])):
        if each.shape != query.shape[1:2] or each.dtype != dtype:
            return f"{name} is {list(each.shape)} of {each.dtype}, not [{query.shape[1]}] of {dtype}, one for each head"
    return check(lists, query.shape[0], query.shape[1], query.shape[2])


def selectors_of(written: str) -> tuple[Selector, ...]:
    """The selectors that ``ditopt::draft_lists`` was given.

    >>> selectors_of("means,error")
    ('means', 'error')
    """
    return tuple(written.split(","))  # type: ignore[arg-type]  # ``draft_refusal`` looks at them


def _elsewhere(*parts: Tensor, kernels: tuple[str, ...] = ("cpu",)) -> str | None:
    """That an operand is on a device without a kernel, or that they are on several; None if all is well."""
    devices = [part.device for part in parts]
    unknown = [device.type for device in devices if device.type not in kernels]
    if unknown:
        return f"there is no kernel for {unknown[0]}"
    named = ", ".join(sorted(map(str, set(devices))))
    return f"operands and lists are on several devices: {named}" if len(set(devices)) > 1 else None


def _mismatch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    """What does not fit in attention's operands and their scale; None if all does."""
    parts = (query, key, value)
    if any(part.ndim != 4 for part in parts) or len({part.shape[0] for part in parts}) > 1:
        return "operands are not [B, H, S, D] of one batch"
    shapes = ", ".join(str(list(part.shape)) for part in parts)
    if 0 in (*query.shape, *key.shape, *value.shape):
        return f"a size is 0, so there is no token, head or channel at all: {shapes}"
    if key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        return f"heads, tokens or channels do not match: {shapes}"
    return None if scale > 0 else f"the scale is {scale:g}, it has to be above 0"
