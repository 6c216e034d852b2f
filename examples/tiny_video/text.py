"""The tokenizer and text encoder of the tiny video pipeline: a word-level vocabulary and a small T5."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

MAX_WORDS = 24
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words that captions use; everything else is ``<unk>``."""
    motions = [word for motion in MOTIONS for word in motion.split()]
    words = dict.fromkeys([*SPECIAL, "a", "and", "over", ",", *COLOURS, *SHAPES, *motions, *BACKGROUNDS])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_WORDS
    )


def build_text_encoder(vocabulary: int, width: int = 128) -> T5EncoderModel:
    """A two-layer T5 encoder of ``width``, random; it is trained together with the transformer."""
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_heads=4,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel, captions: list[str], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Caption features ``[B, MAX_WORDS, width]``; padding rows are zero, as in diffusers' Wan pipeline."""
    padded = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_WORDS, return_tensors="pt")
    tokens = padded.to(device)
    hidden: torch.Tensor = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    mask: torch.Tensor = tokens.attention_mask
    return hidden * mask[..., None].to(hidden.dtype)
