"""Scenes can be made again bit for bit, captions say what is drawn, and the detector reads it."""

from __future__ import annotations

import numpy as np
import pytest

from examples.tiny_image import prompts
from examples.tiny_image.drawing import BACKGROUNDS, COLOURS, SHAPES, signed_distance
from examples.tiny_image.image_detector import (
    KINDS,
    attribute_score,
    count_by_kind,
    count_right,
    parse_caption,
    read_relation,
    read_things,
)
from examples.tiny_image.scene_maps import CLASSES, NUMBERS, TOKEN_EDGE, scene_maps
from examples.tiny_image.scenes import PLACES, RELATIONS, SIZE, SIZES, TEXTURES, grid, render, sample_scene
from examples.tiny_image.text import MAX_WORDS, build_tokenizer
from examples.tiny_image.train import SEED

SCENES = [sample_scene(seed) for seed in range(64)]


def test_render_is_a_function_of_the_seed() -> None:
    image = render(sample_scene(5), 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    np.testing.assert_array_equal(image, render(sample_scene(5), 32))
    assert np.abs(image - render(sample_scene(6), 32)).max() > 0.1


def test_scenes_have_everything_that_captions_can_name() -> None:
    things = [thing for seed in range(300) for thing in sample_scene(seed).things]
    for kind, names in (("colour", COLOURS), ("shape", SHAPES), ("texture", TEXTURES), ("size", SIZES)):
        assert {getattr(thing, kind) for thing in things} == set(names)
    assert {thing.place for thing in things} == set(PLACES)
    assert {sample_scene(seed).relation for seed in range(300)} == {"", *RELATIONS}
    assert {len(sample_scene(seed).things) for seed in range(300)} == {1, 2, 3}


def test_detector_reads_rendered_images() -> None:
    images, captions = [render(scene) for scene in SCENES], [scene.caption for scene in SCENES]
    assert attribute_score(images, captions) >= 0.99
    assert attribute_score(images, captions[1:] + captions[:1]) < 0.25


def test_detector_finds_nothing_in_noise() -> None:
    noise = np.random.default_rng(0).uniform(0, 1, (8, 64, 64, 3)).astype(np.float32)
    assert attribute_score(list(noise), [scene.caption for scene in SCENES[:8]]) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_attribute_is_counted_by_itself(kind: str) -> None:
    """A caption that is wrong in one attribute loses that one, and the others of the thing only with its colour."""
    changes = {
        "background": ("over sand", "over grass"),
        "colour": ("red", "cyan"),
        "shape": ("circle", "cross"),
        "texture": ("striped", "checked"),
        "size": ("large", "small"),
        "place": ("top left", "top right"),
        "relation": ("above", "below"),
    }
    named = [s for s in map(sample_scene, range(4000)) if changes[kind][0] in s.caption and len(s.things) <= 2]
    kept = [s for s in named if sum(changes[kind][0] in thing.phrase for thing in s.things) <= 1][:6]
    assert kept
    for scene in kept:
        image, caption = render(scene), scene.caption.replace(*changes[kind], 1)
        if len({d["colour"] for d in parse_caption(caption)[0]}) < len(scene.things):
            continue  # cyan was there already
        honest, counts = count_by_kind(image, scene.caption), count_by_kind(image, caption)
        lost = {name for name in KINDS if counts[name][0] < honest[name][0]}
        assert kind in lost and (kind == "colour" or lost == {kind})


def test_counts_add_up() -> None:
    for scene in SCENES[:12]:
        counts = count_by_kind(render(scene), scene.caption)
        assert tuple(counts) == KINDS
        assert counts["background"][1] == 1 and counts["relation"][1] == (scene.relation != "")
        assert {counts[kind][1] for kind in ("colour", "shape", "texture", "size")} == {len(scene.things)}
        assert counts["place"][1] == (0 if scene.relation else len(scene.things))
        right, total = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
        assert count_right(render(scene), scene.caption) == (right, total)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_those_of_the_places(relation: str) -> None:
    pairs = [scene for scene in map(sample_scene, range(400)) if scene.relation == relation][:8]
    for scene in pairs:
        seen = read_things(render(scene))
        first, second = (seen[thing.colour] for thing in scene.things)
        assert read_relation(first, second) == relation
        assert read_relation(second, first) != relation


def test_captions_parse_back() -> None:
    for scene in SCENES:
        things, relation, background = parse_caption(scene.caption)
        assert (relation, background) == (scene.relation, scene.background)
        expected = [(t.size, t.texture, t.colour, t.shape, "" if relation else t.place) for t in scene.things]
        assert [tuple(thing.values()) for thing in things] == expected
    for wrong in ("a dog in the rain", SCENES[0].caption.replace(" over ", " on ")):
        with pytest.raises(ValueError, match="not of the form"):
            parse_caption(wrong)


def test_captions_fit_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for seed in range(2000):
        words = tokenizer(sample_scene(seed).caption).input_ids
        assert len(words) <= MAX_WORDS and tokenizer.unk_token_id not in words


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_of_about_one_area_and_their_distance_is_one(shape: str) -> None:
    x, y = (part * 4 - 2 for part in grid(256))
    distance = signed_distance(shape, x, y, 1.0)
    assert (distance < 0).mean() * 16 == pytest.approx(np.pi * 0.92**2, rel=0.2)
    steps = np.hypot(*np.gradient(distance, 4 / 256))
    assert np.quantile(steps, 0.99) < 1.05, "no step is longer than the way to the outline"


def test_prompt_files_are_the_held_out_captions() -> None:
    evaluation = (prompts.HERE / "prompts.txt").read_text().splitlines()
    calibration = (prompts.HERE / "calibration_prompts.txt").read_text().splitlines()
    assert evaluation == prompts.captions(prompts.EVALUATION_SEEDS) and len(evaluation) == 64
    assert calibration == prompts.captions(prompts.CALIBRATION_SEEDS) and len(calibration) == 8
    assert not set(evaluation) & set(calibration)
    assert max(prompts.CALIBRATION_SEEDS) < SEED


def test_scene_maps_name_what_is_rendered_at_every_token() -> None:
    for scene in SCENES[:12]:
        image = render(scene)
        classes, numbers, here = scene_maps(scene, SIZE)
        cells = SIZE // TOKEN_EDGE
        assert classes.shape == (cells * cells, len(CLASSES)) and numbers.shape == (cells * cells, NUMBERS)
        assert (classes[:, -1] == BACKGROUNDS.index(scene.background)).all()
        tokens = image.reshape(cells, TOKEN_EDGE, cells, TOKEN_EDGE, 3).mean((1, 3)).reshape(-1, 3)
        inside = numbers[:, 0] < -0.3  # clear of the outline, so that no pixel of the token is mixed
        palette = np.array(list(COLOURS.values()), np.float32)
        nearest = np.abs(tokens[:, None] / tokens.max(-1)[:, None, None] - palette / palette.max(-1)[:, None]).sum(-1)
        assert inside.sum() > 5
        assert (nearest.argmin(-1)[inside] == classes[inside, 0] - 1).all()
        for number, thing in enumerate(scene.things, 1):
            assert (classes[here == number, 0] == list(COLOURS).index(thing.colour) + 1).all()
            assert (here == number).any()
        assert (classes[here == 0, :-1] == 0).all()
