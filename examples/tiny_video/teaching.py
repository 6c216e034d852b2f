"""What the text encoder is taught before the rest is trained: whose attributes a word of the caption belongs to."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .clips import COLOURS, MOTIONS, SHAPES, sample_scene
from .grounding import phrase_spans
from .text import MAX_WORDS, encode

_NEAR = (1, 9, 2, 10)  # T5's buckets of the words one before, one after, two before, two after: one for each head


def teach_words(
    tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel, seed: int, steps: int = 300, batch: int = 64
) -> float:
    """Train the encoder so that every word of a phrase knows the phrase's colour, shape and motion.

    It stands in for the pretraining of a larger model's text encoder. Each head is first turned to one near word: a
    random encoder learns it either way (1.00 right after 150 steps, 0.98 without), one that was trained to look
    everywhere alike does not (0.71 after 400 steps, which is picking one of the caption's things; 0.99 after 200 with).

    Scenes are drawn from ``seed`` on; the linear map that reads the attributes off a word is dropped. Returns the
    share of attributes right over the last 20 steps.
    """
    kinds = (list(COLOURS), list(SHAPES), list(MOTIONS))
    with torch.no_grad():
        bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias[list(_NEAR), range(len(_NEAR))] += 4.0
    read = torch.nn.Linear(encoder.config.d_model, sum(map(len, kinds)))
    optimiser = torch.optim.AdamW([*encoder.parameters(), *read.parameters()], weight_decay=0.0)
    right: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
        scenes = [sample_scene(seed + step * batch + i) for i in range(batch)]
        labels = torch.full((batch, MAX_WORDS, len(kinds)), -100)
        for row, scene in enumerate(scenes):
            for thing, span in phrase_spans(scene):
                named = (thing.colour, thing.shape, thing.motion)
                labels[row, span] = torch.tensor([k.index(w) for k, w in zip(kinds, named, strict=True)])
        logits = read(encode(tokenizer, encoder, [scene.caption for scene in scenes])).split(list(map(len, kinds)), -1)
        known = labels >= 0
        loss = torch.zeros(())
        for i, part in enumerate(logits):
            loss = loss + torch.nn.functional.cross_entropy(part.flatten(0, 1), labels[..., i].flatten())
        found = torch.stack([part.argmax(-1) for part in logits], -1)
        right.append(float((found == labels)[known].float().mean()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    return sum(right[-20:]) / len(right[-20:])
