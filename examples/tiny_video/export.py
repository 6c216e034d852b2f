"""Turn a training checkpoint into a pipeline directory: the averaged weights, as safetensors.

    python -m examples.tiny_video.export --run runs/tiny_video [--out DIR]

The default directory is this one, where the pipeline's source already is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .pipeline import TinyVideoPipeline
from .text import build_tokenizer
from .train import SHIFT, Trainee

HERE = Path(__file__).parent
MAX_BYTES = 40_000_000


def build_pipeline(weights: dict[str, Tensor] | None = None) -> TinyVideoPipeline:
    """The pipeline with the state dict of a `Trainee` (by default: random weights)."""
    tokenizer = build_tokenizer()
    trainee = Trainee(len(tokenizer))
    if weights is not None:
        trainee.load_state_dict(weights)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    trainee.eval()
    return TinyVideoPipeline(tokenizer, trainee.text_encoder, trainee.transformer, scheduler)


def export(pipeline: TinyVideoPipeline, out: Path) -> int:
    """Write the pipeline to ``out``, each file whole or not at all, and return its size in bytes.

    Raises:
        ValueError: if it is larger than `MAX_BYTES`; ``out`` is then as before.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
        fresh = Path(name)
        pipeline.save_pretrained(fresh)
        files = sorted(path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file())
        size = sum((fresh / path).stat().st_size for path in files)
        if size > MAX_BYTES:
            raise ValueError(f"the pipeline takes {size:,} bytes; it must be at most {MAX_BYTES:,}")
        for path in files:
            if out.resolve() == HERE.resolve() and path.suffix == ".py":
                continue
            (out / path).parent.mkdir(exist_ok=True)
            os.replace(fresh / path, out / path)
    return size


def main() -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of the training run, with latest.pt")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    state = torch.load(args.run / "latest.pt", weights_only=True, map_location="cpu")
    size = export(build_pipeline(state["average"]), args.out)
    print(f"step {state['step']}: {size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
