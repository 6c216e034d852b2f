"""The tokenizer and text encoder of the tiny video pipeline, before they are trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .clips import MOTIONS, SHAPES
from .drawing import BACKGROUNDS, COLOURS
from .words import small_t5, word_tokenizer

MAX_WORDS = 24


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words that captions use; everything else is ``<unk>``."""
    motions = [word for motion in MOTIONS for word in motion.split()]
    return word_tokenizer(["a", "and", "over", ",", *COLOURS, *SHAPES, *motions, *BACKGROUNDS], MAX_WORDS)


def build_text_encoder(vocabulary: int, width: int = 128) -> T5EncoderModel:
    """A two-layer T5 encoder of ``width``, random; it is trained together with the transformer."""
    return small_t5(vocabulary, layers=2, width=width)
