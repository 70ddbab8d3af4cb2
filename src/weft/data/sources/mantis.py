"""Mantis-Instruct: conversations over several pictures, in Parquet, JSON or JSONL.

`conversations` holds {from, value}, or `conversation` {role, content}; every picture has its mark.
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.files import ARRAYS, LINES, ROWS, Place, file_source
from weft.data.sources.rules.conversations import ConversationSource, conversation
from weft.data.stage import Record


class Mantis(ConversationSource):
    """Files with pictures inside (Parquet), or relative to `images`."""

    kind: Literal["mantis"] = "mantis"


def _documents(config: Mantis, value: Any, place: Place) -> Iterator[Record]:
    yield conversation(config, value, place, "mantis", kept=("source",), strict=True)


SOURCE = file_source("mantis", _documents, (*ROWS, *ARRAYS, *LINES))
