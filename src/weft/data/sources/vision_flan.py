"""Vision-Flan: a JSON array of {id, image, task_name, conversations}, pictures in one folder."""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.fields import of_type, required
from weft.data.sources.files import ARRAYS, LINES, Place, file_source
from weft.data.sources.rules.conversations import ConversationSource, conversation
from weft.data.stage import Record


class VisionFlan(ConversationSource):
    """JSON or JSONL files; pictures are relative to `images`. Every row has a picture."""

    kind: Literal["vision_flan"] = "vision_flan"


def _documents(config: VisionFlan, value: Any, place: Place) -> Iterator[Record]:
    required(of_type(value, dict, "record"), "image", str)
    yield conversation(config, value, place, "vision_flan", kept=("task_name",))


SOURCE = file_source("vision_flan", _documents, (*ARRAYS, *LINES))
