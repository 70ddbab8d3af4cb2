"""MMDialog: dialogues with pictures. `conversations.json` is one large array, beside `<media key>.jpg`.

The speakers take turns; the one who has the last word is the assistant.
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import name, objects, of_type, required
from weft.data.sources.files import ARRAYS, LINES, Place, file_source
from weft.data.stage import Record, RecordError
from weft.document import Part, Turn

_TEXT, _MEDIA = "__TEXT__", "__MEDIA__"


class MMDialog(FileSource):
    """Files of dialogues. The data may not be passed on or used commercially, which documents carry in `meta`."""

    kind: Literal["mmdialog"] = "mmdialog"


def _documents(config: MMDialog, value: Any, place: Place) -> Iterator[Record]:
    record = of_type(value, dict, "record")
    native = name(record, "conversation_id")
    said = objects(required(record, "conversation", list), "conversation")
    if not said:
        raise RecordError("empty_value", "field conversation is empty", field="conversation")
    draft = Draft(config, place)
    turns = []
    for i, turn in enumerate(said):
        at = f"conversation[{i}]."
        elements = objects(required(turn, "turn", list, at), f"{at}turn")
        parts = [part for j, element in enumerate(elements) for part in _part(draft, element, f"{at}turn[{j}].")]
        turns.append(Turn("assistant" if (len(said) - i) % 2 else "user", tuple(parts)))
    yield draft.record(identity("mmdialog", native, None), turns, {"access": "non_commercial"})


def _part(draft: Draft, element: dict[str, Any], at: str) -> list[Part]:
    if _TEXT in element:
        return draft.text(element[_TEXT], at + _TEXT)
    if _MEDIA in element:
        return draft.image(name(element, _MEDIA, at), at + _MEDIA, probe=True)
    raise RecordError("missing_key", f"field {at}{_TEXT} or {_MEDIA} is missing", field=at + _TEXT)


SOURCE = file_source("mmdialog", _documents, (*ARRAYS, *LINES))
