"""LLaVA-style instruction data, such as the mix of 665K: {id, image, conversations: [{from, value}]}; JSON or JSONL.

A row without a picture is a conversation in text alone.
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.files import ARRAYS, LINES, Place, file_source
from weft.data.sources.rules.conversations import ConversationSource, conversation
from weft.data.stage import Record


class Llava(ConversationSource):
    """JSON or JSONL files; pictures are relative to `images`."""

    kind: Literal["llava"] = "llava"


def _documents(config: Llava, value: Any, place: Place) -> Iterator[Record]:
    yield conversation(config, value, place, "llava")


SOURCE = file_source("llava", _documents, (*ARRAYS, *LINES))
