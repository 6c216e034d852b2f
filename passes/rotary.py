"""Rotary: a rotary embedding of neighbouring channels, written so that it vectorises.

Models take a head's channels apart into even and odd ones, turn these, and put them together again with strided writes
or a stack. Inductor makes one scalar loop of that and of the norm before it, in which every channel divides and takes
a root anew. The same numbers come of ``x * a + swapped(x) * b``, where ``swapped`` exchanges the channels of a pair;
the tables ``a`` and ``b`` are put together once for all blocks.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.passes._infra import GraphIndex, PassResult, StepPlan, call, in_layout_of, replace_each, tensor_value

aten = torch.ops.aten

EVEN, ODD = 0, 1
WRITTEN = "ditopt_table"
"""Marks a table that was put together here, and is no rotation of the tensor whose channels are in it."""
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Factor:
    """What a channel is multiplied by: ``sign * table``, or the sign alone."""

    sign: float = 1.0
    table: fx.Node | None = None


Channel = tuple[fx.Node, int]
"""A tensor, and which of its channels: the even or the odd ones."""
Form = dict[Channel, Factor]
"""A linear form in channels."""


@dataclass(frozen=True)
class Rotation:
    """What even and odd channels of a result have of their own in ``source``, and of each other (None: nothing)."""

    source: fx.Node
    straight: tuple[Factor | None, Factor | None]
    crossed: tuple[Factor | None, Factor | None]


def rotary(gm: fx.GraphModule, plan: StepPlan, index: GraphIndex) -> PassResult:
    """Rewrite every rotation of pairs that strided writes or a stack put together."""
    if not plan.simplify:
        return PassResult(gm, False)
    writer = _Writer(gm)

    def write(node: fx.Node) -> fx.Node | None:
        rotation = rotation_of(node)
        return None if rotation is None else in_layout_of(gm, writer.write(rotation), node)

    return PassResult(gm, replace_each(gm, write))


def rotation_of(node: fx.Node) -> Rotation | None:
    """The rotation that ends in ``node``, if one does."""
    parts = None if WRITTEN in node.meta else _interleaved(node)
    even, odd = map(_form, parts) if parts is not None else (None, None)
    if even is None or odd is None:
        return None
    sources = {source for form in (even, odd) for source, _ in form}
    if len(sources) != 1:
        return None
    (source,) = sources
    here, there = tensor_value(source), tensor_value(node)
    if here.shape != there.shape or here.dtype != there.dtype or not there.dtype.is_floating_point:
        return None
    ours, theirs = (source, EVEN), (source, ODD)
    found = Rotation(source, (even.get(ours), odd.get(theirs)), (even.get(theirs), odd.get(ours)))
    if None in found.crossed or (None in found.straight and any(found.straight)):
        return None  # such as a table whose values are repeated: each channel of a pair has to have what the other has
    return found if all(_alike(*pair) for pair in (found.straight, found.crossed)) else None


def _alike(one: Factor | None, two: Factor | None) -> bool:
    """Whether two factors can stand side by side: both signs alone, or tables of one shape and type."""
    tables = [None if each is None or each.table is None else tensor_value(each.table) for each in (one, two)]
    first, second = tables
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and first.dtype == second.dtype


def _interleaved(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The even and the odd channels (last dimension) that ``node`` puts together."""
    base = node.args[0] if node.args else None
    if not isinstance(base, fx.Node):
        return None
    if node.target is aten.slice_scatter.default and base.target is aten.slice_scatter.default:
        written = dict(part for each in (base, node) if (part := _written(each)) is not None)
        return (written[EVEN], written[ODD]) if len(written) == 2 else None
    if node.target in VIEWS and base.target is aten.cat.default and _is_pairs(base, node):
        halves, dim = base.args[0], base.args[1] if len(base.args) > 1 else 0
        assert isinstance(halves, list | tuple) and isinstance(dim, int)
        parts = [_before_unsqueeze(half) for half in halves]
        if len(parts) == 2 and dim % tensor_value(base).ndim == tensor_value(base).ndim - 1:
            even, odd = parts
            return (even, odd) if even is not None and odd is not None else None
    return None


