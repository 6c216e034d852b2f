"""What training rests on: words and their things, grounding in joint attention, positions, the loss, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from examples.common.training import Stage
from examples.tiny_image import train as training
from examples.tiny_image.grounding import HEAD, NOBODY, grounding_loss, word_owners
from examples.tiny_image.scenes import Scene, sample_scene
from examples.tiny_image.teaching import KINDS, attributes, teach_words
from examples.tiny_image.text import MAX_WORDS, build_text_encoder, build_tokenizer
from examples.tiny_image.train import THING_WEIGHT, Trainee, build_transformer, start_plain, velocity_loss

PAIR = next(scene for scene in map(sample_scene, range(99)) if scene.relation)
THREE = next(scene for scene in map(sample_scene, range(99)) if len(scene.things) == 3)


@pytest.mark.parametrize("scene", [PAIR, THREE], ids=["pair", "three"])
def test_words_belong_to_the_things_they_describe(scene: Scene) -> None:
    words = build_tokenizer().tokenize(scene.caption)
    owners = word_owners(scene)
    assert len(owners) == MAX_WORDS and set(owners[len(words) :]) <= {NOBODY}
    for number, thing in enumerate(scene.things, 1):
        own = " ".join(word for word, owner in zip(words, owners, strict=False) if owner == number)
        assert own == (thing.phrase if scene.relation else f"{thing.phrase} {thing.place}")
    assert [w for w, owner in zip(words, owners, strict=False) if owner == 0] == ["over", scene.background]


def test_words_teach_the_encoder_what_a_thing_is_like() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer))
    assert teach_words(tokenizer, encoder, seed=9_000_000, steps=60, batch=32) > 0.55  # about 0.3 by chance


def test_attributes_are_numbers_in_their_lists() -> None:
    thing = PAIR.things[0]
    named = [kind[number] for kind, number in zip(KINDS, attributes(thing), strict=True)]
    assert named == [thing.colour, thing.shape, thing.texture, thing.size, thing.place]


class TestGrounding:
    def attention(self) -> Attention:
        torch.manual_seed(0)
        return Attention(
            query_dim=24, added_kv_proj_dim=24, dim_head=12, heads=2, out_dim=24, context_pre_only=False,
            qk_norm="rms_norm", processor=JointAttnProcessor2_0(),
        )  # fmt: skip

    def test_is_least_where_a_token_looks_at_its_own_words(self) -> None:
        attention, owners = self.attention(), torch.tensor([word_owners(PAIR)])
        here = torch.tensor([[owner for owner in owners[0].tolist() if owner > 0]])
        tokens, words = torch.randn(1, here.shape[1], 24), torch.randn(1, MAX_WORDS, 24)
        rows = torch.arange(0, here.shape[1], 2)
        optimiser = torch.optim.Adam(attention.parameters(), 2e-2)
        losses = []
        for _ in range(200):
            loss = grounding_loss(attention, tokens, words, here, owners, rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.1 < 1.0 < losses[0]
        maps: list[torch.Tensor] = []

        def keep(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
            maps.append((query @ key.mT * 12**-0.5).softmax(-1))
            return maps[-1] @ value

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
            attention(tokens, encoder_hidden_states=words)
        count = here.shape[1]
        looked = maps[0][:, HEAD, :count, count:]  # joint attention has the image first
        own = (owners[:, None] == here[..., None]).float()
        assert (looked * own).sum(-1)[:, rows].min() > 0.85

    def test_caption_left_out_counts_nothing(self) -> None:
        attention, here, owners = self.attention(), torch.ones(1, 5), torch.full((1, MAX_WORDS), NOBODY)
        words = torch.randn(1, MAX_WORDS, 24)
        assert grounding_loss(attention, torch.randn(1, 5, 24), words, here, owners, torch.arange(5)) == 0


def test_cells_near_things_weigh_more_in_the_velocity_loss() -> None:
    wanted, here = torch.zeros(1, 12, 4, 4), torch.zeros(1, 16)
    here[0, 6] = 1
    near, far = torch.zeros_like(wanted), torch.zeros_like(wanted)
    near[:, :, 1, 2] = 1
    far[:, :, 2, 1] = 1
    losses = [velocity_loss(velocity, wanted, here).item() for velocity in (near, far)]
    assert losses[0] == pytest.approx(THING_WEIGHT * losses[1])
    assert velocity_loss(torch.ones_like(wanted), wanted, here).item() == pytest.approx(1.0)


def test_transformer_starts_as_a_plain_one_that_predicts_nothing() -> None:
    torch.manual_seed(0)
    transformer = build_transformer()
    start_plain(transformer)
    inputs = (torch.randn(1, 12, 4, 4), torch.randn(1, 3, 128), torch.randn(1, 128), torch.tensor([500.0]))
    with torch.no_grad():
        assert (transformer(*inputs, return_dict=False)[0] == 0).all()
        block, width = transformer.transformer_blocks[0], transformer.inner_dim
        image, text, condition = torch.randn(1, 16, width), torch.randn(1, 3, width), torch.randn(1, width)
        moved = block(image, text, condition)
        assert torch.equal(moved[1], block(image, text, torch.zeros(1, width))[1]), "no condition has effect yet"
        assert (moved[1] - image).abs().max() > 0.1, "its gates are open"


def test_a_small_canvas_has_the_positions_of_the_whole() -> None:
    trainee = Trainee(50)
    embed = trainee.transformer.pos_embed
    whole = embed.pos_embed.clone()
    trainee.tap()
    assert torch.equal(embed.cropped_pos_embed(32, 32), whole)
    small = embed.cropped_pos_embed(16, 16).view(16, 16, -1)
    torch.testing.assert_close(small[3, 5], whole.view(32, 32, -1)[6:8, 10:12].mean((0, 1)))


def test_training_learns_and_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps in one go, and two and two, end in the same weights."""
    monkeypatch.setattr(training, "STAGES", (Stage(8, 2, 3), Stage(16, 2, 1)))
    monkeypatch.setattr(training, "teach_words", lambda tokenizer, encoder, seed: 1.0)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    training.train(tmp_path / "whole", save_every=2)
    training.train(tmp_path / "parts", save_every=2, stop_after=2)
    training.train(tmp_path / "parts", save_every=2)
    whole, parts = (torch.load(tmp_path / name / "latest.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for kind in ("model", "average"):
        for name, value in whole[kind].items():
            torch.testing.assert_close(parts[kind][name], value, msg=name)
    moved = [name for name, value in whole["model"].items() if not torch.equal(value, whole["average"][name])]
    assert len(moved) > 200
