"""Stories, captions and edits of the drawn world, as training documents."""

import random
from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from weft.config import Config
from weft.data.sources.base import Plan, Source, Unit
from weft.data.sources.picturebook import Scene, draw, is_held_out, random_edit, random_scene, random_story
from weft.data.stage import Record, count
from weft.document import Document, Image, Turn, assistant, user
from weft.images import encode_png

_UNIT = 64


class Picturebook(Config):
    """The drawn world: as many documents as asked for."""

    kind: Literal["picturebook"] = "picturebook"
    task: Literal["story", "caption", "edit"] = "story"
    """`story`: an instruction, answered by sentences and pictures in turn. `caption`: a caption, answered by its
    picture. `edit`: a picture and a sentence, answered by the picture afterwards."""
    n: PositiveInt = 1000
    seed: NonNegativeInt = 0
    edits: PositiveInt = 2
    """Of a story: it has one picture more."""
    avoid_held_out: bool = True
    """Leave out the scenes that evaluation draws from."""


def plan(config: Picturebook) -> Plan:
    starts = range(1, config.n + 1, _UNIT)
    return Plan(tuple(Unit("picturebook", config.task, i, min(_UNIT, config.n + 1 - i)) for i in starts))


def read(config: Picturebook, unit: Unit) -> Iterator[Record]:
    for number in range(unit.first, unit.first + unit.number):
        # seeded by number, so that a document does not depend on where a unit begins
        document = _document(config, number, random.Random(f"{config.task}:{config.seed}:{number}"))
        yield Record(unit.file, number, document, count(document))


def _document(config: Picturebook, number: int, rng: random.Random) -> Document:
    name = f"{config.task}-{config.seed}-{number:06d}"
    scenes, turns = _drawn(config, name, rng)
    return Document(turns, name, {"task": config.task, "scenes": [scene.caption() for scene in scenes]})


def _drawn(config: Picturebook, name: str, rng: random.Random) -> tuple[tuple[Scene, ...], tuple[Turn, Turn]]:
    if config.task == "story":
        story = random_story(rng, edits=config.edits, held_out=False if config.avoid_held_out else None)
        pictures = [_picture(scene, f"{name}-{i}.png") for i, scene in enumerate(story.scenes, start=1)]
        steps = [part for step in zip(story.sentences(), pictures, strict=True) for part in step]
        return story.scenes, (user(story.instruction()), assistant(*steps))
    while True:
        before = random_scene(rng)
        sentence, after = random_edit(rng, before)
        scenes = (before,) if config.task == "caption" else (before, after)
        if not (config.avoid_held_out and any(map(is_held_out, scenes))):
            break
    first = _picture(before, f"{name}-1.png")
    if config.task == "caption":
        return scenes, (user(before.caption()), assistant(first))
    return scenes, (user(first, sentence), assistant(_picture(after, f"{name}-2.png")))


def _picture(scene: Scene, path: str) -> Image:
    return Image(encode_png(draw(scene)), path)


SOURCE = Source(plan, read)
