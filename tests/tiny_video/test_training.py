"""What training rests on: the text encoder's attention, what it is taught, grounding, coordinates."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from examples.common.training import plain_attention
from examples.tiny_video.clips import sample_scene
from examples.tiny_video.drawing import COLOURS
from examples.tiny_video.grounding import HEAD, grounding_loss, word_owners
from examples.tiny_video.space_to_depth import coordinates
from examples.tiny_video.teaching import teach_words
from examples.tiny_video.text import MAX_WORDS, build_text_encoder, build_tokenizer
from examples.tiny_video.train import THING_WEIGHT, velocity_loss
from examples.tiny_video.words import encode

TWO_THINGS = next(scene for scene in map(sample_scene, range(99)) if len(scene.things) == 2)


def test_text_encoder_is_the_same_while_training_as_in_the_pipeline() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer)).eval()
    captions = [sample_scene(seed).caption for seed in range(3)]
    expected = encode(tokenizer, encoder, captions)
    with patch.object(nn.functional, "scaled_dot_product_attention", plain_attention):
        assert torch.equal(encode(tokenizer, encoder, captions), expected)


def test_plain_attention_is_the_fused_one() -> None:
    query, key, value = torch.randn(3, 2, 3, 40, 16).unbind()
    fused = nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(plain_attention(query, key, value), fused, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_words_belong_to_the_things_they_describe(seed: int) -> None:
    scene = sample_scene(seed)
    tokenizer = build_tokenizer()
    words = tokenizer.tokenize(scene.caption)
    owners = word_owners(scene)
    assert len(owners) == MAX_WORDS
    for thing in scene.things:
        own = [
            word for word, owner in zip(words, owners, strict=False) if owner == list(COLOURS).index(thing.colour) + 1
        ]
        assert " ".join(own) == thing.phrase
    assert [word for word, owner in zip(words, owners, strict=False) if owner == 0] == ["over", scene.background]
    assert set(owners[len(words) :]) <= {-1}


def test_words_teach_the_encoder_which_shape_has_which_colour() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer))
    assert teach_words(tokenizer, encoder, seed=9_000_000, steps=120, batch=32) > 0.9  # 0.7: one of the things


class TestGrounding:
    def attention(self) -> WanAttention:
        torch.manual_seed(0)
        return WanAttention(dim=24, heads=2, dim_head=12, cross_attention_dim_head=12)

    def test_is_least_where_a_token_looks_at_its_own_words(self) -> None:
        attention, owners = self.attention(), torch.tensor([word_owners(TWO_THINGS)])
        here = torch.tensor([[owner for owner in owners[0].tolist() if owner > 0]])
        tokens, words = torch.randn(1, here.shape[1], 24), torch.randn(1, MAX_WORDS, 24)
        optimiser = torch.optim.Adam(attention.parameters(), 1e-2)
        losses = []
        for _ in range(150):
            loss = grounding_loss(attention, tokens, words, here, owners)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 < 0.5 < losses[0]
        part = slice(HEAD * 12, (HEAD + 1) * 12)
        query, key = attention.norm_q(attention.to_q(tokens)), attention.norm_k(attention.to_k(words))
        looked = ((query[..., part] @ key[..., part].mT) * 12**-0.5).softmax(-1)
        own = (owners[:, None] == here[..., None]).float()
        assert (looked * own).sum(-1).min() > 0.9

    def test_caption_left_out_counts_nothing(self) -> None:
        attention, here = self.attention(), torch.ones(1, 5)
        owners = torch.full((1, MAX_WORDS), -1)
        assert grounding_loss(attention, torch.randn(1, 5, 24), torch.randn(1, MAX_WORDS, 24), here, owners) == 0


def test_cells_near_things_weigh_more_in_the_velocity_loss() -> None:
    wanted, here = torch.zeros(1, 12, 2, 4, 4), torch.zeros(1, 8)
    here[0, 5] = 1  # second frame, first row, second column of tokens: two cells each way
    near, far = torch.zeros_like(wanted), torch.zeros_like(wanted)
    near[:, :, 1, :2, 2:] = 1
    far[:, :, 0, :2, 2:] = 1
    losses = [velocity_loss(velocity, wanted, here).item() for velocity in (near, far)]
    assert losses[0] == pytest.approx(THING_WEIGHT * losses[1])
    assert velocity_loss(torch.ones_like(wanted), wanted, here).item() == pytest.approx(1.0)


def test_coordinates_grow_along_their_axes() -> None:
    latents = torch.randn(2, 12, 3, 4, 5)
    places = coordinates(latents.double())
    assert places.shape == (2, 3, 3, 4, 5) and places.dtype == torch.float64
    frame, y, x = coordinates(latents)[1]
    assert (frame.diff(dim=0) > 0).all() and (y.diff(dim=1) > 0).all() and (x.diff(dim=2) > 0).all()
    assert torch.equal(frame[:, 0, 0], torch.linspace(-1.7, 1.7, 3)) and (frame[1] == frame[1, 0, 0]).all()
