"""What it costs to put tokens into another order around block-sparse attention: one Wan block, calls in turn.

    python -m benchmarks.token_orders --calls 40 --keep 0.25

Steps with the same lists, in raster order (no gathers in the graph), in tiles for a site, and in tiles for each head,
in float32 and bfloat16: 4 heads of 64 channels, a feed-forward layer of 1,024. Weights are random, as only time counts,
which is the process's own, so that others on the machine disturb it less. Prints milliseconds and the share that orders
add, with a 95% interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.dispatch_overhead import overhead
from ditopt.backend import Session, ditopt_backend
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import BlockLists, blocks, kernel_blocks
from ditopt.kernels.patterns.orders import TokenOrder, inverse
from ditopt.passes._infra import Ordered, SparseAttention, StepPlan
from ditopt.passes.sparse import list_names, order_names
from ditopt.runtime.program import Program

GRID = (6, 28, 28)
HEADS, CHANNELS = 4, 64
SITE = "blocks.0.attn1"
DTYPES = {"float32": None, "bfloat16": "bfloat16"}

Run = Callable[[], float]


def captured(grid: tuple[int, int, int]) -> tuple[Program, list[Any]]:
    """A block of Wan with random weights, called once, and the inputs of its graph."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=CHANNELS, in_channels=4, out_channels=4,
        text_dim=64, freq_dim=16, ffn_dim=1024, num_layers=1, rope_max_seq_len=max(32, *grid),
    ).eval().requires_grad_(False)  # fmt: skip
    frames, rows, columns = grid
    inputs = {
        "hidden_states": torch.randn(1, 4, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 64),
    }
    session = Session()
    found: list[Any] = []
    options: dict[str, Any] = {"session": session}
    forward: Any = torch.compile(model, backend=ditopt_backend, options=options)
    with torch.no_grad():
        forward(**inputs, return_dict=False)
        (program,) = session.programs
        program.observer = lambda seen: found.extend(seen.arguments)
        forward(**inputs, return_dict=False)
        program.observer = None
    return program, found


def contenders(program: Program, arguments: list[Any], geometry: Geometry, keep: float) -> dict[str, Run]:
    """What runs one step and tells its seconds, by dtype and form of the order."""
    tokens = geometry.tokens
    query_block, key_block = kernel_blocks(tokens, tokens)
    size = blocks(tokens, query_block), blocks(tokens, key_block)
    drawn = torch.rand((1, HEADS, *size), generator=torch.Generator().manual_seed(0)) < keep
    lists = BlockLists.from_map(drawn, query_block, key_block, size[1])
    wanted = SparseAttention(SITE, query_block, key_block, size[1])
    order = TokenOrder("tiles").of_sequence(geometry, key_block)
    pair = torch.from_numpy(order), torch.from_numpy(inverse(order))
    given = dict(zip(list_names(SITE), (lists.indices, lists.counts), strict=True))
    orders: dict[Ordered, dict[str, Tensor]] = {
        Ordered.NOT: {},
        Ordered.SITE: dict(zip(order_names(SITE), pair, strict=True)),
        Ordered.HEADS: {
            name: each.expand(HEADS, -1).contiguous() for name, each in zip(order_names(SITE), pair, strict=True)
        },
    }
    found: dict[str, Run] = {}
    for name, dtype in DTYPES.items():
        for form, further in orders.items():
            plan = StepPlan(sparse=(replace(wanted, order=form),), dtype=dtype, simplify=True)
            found[f"{name} {form.name.lower()}"] = _timed(program, plan, arguments, {**given, **further})
    return found


def _timed(program: Program, plan: StepPlan, arguments: list[Any], added: dict[str, Tensor]) -> Run:
    variant = program.variants.get(plan)

    def run() -> float:
        values = [arguments[each] if isinstance(each, int) else added[each] for each in variant.inputs]
        began = time.process_time()
        with torch.no_grad():
            variant.run(values)
        return time.process_time() - began

    return run


def measure(runs: dict[str, Run], calls: int) -> dict[str, list[float]]:
    """Seconds of ``calls`` calls of each, in turn, behind one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for call in range(calls + 1):
        for name, run in runs.items():
            seconds = run()
            if call:
                found[name].append(seconds)
    return found


def told(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step (medians), and of ordered ones what they add as shares of the raster one."""
    rows = {}
    for name, own in seconds.items():
        dtype, form = name.split()
        rows[name] = {"ms": 1e3 * statistics.median(own)}
        if form != Ordered.NOT.name.lower():
            rows[name] |= overhead(seconds[f"{dtype} {Ordered.NOT.name.lower()}"], own)
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=40, help="of each, in turn")
    parser.add_argument("--keep", type=float, default=0.25, help="share of blocks, drawn at random")
    parser.add_argument("--grid", type=int, nargs=3, default=GRID, metavar=("F", "R", "C"), help="tokens")
    arguments = parser.parse_args()
    geometry = Geometry(*arguments.grid)
    program, inputs = captured(geometry.sizes)
    runs = contenders(program, inputs, geometry, arguments.keep)
    print(json.dumps(told(measure(runs, arguments.calls)), indent=1))


if __name__ == "__main__":
    main()
