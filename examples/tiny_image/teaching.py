"""What the text encoder is taught before the rest is trained: whose attributes a word of the caption belongs to."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from ..common.teaching import teach
from .drawing import COLOURS, SHAPES
from .grounding import word_owners
from .scenes import PLACES, SIZES, TEXTURES, Thing, sample_scene
from .text import MAX_WORDS

KINDS = (tuple(COLOURS), SHAPES, TEXTURES, tuple(SIZES), tuple(PLACES))


def attributes(thing: Thing) -> tuple[int, ...]:
    """The number of each of a thing's attributes in its list of `KINDS`."""
    named = (thing.colour, thing.shape, thing.texture, thing.size, thing.place)
    return tuple(kind.index(name) for kind, name in zip(KINDS, named, strict=True))


def teach_words(
    tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel, seed: int, steps: int = 500, batch: int = 64
) -> float:
    """Train the encoder so that every word of a phrase knows the phrase's attributes, place included.

    The place may be told by a word far away: of ``a small red circle above a large blue square`` the circle is at the
    top. Scenes are drawn from ``seed`` on. Returns the share of attributes right over the last 20 steps.
    """

    def draw(step: int) -> tuple[list[str], Tensor]:
        scenes = [sample_scene(seed + step * batch + i) for i in range(batch)]
        labels = torch.full((batch, MAX_WORDS, len(KINDS)), -100)
        for row, scene in enumerate(scenes):
            told = [attributes(thing) for thing in scene.things]
            for place, owner in enumerate(word_owners(scene)):
                if owner > 0:
                    labels[row, place] = torch.tensor(told[owner - 1])
        return [scene.caption for scene in scenes], labels

    return teach(tokenizer, encoder, [len(kind) for kind in KINDS], draw, steps)
