"""Teach a text encoder, before the rest is trained, whose attributes a word of the caption belongs to.

It stands in for the pretraining of a larger model's text encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .words import encode


def teach(
    tokenizer: PreTrainedTokenizerFast,
    encoder: T5EncoderModel,
    kinds: list[int],
    draw: Callable[[int], tuple[list[str], Tensor]],
    steps: int,
) -> float:
    """Train the encoder so that the class of every kind can be read off every word by a linear map, which is dropped.

    Args:
        tokenizer: of the captions.
        encoder: trained in place.
        kinds: how many classes each kind of attribute has.
        draw: the captions of a step and their labels ``[B, words, kinds]``, int64, -100 for a word of nobody.
        steps: how many.

    Returns:
        The share of attributes right over the last 20 steps.
    """
    read = torch.nn.Linear(encoder.config.d_model, sum(kinds))
    optimiser = torch.optim.AdamW([*encoder.parameters(), *read.parameters()], weight_decay=0.0)
    right: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
        captions, labels = draw(step)
        logits = read(encode(tokenizer, encoder, captions)).split(kinds, -1)
        loss = torch.zeros(())
        for i, part in enumerate(logits):
            loss = loss + torch.nn.functional.cross_entropy(part.flatten(0, 1), labels[..., i].flatten())
        found = torch.stack([part.argmax(-1) for part in logits], -1)
        right.append(float((found == labels)[labels >= 0].float().mean()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    return sum(right[-20:]) / len(right[-20:])
