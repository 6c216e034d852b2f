"""Clips can be made again bit for bit, and the detector reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.common.scene_head import SceneHead
from examples.tiny_video import prompts
from examples.tiny_video.clips import FRAMES, SIZE, render, sample_scene
from examples.tiny_video.detector import KINDS, attribute_score, count_by_kind, count_right, parse_caption
from examples.tiny_video.drawing import BACKGROUNDS, COLOURS
from examples.tiny_video.scene_maps import CLASSES, NUMBERS, TOKEN_EDGE, scene_maps
from examples.tiny_video.space_to_depth import from_latents, to_latents
from examples.tiny_video.train import SEED

SCENES = [sample_scene(seed) for seed in range(48)]


def test_render_is_a_function_of_the_seed() -> None:
    clip = render(sample_scene(5), 32)
    assert clip.shape == (FRAMES, 32, 32, 3) and clip.dtype == np.float32
    assert clip.min() >= 0 and clip.max() <= 1
    np.testing.assert_array_equal(clip, render(sample_scene(5), 32))
    assert np.abs(clip - render(sample_scene(6), 32)).max() > 0.1


def test_detector_reads_rendered_clips() -> None:
    clips, captions = [render(scene) for scene in SCENES], [scene.caption for scene in SCENES]
    assert attribute_score(clips, captions) >= 0.98
    assert attribute_score(clips, captions[1:] + captions[:1]) < 0.6


def test_detector_finds_nothing_in_noise() -> None:
    noise = np.random.default_rng(0).uniform(0, 1, (8, FRAMES, 64, 64, 3)).astype(np.float32)
    assert attribute_score(list(noise), [scene.caption for scene in SCENES[:8]]) < 0.3


def test_counts_by_kind_add_up() -> None:
    scene = SCENES[3]
    counts = count_by_kind(render(scene), SCENES[4].caption)
    assert tuple(counts) == KINDS
    assert counts["background"][1] == 1
    assert {counts[kind][1] for kind in KINDS[1:]} == {len(SCENES[4].things)}
    assert count_right(render(scene), SCENES[4].caption) == (
        sum(right for right, _ in counts.values()),
        sum(of for _, of in counts.values()),
    )


def test_captions_parse_back() -> None:
    for scene in SCENES:
        things, background = parse_caption(scene.caption)
        assert background == scene.background
        assert [tuple(thing.values()) for thing in things] == [(t.colour, t.shape, t.motion) for t in scene.things]
    with pytest.raises(ValueError, match="not of the form"):
        parse_caption("a dog in the rain")


@pytest.mark.parametrize("size", [32, 48, 64])
def test_space_to_depth_is_inverted_exactly(size: int) -> None:
    levels = torch.randint(0, 257, (2, FRAMES, size, size, 3), generator=torch.Generator().manual_seed(0))
    clips = levels / 256
    latents = to_latents(clips)
    assert latents.shape == (2, 12, FRAMES, size // 2, size // 2)
    assert torch.equal(from_latents(latents), clips)
    drawn = torch.from_numpy(render(SCENES[0], size))[None]
    torch.testing.assert_close(from_latents(to_latents(drawn)), drawn, rtol=0, atol=2**-24)


def test_a_latent_cell_holds_its_own_four_pixels() -> None:
    clips = torch.full((1, 1, 4, 6, 3), 0.5)
    clips[0, 0, 2:4, 4:6] = 1.0
    cells = to_latents(clips)[0, :, 0].abs().sum(0)
    assert torch.equal(cells, torch.tensor([[0.0, 0, 0], [0, 0, 12]]))


def test_prompt_files_are_the_held_out_captions() -> None:
    evaluation = (prompts.HERE / "prompts.txt").read_text().splitlines()
    calibration = (prompts.HERE / "calibration_prompts.txt").read_text().splitlines()
    assert evaluation == prompts.captions(prompts.EVALUATION_SEEDS) and len(evaluation) == 64
    assert calibration == prompts.captions(prompts.CALIBRATION_SEEDS) and len(calibration) == 8
    assert not set(evaluation) & set(calibration)
    assert max(prompts.CALIBRATION_SEEDS) < SEED + 1_000_000


def test_scene_maps_name_what_is_rendered_at_every_token() -> None:
    for seed in range(12):
        scene = sample_scene(seed)
        clip = render(scene, SIZE)
        classes, numbers = scene_maps(scene, SIZE)
        cells = SIZE // TOKEN_EDGE
        assert classes.shape == (FRAMES * cells * cells, len(CLASSES))
        assert (classes[:, 3] == BACKGROUNDS.index(scene.background)).all()
        inside = numbers[:, 0] < -0.25  # clear of the outline, so that no pixel of the token is mixed
        tokens = clip.reshape(FRAMES, cells, TOKEN_EDGE, cells, TOKEN_EDGE, 3).mean((2, 4)).reshape(-1, 3)
        palette = np.array(list(COLOURS.values()), np.float32)
        nearest = np.abs(tokens[:, None] / tokens.max(-1)[:, None, None] - palette / palette.max(-1)[:, None]).sum(-1)
        assert inside.sum() > 10
        agree = nearest.argmin(-1)[inside] == classes[inside, 0] - 1
        assert agree.mean() > 0.97, seed
        far = numbers[:, 0] == 1
        assert (classes[far, :3] == 0).all()


def test_scene_head_reads_what_is_in_the_features() -> None:
    scenes = [sample_scene(seed) for seed in range(2)]
    classes, numbers = (
        torch.from_numpy(np.stack(part)) for part in zip(*(scene_maps(s, 32) for s in scenes), strict=True)
    )
    torch.manual_seed(0)
    head = SceneHead(32, CLASSES, NUMBERS)
    known = torch.cat([numbers, classes, torch.zeros(*classes.shape[:2], 32 - NUMBERS - len(CLASSES))], -1)
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = head(known, classes, numbers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
