"""Generate clips for held-out captions and count the attributes that the analytic detector finds.

    python -m examples.tiny_video.evaluate --model examples/tiny_video --sheet sheet.png

Clip i starts from the noise of seed i, whatever the batch, so runs differ only in what is being compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from .clips import Array
from .detector import KINDS, count_by_kind
from .prompts import CALIBRATION_SEEDS, EVALUATION_SEEDS, captions
from .sheet import contact_sheet, save_gif

Counts = dict[str, tuple[int, int]]
SHEET_ROWS = 16


def generate(pipeline: Any, prompts: list[str], batch: int, **settings: Any) -> Array:
    """Clips ``[B, F, H, W, 3]`` in [0, 1], ``batch`` at a time; ``settings`` go to the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    found = []
    with Progress(*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("clips", total=len(prompts))
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
            found.append(pipeline(part, generator=noise, output_type="np", **settings).frames)
            progress.advance(task, len(part))
    return np.concatenate(found)


def total(counts: list[Counts]) -> Counts:
    """(right, total) over all clips, for each kind and for ``all``."""
    sums = {kind: (sum(c[kind][0] for c in counts), sum(c[kind][1] for c in counts)) for kind in KINDS}
    return sums | {"all": (sum(right for right, _ in sums.values()), sum(of for _, of in sums.values()))}


def table(sums: Counts) -> Table:
    """The scores as a rich table."""
    shown = Table("attribute", "right", "of", "score")
    for kind, (right, of) in sums.items():
        shown.add_row(kind, str(right), str(of), f"{right / of:.3f}", style="bold" if kind == "all" else "")
    return shown


def main() -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline directory; its code is run")
    parser.add_argument("--captions", type=int, default=len(EVALUATION_SEEDS), help="how many, from scene seed 0 on")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=64, help="canvas edge in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sheet", type=Path, help=f"write a contact sheet of the first {SHEET_ROWS} clips")
    parser.add_argument("--gif", type=Path, help=f"write the first {SHEET_ROWS} clips as one animation")
    parser.add_argument("--json", type=Path, help="write the scores and settings")
    args = parser.parse_args()
    if not 1 <= args.captions <= CALIBRATION_SEEDS.start:
        parser.error(f"--captions is {args.captions}; it must be from 1 to {CALIBRATION_SEEDS.start}")
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be at least 1")

    prompts = captions(range(args.captions))
    pipeline = DiffusionPipeline.from_pretrained(args.model, trust_remote_code=True)
    settings = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "height": args.size,
        "width": args.size,
    }
    began = time.perf_counter()
    clips = generate(pipeline, prompts, args.batch, **settings)
    seconds = time.perf_counter() - began
    counts = [count_by_kind(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    sums = total(counts)
    Console().print(table(sums), f"{seconds / len(prompts):.2f} s per clip")

    rows = slice(0, SHEET_ROWS)
    if args.sheet:
        wrong = [[f"{kind} {of - right} wrong" for kind, (right, of) in c.items() if right < of] for c in counts]
        notes = ["- " + (", ".join(parts) or "all right") for parts in wrong]
        contact_sheet(clips[rows], prompts[rows], notes[rows]).save(args.sheet)
    if args.gif:
        save_gif(clips[rows], args.gif)
    if args.json:
        scores = {kind: {"right": right, "of": of, "score": right / of} for kind, (right, of) in sums.items()}
        report = {"scores": scores, "captions": len(prompts), "seconds_per_clip": seconds / len(prompts), **settings}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
