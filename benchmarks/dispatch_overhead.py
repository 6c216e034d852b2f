"""What a program adds to a step: an all-dense plan against plain Inductor, calls interleaved, medians.

Run: python -m benchmarks.dispatch_overhead [--layers 2] [--width 192] [--frames 6] [--calls 50]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import forget_compiled_code
from ditopt.backend import Session, ditopt_backend
from ditopt.decisions import Reuse
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint

TIMES = tuple(1000.0 - i for i in range(1000))


def build(layers: int, width: int) -> nn.Module:
    """A Wan video transformer with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=width // 6,
        in_channels=12,
        out_channels=12,
        text_dim=128,
        freq_dim=64,
        ffn_dim=3 * width,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    return model.eval().requires_grad_(False)


def dense_plan(structure: str, layers: int) -> Plan:
    """A plan in which every step but the last is dense, so that clock, streams and slots are all at work."""
    return Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure=structure, blocks=layers),
        sampler=SamplerPrint(
            class_name="none", steps=len(TIMES), timesteps={"transformer": TIMES}, sigmas={"transformer": TIMES}
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(identity="encoder_hidden_states"),
        rules=(Rule(sites="step", steps=(len(TIMES) - 1,), do=Reuse()),),
    )


def measure(contenders: dict[str, Callable[..., Any]], calls: int, inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    """Seconds of every call; the contenders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for call in range(calls):
            for name, forward in contenders.items():
                began = time.perf_counter()
                forward(**inputs, timestep=torch.tensor([TIMES[call % (len(TIMES) - 1)]]), return_dict=False)
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Print the medians and what the program adds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--calls", type=int, default=50)
    given = parser.parse_args()

    model = build(given.layers, given.width)
    inputs = {
        "hidden_states": torch.randn(1, 12, given.frames, 32, 32),
        "encoder_hidden_states": torch.randn(1, 12, 128),
    }
    session = Session(inputs=Inputs(identity="encoder_hidden_states"))
    contenders = {
        "inductor": torch.compile(model, backend="inductor", fullgraph=True),
        "ditopt": torch.compile(
            build(given.layers, given.width), backend=ditopt_backend, fullgraph=True, options={"session": session}
        ),
    }
    measure(contenders, 1, inputs)
    session.bind(dense_plan(session.programs[0].variants.trace.structure, given.layers))
    measure(contenders, 3, inputs)
    medians = {name: statistics.median(taken) for name, taken in measure(contenders, given.calls, inputs).items()}
    for name, median in medians.items():
        print(f"{name:10} {1e3 * median:9.3f} ms a step")
    added = medians["ditopt"] - medians["inductor"]
    print(
        f"{'added':10} {1e3 * added:9.3f} ms, {100 * added / medians['inductor']:.2f}% "
        "(with the copy of the output that is recorded)"
    )
    forget_compiled_code()


if __name__ == "__main__":
    main()
