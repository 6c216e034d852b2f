"""Train the tiny video model: rectified flow on procedural clips, small canvases first.

    python -m examples.tiny_video.train --out runs/tiny_video

Stages grow the canvas (32, 64 pixels: 384, 1,536 tokens). Beside the velocity, a head that only training
uses reads off a middle block what stands where (`scene_maps`), and a head of the cross-attention is told which
words to look at (`grounding`). A checkpoint is written every
``--save-every`` steps and found again on the next start, so the run survives an interruption. The
batch of step n depends on n and the seed alone. The exported weights are an average over steps.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from ..common import training
from ..common.scene_head import SceneHead
from ..common.training import Optimisers, follow, learning_rate, plain_attention, save, stage_at
from .clips import FRAMES, RADII, render, sample_scene
from .grounding import grounding_loss, word_owners
from .scene_maps import CLASSES, NUMBERS, scene_maps
from .space_to_depth import AXES, CHANNELS, coordinates, to_latents
from .teaching import teach_words
from .text import build_text_encoder, build_tokenizer
from .words import encode

SEED = 20261120
SHIFT = 3.0  # of the noise schedule; the sampler uses the same
DROP_CAPTION = 0.12


@dataclass(frozen=True)
class Stage(training.Stage):
    """A stage with things of ``radii``."""

    radii: tuple[float, float] = RADII


STAGES = (Stage(32, 16, 1100, (0.18, 0.24)), Stage(64, 6, 1050), Stage(32, 16, 750, (0.18, 0.24)), Stage(64, 6, 2550))
FIRST_SCENE = SEED + 2_000_000  # seed of the first scene drawn
FIRST_TAUGHT = SEED + 500_000_000  # seed of the first scene whose caption the text encoder is taught
WARMUP = 100
FALL = 0.1  # share of the run over which the learning rate falls at its end
TAPPED_BLOCK = 4  # whose features the scene loss reads
GROUNDED_BLOCKS = (2, 3, 4, 5)  # whose cross-attention has a grounding loss
THING_WEIGHT = 3.0  # of the cells near things in the velocity loss
SCENE_WEIGHT = 0.1  # of the scene loss beside the velocity loss, times the learning-rate schedule
GROUNDING_WEIGHT = 0.1  # likewise, of the mean grounding loss of the blocks


def build_transformer() -> WanTransformer3DModel:
    """The Wan transformer of diffusers, 8 blocks of width 192, over 2 x 2 space-to-depth latents and coordinates."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=64, in_channels=CHANNELS + AXES,
        out_channels=CHANNELS, text_dim=128, freq_dim=256, ffn_dim=576, num_layers=8, cross_attn_norm=True,
        rope_max_seq_len=64,
    )  # fmt: skip


