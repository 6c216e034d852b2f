"""The orders of tokens that a site's sparse heads ask for, as inputs of its graphs."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ditopt.decisions import HeadDecision
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.orders import TokenOrder, inverse
from ditopt.passes._infra import Ordered
from ditopt.runtime.choices import Heads, choice_of


def order_of(decision: HeadDecision) -> TokenOrder | None:
    """The order that a head's blocks are in; None is raster order."""
    choice = choice_of(decision)
    return None if choice is None else choice.order


def site_orders(
    decided: Mapping[int, Heads], geometry: Geometry | None, block: int, device: torch.device
) -> tuple[Ordered, dict[int, tuple[Tensor, Tensor]]]:
    """How the tokens of a site in blocks of ``block`` are ordered, in all steps alike; and by step in which order.

    The latter are the order and what undoes it, int64: ``[S]`` where the heads of every step have one between them,
    else ``[H, S]``. Heads that mean the same in every order go with the others. Where nobody asks for one there is
    none, and a step in which nobody does has raster order. Where a call finds the order of some head, heads have one
    each, and that one's is raster order here.
    """
    asked = {heads: _asked(heads) for heads in dict.fromkeys(decided.values())}
    if geometry is None or not any(map(any, asked.values())):
        return Ordered.NOT, {}
    several = any(len(set(orders)) > 1 for orders in asked.values()) or any(
        any(clustered_heads(heads)) for heads in asked
    )
    form = Ordered.HEADS if several else Ordered.SITE
    found = {}
    for heads, orders in asked.items():
        rows = [_sequence(order, geometry, block) for order in (orders if form is Ordered.HEADS else orders[:1])]
        pair = (torch.stack([row[place] for row in rows]).to(device) for place in range(2))
        there, back = (each if form is Ordered.HEADS else each[0] for each in pair)
        found[heads] = there, back
    return form, {step: found[heads] for step, heads in decided.items()}


def _asked(heads: Heads) -> tuple[TokenOrder | None, ...]:
    """The order of every head; heads to which it is all one have that of the first to which it is not."""
    choices = [choice_of(do) for do in heads]
    bound = [None if choice is None or choice.in_any_order else choice for choice in choices]
    first = next((choice.order for choice in bound if choice is not None), None)
    return tuple(first if choice is None else choice.order for choice in bound)


def clustered_heads(heads: Heads) -> tuple[bool, ...]:
    """Of every head whether calls find the order of its queries and of its keys."""
    choices = [choice_of(do) for do in heads]
    orders = [None if choice is None or choice.in_any_order else choice.order for choice in choices]
    return tuple(order is not None and order.is_found for order in orders)


@functools.lru_cache(maxsize=32)
def _sequence(order: TokenOrder | None, geometry: Geometry, block: int) -> tuple[Tensor, Tensor]:
    """``[S]`` each: the order of a sequence, and what undoes it."""
    if order is None:
        raster = torch.arange(geometry.tokens)
        return raster, raster
    there = order.of_sequence(geometry, block)
    return torch.from_numpy(there), torch.from_numpy(inverse(there))