def _is_pairs(apart: fx.Node, flat: fx.Node) -> bool:
    """Whether ``apart`` ``[..., D / 2, 2]`` has the channels of ``flat`` ``[..., D]`` in pairs."""
    one, two = tensor_value(apart).shape, tensor_value(flat).shape
    return len(one) > 1 and one[-1] == 2 and tuple(two) == (*one[:-2], one[-2] * 2)


def _stride_two(node: fx.Node, first: int) -> int | None:
    """Which channels an operator takes whose arguments from ``first`` on are dimension, start, end and step."""
    given = dict(zip(("dim", "start", "end", "step"), node.args[first:], strict=False))
    dim, start, end, step = given.get("dim", 0), given.get("start"), given.get("end"), given.get("step", 1)
    base = node.args[0]
    assert isinstance(base, fx.Node) and isinstance(dim, int)
    size, last = tensor_value(base).shape[-1], tensor_value(base).ndim - 1
    whole = end is None or (isinstance(end, int) and end >= size)
    if step != 2 or not whole or size % 2 or dim % (last + 1) != last:
        return None
    return EVEN if start in (None, EVEN) else ODD if start == ODD else None


def _written(node: fx.Node) -> tuple[int, fx.Node] | None:
    """Which channels a ``slice_scatter`` writes, and what."""
    value = node.args[1]
    if isinstance(value, fx.Node) and value.target is aten.copy.default:
        copied = value.args[1]
        assert isinstance(copied, fx.Node)
        one, two = tensor_value(copied), tensor_value(value)
        value = copied if one.dtype == two.dtype and one.shape == two.shape else None
    which = _stride_two(node, 2)
    return (which, value) if isinstance(value, fx.Node) and which is not None else None


def _before_unsqueeze(node: object) -> fx.Node | None:
    """What a trailing dimension of one element was added to."""
    if not isinstance(node, fx.Node) or node.target is not aten.unsqueeze.default:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, fx.Node) and node.args[1] in (-1, tensor_value(inner).ndim) else None


def _channel(node: fx.Node) -> Channel | None:
    """The tensor whose even or odd channels ``node`` is, and which."""
    if node.target is aten.slice.Tensor:
        base, which = node.args[0], _stride_two(node, 1)
        return (base, which) if isinstance(base, fx.Node) and which is not None else None
    if node.target is operator.getitem:
        taken, number = node.args
        if not isinstance(taken, fx.Node) or taken.target is not aten.unbind.int:
            return None
        apart, dim = taken.args[0], taken.args[1] if len(taken.args) > 1 else 0
    elif node.target is aten.select.int:
        apart, dim, number = node.args
    else:
        return None
    if not isinstance(apart, fx.Node) or apart.target not in VIEWS or not isinstance(number, int):
        return None
    base = apart.args[0]
    if not isinstance(base, fx.Node) or not _is_pairs(apart, base) or dim not in (-1, tensor_value(apart).ndim - 1):
        return None
    return base, number % 2


def _form(node: object) -> Form | None:
    """``node`` as a linear form: a term, or the sum or difference of two; None if it is not one."""
    if not isinstance(node, fx.Node) or node.kwargs or node.target not in (aten.add.Tensor, aten.sub.Tensor):
        return _term(node)
    one, two = map(_term, node.args)
    if node.target is aten.sub.Tensor:
        two = _negative(two)
    return {**one, **two} if one is not None and two is not None and not one.keys() & two.keys() else None


def _term(node: object) -> Form | None:
    """``node`` as one channel, with its factor."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return None
    if node.target is aten.neg.default:
        return _negative(_term(node.args[0]))
    return _product(*node.args) if node.target is aten.mul.Tensor else _bare(node)


def _bare(node: object) -> Form | None:
    """``node`` as one channel or its negative."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.neg.default:
        return _negative(_bare(node.args[0]))
    channel = _channel(node)
    return None if channel is None else {channel: Factor()}


