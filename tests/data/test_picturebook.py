"""The world's grammar: one meaning per sentence, only valid edits, and a reader that is right on clean pictures."""

import random

import numpy as np
import pytest
from PIL import Image as PILImage

from weft.data.sources.picturebook import (
    Reader,
    Scene,
    Thing,
    draw,
    held_out_scene,
    is_held_out,
    parse_caption,
    random_edit,
    random_scene,
    random_story,
    valid_edits,
)


@pytest.fixture(scope="module")
def reader():
    return Reader()


def scenes(n, seed=0):
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(n)]


def test_reader_finds_every_scene_also_under_noise(reader):
    rng = np.random.default_rng(0)
    for scene in scenes(100):
        picture = draw(scene)
        assert reader.read(picture) == scene
        noisy = (np.asarray(picture) + rng.normal(0, 40, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        assert reader.read(PILImage.fromarray(noisy)) == scene


def test_reader_agrees_with_a_search_over_all_pairs(reader):
    # one picture that is no scene: half of one, half of another
    from weft.data.sources.picturebook import COLORS, KINDS, SIZES

    left = draw(Scene("beach", "day", (("left", Thing("cat", "red", "big")),)))
    right = draw(Scene("beach", "night", (("right", Thing("cat", "blue", "small")),)))
    mixed = PILImage.fromarray(np.concatenate([np.asarray(left)[:, :32], np.asarray(right)[:, 32:]], 1))
    target = np.asarray(mixed, dtype=float)
    rng = random.Random(1)
    found = reader.read(mixed)
    best = ((np.asarray(draw(found), dtype=float) - target) ** 2).sum()
    for kind in KINDS:
        for color in COLORS:
            for size in SIZES:
                thing = Thing(kind, color, size)
                for place in ("left", "middle", "right"):
                    for time in ("day", "night"):
                        other = np.asarray(draw(Scene("beach", time, ((place, thing),))), dtype=float)
                        assert ((other - target) ** 2).sum() >= best
    for scene in (random_scene(rng) for _ in range(300)):
        assert ((np.asarray(draw(scene), dtype=float) - target) ** 2).sum() >= best


def test_captions_mean_one_scene():
    for scene in scenes(300):
        assert parse_caption(scene.caption()) == scene
    assert parse_caption("a big red cat on the left, on the moon by day.") is None
    assert parse_caption("once there was a cat.") is None


def test_edits_are_valid_named_uniquely_and_change_one_thing():
    for scene in scenes(50):
        edits = dict(valid_edits(scene))
        assert len(edits) == len(list(valid_edits(scene))), "a sentence with two meanings"
        for after in edits.values():
            assert after != scene
            changed = [name for name, value in scene.attributes().items() if after.attributes()[name] != value]
            assert len(changed) == 1 or len(after.things) != len(scene.things) or changed == ["places"]


def test_stories_follow_their_edits_and_never_repeat_a_picture():
    rng = random.Random(3)
    for _ in range(50):
        story = random_story(rng, held_out=False)
        assert len(story.sentences()) == len(story.scenes) == 3 and len(set(story.scenes)) == 3
        for before, edit, after in zip(story.scenes, story.edits, story.scenes[1:], strict=False):
            assert dict(valid_edits(before))[edit] == after
        assert not any(map(is_held_out, story.scenes))
    assert is_held_out(random_story(rng, held_out=True).scenes[0]) and is_held_out(held_out_scene(rng))


def test_every_kind_of_edit_occurs():
    rng = random.Random(4)
    words = {word for _ in range(400) for word in random_edit(rng, random_scene(rng))[0][:-1].split()}
    assert {"falls", "breaks", "turns", "grows", "shrinks", "moves", "leaves", "comes"} <= words


def test_held_out_share_is_a_tenth():
    held = sum(map(is_held_out, scenes(3000, seed=5)))
    assert 200 < held < 400
