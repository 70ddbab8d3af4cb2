"""The drawn world: stories, pictures and captions scored without a judge, by what the exact reader sees."""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.sources.picturebook import (
    Reader,
    Scene,
    Story,
    draw,
    held_out_scene,
    parse_caption,
    random_edit,
    random_story,
)
from weft.document import Document, Image, Part, Text, user
from weft.evaluation.interval import Share, share
from weft.evaluation.task import Place, Sample, Task
from weft.images import decode_image, encode_png

TEST_SEED = 20_260_704
"""Of the set that reports quote. Settings are chosen on other seeds."""
_SEEDS = {"test": TEST_SEED, "dev": TEST_SEED + 1}
STORIES = 200
"""Of a split; drawing held-out ones takes time."""


@dataclass(frozen=True)
class StoryScore:
    """One answer. `pictures[i]`: every attribute of picture i is as asked. `sentences[i]`: word for word as asked."""

    wellformed: bool
    pictures: tuple[bool, ...]
    sentences: tuple[bool, ...]
    seen: tuple[Scene | None, ...]
    """What the reader sees in each picture; None where there is none."""


@dataclass(frozen=True)
class StorySummary:
    n: int
    wellformed: Share
    story_exact: tuple[Share, ...]
    text_exact: tuple[Share, ...]


def held_out_stories(n: int, seed: int = TEST_SEED) -> list[Story]:
    """Stories whose first scene no training data shows."""
    rng = random.Random(seed)
    return [random_story(rng, held_out=True) for _ in range(n)]


def prompt(story: Story) -> Document:
    return Document((user(story.instruction()),), id=story.instruction())


def score_story(story: Story, parts: Sequence[Part], finished: bool, reader: Reader) -> StoryScore:
    """Compare an answer with its story.

    Args:
        parts: the answer, text and pictures in order.
        finished: the model ended it by itself.
    """
    asked = len(story.scenes)
    kinds = [type(part) for part in parts]
    pictures = [part for part in parts if isinstance(part, Image)]
    texts = [part.text.strip() for part in parts if isinstance(part, Text)]
    seen = [reader.read(decode_image(part.data)) if part.data else None for part in pictures[:asked]]
    seen += [None] * (asked - len(seen))
    sentences = story.sentences()
    return StoryScore(
        wellformed=finished and kinds == [Text, Image] * asked,
        pictures=tuple(found == scene for found, scene in zip(seen, story.scenes, strict=True)),
        sentences=tuple(i < len(texts) and texts[i] == sentence for i, sentence in enumerate(sentences)),
        seen=tuple(seen),
    )


def summarise(scores: Sequence[StoryScore]) -> StorySummary:
    return StorySummary(
        n=len(scores),
        wellformed=share([score.wellformed for score in scores]),
        story_exact=tuple(share(list(column)) for column in zip(*(s.pictures for s in scores), strict=True)),
        text_exact=tuple(share(list(column)) for column in zip(*(s.sentences for s in scores), strict=True)),
    )


def story_of(reference: Mapping[str, Any]) -> Story:
    """The story of a sample's reference."""
    scenes = tuple(parse_caption(caption) for caption in reference["captions"])
    assert all(scenes)
    return Story(tuple(scene for scene in scenes if scene is not None), tuple(reference["edits"]))


@functools.cache
def _split(split: str) -> list[Story]:
    return held_out_stories(STORIES, _SEEDS[split])


def _stories(place: Place) -> Iterator[Sample]:
    for i, story in enumerate(_split(place.split)):
        reference = {"captions": [scene.caption() for scene in story.scenes], "edits": list(story.edits)}
        yield Sample(f"story-{i:04d}", prompt(story), reference)


def _scenes(place: Place) -> Iterator[tuple[str, Scene]]:
    rng = random.Random(_SEEDS[place.split])
    known: set[Scene] = set()
    while len(known) < STORIES:
        scene = held_out_scene(rng)
        if scene not in known:
            known.add(scene)
            yield f"scene-{len(known) - 1:04d}", scene


def _facets(scene: Scene) -> dict[str, str]:
    return {"things": str(len(scene.things))}


def _drawing(place: Place) -> Iterator[Sample]:
    for name, scene in _scenes(place):
        asked = Document((user(scene.caption()),), id=name)
        yield Sample(name, asked, {"caption": scene.caption()}, facets=_facets(scene))


def _telling(place: Place) -> Iterator[Sample]:
    for name, scene in _scenes(place):
        asked = Document((user(Image(encode_png(draw(scene)))),), id=name)
        yield Sample(name, asked, {"caption": scene.caption()}, facets=_facets(scene))


def _editing(place: Place) -> Iterator[Sample]:
    rng = random.Random(_SEEDS[place.split] + 1)
    for name, scene in _scenes(place):
        sentence, after = random_edit(rng, scene)
        asked = Document((user(Image(encode_png(draw(scene))), sentence),), id=name)
        yield Sample(name, asked, {"caption": after.caption(), "before": scene.caption()}, facets=_facets(after))


_SPLITS = ("test", "dev")
TASKS = {
    "picturebook-story": Task(
        "stories of three sentences and three pictures, first scenes held out",
        "",
        _stories,
        ("picturebook/story", "prose/length"),
        _SPLITS,
        sampling={"max_images": 4, "max_text_tokens": 96},
    ),
    "picturebook-draw": Task(
        "a picture of a held-out caption",
        "",
        _drawing,
        ("picturebook/picture",),
        _SPLITS,
        sampling={"max_images": 2, "max_text_tokens": 96},
    ),
    "picturebook-edit": Task(
        "a held-out picture after one change",
        "",
        _editing,
        ("picturebook/picture",),
        _SPLITS,
        sampling={"max_images": 2, "max_text_tokens": 96},
    ),
    "picturebook-tell": Task(
        "the caption of a held-out picture",
        "",
        _telling,
        ("picturebook/caption",),
        _SPLITS,
        sampling={"max_images": 0, "max_text_tokens": 96},
    ),
}
