"""PororoSV: cartoon stories of five frames.

following_cache4.json     {frame: [four frames that follow]}; converted from the pickled table of that name
descriptions.json         {frame: [captions]}; converted likewise
<images>/<frame>.png      one picture, not the strip of all frames of a clip
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, Plan, Source
from weft.data.sources.files import ARRAYS, Place, file_source
from weft.data.sources.rules.frames import FOLLOWING, plan_frames, story, table
from weft.data.stage import Record

_CAPTIONS = "descriptions.json"
NAMES = "pororo|loopy|eddy|harry|poby|tongtong|crong|rody|petty"


class Pororo(FileSource):
    """The folder with the tables."""

    kind: Literal["pororo"] = "pororo"


def plan(config: Pororo) -> Plan:
    """Raises `UsageError` where a table is missing, or is a pickle."""
    return plan_frames(config, "pororo", (FOLLOWING, _CAPTIONS))


def _documents(config: Pororo, value: Any, place: Place) -> Iterator[Record]:
    yield story(config, value, place, "pororo", table(place.root / _CAPTIONS), NAMES)


SOURCE = Source(plan, file_source("pororo", _documents, ARRAYS, inside="").read)
