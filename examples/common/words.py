"""Tokenizer and text encoder of the shipped models: a word-level vocabulary and a small T5.

This file is shared: the folder of each shipped model has a link to it, so that a model loads from its folder alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

SPECIAL = ("<pad>", "</s>", "<unk>")


def word_tokenizer(words: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of captions of at most ``length`` words; what is not among ``words`` is ``<unk>``."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    core = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def small_t5(vocabulary: int, layers: int, width: int = 128) -> T5EncoderModel:
    """A T5 encoder of ``layers`` layers of ``width``, random; it is trained together with the transformer."""
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=32, d_ff=2 * width, num_layers=layers, num_heads=4,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel, captions: list[str], device: torch.device | str = "cpu"
) -> Tensor:
    """Caption features ``[B, words, width]``; padding rows are zero, as in diffusers' Wan pipeline."""
    return encode_with_mask(tokenizer, encoder, captions, device)[0]


def encode_with_mask(
    tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel, captions: list[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Caption features ``[B, words, width]``, padding rows zero, and which rows are words ``[B, words]``, 0 or 1."""
    padded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    tokens = padded.to(device)
    hidden: Tensor = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    mask: Tensor = tokens.attention_mask.to(hidden.dtype)
    return hidden * mask[..., None], mask


def encode_pooled(
    tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel, captions: list[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Caption features ``[B, words, width]``, padding rows zero, and their mean over words ``[B, width]``."""
    hidden, mask = encode_with_mask(tokenizer, encoder, captions, device)
    return hidden, hidden.sum(1) / mask.sum(1, keepdim=True)
