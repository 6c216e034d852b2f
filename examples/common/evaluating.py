"""Generate from captions and sum up what a detector finds: what the evaluations of the shipped models share.

Sample i starts from the noise of seed i, whatever the batch, so runs differ only in what is being compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from .drawing import Array

Counts = dict[str, tuple[int, int]]  # (right, total) for each kind of attribute


def generate(pipeline: Any, prompts: list[str], batch: int, **settings: Any) -> Array:
    """Samples ``[B, ...]`` in [0, 1], ``batch`` at a time; ``settings`` go to the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    found = []
    with Progress(*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("samples", total=len(prompts))
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
            found.append(pipeline(part, generator=noise, output_type="np", return_dict=False, **settings)[0])
            progress.advance(task, len(part))
    return np.concatenate(found)


def total(counts: list[Counts]) -> Counts:
    """(right, total) over all samples, for each kind that some caption names and for ``all``."""
    sums = {kind: (sum(c[kind][0] for c in counts), sum(c[kind][1] for c in counts)) for kind in counts[0]}
    sums = {kind: (right, of) for kind, (right, of) in sums.items() if of}
    return sums | {"all": (sum(right for right, _ in sums.values()), sum(of for _, of in sums.values()))}


def what_is_wrong(counts: Counts) -> str:
    """A note on one sample, such as ``- shape 1 wrong``."""
    return "- " + (
        ", ".join(f"{kind} {of - right} wrong" for kind, (right, of) in counts.items() if right < of) or "all right"
    )


def table(sums: Counts) -> Table:
    """The scores as a rich table."""
    shown = Table("attribute", "right", "of", "score")
    for kind, (right, of) in sums.items():
        shown.add_row(kind, str(right), str(of), f"{right / of:.3f}", style="bold" if kind == "all" else "")
    return shown


def command_line(description: str | None, captions: int) -> argparse.ArgumentParser:
    """The options that both evaluations have; ``captions`` is how many there are."""

    def count(text: str) -> int:
        if not 1 <= int(text) <= captions:
            raise argparse.ArgumentTypeError(f"{text} is not from 1 to {captions}")
        return int(text)

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return int(text)

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline directory; its code is run")
    parser.add_argument("--captions", type=count, default=64, help="how many, from scene seed 0 on")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=64, help="canvas edge in pixels")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--json", type=Path, help="write the scores and settings")
    return parser


def evaluate(
    pipeline: Any, prompts: list[str], count_by_kind: Callable[[Array, str], Counts], args: argparse.Namespace
) -> tuple[Array, list[Counts]]:
    """Generate as the options of `command_line` say, print the scores, write ``--json``; samples and their counts."""
    settings = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "height": args.size,
        "width": args.size,
    }
    began = time.perf_counter()
    samples = generate(pipeline, prompts, args.batch, **settings)
    seconds = (time.perf_counter() - began) / len(prompts)
    counts = [count_by_kind(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
    sums = total(counts)
    Console().print(table(sums), f"{seconds:.2f} s per sample")
    if args.json:
        scores = {kind: {"right": right, "of": of, "score": right / of} for kind, (right, of) in sums.items()}
        report = {"scores": scores, "captions": len(prompts), "seconds_per_sample": seconds, **settings}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return samples, counts
