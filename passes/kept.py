"""Kept: tensors of an attention site that one step finds and later ones read in its place, head by head (state slots).

A slot is named by its kind and its site. To add a kind:

1. ``TENSORS`` says how many tensors it has. Where a pass makes them, it hands them on (``hand_on``) if the site
   ``keeps`` the kind, and takes those of the slot for the heads that read it (``take``) if the site ``reads`` it; both
   are fields of ``SparseAttention``, so they tell variants apart. ``passes.audit`` has to check that what is handed on,
   and what is read, are these very values (``check_handed_on``, ``taken``).
2. ``runtime.sparse`` says in which steps: ``ditopt.kept.uses`` counts the steps of a head's run, ``runtime.kept`` makes
   of that which steps keep, which read the slot of which step, and ``[H]``, the heads that read.

All else goes by the slot's name: the program stores what a variant hands on, gives it to the steps that read it if it
is of the planned step (else they run dense), and drops it behind its last reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ditopt.errors import AuditError
from ditopt.passes._infra import StepPlan, add_input, call, outputs, set_outputs, tensor_value, word

aten = torch.ops.aten

LISTS = "lists"
"""The lists that a site attends by: ``indices`` ``[B, H, Qb, W]`` and ``counts`` ``[B, H, Qb]``, int32."""
REST = "rest"
"""What heads keep of blocks that their lists leave out (``passes.kept_rest``): ``[B, H, S, E]`` and ``[B, H, S]``."""
TENSORS: Mapping[str, int] = {LISTS: 2, REST: 2}
"""How many tensors a slot of each kind has."""
PREFIX = "kept_"
"""Of the names of inputs that carry slots."""


def slot_of(kind: str, site: str) -> str:
    """A slot's name; no feature's is like it, as no name of a site has a blank."""
    return f"{kind} {site}"


def kept_names(kind: str, site: str) -> tuple[str, ...]:
    """The inputs that carry a slot's tensors."""
    return tuple(f"{PREFIX}{kind}_{word(site)}_{place}" for place in range(TENSORS[kind]))


def readers_name(kind: str, site: str) -> str:
    """The input that says which heads of a site read a slot: ``[H]`` boolean."""
    return f"reads_{kind}_{word(site)}"


def kept_slots(plan: StepPlan) -> tuple[tuple[str, int], ...]:
    """The slots that a graph hands on behind its features, in order, and how many tensors each has."""
    return tuple((slot_of(kind, each.site), TENSORS[kind]) for each in plan.sparse for kind in each.keeps)


def hand_on(gm: fx.GraphModule, plan: StepPlan, before: int, kept: Mapping[str, Sequence[fx.Node]]) -> None:
    """Let outputs behind the first ``before`` be those of the plan's slots that ``kept`` has the tensors of."""
    behind = [node for slot, _ in kept_slots(plan) for node in kept.get(slot, ())]
    set_outputs(gm, [*outputs(gm)[:before], *behind])


def take(gm: fx.GraphModule, kind: str, site: str, given: Sequence[fx.Node], batch: int) -> list[fx.Node]:
    """The slot's tensors for heads that read it, those ``given`` (``[B or 1, H, ...]``) for others; ``[B, H, ...]``."""
    first = tensor_value(given[0])
    heads = add_input(gm, readers_name(kind, site), first.new_empty(first.shape[1:2], dtype=torch.bool))
    found = []
    for name, own in zip(kept_names(kind, site), given, strict=True):
        like = tensor_value(own)
        slot = add_input(gm, name, like.new_empty((batch, *like.shape[1:])))
        of_heads = call(gm, aten.view.default, heads, [-1, *[1] * (like.ndim - 2)])
        found.append(call(gm, aten.where.self, of_heads, slot, own))
    return found


def taken(node: object, kind: str, site: str, place: int) -> object:
    """What heads have that do not read a slot's tensor ``place``, if ``node`` is as ``take`` makes it; else None."""
    if not isinstance(node, fx.Node) or node.target is not aten.where.self:
        return None
    heads, slot, given = node.args
    if isinstance(heads, fx.Node) and heads.target is aten.view.default:
        heads = heads.args[0]
    read = [str(each.target) for each in (heads, slot) if isinstance(each, fx.Node) and each.op == "placeholder"]
    return given if read == [readers_name(kind, site), kept_names(kind, site)[place]] else None


def check_handed_on(gm: fx.GraphModule, plan: StepPlan, before: int, made: Mapping[str, Sequence[object]]) -> None:
    """The outputs behind the first ``before`` are the tensors of the plan's slots, which ``made`` has, and no others.

    Raises:
        AuditError: one is not; names the slot.
    """
    left = outputs(gm)[before:]
    for slot, count in kept_slots(plan):
        mine, left = left[:count], left[count:]
        wanted = made.get(slot, ())
        if len(mine) != len(wanted) or any(one is not other for one, other in zip(mine, wanted, strict=True)):
            told = ", ".join(str(each) for each in mine) or "nothing"
            raise AuditError(f"{slot}: to be kept, but the graph hands on {told} in its place")
    if left:
        raise AuditError(f"the graph hands on {len(left)} values that the plan does not keep, e.g. {left[0]}")


def stand_ins(gm: fx.GraphModule, lists: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for a graph's slots where none are at hand, to time it by: zeros; of lists so many blocks as have room.

    ``lists`` are the graph's other inputs by name, with ``room_name``.
    """
    found = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith(PREFIX):
            like = tensor_value(node)
            found[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    for name, room in lists.items():
        if name.startswith(ROOM):
            site = name.removeprefix(ROOM)
            indices, counts = (found[f"{PREFIX}{LISTS}_{site}_{place}"] for place in range(2))
            indices.copy_(torch.arange(indices.shape[-1]))
            counts.copy_(room[None, :, None])
    return found


ROOM = "room_"


def room_name(site: str) -> str:
    """Beside a graph's inputs: how many blocks those heads have room for that read lists, ``[H]`` int32."""
    return f"{ROOM}{word(site)}"
