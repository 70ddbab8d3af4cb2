"""The custom data of LLaMA-Factory (ShareGPT form) and of ms-swift, as JSON or JSONL.

{messages: [{role, content, loss?}], images?}
{conversations: [{from, value}], system?, images?}
{query, response, history?: [[query, response], ...], system?, images?}
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import Object, name, of_type, optional, required
from weft.data.sources.files import ARRAYS, LINES, ROWS, Place, file_source
from weft.data.sources.rules.conversations import ConversationSource, Message, messages_of, meta_of, pictures_of, turns
from weft.data.stage import Record, RecordError


class Swift(ConversationSource):
    """JSON, JSONL or Parquet files; pictures are relative to `images`."""

    kind: Literal["swift"] = "swift"


def _documents(config: Swift, value: Any, place: Place) -> Iterator[Record]:
    record = of_type(value, dict, "record")
    for other in ("videos", "audios"):
        if record.get(other):
            raise RecordError("other_media", f"field {other}: only texts and pictures are read", field=other)
    system = optional(record, "system", str)
    asked = _asked(record) if "response" in record else messages_of(record)
    messages = [Message("system", system, "system"), *asked] if system else asked
    draft = Draft(config, place)
    native = name(record, "id") if record.get("id") is not None else None
    said = turns(draft, messages, pictures_of(record))
    yield draft.record(identity("swift", native, record, own=config.own_ids), said, meta_of(record))


def _asked(record: Object) -> list[Message]:
    messages = []
    for i, pair in enumerate(optional(record, "history", list) or []):
        at = f"history[{i}]"
        said = [of_type(text, str, at) for text in of_type(pair, list, at)]
        if len(said) != 2:
            raise RecordError("count_mismatch", f"field {at} must be [query, response], got {len(said)}", field=at)
        messages += [Message("user", said[0], at), Message("assistant", said[1], at)]
    query, response = (required(record, key, str) for key in ("query", "response"))
    return [*messages, Message("user", query, "query"), Message("assistant", response, "response")]


SOURCE = file_source("swift", _documents, (*ARRAYS, *LINES, *ROWS))
