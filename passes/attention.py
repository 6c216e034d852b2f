"""What an attention call in a graph was given, and what no kernel of ours takes of it."""

from __future__ import annotations

import operator

from torch import fx

from ditopt.kernels.ops import DRAFT_LISTS, FIRST_ORDER_ON_GPU, SETTINGS, int8_refusal
from ditopt.passes._infra import tensor_value


def scale_of(node: fx.Node) -> float:
    """What scores are multiplied by; one over the root of the number of channels unless it is given."""
    given = _settings(node)["scale"]
    depth: int = tensor_value(node.args[0]).shape[-1]  # type: ignore[arg-type]  # a node
    return float(given) if isinstance(given, (int, float)) else depth**-0.5


def mask_of(node: fx.Node) -> fx.Node | None:
    """The mask of an attention call."""
    found = _settings(node)["attn_mask"]
    return found if isinstance(found, fx.Node) else None


def special(node: fx.Node) -> str | None:
    """What an attention call has beyond operands and a scale; None: nothing."""
    return "there is a mask" if mask_of(node) is not None else special_but_mask(node)


def special_but_mask(node: fx.Node) -> str | None:
    """What an attention call has beyond operands, a scale and a mask; None: nothing."""
    given = _settings(node)
    query, key = (tensor_value(operand) for operand in node.args[:2])  # type: ignore[arg-type]  # nodes
    if given["is_causal"]:
        return "there is a causal mask"
    if given["dropout_p"]:
        return f"dropout is {given['dropout_p']}"
    if query.shape[1:2] != key.shape[1:2] and not given["enable_gqa"]:
        return "queries and keys have different numbers of heads"
    return None


def rest_refusal(node: fx.Node) -> str | None:
    """Why no kernel attends to means of what an attention call's pattern skips; None if one does."""
    return special(node)


def first_order_refusal(node: fx.Node) -> str | None:
    """Why no kernel does so to first order; None if one does."""
    device = tensor_value(node.args[0]).device.type  # type: ignore[arg-type]  # a node
    return rest_refusal(node) or (None if device == "cpu" else FIRST_ORDER_ON_GPU)


def int8_scores_refusal(node: fx.Node) -> str | None:
    """Why no kernel gives an attention call int8 scores; None if one does."""
    device = tensor_value(node.args[0]).device  # type: ignore[arg-type]  # a node
    return special_but_mask(node) or int8_refusal(device)


def rest_of(node: fx.Node) -> tuple[object, object, object, object]:
    """What a block-sparse attention was given behind its scale: pooled keys and values, heads with a rest, the pool."""
    given = (*node.args[8:12], *(None, None, None, 0)[len(node.args[8:12]) :])
    return given[0], given[1], given[2], given[3]


def list_maker(node: fx.Node) -> fx.Node | None:
    """The ``ditopt::draft_lists`` whose two results are the lists of a block-sparse attention; None: there is none."""
    pair = [each for each in node.args[3:5] if isinstance(each, fx.Node) and each.target is operator.getitem]
    makers = {each.args[0] for each in pair}
    if [each.args[1] for each in pair] != [0, 1] or len(makers) != 1:
        return None
    (maker,) = makers
    return maker if isinstance(maker, fx.Node) and maker.target is DRAFT_LISTS else None


def _settings(node: fx.Node) -> dict[str, object]:
    """What an attention call was given behind its three operands, by name, or has by default."""
    return {**SETTINGS, **dict(zip(SETTINGS, node.args[3:], strict=False)), **node.kwargs}