def velocity_loss(velocity: Tensor, wanted: Tensor, here: Tensor) -> Tensor:
    """Mean squared error of ``[B, 12, F, H, W]``; cells where a thing is near (``here`` ``[B, N]``) count more."""
    b, _, frames, height, width = wanted.shape
    near = (here > 0).view(b, 1, frames, height // 2, width // 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    weight = torch.where(near, THING_WEIGHT, 1.0)
    mean: Tensor = ((velocity.float() - wanted).square() * (weight / weight.mean())).mean()
    return mean


Maps = tuple[Tensor, Tensor]  # class numbers and numbers, see `scene_maps`
Batch = tuple[Tensor, list[str], Maps, Tensor]  # clips, captions, scene maps, owners of the words


class Trainee(nn.Module):
    """Transformer and text encoder as one module, so that one optimiser and one average cover both."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(vocabulary)
        self.scene_head = SceneHead(self.transformer.proj_out.in_features, CLASSES, NUMBERS)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        self._tapped: list[Tensor] = []
        self._looked: list[tuple[WanAttention, Tensor, Tensor]] = []

    def tap(self) -> None:
        """Have the forward pass keep what the auxiliary losses read."""
        blocks = self.transformer.blocks
        blocks[TAPPED_BLOCK].register_forward_hook(lambda *seen: self._tapped.append(seen[-1]))
        for i in GROUNDED_BLOCKS:
            blocks[i].attn2.register_forward_hook(lambda module, given, _: self._looked.append((module, *given[:2])))

    def forward(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, maps: Maps, owners: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity like ``noisy`` ``[B, 12, F, H/2, W/2]``, the scene loss and the grounding loss."""
        velocity = self.transformer(torch.cat([noisy, coordinates(noisy)], 1), timestep, text, return_dict=False)[0]
        losses = [grounding_loss(*seen, maps[0][..., 0], owners) for seen in self._looked]
        self._looked.clear()
        return velocity, self.scene_head(self._tapped.pop(), *maps), torch.stack(losses).mean()


def load_weights(trainee: Trainee, folder: Path) -> None:
    """Start from the weights of an exported pipeline; what reads channels that it did not have starts at zero."""
    for name, part in (("transformer", trainee.transformer), ("text_encoder", trainee.text_encoder)):
        (found,) = (folder / name).glob("*.safetensors")
        weights = load_file(found)
        if name == "transformer":
            wide = torch.zeros_like(part.patch_embedding.weight)
            narrow = weights["patch_embedding.weight"]
            wide[:, : narrow.shape[1]] = narrow
            weights["patch_embedding.weight"] = wide
        part.load_state_dict(weights, strict=name == "transformer")  # T5 ties its embeddings: one is saved


def batches(start: int, stages: tuple[Stage, ...], mine: slice) -> queue.Queue[Batch]:
    """Render this worker's share ``mine`` of the batches from step ``start`` on in a background thread."""
    ready: queue.Queue[Batch] = queue.Queue(maxsize=4)

    def work() -> None:
        for step in range(start, sum(stage.steps for stage in stages)):
            stage = stage_at(step, stages)
            seeds = [FIRST_SCENE + step * 64 + i for i in range(stage.batch)]
            scenes = [sample_scene(seed, stage.radii) for seed in seeds[mine]]
            clips = np.stack([render(scene, stage.size, FRAMES) for scene in scenes])
            maps = [np.stack(part) for part in zip(*(scene_maps(scene, stage.size) for scene in scenes), strict=True)]
            captions = [scene.caption for scene in scenes]
            owners = torch.tensor([word_owners(scene) for scene in scenes])
            ready.put(
                (torch.from_numpy(clips), captions, (torch.from_numpy(maps[0]), torch.from_numpy(maps[1])), owners)
            )

    threading.Thread(target=work, daemon=True).start()
    return ready


def main() -> None:
    """Train (or resume) as the command line says, one process per core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--start", type=Path, help="a pipeline directory whose weights to start from")
    parser.add_argument("--teach", action="store_true", help="teach a started or resumed text encoder its words first")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each batch")
    parser.add_argument("--stop-after", type=int, help="stop after this many steps of this start (for trials)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        spawn(train, (args, Path(meeting) / "workers"), nprocs=args.workers, daemon=True)


def average_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    """Replace every gradient by its mean over the workers, in one exchange."""
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    distributed.all_reduce(flat)
    flat /= workers
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()


def train(rank: int, args: argparse.Namespace, meeting: Path) -> None:
    """The training loop of one worker; ``meeting`` is the file by which the workers find each other."""
    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=args.workers)
    with patch.object(nn.functional, "scaled_dot_product_attention", plain_attention):
        _train(rank, args)


def _train(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    mine = slice(rank, None, args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    trainee = Trainee(len(tokenizer))
    if args.start is not None:
        load_weights(trainee, args.start)
    average = {name: value.detach().clone() for name, value in trainee.state_dict().items()}
    optimisers = Optimisers(trainee, lambda name: ".blocks." in name and "scale_shift" not in name)
    step, taught = 0, False
    latest = args.out / "latest.pt"
    if latest.exists():
        state = torch.load(latest, weights_only=True)
        trainee.load_state_dict(state["model"])
        average = state["average"]
        optimisers.load_state_dicts(state["optimisers"])
        step, taught = state["step"], state.get("taught", False)
        if rank == 0:
            print(f"resumed at step {step}", flush=True)
    if not taught and (args.teach or (step == 0 and args.start is None)):
        share = teach_words(tokenizer, trainee.text_encoder, FIRST_TAUGHT)
        if rank == 0:
            print(f"text encoder: {share:.4f} of the words' attributes right", flush=True)
        encoder = trainee.text_encoder.state_dict()
        average |= {f"text_encoder.{name}": value.detach().clone() for name, value in encoder.items()}
        taught = True
    trainee.tap()
    run: Any = torch.compile(trainee, dynamic=False)
    total = sum(stage.steps for stage in STAGES)
    source = batches(step, STAGES, mine)
    first, began, recent = step, time.time(), []
    while step < total and (args.stop_after is None or step - first < args.stop_after):
        clips, captions, maps, owners = source.get()
        draw = torch.Generator().manual_seed(SEED + step)
        batch = stage_at(step, STAGES).batch
        drop = (torch.rand(batch, generator=draw) < DROP_CAPTION)[mine]
        text = encode(tokenizer, trainee.text_encoder, ["" if d else c for c, d in zip(captions, drop, strict=True)])
        latents = to_latents(clips)
        noise = torch.randn((batch, *latents.shape[1:]), generator=draw)[mine]
        u = ((torch.arange(batch) + torch.rand(batch, generator=draw)) / batch).sqrt()[mine]  # more of the noisy ones
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        mix = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            owners = owners.masked_fill(drop[:, None], -1)
            velocity, scene_loss, grounding = run((1 - mix) * latents + mix * noise, sigma * 1000, text, maps, owners)
        loss = velocity_loss(velocity, noise - latents, maps[0][..., 0])
        scale = learning_rate(step, total, WARMUP, FALL)
        (loss + scale * (SCENE_WEIGHT * scene_loss + GROUNDING_WEIGHT * grounding)).backward()
        average_gradients(list(trainee.parameters()), args.workers)
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimisers.step(scale)
        step += 1
        follow(average, trainee, step)
        recent.append((loss.item(), scene_loss.item(), grounding.item()))
        if rank == 0 and (step % 20 == 0 or step - first == 5):
            rate = (time.time() - began) / (len(recent) if step - first > 20 else step - first)
            left = (total - step) * rate / 60
            size = stage_at(step - 1, STAGES).size
            shown = "loss {:.4f} scene {:.4f} grounding {:.4f}".format(*np.mean(recent, 0))
            shown = f"{shown} {rate:.2f} s/step, {left:.0f} min left"
            print(f"step {step}/{total} size {size} {shown}", flush=True)
            recent, began = [], time.time()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}; the last good checkpoint is {latest}")
        if rank == 0 and (step % args.save_every == 0 or step == total):
            save(latest, {"model": trainee.state_dict(), "average": average, "step": step, "taught": taught,
                          "optimisers": optimisers.state_dicts()})  # fmt: skip
            (args.out / "progress.json").write_text(json.dumps({"step": step, "total": total}))


if __name__ == "__main__":
    main()
