"""What a program adds to a step: an all-dense plan against plain Inductor, calls in turn, medians over all of them.

    python -m benchmarks.dispatch_overhead --model examples/tiny_video --calls 200 --json build/dispatch.json
    python -m benchmarks.dispatch_overhead --tiny --calls 2000

The first measures the shipped model at its real size (1,536 tokens, batch 1), where the bound is 1% of a step; the
second a model so small that the microseconds a call show. The dense plan has a rule, so that every call goes through
clock, streams and slots, and predicts nothing. A third contender also records the output at every step, which a plan
that predicts from it pays for beside the dispatch; whether it is within the bound is told, not held. Exits with 1
where the dense plan misses the bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditopt._torch import forget_compiled_code
from ditopt.backend import Session, ditopt_backend
from ditopt.bench import versions
from ditopt.decisions import Dense, Reuse
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.plan_text import write_text_atomically
from ditopt.runtime.program import Program

BOUND = 0.01
GRID = (6, 32, 32)  # frames, rows and columns of the latents: 1,536 tokens in patches of 1 x 2 x 2
TEXT_TOKENS = 24
WARM_UP = 3
RESAMPLES = 2000
TIMES = tuple(1000.0 - i for i in range(1000))
INPUTS = Inputs(identity="encoder_hidden_states")
RULES = {
    "dense plan": (Rule(sites="step", steps=(0,), do=Dense()),),  # without any rule nothing would be dispatched
    "dense plan, recording": (Rule(sites="step", steps=(len(TIMES) - 1,), do=Reuse()),),
}

Forward = Callable[..., Any]


def tiny() -> Any:
    """A Wan transformer of one narrow block with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def shipped(directory: Path) -> Any:
    """The transformer of a pipeline directory."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(directory, subfolder="transformer")


def make_plan(structure: str, rules: tuple[Rule, ...]) -> Plan:
    """A plan with one step for every value in ``TIMES``."""
    return Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure=structure, blocks=0),
        sampler=SamplerPrint(
            class_name="none", steps=len(TIMES), timesteps={"transformer": TIMES}, sigmas={"transformer": TIMES}
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=INPUTS,
        rules=rules,
    )


def contenders(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Forward]:
    """Plain Inductor, the program under a plan without a prediction, and under one that records every output."""
    made: dict[str, Forward] = {"inductor": torch.compile(model, backend="inductor", fullgraph=True)}
    return made | {name: planned(model, rules, inputs)[0] for name, rules in RULES.items()}


def planned(model: nn.Module, rules: tuple[Rule, ...], inputs: dict[str, Tensor]) -> tuple[Forward, Program]:
    """The model compiled under a plan with ``rules``, and the program that it runs."""
    session = Session(inputs=INPUTS)
    options: Any = {"session": session}
    forward: Forward = torch.compile(model, backend=ditopt_backend, fullgraph=True, options=options)
    measure({"capture": forward}, 1, inputs)
    (program,) = session.programs
    session.bind(make_plan(program.variants.trace.structure, rules))
    assert session.programs[0].bound is not None, "a plan that binds nothing dispatches nothing"
    return forward, program


def measure(made: dict[str, Forward], calls: int, inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    """Seconds of every call; the contenders take turns, another one first in each."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    with torch.no_grad():
        for call in range(calls):
            timestep = torch.tensor([TIMES[call % (len(TIMES) - 1)]])
            first = call % len(names)
            for name in names[first:] + names[:first]:
                began = time.perf_counter()
                made[name](**inputs, timestep=timestep, return_dict=False)
                seconds[name].append(time.perf_counter() - began)
    return seconds


def overhead(plain: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """What ``ours`` adds to the median of ``plain``: a share, its 95% bootstrap interval over turns, microseconds."""
    pairs = np.array([plain, ours])
    draws = np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, draws], axis=-1)
    low, high = np.quantile(medians[1] / medians[0] - 1, (0.025, 0.975))
    dense, program = statistics.median(plain), statistics.median(ours)
    return {
        "share": program / dense - 1,
        "share_low": float(low),
        "share_high": float(high),
        "microseconds": 1e6 * (program - dense),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write the JSON; 1 where the all-dense plan misses the bound, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny_video"))
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: microseconds a call, no bound")
    parser.add_argument("--calls", type=int, default=200, help="of each contender, at least 3")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args(words)
    if given.calls < WARM_UP:
        parser.error(f"--calls {given.calls}: give at least {WARM_UP}")

    model = (tiny() if given.tiny else shipped(given.model)).eval().requires_grad_(False)
    shape = (1, int(model.config.in_channels), *((1, 4, 4) if given.tiny else GRID))
    text = 16 if given.tiny else int(model.config.text_dim)
    torch.manual_seed(1)
    inputs = {"hidden_states": torch.randn(shape), "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, text)}
    made = contenders(model, inputs)
    measure(made, WARM_UP, inputs)
    seconds = measure(made, given.calls, inputs)
    forget_compiled_code()

    plain = seconds["inductor"]
    added = {name: overhead(plain, taken) for name, taken in seconds.items() if name != "inductor"}
    bound = None if given.tiny else BOUND
    within = {name: bound is None or found["share"] <= bound for name, found in added.items()}
    met = within["dense plan"]
    print(f"{given.calls} calls of each contender in turn, latents {list(shape)}")
    print(f"{'inductor':22} {1e3 * statistics.median(plain):10.3f} ms a call")
    for name, found in added.items():
        print(
            f"{name:22} {found['microseconds']:+10.0f} µs a call = {found['share']:+.2%} of a step "
            f"(95% interval {found['share_low']:+.2%} to {found['share_high']:+.2%})"
        )
    if bound is not None:
        print(f"bound {bound:.0%} for the dense plan: {'met' if met else 'MISSED'}")
        also = "is within it too" if within["dense plan, recording"] else "is over it (told, not held)"
        print(f"recording every output {also}")
    if given.json is not None:
        figures = {
            "model": "tiny" if given.tiny else str(given.model),
            "latents": list(shape),
            "calls": given.calls,
            "median_s": {name: statistics.median(taken) for name, taken in seconds.items()},
            "overhead": added,
            "bound": bound,
            "met": met,
            "within_bound": within,
            "seconds": seconds,
            "versions": versions(),
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(given.json, json.dumps(figures, indent=2) + "\n")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
