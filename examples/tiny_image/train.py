"""Train the tiny image model: rectified flow on procedural scenes, small canvases first.

    python -m examples.tiny_image.train --out runs/tiny_image

Stages grow the canvas (32, 64 pixels: 256, 1,024 image tokens). Beside the velocity, a head that only training uses
reads off a middle block what stands where (`scene_maps`), and a head of the joint attention is told which words to look
at (`grounding`). A checkpoint is written every ``--save-every`` steps and found again on the next start, so the run
survives an interruption. The batch of step n depends on n and the seed alone. The exported weights are an average over
steps.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..common.scene_head import SceneHead
from ..common.training import Optimisers, Stage, follow, learning_rate, plain_attention, save, stage_at
from .grounding import NOBODY, grounding_loss, word_owners
from .scene_maps import CLASSES, NUMBERS, scene_maps
from .scenes import SIZE, render, sample_scene
from .space_to_depth import CHANNELS, FACTOR, to_latents
from .teaching import teach_words
from .text import build_text_encoder, build_tokenizer
from .words import encode_pooled

SEED = 20261128
SHIFT = 3.0  # of the noise schedule; the sampler uses the same
DROP_CAPTION = 0.1


STAGES = (Stage(32, 16, 2000), Stage(SIZE, 6, 1200))
FIRST_SCENE = SEED + 2_000_000  # seed of the first scene drawn
FIRST_TAUGHT = SEED + 500_000_000  # seed of the first scene whose caption the text encoder is taught
WARMUP = 50
FALL = 0.25  # share of the run over which the learning rate falls at its end
TAPPED_BLOCK = 4  # whose features the scene loss reads
GROUNDED_BLOCKS = (1, 2, 3, 4)  # whose joint attention has a grounding loss
JUDGED = 4  # one image token in so many has a grounding loss, others each step
THING_WEIGHT = 3.0  # of the cells near things in the velocity loss
SCENE_WEIGHT = 0.1  # of the scene loss beside the velocity loss, times the learning-rate schedule
GROUNDING_WEIGHT = 0.1  # likewise, of the mean grounding loss of the blocks


def build_transformer() -> SD3Transformer2DModel:
    """The MM-DiT of diffusers, 10 joint blocks of width 192, a token for each 2 x 2 pixels."""
    edge = SIZE // FACTOR
    return SD3Transformer2DModel(
        sample_size=edge, patch_size=1, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=10,
        num_attention_heads=3, attention_head_dim=64, joint_attention_dim=128, caption_projection_dim=192,
        pooled_projection_dim=128, pos_embed_max_size=edge, qk_norm="rms_norm",
    )  # fmt: skip


def start_plain(transformer: SD3Transformer2DModel) -> None:
    """Start as a plain pre-norm transformer that predicts zero: modulations do nothing, gates are open.

    The published start has the gates closed (adaLN-Zero), which learns slower in the first hundreds of steps.
    """
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
            parts = norm.linear.bias.data.chunk(norm.linear.out_features // transformer.inner_dim)
            if len(parts) == 6:  # shift, scale, gate, shift, scale, gate
                parts[2].fill_(1.0)
                parts[5].fill_(1.0)
    for linear in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def velocity_loss(velocity: Tensor, wanted: Tensor, here: Tensor) -> Tensor:
    """Mean squared error of ``[B, 12, H, W]``; cells where a thing is near (``here`` ``[B, H * W]``) count more."""
    near = (here > 0).view(wanted.shape[0], 1, *wanted.shape[2:])
    weight = torch.where(near, THING_WEIGHT, 1.0)
    mean: Tensor = ((velocity.float() - wanted).square() * (weight / weight.mean())).mean()
    return mean


@dataclass(frozen=True)
class Batch:
    """Images ``[B, H, W, 3]``, captions, scene maps (see there) and owners of the words ``[B, W]``."""

    images: Tensor
    captions: list[str]
    classes: Tensor
    numbers: Tensor
    here: Tensor
    owners: Tensor


class Trainee(nn.Module):
    """Transformer and text encoder as one module, so that one optimiser and one average cover both."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(vocabulary)
        self.scene_head = SceneHead(self.transformer.inner_dim, CLASSES, NUMBERS)
        start_plain(self.transformer)
        self._tapped: list[Tensor] = []
        self._looked: list[tuple[Attention, Tensor, Tensor]] = []

    def tap(self) -> None:
        """Have the forward pass keep what the auxiliary losses read, and read positions as shares of the canvas.

        SD3's positions are the middle of a grid, so that a small canvas would show the middle of a large one. Here a
        token of a small canvas gets the mean position of the tokens of the whole one in its place.
        """
        blocks, embed = self.transformer.transformer_blocks, self.transformer.pos_embed
        blocks[TAPPED_BLOCK].register_forward_hook(lambda *seen: self._tapped.append(seen[-1][1]))

        def keep(module: Attention, _: Any, given: dict[str, Tensor], __: Any) -> None:
            self._looked.append((module, given["hidden_states"], given["encoder_hidden_states"]))

        for i in GROUNDED_BLOCKS:
            blocks[i].attn.register_forward_hook(keep, with_kwargs=True)

        def positions(height: int, width: int) -> Tensor:
            edge = embed.pos_embed_max_size
            whole = embed.pos_embed.view(1, height, edge // height, width, edge // width, -1)
            mean: Tensor = whole.mean((2, 4)).flatten(1, 2)
            return mean

        embed.cropped_pos_embed = positions

    def forward(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, batch: tuple[Tensor, ...], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity like ``noisy`` ``[B, 12, H/2, W/2]``, the scene loss and the grounding loss."""
        classes, numbers, here, owners = batch
        velocity = self.transformer(noisy, text, pooled, timestep, return_dict=False)[0]
        losses = [grounding_loss(*seen, here, owners, rows) for seen in self._looked]
        self._looked.clear()
        return velocity, self.scene_head(self._tapped.pop(), classes, numbers), torch.stack(losses).mean()


def batches(start: int, stages: tuple[Stage, ...]) -> queue.Queue[Batch]:
    """Render the batches from step ``start`` on in a background thread."""
    ready: queue.Queue[Batch] = queue.Queue(maxsize=4)

    def work() -> None:
        for step in range(start, sum(stage.steps for stage in stages)):
            stage = stage_at(step, stages)
            scenes = [sample_scene(FIRST_SCENE + step * 64 + i) for i in range(stage.batch)]
            images = torch.from_numpy(np.stack([render(scene, stage.size) for scene in scenes]))
            maps = zip(*(scene_maps(scene, stage.size) for scene in scenes), strict=True)
            owners = torch.tensor([word_owners(scene) for scene in scenes])
            classes, numbers, here = (torch.from_numpy(np.stack(part)) for part in maps)
            ready.put(Batch(images, [scene.caption for scene in scenes], classes, numbers, here, owners))

    threading.Thread(target=work, daemon=True).start()
    return ready


def main() -> None:
    """Train (or resume) as the command line says, in one process and one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--stop-after", type=int, help="stop after this many steps of this start (for trials)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with patch.object(nn.functional, "scaled_dot_product_attention", plain_attention):
        train(args.out, args.save_every, args.stop_after)


def train(out: Path, save_every: int, stop_after: int | None = None) -> None:
    """The training loop; ``out`` is the directory of its checkpoint, from which it goes on if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    trainee = Trainee(len(tokenizer))
    optimisers = Optimisers(trainee, lambda name: "transformer_blocks." in name and ".norm1" not in name)
    step, latest = 0, out / "latest.pt"
    if latest.exists():
        state = torch.load(latest, weights_only=True)
        trainee.load_state_dict(state["model"])
        average = state["average"]
        optimisers.load_state_dicts(state["optimisers"])
        step = state["step"]
        print(f"resumed at step {step}", flush=True)
    else:
        share = teach_words(tokenizer, trainee.text_encoder, FIRST_TAUGHT)
        print(f"text encoder: {share:.4f} of the words' attributes right", flush=True)
        average = {name: value.detach().clone() for name, value in trainee.state_dict().items()}
    trainee.tap()
    run: Any = torch.compile(trainee, dynamic=False)
    total = sum(stage.steps for stage in STAGES)
    source = batches(step, STAGES)
    first, began, recent = step, time.time(), []
    while step < total and (stop_after is None or step - first < stop_after):
        given = source.get()
        draw = torch.Generator().manual_seed(SEED + step)
        batch = stage_at(step, STAGES).batch
        drop = torch.rand(batch, generator=draw) < DROP_CAPTION
        captions = ["" if d else c for c, d in zip(given.captions, drop, strict=True)]
        text, pooled = encode_pooled(tokenizer, trainee.text_encoder, captions)
        latents = to_latents(given.images)
        noise = torch.randn(latents.shape, generator=draw)
        u = ((torch.arange(batch) + torch.rand(batch, generator=draw)) / batch).sqrt()  # more of the noisy ones
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        mix = sigma.view(-1, 1, 1, 1)
        tokens = given.here.shape[1]
        rows = torch.randperm(tokens, generator=draw)[: tokens // JUDGED]
        targets = (given.classes, given.numbers, given.here, given.owners.masked_fill(drop[:, None], NOBODY))
        with torch.autocast("cpu", torch.bfloat16):
            velocity, scene_loss, grounding = run(
                (1 - mix) * latents + mix * noise, sigma * 1000, text, pooled, targets, rows
            )
        loss = velocity_loss(velocity, noise - latents, given.here)
        scale = learning_rate(step, total, WARMUP, FALL)
        (loss + scale * (SCENE_WEIGHT * scene_loss + GROUNDING_WEIGHT * grounding)).backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimisers.step(scale)
        step += 1
        follow(average, trainee, step)
        recent.append((loss.item(), scene_loss.item(), grounding.item()))
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}; the last good checkpoint is {latest}")
        if step % 20 == 0 or step - first == 5:
            rate = (time.time() - began) / len(recent)
            left = (total - step) * rate / 60
            shown = "loss {:.4f} scene {:.4f} grounding {:.4f}".format(*np.mean(recent, 0))
            size = stage_at(step - 1, STAGES).size
            print(f"step {step}/{total} size {size} {shown} {rate:.2f} s/step, {left:.0f} min left", flush=True)
            recent, began = [], time.time()
        if step % save_every == 0 or step == total:
            save(latest, {"model": trainee.state_dict(), "average": average, "step": step,
                          "optimisers": optimisers.state_dicts()})  # fmt: skip
            (out / "progress.json").write_text(json.dumps({"step": step, "total": total}))


if __name__ == "__main__":
    main()