def _product(left: object, right: object) -> Form | None:
    """A channel times a table, in either order.

    Of two tensors' channels the table is the smaller, as it is the same for all heads; of two of one size neither is.
    """
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    table, rest = sorted((left, right), key=lambda node: (_bare(node) is not None, tensor_value(node).numel()))
    form, here, there = _bare(rest), tensor_value(table), tensor_value(rest)
    if form is None or (_bare(table) is not None and here.numel() == there.numel()):
        return None
    if not here.dtype.is_floating_point or here.shape[-1:] != there.shape[-1:]:  # or a factor for all channels alike
        return None
    return {channel: Factor(factor.sign, table) for channel, factor in form.items()}


def _negative(form: Form | None) -> Form | None:
    return None if form is None else {channel: Factor(-each.sign, each.table) for channel, each in form.items()}


class _Writer:
    """Writes rotations into a graph at the current place; every table is made once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._tables: dict[object, fx.Node] = {}

    def write(self, rotation: Rotation) -> fx.Node:
        """The rotated tensor."""
        source = rotation.source
        terms = [(source, rotation.straight), (self._swapped(source), rotation.crossed)]
        products = [
            call(self.gm, aten.mul.Tensor, value, self._table(source, even, odd))
            for value, (even, odd) in terms
            if even is not None and odd is not None
        ]
        return products[0] if len(products) == 1 else call(self.gm, aten.add.Tensor, *products)

    def _swapped(self, source: fx.Node) -> fx.Node:
        """``source`` with the channels of every pair exchanged."""
        shape = list(tensor_value(source).shape)
        pairs = call(self.gm, aten.view.default, source, [*shape[:-1], shape[-1] // 2, 2])
        exchanged = call(self.gm, torch.ops.prims.rev.default, pairs, [len(shape)])
        return call(self.gm, aten.view.default, exchanged, shape)

    def _table(self, source: fx.Node, even: Factor, odd: Factor) -> fx.Node:
        """The factors of even and of odd channels, side by side as channels are."""
        whole = _taken_apart(even, odd)
        if whole is not None:
            return whole
        value = tensor_value(source)
        like = (value.shape[-1], value.dtype, value.device)
        key = (like, *((each.sign, _identity(each.table)) for each in (even, odd)))
        if key not in self._tables:
            halves = [self._half(source, each) for each in (even, odd)]
            pairs = [call(self.gm, aten.unsqueeze.default, half, tensor_value(half).ndim) for half in halves]
            apart = call(self.gm, aten.cat.default, pairs, -1)
            shape = tensor_value(apart).shape
            self._tables[key] = call(self.gm, aten.view.default, apart, [*shape[:-2], shape[-2] * 2])
            self._tables[key].meta[WRITTEN] = True
        return self._tables[key]

    def _half(self, source: fx.Node, factor: Factor) -> fx.Node:
        """The factors of the even, or of the odd channels."""
        if factor.table is not None:
            return factor.table if factor.sign == 1 else call(self.gm, aten.neg.default, factor.table)
        shape = [tensor_value(source).shape[-1] // 2]
        value = tensor_value(source).new_full(shape, factor.sign)
        settings: dict[str, Any] = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        node = self.gm.graph.call_function(aten.full.default, (shape, factor.sign), settings)
        node.meta["val"] = value
        return node


def _taken_apart(even: Factor, odd: Factor) -> fx.Node | None:
    """The tensor whose even channels are the one table and whose odd ones the other, if there is one."""
    if even.table is None or odd.table is None or even.sign != 1 or odd.sign != 1:
        return None
    one, two = _channel(even.table), _channel(odd.table)
    return one[0] if one is not None and two is not None and (one[1], two) == (EVEN, (one[0], ODD)) else None


def _identity(table: fx.Node | None) -> object:
    """What tells a table: a slice of one tensor is the same table wherever it is taken."""
    if table is not None and table.target is aten.slice.Tensor and not table.kwargs:
        return table.target, table.args
    return table
