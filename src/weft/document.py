"""An illustrated document: turns, each a role and an ordered run of text and pictures.

The same form on disk, over HTTP, in prompts and in answers:

    {"id": ..., "meta": {...}, "messages": [{"role": "user", "content": [
        {"type": "text", "text": ...}, {"type": "image", "image": "a/path.png"}]}]}

A picture carries its encoded bytes, or a relative path under the document's folder, or both. Decoding the bytes is the
business of `images.py`.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from weft.errors import DocumentError

Role = Literal["system", "user", "assistant"]
_ROLES = get_args(Role)


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Image:
    """A picture, encoded (PNG, JPEG, ...). At least one of `data` and `path` is given; `path` is relative, with /."""

    data: bytes | None = field(default=None, repr=False)
    path: str | None = None

    def __post_init__(self) -> None:
        if self.data is None and self.path is None:
            raise DocumentError("an image needs bytes or a path")

    @property
    def sha256(self) -> str:
        """Hash of the encoded bytes, which must be there."""
        if self.data is None:
            raise DocumentError("the bytes of this image were not read", where=self.path)
        return hashlib.sha256(self.data).hexdigest()


Part = Text | Image


@dataclass(frozen=True)
class Turn:
    role: Role
    parts: tuple[Part, ...]
    loss: bool | None = None
    """Whether training counts this turn. None: assistant turns count, others do not."""


@dataclass(frozen=True)
class Document:
    turns: tuple[Turn, ...]
    id: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> Iterator[Part]:
        return itertools.chain.from_iterable([turn.parts for turn in self.turns])

    @property
    def images(self) -> Iterator[Image]:
        return iter([part for part in self.parts if isinstance(part, Image)])

    @property
    def texts(self) -> Iterator[Text]:
        return iter([part for part in self.parts if isinstance(part, Text)])

    def to_json(self) -> dict[str, Any]:
        """The chat form. Pictures need a path: give them one first (`with_images`)."""
        record: dict[str, Any] = {} if self.id is None else {"id": self.id}
        record["messages"] = [_turn_json(turn) for turn in self.turns]
        if self.meta:
            record["meta"] = dict(self.meta)
        return record

    def with_images(self, images: Sequence[Image]) -> "Document":
        """The same document with its pictures, in order, replaced."""
        rest = iter(images)
        turns = tuple(
            Turn(turn.role, tuple(next(rest) if isinstance(part, Image) else part for part in turn.parts), turn.loss)
            for turn in self.turns
        )
        return Document(turns, self.id, self.meta)


def user(*parts: str | Part) -> Turn:
    """A user turn; strings are text."""
    return Turn("user", _parts(parts))


def assistant(*parts: str | Part) -> Turn:
    """An assistant turn; strings are text."""
    return Turn("assistant", _parts(parts))


def from_json(record: Any, where: str | None = None) -> Document:
    """Read the chat form; `where` (file and line) goes into errors.

    A plain string `content` is one text part. Unknown keys beside the known ones are kept in `meta`.

    Raises:
        DocumentError: names the field that is wrong.
    """
    if not isinstance(record, dict):
        raise DocumentError(f"a record must be a JSON object, got {type(record).__name__}", where=where)
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DocumentError("field messages must be a non-empty list", where=where)
    turns = tuple([_turn(message, f"messages[{i}]", where) for i, message in enumerate(messages)])
    identity = record.get("id")
    if identity is not None and not isinstance(identity, str):
        raise DocumentError(f"field id must be a string, got {identity!r}", where=where)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise DocumentError("field meta must be an object", where=where)
    other = {key: value for key, value in record.items() if key not in ("id", "messages", "meta")}
    return Document(turns, identity, {**other, **meta})


def _turn(message: Any, at: str, where: str | None) -> Turn:
    if not isinstance(message, dict):
        raise DocumentError(f"field {at} must be an object", where=where)
    role, content, loss = message.get("role"), message.get("content"), message.get("loss")
    if role not in _ROLES:
        raise DocumentError(f"field {at}.role must be one of {', '.join(_ROLES)}, got {role!r}", where=where)
    if loss is not None and not isinstance(loss, bool):
        raise DocumentError(f"field {at}.loss must be true or false, got {loss!r}", where=where)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DocumentError(f"field {at}.content must be a string or a list of parts", where=where)
    parts = tuple([_part(part, f"{at}.content[{i}]", where) for i, part in enumerate(content)])
    return Turn(cast(Role, role), parts, loss)


def _part(part: Any, at: str, where: str | None) -> Part:
    if not isinstance(part, dict):
        raise DocumentError(f"field {at} must be an object with a type", where=where)
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise DocumentError(f"field {at}.text must be a string, got {type(text).__name__}", where=where)
        if not text.isascii():
            _check_unicode(text, at, where)
        return Text(text)
    if kind == "image":
        path = part.get("image")
        if not isinstance(path, str) or not path:
            raise DocumentError(f"field {at}.image must be a path, got {path!r}", where=where)
        return Image(path=path)
    raise DocumentError(f"field {at}.type must be text or image, got {kind!r}", where=where)


def _check_unicode(text: str, at: str, where: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"field {at}.text holds a lone surrogate at character {error.start}", where=where
        ) from error


def _turn_json(turn: Turn) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        elif part.path is None:
            raise DocumentError("an image without a path cannot be written as JSON")
        else:
            content.append({"type": "image", "image": part.path})
    message: dict[str, Any] = {"role": turn.role, "content": content}
    return message if turn.loss is None else {**message, "loss": turn.loss}


def _parts(parts: Sequence[str | Part]) -> tuple[Part, ...]:
    return tuple([Text(part) if isinstance(part, str) else part for part in parts])
