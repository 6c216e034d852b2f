"""What a profile with everything on costs: seconds and peak memory over the dense eager generations that it rides on.

    python -m benchmarks.profile_cost --tokens 4096 --json docs/results/profile_cost.json

A Wan of random weights (which time kernels and judge nothing) under a plain Euler loop. Each side runs in a process of
its own, from an empty cache of profiles, so that peaks of resident memory can be told apart; a third process imports
the same libraries and builds the same model, and does nothing. Threads that wait sleep (OMP_WAIT_POLICY), so that what
else runs on the machine slows the sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ditopt
from ditopt.device import describe_device
from ditopt.plan_text import write_text_atomically

SIDES = ("nothing", "eager", "profile")


def build(blocks: int, heads: int) -> nn.Module:
    """A seeded Wan with ``heads`` heads of 64 channels."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model: nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * 64 * heads,
        num_layers=blocks,
        rope_max_seq_len=64,
    )
    return model.eval().requires_grad_(False)


def rollout_of(tokens: int, steps: int) -> Any:
    """Euler's method on seeded noise of ``tokens`` tokens: 16 frames of as many rows as columns."""
    side = round((tokens / 16) ** 0.5)
    sigmas = torch.linspace(1, 0, steps + 1)

    def rollout(model: nn.Module, prompt: str, seed: int) -> Tensor:
        x = torch.randn(1, 16, 16, 2 * side, 2 * side, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(len(prompt)))
        for now, then in pairwise(sigmas):
            x = (
                x
                + (then - now)
                * model(hidden_states=x, timestep=now[None] * 1000, encoder_hidden_states=text, return_dict=False)[0]
            )
        return x

    return rollout


def one_side(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak resident bytes of this process, doing what ``side`` says."""
    model, rollout = build(arguments.blocks, arguments.heads), rollout_of(arguments.tokens, arguments.steps)
    prompts = [f"prompt {number}" for number in range(arguments.prompts)]
    began = time.perf_counter()
    if side == "eager":
        with torch.no_grad():
            for seed, prompt in enumerate(prompts):
                rollout(model, prompt, seed)
    elif side == "profile":
        collect = arguments.collect.split(",") if arguments.collect else None
        ditopt.profile_model(model, prompts, rollout=rollout, collect=collect)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main() -> None:
    """Run the sides in turn, each in its own process, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--collect", help="tables to take, with commas between; default: all")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(one_side(arguments.side, arguments)))
        return
    found = {}
    for side in SIDES:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "benchmarks.profile_cost", *sys.argv[1:], "--side", side]
            settings = {"DITOPT_CACHE": cache, "OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | settings)
        *progress, last = done.stdout.strip().splitlines()
        found[side] = json.loads(last)
        print("\n".join(progress))
    idle = found["nothing"]["peak"]
    result = {
        **{key: getattr(arguments, key) for key in ("tokens", "blocks", "heads", "steps", "prompts", "collect")},
        "device": describe_device(torch.device("cpu")),
        "sides": found,
        "times_as_long": found["profile"]["seconds"] / found["eager"]["seconds"],
        "times_the_peak": found["profile"]["peak"] / found["eager"]["peak"],
        "times_the_peak_above_idle": (found["profile"]["peak"] - idle) / (found["eager"]["peak"] - idle),
    }
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
