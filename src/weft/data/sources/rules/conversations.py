"""Conversations in which `<image>` marks where pictures stand; the pictures come in a list, in that order.

Messages are {from, value} or {role, content}. The number of marks must be that of the pictures; where no mark is there
at all, pictures stand before the first text, as trainers that read such files put them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.sources.base import FileSource, parse_json
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import Object, first_of, name, objects, of_type, optional, plain
from weft.data.sources.files import Place
from weft.data.stage import Record, RecordError
from weft.document import Part, Role, Turn

_MARK = "<image>"
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


class ConversationSource(FileSource):
    """What sources of conversations can be told besides."""

    own_ids: bool = False
    """Names of records are ids of documents as they are; otherwise the source's name and a colon come before them."""


@dataclass(frozen=True)
class Message:
    role: Role
    text: str
    at: str
    loss: bool | None = None


def conversation(
    config: ConversationSource, value: Any, place: Place, source: str, *, kept: Sequence[str] = (), strict: bool = False
) -> Record:
    """The document of a record that holds one conversation and its pictures.

    Args:
        kept: fields worth keeping in `meta`, beside those of a field `meta`.
        strict: pictures without any mark are refused.
    """
    record = of_type(value, dict, "record")
    draft = Draft(config, place)
    said = turns(draft, messages_of(record), pictures_of(record), strict=strict)
    native = name(record, "id") if record.get("id") is not None else None
    meta = meta_of(record) | plain(record, *kept)
    return draft.record(identity(source, native, record, own=config.own_ids), said, meta)


def meta_of(record: Object) -> Object:
    """The field `meta`, an object or the JSON of one; nothing where it is anything else."""
    found = record.get("meta")
    if isinstance(found, str):
        try:
            found = parse_json(found.encode())
        except RecordError:
            return {}
    return found if isinstance(found, dict) else {}


def messages_of(record: Object, keys: Sequence[str] = ("conversations", "conversation", "messages")) -> list[Message]:
    """The messages under the first of `keys` that is there."""
    key = first_of(record, keys)
    rows = objects(of_type(record[key], list, key), key)
    if not rows:
        raise RecordError("empty_value", f"field {key} is empty", field=key)
    return [_message(row, f"{key}[{i}].") for i, row in enumerate(rows)]


def pictures_of(record: Object, keys: Sequence[str] = ("images", "image")) -> list[tuple[Any, str]]:
    """Pictures with the fields they are in: a list, a single one, or none."""
    key = next((key for key in keys if record.get(key) is not None), None)
    if key is None:
        return []
    found = record[key]
    return [(value, f"{key}[{i}]") for i, value in enumerate(found)] if isinstance(found, list) else [(found, key)]


def turns(
    draft: Draft, messages: Sequence[Message], pictures: Sequence[tuple[Any, str]], *, strict: bool = False
) -> list[Turn]:
    """The turns of a conversation.

    Args:
        strict: pictures without any mark are refused.

    Raises:
        RecordError: there are not as many marks as pictures.
    """
    marks = sum(message.text.count(_MARK) for message in messages)
    if marks != len(pictures) and (marks or strict):
        raise RecordError("count_mismatch", f"{marks} marks {_MARK} for {len(pictures)} pictures", field="images")
    rest = iter(pictures)
    made = []
    for message in messages:
        before = [] if marks or message.role == "system" else list(_load(draft, rest))
        made.append(Turn(message.role, (*before, *_parts(draft, message, rest)), message.loss))
    return made


def _message(row: Object, at: str) -> Message:
    role_key, text_key = first_of(row, ("from", "role")), first_of(row, ("value", "content"))
    role = of_type(row[role_key], str, at + role_key)
    if role not in _ROLES:
        message = f"field {at}{role_key} must be one of {', '.join(_ROLES)}, got {role[:40]!r}"
        raise RecordError("unknown_role", message, field=at + role_key)
    text = of_type(row[text_key], str, at + text_key)
    return Message(_ROLES[role], text, at + text_key, optional(row, "loss", bool, at))


def _load(draft: Draft, pictures: Iterator[tuple[Any, str]]) -> Iterator[Part]:
    for value, field in pictures:
        yield from draft.image(value, field)


def _parts(draft: Draft, message: Message, pictures: Iterator[tuple[Any, str]]) -> Iterator[Part]:
    if _MARK not in message.text:
        yield from draft.text(message.text, message.at)
        return
    for i, piece in enumerate(re.split(re.escape(_MARK), message.text)):
        if i:
            value, field = next(pictures)
            yield from draft.image(value, field)
        if piece.strip():
            yield from draft.text(piece.strip(), message.at)
