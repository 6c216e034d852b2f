"""Where the products behind attention are found, and what they take of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ditopt.kernels.ops import ATTENTION
from ditopt.measures import Table
from ditopt.profiler.interpret import Collector, Seen, Watched
from ditopt.profiler.places import _product_behind, attentions
from tests.profiler.attention_rig import model
from tests.trace.models import CASES

TEXT = {"SD3": (16, 22), "Flux": (0, 6), "CogVideoX": (0, 6), "HunyuanVideo": (32, 38)}
"""Where text stands in the models that have it in self-attention."""


class Kept(Collector):
    """Keeps the values of some nodes."""

    name = "kept"

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.wanted, self.seen = frozenset(names), dict[str, Seen]()

    def see(self, seen: Seen) -> None:
        self.seen[seen.node.name] = seen

    def tables(self) -> dict[str, Table]:
        return {}


@pytest.mark.parametrize("name", CASES)
def test_the_product_behind_every_attention_takes_its_output_as_told(name: str) -> None:
    trace = model(name).program.variants.trace
    entries = attentions(trace)
    nodes = [node.name for entry in entries for node in (entry.node, entry.projection) if node is not None]
    kept = Kept(nodes)
    with torch.no_grad():
        Watched(trace, [kept]).run(*model(name).arguments)
    assert entries
    for entry in entries:
        assert entry.projection is not None and entry.weight is not None
        output = kept.seen[entry.node.name].result
        product = kept.seen[entry.projection.name]
        left, weight = product.arguments[entry.weight - 1], product.arguments[entry.weight]
        first, last = entry.rows
        together = output.transpose(1, 2).flatten(2)[:, first:last]
        taken = left.view(output.shape[0], -1, left.shape[-1])[:, : last - first]
        columns = slice(entry.column, entry.column + together.shape[-1])
        torch.testing.assert_close(taken[..., columns], together, rtol=0, atol=0)
        assert weight.shape[-2] == left.shape[-1] >= columns.stop


@pytest.mark.parametrize("name", TEXT)
def test_where_text_has_a_product_of_its_own_the_videos_is_followed(name: str) -> None:
    trace = model(name).program.variants.trace
    positions = {position: path for path, position in trace.state_names.items()}
    paths = {node: positions.get(number, "") for number, node in enumerate(trace.placeholders)}
    first, last = TEXT[name]
    for entry in attentions(trace):
        assert entry.projection is not None and entry.weight is not None
        whole = entry.rows == (0, entry.site.queries)
        assert whole or entry.rows == ((last, entry.site.queries) if first == 0 else (0, first))
        weight: Any = entry.projection.args[entry.weight]
        while weight.op != "placeholder":
            (weight,) = weight.all_input_nodes
        assert not any(part in paths[weight] for part in ("add_out", "context")), paths[weight]
        assert paths[weight].endswith(("to_out.0.weight", "proj_out.weight"))


def graph_of(function: Callable[..., Any], *arguments: Tensor) -> fx.Node:
    """The attention node of a function's graph."""
    gm = make_fx(function, tracing_mode="fake")(*arguments)
    (found,) = (node for node in gm.graph.nodes if node.target is ATTENTION)
    assert isinstance(found, fx.Node)
    return found


X, W, V = torch.randn(1, 2, 10, 4), torch.randn(8, 6), torch.randn(8, 6)


def attend(x: Tensor) -> Tensor:
    """``[1, 10, 8]``."""
    found: Tensor = torch.ops.ditopt.attention(x, x, x)
    return found.transpose(1, 2).reshape(1, 10, 8)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def plain(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return flat(attend(x)) @ w


def rejoined(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    first, second = attend(x).split([4, 6], 1)
    return flat(torch.cat([first, second], 1)) @ w


def turned_round(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    first, last = attend(x).split([4, 6], 1)
    return flat(torch.cat([last, last], 1)) @ w, flat(first) @ v


def sliced(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = attend(x)
    return flat(out[:, :4]) @ w, flat(out[:, -6:]) @ v


def chunks(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    first, second = attend(x).split(5, 1)
    return flat(first) @ w, flat(second) @ v


def bent(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return flat(attend(x)).relu() @ w


def also_read(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = flat(attend(x))
    return out @ w, out + 1


def twice(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = flat(attend(x))
    return out @ w, out @ v


def overlapping(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = attend(x)
    return flat(out[:, :6]) @ w, flat(out[:, 5:]) @ v


def of_data(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return flat(attend(x)) @ (w + v)


def every_other(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return flat(attend(x)[:, ::2]) @ w


def narrow(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return flat(attend(x)[:, :, :6]) @ w.T


def right_hand(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return w.T @ flat(attend(x)).T


def handed_out(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return attend(x)


@pytest.mark.parametrize(
    ("function", "lengths", "rows"),
    [
        (plain, set(), (0, 10)),
        (rejoined, set(), (0, 10)),
        (sliced, {6}, (4, 10)),
        (sliced, {4, 7}, (0, 4)),
        (sliced, {4, 6}, None),
        (sliced, set(), None),
        (chunks, {5}, None),
        (bent, set(), None),
        (also_read, set(), None),
        (twice, {10}, None),
        (overlapping, {6}, None),
        (turned_round, {6}, None),
        (handed_out, set(), None),
        (of_data, set(), None),
        (every_other, set(), None),
        (narrow, set(), None),
        (right_hand, set(), None),
    ],
)
def test_a_product_is_found_only_where_it_is_the_only_one(
    function: Callable[..., Any], lengths: set[int], rows: tuple[int, int] | None
) -> None:
    found = _product_behind(graph_of(function, X, W, V), 10, lengths)
    assert (found and found.rows) == rows
    assert found is None or found.column == 0
