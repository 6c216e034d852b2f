"""Which words of the caption a token should look at: the targets of the second auxiliary loss of training.

Left to the velocity loss alone, the cross-attention of a small model learns to look at all words about things at once,
and so takes the shape of one thing and the motion of another. Captions of procedural scenes say which phrase belongs
to which thing, so one head of a few blocks is told (after TokenCompose: Wang et al., 2023, arXiv 2312.03626, which
takes segmentation maps of a pretrained model for it).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from .clips import Scene, Thing
from .drawing import COLOURS
from .text import MAX_WORDS

HEAD = 0  # of the cross-attention; the others are free
_BACKGROUND, _NOBODY = 0, -1


def phrase_spans(scene: Scene) -> Iterator[tuple[Thing, slice]]:
    """Which tokens of the caption describe each thing, in its order."""
    start = 0
    for thing in scene.things:
        length = len(thing.phrase.split())
        yield thing, slice(start, start + length)
        start += length + 1  # a comma or "and"


def word_owners(scene: Scene) -> list[int]:
    """For each of the `MAX_WORDS` tokens of the caption, whose it is.

    A number from 1 on is a thing, by its colour's place in `COLOURS` plus 1 (as in `scene_maps`, class 0), which no
    other thing of the scene has; 0 is the background's; -1 nobody's (punctuation, "and", padding).
    """
    owners = [_NOBODY] * MAX_WORDS
    end = 0
    for thing, span in phrase_spans(scene):
        end = span.stop
        owners[span] = [list(COLOURS).index(thing.colour) + 1] * (end - span.start)
    owners[end : end + 2] = [_BACKGROUND] * 2  # "over" and its name
    return owners


def grounding_loss(attention: WanAttention, tokens: Tensor, words: Tensor, here: Tensor, owners: Tensor) -> Tensor:
    """Divergence of head `HEAD` of a cross-attention from looking evenly at the words of what is here.

    Args:
        attention: the cross-attention of a block.
        tokens: what it gets as queries, ``[B, N, width]``.
        words: what it gets as keys, ``[B, W, width]``.
        here: the owner at every token, ``[B, N]``; 0 where no thing is near.
        owners: of every word, ``[B, W]``, see `word_owners`; a caption left out has none but -1 and counts nothing.

    Returns:
        The mean over tokens in nats; tokens far from things count a quarter.
    """
    width = attention.inner_dim // attention.heads
    part = slice(HEAD * width, (HEAD + 1) * width)
    query = attention.norm_q(attention.to_q(tokens))[..., part]
    key = attention.norm_k(attention.to_k(words))[..., part]
    looked = ((query @ key.transpose(-1, -2)).float() * width**-0.5).log_softmax(-1)
    wanted = (owners[:, None] == here[..., None]).float()
    count = wanted.sum(-1).clamp(min=1)
    weight = torch.where(here > 0, 1.0, 0.25) * wanted.amax(-1)
    mean: Tensor = ((-(wanted * looked).sum(-1) / count - count.log()) * weight).sum() / weight.sum().clamp(min=1)
    return mean
