"""Which words of the caption a token should look at: the targets of the second auxiliary loss of training.

Joint attention lets an image token look at words and at a thousand other image tokens, so at first words have little
weight and learn little. Captions of procedural scenes say which phrase belongs to which thing, so one head of a few
blocks is told to look at the words about what is here (after TokenCompose: Wang et al., 2023, arXiv 2312.03626, which
takes segmentation maps of a pretrained model for it).
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .scenes import Scene
from .text import MAX_WORDS

HEAD = 0  # of the joint attention; the others are free
NOBODY = -1


def word_owners(scene: Scene) -> list[int]:
    """For each of the `MAX_WORDS` tokens of the caption, whose it is.

    A number from 1 on is a thing, in the caption's order; 0 is the background's; -1 nobody's (relations, punctuation,
    "and", padding).
    """
    owners: list[int] = []
    for text, owner in scene.pieces():
        owners += [owner + 1 if owner >= -1 else NOBODY] * len(text.split())
    return owners + [NOBODY] * (MAX_WORDS - len(owners))


def grounding_loss(
    attention: Attention, tokens: Tensor, words: Tensor, here: Tensor, owners: Tensor, rows: Tensor
) -> Tensor:
    """Divergence of head `HEAD` of a joint attention from looking evenly at the words of what is here.

    Args:
        attention: the joint attention of a block, with query and key norms.
        tokens: the image tokens that it gets, ``[B, N, width]``.
        words: the text tokens that it gets, ``[B, W, width]``.
        here: the owner at every image token, ``[B, N]``; 0 where no thing is near.
        owners: of every word, ``[B, W]``, see `word_owners`; a caption left out has none but -1 and counts nothing.
        rows: the image tokens to judge, ``[R]`` (all N cost as much as the head itself).

    Returns:
        The mean over the judged tokens in nats; those far from things count a quarter.
    """
    width = attention.inner_dim // attention.heads
    part = slice(HEAD * width, (HEAD + 1) * width)
    query = attention.norm_q(attention.to_q(tokens[:, rows])[..., part])
    image_keys = attention.norm_k(attention.to_k(tokens)[..., part])
    text_keys = attention.norm_added_k(attention.add_k_proj(words)[..., part])
    keys = torch.cat([text_keys, image_keys], 1)
    looked = ((query @ keys.transpose(-1, -2)).float() * width**-0.5).log_softmax(-1)[..., : words.shape[1]]
    here = here[:, rows]
    wanted = (owners[:, None] == here[..., None]).float()
    count = wanted.sum(-1).clamp(min=1)
    weight = torch.where(here > 0, 1.0, 0.25) * wanted.amax(-1)
    mean: Tensor = ((-(wanted * looked).sum(-1) / count - count.log()) * weight).sum() / weight.sum().clamp(min=1)
    return mean
