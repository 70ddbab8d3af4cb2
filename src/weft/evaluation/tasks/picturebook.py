"""Stories scored without a judge: what was asked for against what the exact reader sees and what was written."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from weft.data.sources.picturebook import Reader, Scene, Story, random_story
from weft.document import Document, Image, Part, Text, user
from weft.evaluation.interval import Share, share
from weft.images import decode_image

TEST_SEED = 20_260_704
"""Of the set that reports quote. Settings are chosen on other seeds."""


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
