"""Turn a training checkpoint into a pipeline directory: the averaged weights, as safetensors.

    python -m examples.tiny_video.export --run runs/tiny_video [--out DIR]

The default directory is this one, where the pipeline's source already is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..common.exporting import export
from .pipeline import TinyVideoPipeline
from .text import build_tokenizer
from .train import SHIFT, Trainee

HERE = Path(__file__).parent


def build_pipeline(weights: dict[str, Tensor] | None = None) -> TinyVideoPipeline:
    """The pipeline with the state dict of a `Trainee` (by default: random weights)."""
    tokenizer = build_tokenizer()
    trainee = Trainee(len(tokenizer))
    if weights is not None:
        trainee.load_state_dict(weights)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    trainee.eval()
    return TinyVideoPipeline(tokenizer, trainee.text_encoder, trainee.transformer, scheduler)


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
