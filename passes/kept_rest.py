"""A rest kept between steps: attention to listed blocks put together with that to all others, of this call or before.

A graph that ``keeps`` a site's rest calls the kernel a second time, for all blocks that its heads' lists leave out, and
hands on what ``ditopt::keep_rest`` says; one that ``reads`` it adds that by ``ditopt::add_rest``. Where some heads keep
theirs anew and others read, one operator does both. What is kept is of queries in the order that a head's blocks have.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from ditopt.errors import AuditError
from ditopt.kernels.ops import ADD_REST, KEEP_REST
from ditopt.passes._infra import SITE, SparseAttention, add_input, call, tensor_value, word
from ditopt.passes.attention import rest_of
from ditopt.passes.cast import readers, source
from ditopt.passes.kept import REST, kept_names, readers_name


def forms_name(site: str) -> str:
    """The input that says what each head of a site keeps: ``[H]`` int32, 0 or a code of ``kernels.patterns.kept``."""
    return f"forms_{word(site)}"


def other_names(site: str) -> tuple[str, str]:
    """The inputs that list all other blocks of heads that keep a rest anew: ``[1, H, Qb, W]``, ``[1, H, Qb]`` int32."""
    return f"others_indices_{word(site)}", f"others_counts_{word(site)}"


def resting_name(site: str) -> str:
    """The input that says which heads of a site a slot is of, where it is not of all: ``[K]`` int64, ascending."""
    return f"resting_{word(site)}"


def keeps_rest(wanted: SparseAttention) -> bool:
    """Whether a site's graph calls the kernel for all other blocks, too."""
    return REST in wanted.keeps


def has_rest(wanted: SparseAttention) -> bool:
    """Whether heads of a site keep a rest in this graph or read one."""
    return REST in (*wanted.keeps, *wanted.reads)


def with_rest(
    gm: fx.GraphModule,
    wanted: SparseAttention,
    own: fx.Node,
    out: fx.Node,
    attend: Callable[[Sequence[fx.Node]], fx.Node],
) -> tuple[fx.Node, list[fx.Node]]:
    """A site's result with its rest, and what is handed on; ``out`` is the first of the two results ``own``.

    ``attend`` inserts the same call with other lists, behind which the heads' pooled operands are left out.
    """
    lse, site = call(gm, operator.getitem, own, 1), wanted.site
    counts = tensor_value(lse)
    of_heads = counts.new_empty(counts.shape[1:2], dtype=torch.int32)
    forms = add_input(gm, forms_name(site), of_heads)
    like = [tensor_value(each) for each in (out, lse)]
    slot = [
        add_input(gm, name, each.new_empty((each.shape[0], wanted.resting or each.shape[1], *each.shape[2:])))
        for name, each in zip(kept_names(REST, site) if REST in wanted.reads else (), like, strict=False)
    ]
    named = {}
    if wanted.resting:
        named["heads"] = add_input(gm, resting_name(site), counts.new_empty(wanted.resting, dtype=torch.int64))
    if not keeps_rest(wanted):
        return call(gm, ADD_REST, out, lse, forms, *slot, **named), []
    rows = (1, of_heads.shape[0], -(-counts.shape[2] // wanted.query_block))
    sizes = ((*rows, wanted.others), rows)
    lists = [add_input(gm, name, of_heads.new_empty(size)) for name, size in zip(other_names(site), sizes, strict=True)]
    others = attend(lists)
    parts = [call(gm, operator.getitem, others, place) for place in range(2)]
    if slot:
        slot.insert(0, add_input(gm, readers_name(REST, site), of_heads.new_empty(of_heads.shape, dtype=torch.bool)))
    three = call(gm, KEEP_REST, out, lse, *parts, forms, *slot, **named)
    whole, *handed_on = (call(gm, operator.getitem, three, place) for place in range(3))
    return whole, handed_on


def check_with_rest(
    gm: fx.GraphModule, wanted: SparseAttention, calls: Sequence[fx.Node]
) -> tuple[list[fx.Node], tuple[fx.Node, ...]]:
    """A site's results, and what is handed on of them, if the plan's rest makes them of its own attention ``calls``.

    Raises:
        AuditError: they are not; names the site.
    """

    def complain(told: str) -> AuditError:
        return AuditError(f"{wanted.site}: to be {wanted}, but {told}")

    own, site = calls[0], wanted.site
    parts = _parts(own)
    found = [node for node in gm.graph.nodes if node.target in (KEEP_REST, ADD_REST) and node.meta.get(SITE) == site]
    if not has_rest(wanted):
        if found:
            raise complain("its attention has a rest in the graph")
        return [parts[0]] if 0 in parts else [], ()
    made_by = KEEP_REST if keeps_rest(wanted) else ADD_REST
    if [node.target for node in found] != [made_by]:
        told = ", ".join(str(node.target) for node in found) or "nothing"
        raise complain(f"its rest is made by {told}")
    (node,) = found
    slots = [*kept_names(REST, site)] if REST in wanted.reads else []
    given: list[object] = [parts.get(0), parts.get(1)]
    names = [forms_name(site), *slots]
    if keeps_rest(wanted):
        given += _checked_others(wanted, calls, complain)
        names[1:1] = [readers_name(REST, site)] if slots else []
    values, inputs = node.args[: len(given)], node.args[len(given) :]
    read = [str(each.target) for each in inputs if isinstance(each, fx.Node) and each.op == "placeholder"]
    if any(source(value) is not wanted_value for value, wanted_value in zip(values, given, strict=True)):
        raise complain("what its rest is put together with is not its own attention")
    heads = [*node.kwargs.items()]
    read += [str(each.target) for _, each in heads if isinstance(each, fx.Node)]
    names += [resting_name(site)] if wanted.resting else []
    if read != names or len(inputs) + len(heads) != len(names):
        raise complain(f"its rest reads {', '.join(read) or 'nothing'}")
    if readers([parts[0]]) != [node]:
        raise complain("its attention is read without its rest")
    made = _parts(node)
    results = [node] if made_by is ADD_REST else [made[0]] if 0 in made else []
    return results, tuple(made[place] for place in (1, 2) if place in made)


def _checked_others(
    wanted: SparseAttention, calls: Sequence[fx.Node], complain: Callable[[str], AuditError]
) -> list[object]:
    """The two results of a second call, if it is the first with all other lists."""
    own, others = calls
    lists = [str(each.target) for each in others.args[3:5] if isinstance(each, fx.Node) and each.op == "placeholder"]
    indices = others.args[3]
    room = tensor_value(indices).shape[-1] if isinstance(indices, fx.Node) else None
    if lists != [*other_names(wanted.site)] or room != wanted.others:
        raise complain(f"its second call reads the lists {', '.join(lists) or 'of the graph'}")
    alike = others.args[:3] == own.args[:3] and others.args[5:8] == own.args[5:8] and others.kwargs == own.kwargs
    if not alike or rest_of(others) != (None, None, None, 0):
        raise complain("its second call has other operands, sizes, mask or scale than its first")
    found = _parts(others)
    return [found.get(0), found.get(1)]


def _parts(node: fx.Node) -> dict[object, fx.Node]:
    """The results that are taken of a call with several, by place."""
    return {use.args[1]: use for use in node.users if use.target is operator.getitem}
