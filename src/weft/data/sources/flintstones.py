"""FlintstonesSV: cartoon stories of five frames.

flintstones_annotations_v1-0.json     [{globalID, description}, ...], as released
following_cache4.json                 {frame: [four frames that follow]}; converted from the pickled table
<images>/<frame>.png                  one picture, not the strip of all frames of a clip
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, Plan, Source
from weft.data.sources.files import ARRAYS, Place, file_source
from weft.data.sources.rules.frames import FOLLOWING, plan_frames, story, table
from weft.data.stage import Record

_CAPTIONS = "flintstones_annotations_v1-0.json"
NAMES = "fred|barney|wilma|betty|pebbles|dino|slate"


class Flintstones(FileSource):
    """The folder with the tables."""

    kind: Literal["flintstones"] = "flintstones"


def plan(config: Flintstones) -> Plan:
    """Raises `UsageError` where a table is missing, or is a pickle."""
    return plan_frames(config, "flintstones", (FOLLOWING, _CAPTIONS))


def _documents(config: Flintstones, value: Any, place: Place) -> Iterator[Record]:
    yield story(config, value, place, "flintstones", table(place.root / _CAPTIONS), NAMES)


SOURCE = Source(plan, file_source("flintstones", _documents, ARRAYS, inside="").read)
