"""Files of an unknown layout, by a mapping that says which fields hold what; `weft data sniff` proposes one.

    kind: mapping
    path: data.jsonl
    input:  [{text: instruction}, {image: source}]
    output: [{each: steps, of: [{text: caption}, {image: file}]}]

or, for conversations with `<image>` marks, `conversations: messages` and `pictures: images`.
A field may be given by its path, as in `meta.title`.
"""

from collections.abc import Iterator
from typing import Any, Literal

import pydantic

from weft.config import Config
from weft.data.sources.base import FileSource, Plan, Source, Unit, decode_utf8, parse_json
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import Object, objects, of_type, plain
from weft.data.sources.files import ARRAYS, LINES, PACKED, ROWS, TARS, TEXT, Place, file_source
from weft.data.sources.files.tars import Sample
from weft.data.sources.rules.conversations import messages_of, pictures_of, turns
from weft.data.sources.rules.pairs import caption_of
from weft.data.stage import Record, RecordError
from weft.document import Part, assistant, user


class Slot(Config):
    """What one field becomes: a text, a picture, or the slots `of` for each entry of the list in `each`.

    A list of texts is joined by spaces; a list of pictures is as many pictures.
    """

    text: str | None = None
    image: str | None = None
    each: str | None = None
    of: tuple["Slot", ...] = ()

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Slot":
        if sum(key is not None for key in (self.text, self.image, self.each)) != 1:
            raise ValueError("a slot has one of text, image and each")
        if bool(self.of) != (self.each is not None):
            raise ValueError("each and of go together")
        return self


class Mapping(FileSource):
    """JSON, JSONL, Parquet or tar files whose fields are named here."""

    kind: Literal["mapping"] = "mapping"
    inside: str | None = None
    """The key of a JSON file's object under which the records are; "" is the object itself."""
    id: str | None = None
    """The field with the record's name."""
    input: tuple[Slot, ...] = ()
    """What the user says."""
    output: tuple[Slot, ...] = ()
    """What the assistant says."""
    conversations: str | None = None
    """The field with a list of messages, instead of `input` and `output`."""
    pictures: str | None = None
    """The field with the pictures of the messages."""
    meta: tuple[str, ...] = ()
    """Fields to keep beside the document."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Mapping":
        if (self.conversations is None) == (not self.output):
            raise ValueError("name either the output or the conversations")
        return self


def _documents(config: Mapping, value: Any, place: Place) -> Iterator[Record]:
    record = record_of(value)
    draft = Draft(config, place)
    native = _at(record, config.id) if config.id is not None else None
    if native is not None and (isinstance(native, bool) or not isinstance(native, str | int)):
        raise RecordError("wrong_type", f"field {config.id} must be a string or a whole number", field=config.id)
    name = identity("mapping", None if native is None else str(native), record)
    if config.conversations is not None:
        # found by their paths here, so that the rule for conversations sees them under its own names
        flat = {"messages": _at(record, config.conversations)}
        if config.pictures is not None and (shown := _get(record, config.pictures)) is not None:
            flat["images"] = shown
        said = turns(draft, messages_of(flat), pictures_of(flat))
    else:
        asked = [part for slot in config.input for part in _fill(draft, slot, record, "")]
        answer = [part for slot in config.output for part in _fill(draft, slot, record, "")]
        said = [user(*asked), assistant(*answer)] if config.input else [assistant(*answer)]
    yield draft.record(name, said, plain(record, *config.meta))


def _fill(draft: Draft, slot: Slot, record: Object, at: str) -> list[Part]:
    if slot.each is not None:
        field = at + slot.each
        rows = objects(of_type(_at(record, slot.each, at), list, field), field)
        return [
            p for i, row in enumerate(rows) for inner in slot.of for p in _fill(draft, inner, row, f"{field}[{i}].")
        ]
    if slot.text is not None:
        return draft.text(caption_of(_at(record, slot.text, at), at + slot.text), at + slot.text)
    assert slot.image is not None
    found, field = _at(record, slot.image, at), at + slot.image
    several = found if isinstance(found, list) else [found]
    return [part for value in several for part in draft.image(value, field)]


def _at(record: Object, path: str, at: str = "") -> Any:
    found = _get(record, path)
    if found is None:
        raise RecordError("missing_key", f"field {at}{path} is missing or null", field=f"{at}{path}")
    return found


def _get(record: Object, path: str) -> Any:
    # a key may hold a dot itself, as the files of a sample do: 0.jpg
    if path in record:
        return record[path]
    found: Any = record
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def record_of(value: Any) -> Object:
    """The fields of a record; those of a sample are the fields of `<key>.json` and every other file by its suffix."""
    if not isinstance(value, Sample):
        return of_type(value, dict, "record")
    record: Object = {"__key__": value.key}
    for kind, data in value.files.items():
        if kind == "json":
            record |= of_type(parse_json(data), dict, "json")
        else:
            record[kind] = decode_utf8(data) if kind in ("txt", "caption") else data
    return record


def plan(config: Mapping) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    return _files(config).plan(config)


def read(config: Mapping, unit: Unit) -> Iterator[Record]:
    return _files(config).read(config, unit)


def _files(config: Mapping) -> Source[Mapping]:
    return file_source("mapping", _documents, (*LINES, *PACKED, *TEXT, *ARRAYS, *ROWS, *TARS), inside=config.inside)


SOURCE = Source(plan, read)
