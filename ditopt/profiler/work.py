"""Where the time of a step goes: the operators of each compiled graph by kind, and what this machine can do at most."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.profiler import ProfilerActivity, profile

from ditopt.kernels.block_sparse_attention.lists import blocks
from ditopt.kernels.ops import ATTENTION, BLOCK_SPARSE_ATTENTION, FLASH_ATTENTION
from ditopt.passes._infra import SITE, StepPlan, tensor_value
from ditopt.passes.attention import list_maker, rest_of
from ditopt.passes.flops import PRODUCTS, attention_flops, product_flops
from ditopt.passes.kept import LISTS, room_name, taken
from ditopt.profiler.timing import inputs_for, synchronise
from ditopt.runtime.program import Program

RUNS = 3
PROFILER_LOG = "KINETO_LOG_LEVEL"
"""Below 6 the profiler writes a line of its own for every start and stop, in the midst of the progress bars."""
ATTENTION_KIND, PRODUCT_KIND, REST = "attention", "linear", "other"
ATTENTION_OPERATORS = ("scaled_dot_product", "flash_attention", "block_sparse_attention")
PRODUCT_OPERATORS = ("addmm", "::mm", "::bmm", "linear")
SIDE = 2048
STREAM = 1 << 26
"""Products of ``SIDE`` x ``SIDE`` and copies of ``STREAM`` floats are what the machine's rates are measured by."""


def variant_work(
    program: Program, plan: StepPlan, arguments: Sequence[Any], lists: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Seconds of one compiled graph, and of its kinds of operators with their FLOPs, least bytes and calls.

    Attention and products are operators of their own, and a profiler tells their time; the rest is fused, so it has
    what is left. ``arguments`` are a call's inputs, ``lists`` those of sparse attention.
    """
    variant = program.variants.get(plan)
    values = inputs_for(program, plan, arguments, lists)
    counted = counted_work(program.variants.graph(plan), lists)

    @torch.no_grad()
    def run() -> None:
        synchronise(variant.run(list(values)))

    run()
    seconds = _median_seconds(run)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    os.environ.setdefault(PROFILER_LOG, "6")
    with profile(activities=activities) as seen:
        for _ in range(RUNS):
            run()
    known = {kind: spent / RUNS for kind, spent in _seconds_by_kind(seen.events() or ()).items()}
    known[REST] = max(seconds - sum(known.values()), 0.0)
    return {
        "seconds": seconds,
        "kinds": {kind: {"seconds": known.get(kind, 0.0), **work} for kind, work in counted.items()},
    }


def counted_work(gm: fx.GraphModule, lists: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Any]]:
    """By kind: FLOPs (two per multiply-add), bytes of operands and results read or written once, calls, dtype.

    Of attention to ``lists`` (graph inputs by name) only what these name counts as computed.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        result = next(iter(node.users)) if node.target is BLOCK_SPARSE_ATTENTION else node  # without logarithms of sums
        if not isinstance(result.meta.get("val"), Tensor):
            continue
        if node.target is BLOCK_SPARSE_ATTENTION:
            kind, flops = ATTENTION_KIND, round(attention_flops(node) * _listed_share(node, lists or {}))
        elif node.target in PRODUCTS:
            kind, flops = PRODUCT_KIND, product_flops(node)
        elif node.target in (ATTENTION, FLASH_ATTENTION):
            kind, flops = ATTENTION_KIND, attention_flops(node)
        else:
            continue
        entry = found.setdefault(kind, {"flops": 0, "bytes": 0, "calls": 0, "dtype": _dtype(node)})
        parts = [result, *node.all_input_nodes]
        entry["flops"] += flops
        entry["bytes"] += sum(tensor_value(part).numel() * tensor_value(part).element_size() for part in parts)
        entry["calls"] += 1
    return {**found, REST: {}}


def _listed_share(node: fx.Node, lists: Mapping[str, Tensor]) -> float:
    """What lists of a block-sparse attention name of all blocks, with a rest's groups; 1 where they are not at hand.

    Of lists that a call finds for itself, or has of an earlier step, it is what they have room for.
    """
    maker, site = list_maker(node), node.meta.get(SITE, "")
    own = node.args[4] if maker is None else maker.args[3]
    given = taken(own, LISTS, site, 1)
    counts = _given(lists, own if given is None else given)
    keep = None if maker is None else _given(lists, maker.args[4])
    room = None if given is None else lists.get(room_name(site))
    if counts is None or (maker is not None and keep is None) or (given is not None and room is None):
        return 1.0
    for each in (keep, room):
        counts = counts if each is None else counts.clamp(min=each[None, :, None])
    keys, key_block = int(tensor_value(node.args[1]).shape[-2]), int(node.args[6])  # type: ignore[arg-type]  # a node
    share = float(counts.sum()) / (counts.numel() * blocks(keys, key_block))
    *_, rest, pool = rest_of(node)
    heads = _given(lists, rest)
    return share if heads is None else share + float((heads != 0).float().mean()) / int(pool)  # type: ignore[call-overload]


def _given(lists: Mapping[str, Tensor], node: object) -> Tensor | None:
    """The tensor that an input of the graph is given, if that is at hand."""
    return lists.get(str(node.target)) if isinstance(node, fx.Node) else None


def machine_rates(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """What this machine does at most, measured now: FLOPs per second of large products by dtype, bytes of a copy."""
    rates: dict[str, float] = {}
    for dtype in dtypes:
        left = torch.ones(SIDE, SIDE, device=device, dtype=dtype)

        def product(left: Tensor = left) -> None:
            synchronise([left @ left])

        product()
        rates[_name(dtype)] = 2 * SIDE**3 / _median_seconds(product)
    source = torch.ones(STREAM, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronise([target])

    copy()
    moved = 2 * source.numel() * source.element_size()
    return {"flops_per_second": rates, "bytes_per_second": moved / _median_seconds(copy)}


def _seconds_by_kind(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of the outermost operators of each kind, what they call included."""
    found = {ATTENTION_KIND: 0.0, PRODUCT_KIND: 0.0}
    for event in events:
        kind = _kind(str(event.name))
        parent = event.cpu_parent
        while parent is not None and _kind(str(parent.name)) is None:
            parent = parent.cpu_parent
        if kind is not None and parent is None:
            device = float(getattr(event, "device_time_total", 0.0))
            found[kind] += (device or float(event.cpu_time_total)) / 1e6
    return found


def _kind(name: str) -> str | None:
    if any(part in name for part in ATTENTION_OPERATORS):
        return ATTENTION_KIND
    return PRODUCT_KIND if any(part in name for part in PRODUCT_OPERATORS) else None


def _median_seconds(run: Callable[[], None]) -> float:
    spent = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def _dtype(node: fx.Node) -> str:
    position = 0 if node.target is BLOCK_SPARSE_ATTENTION else -1  # behind its operands are lists
    return _name(tensor_value(node.all_input_nodes[position]).dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
