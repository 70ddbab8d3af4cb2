"""YouCook2: recipes as videos, a sentence to a segment. The pictures are frames that were taken from the videos before.

youcookii_annotations_trainval.json        {database: {video: {recipe_type, subset, annotations: [{id, segment, ...}]}}}
<images>/<video>/<annotation id>.jpg       one frame to a segment
label_foodtype.csv                         recipe_type,dish
"""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from weft.data.sources.base import FileSource
from weft.data.sources.draft import Draft, identity
from weft.data.sources.elements import INSTRUCTION
from weft.data.sources.fields import Object, name, objects, of_type, only, plain, required
from weft.data.sources.files import ARRAYS, Place, file_source
from weft.data.sources.rules.steps import Step, steps
from weft.data.stage import Record, RecordError
from weft.document import assistant
from weft.errors import UsageError


class YouCook2(FileSource):
    """A file of annotations; frames are looked for in `images`."""

    kind: Literal["youcook2"] = "youcook2"
    dishes: Path | None = None
    """The table of dishes (label_foodtype.csv); None: recipes come without an instruction."""
    instruction: str = INSTRUCTION
    """What the user asks, where the dish is known; {title} is replaced."""


def _documents(config: YouCook2, value: Any, place: Place) -> Iterator[Record]:
    video, found = only(value, "video")
    recipe = of_type(found, dict, video)
    segments = objects(required(recipe, "annotations", list, f"{video}."), f"{video}.annotations")
    if not segments:
        raise RecordError("empty_value", f"video {video} has no annotations", field=f"{video}.annotations")
    draft = Draft(config, place)
    starts = [_start(segment, f"{video}.annotations[{i}].") for i, segment in enumerate(segments)]
    told = sorted(range(len(segments)), key=starts.__getitem__)
    story = (_step(video, segments[i], f"{video}.annotations[{i}].") for i in told)
    parts = steps(draft, story)
    dish = _dishes(config.dishes).get(name(recipe, "recipe_type", f"{video}.")) if config.dishes else None
    meta = plain(recipe, "subset", "recipe_type", "video_url", "duration") | ({"title": dish} if dish else {})
    instruction = config.instruction.replace("{title}", dish) if dish else None
    yield draft.record(identity("youcook2", video, None), [assistant(*parts)], meta, instruction=instruction)


def _step(video: str, segment: Object, at: str) -> Step:
    return Step(required(segment, "sentence", str, at), f"{video}/{name(segment, 'id', at)}", at + "sentence")


def _start(segment: Object, at: str) -> float:
    times = [of_type(time, float, f"{at}segment") for time in required(segment, "segment", list, at)]
    if len(times) != 2 or not 0 <= times[0] <= times[1]:
        raise RecordError("bad_segment", f"field {at}segment must be [start, end], got {times}", field=f"{at}segment")
    return times[0]


@functools.lru_cache(maxsize=4)
def _dishes(file: Path) -> dict[str, str]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            return {row[0].strip(): row[1].strip() for row in csv.reader(handle) if len(row) >= 2}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            "table of dishes cannot be read", where=str(file), fix="it is a CSV file, recipe_type,dish"
        ) from error


SOURCE = file_source("youcook2", _documents, ARRAYS, inside="database")
