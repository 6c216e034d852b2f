"""Schemas and fakes of ditopt's operators; no implementation beyond a call to the plain one.

``ditopt::attention`` stands for one attention call of the model while a graph is analysed, so that no
device decomposes it out of sight. The pass ``lower_attention`` turns it back before Inductor sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LIBRARY = torch.library.Library("ditopt", "DEF")
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor"
)


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
