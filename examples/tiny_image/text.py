"""The tokenizer and text encoder of the tiny image pipeline, before they are trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .drawing import BACKGROUNDS, COLOURS, SHAPES
from .scenes import PLACES, RELATIONS, SIZES, TEXTURES
from .words import small_t5, word_tokenizer

MAX_WORDS = 32


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words that captions use; everything else is ``<unk>``."""
    named = [word for name in (*PLACES, *RELATIONS) for word in name.split()]
    told = [*SIZES, *TEXTURES[1:], *COLOURS, *SHAPES, *named, *BACKGROUNDS]
    return word_tokenizer(["a", "and", "over", ",", *told], MAX_WORDS)


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A three-layer T5 encoder, random; it is trained together with the transformer."""
    return small_t5(vocabulary, layers=3)
