"""One record on its way to a document: what it held is counted, its pictures are loaded, what is lost is remembered."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weft.data.sources.base import PICTURES, FileSource, has_picture, load_picture, settle
from weft.data.sources.fields import of_type
from weft.data.sources.files import Place
from weft.data.stage import Count, Loss, Record, RecordError, What
from weft.document import Document, Image, Part, Text, Turn, user
from weft.images import MAX_BYTES

MAX_TEXT = 2**20
"""Characters of one text."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


class Draft:
    """Gives parts as lists of one or none, to be put together in reading order; `record` ends it.

    Text is NFC, without control characters; a text that turns the direction of writing by force is flagged in `meta`.
    """

    def __init__(self, config: FileSource, place: Place) -> None:
        self.folder = config.images or place.folder
        self._place, self._on_bad_image = place, config.on_bad_image
        self._texts = self._images = 0
        self._losses: list[Loss] = []
        self._flags: set[str] = set()
        self._of_pictures: dict[str, dict[str, Any]] = {}
        self._looked_at: set[str] = set()

    def text(self, value: Any, field: str) -> list[Part]:
        """Raises `RecordError` if `value` is no text."""
        text = clean(of_type(value, str, field))
        self._texts += 1
        if not text.strip():
            return self._lose("text", "empty_text", "a text without a character", field)
        if len(text) > MAX_TEXT:
            return self._lose("text", "text_too_long", f"{len(text):,} characters, more than {MAX_TEXT:,}", field)
        if not text.isascii() and _BIDI.search(text):
            self._flags.add("bidi_override")
        return [Text(text)]

    def image(
        self,
        value: Any,
        field: str,
        *,
        about: dict[str, Any] | None = None,
        probe: bool = False,
        check: Callable[[bytes], Loss | None] = lambda data: None,
    ) -> list[Part]:
        """A picture by its path, by {bytes, path}, or by its bytes.

        Args:
            check: why these bytes are not the picture that was meant.
            about: what is known of it (url, similarity, licence): kept in `meta.images` under its path.
            probe: try the suffixes of pictures where there is no file of that very name.

        Raises:
            RecordError: `value` is none of these.
        """
        data, path = _picture(value, field)
        self._images += 1
        if data is None:
            assert path is not None
            if probe:
                path = probed(self.folder, path) or path
            found = load_picture(self.folder, path, field, self._looked_at)
            if isinstance(found, Loss):
                self._losses.append(found)
                return []
            data = found
        elif not 0 < len(data) <= MAX_BYTES:
            return self._lose("image", "image_size", f"picture of {len(data):,} bytes", field)
        wrong = check(data)
        if wrong is not None:
            self._losses.append(wrong)
            return []
        if about and path is not None:
            self._of_pictures[path] = about
        return [Image(data, path)]

    def lost_image(self, reason: str, message: str, field: str, image: str | None = None) -> list[Part]:
        """A picture that is not even to be looked for."""
        self._images += 1
        self._losses.append(Loss("image", reason, message, field, image))
        return []

    def lost_text(self, reason: str, message: str, field: str) -> list[Part]:
        self._texts += 1
        return self._lose("text", reason, message, field)

    def record(
        self, identity: str, turns: Sequence[Turn], meta: dict[str, Any], *, instruction: str | None = None
    ) -> Record:
        """The record of a document, or of its loss.

        Args:
            instruction: a user turn to begin with that no field of the record holds.
        """
        asked = () if instruction is None else (user(instruction),)
        extra: dict[str, Any] = {"flags": sorted(self._flags)} if self._flags else {}
        if self._of_pictures:
            extra["images"] = self._of_pictures
        # an empty turn says nothing, but an empty last one is a missing answer
        filled = [turn for turn in turns[:-1] if turn.parts]
        document = Document((*asked, *filled, *turns[-1:]), identity, {**meta, **extra})
        left, lost = settle(document, self._losses, self._on_bad_image)
        return Record(
            self._place.file, self._place.number, left, Count(1, self._texts, self._images), lost, added=len(asked)
        )

    def _lose(self, what: What, reason: str, message: str, field: str) -> list[Part]:
        self._losses.append(Loss(what, reason, message, field))
        return []


def identity(source: str, native: str | None, value: Any, *, own: bool = False) -> str:
    """`source:native`, or a hash of the record where it has no name of its own.

    Args:
        own: the native name is the identity as it is.
    """
    if native:
        return clean(native) if own else f"{source}:{clean(native)}"
    return f"{source}:{hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()[:24]}"


def coin(*names: str | int) -> bool:
    """Heads or tails, the same for the same names on every machine."""
    return hashlib.sha256("\0".join(map(str, names)).encode()).digest()[0] < 128


def url_name(url: str) -> str:
    """The file that a picture's URL is kept under: its SHA-256, without a suffix."""
    return hashlib.sha256(url.encode()).hexdigest()


def clean(text: str) -> str:
    """NFC, one kind of line end, no control characters.

    Raises:
        RecordError: the text holds half of a surrogate pair.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError("lone_surrogate", f"half of a surrogate pair at character {error.start}") from error
        text = unicodedata.normalize("NFC", text)
    if text.isprintable():  # then it holds none of these, and this is told soonest
        return text
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


def _picture(value: Any, field: str) -> tuple[bytes | None, str | None]:
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            # with its bytes here the name is no path to follow, and must not become one
            safe = isinstance(path, str) and re.fullmatch(r"[\w][\w.-]{0,200}", path)
            return data, path if safe else None
        value = path if data is None else data
    if not isinstance(value, str) or not value:
        found = "null" if value is None else type(value).__name__
        raise RecordError(
            "wrong_type", f"field {field} must name a picture or hold its bytes, got {found}", field=field
        )
    return None, value


def probed(folder: Path, path: str) -> str | None:
    """The path, or the path with the suffix of a picture: whichever is there."""
    return next((each for each in (path, *(path + suffix for suffix in PICTURES)) if has_picture(folder, each)), None)


def _digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=_digest)
