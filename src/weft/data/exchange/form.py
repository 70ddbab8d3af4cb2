"""What a form of files for others is: what it carries of a document, how it is written, and how it is read back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weft.data.exchange.files import Files
from weft.data.sources.base import MAX_RECORD
from weft.document import Document, Image, Text

DATA = "train"
"""Data files are named after the split that they hold."""


@dataclass(frozen=True)
class Lack:
    """Something of a document that a form has no place for."""

    reason: str
    """A short code: a row of the form's `lacks`."""
    message: str


Fitted = tuple[Document | None, tuple[Lack, ...]]
"""What a form carries of a document, and what it lacks of it; None where nothing that makes sense is left."""


class Sink(Protocol):
    """Writes documents that fit, in order."""

    def add(self, document: Document) -> None: ...

    def close(self) -> None:
        """The end of the last file."""


@dataclass(frozen=True)
class Form:
    """One row of the table."""

    lacks: Mapping[str, str]
    """What it cannot carry, by reason."""
    fit: Callable[[Document], Fitted]
    write: Callable[[Files], Sink]
    """A sink that goes on where the files end."""
    sources: Callable[[Path], list[dict[str, Any]]]
    """The sources of `weft data build` that read such files, ids as they are."""
    data: str
    """Names of its data files."""
    usage: str
    """How others read it, in Markdown; {name} is the folder's."""
    is_loadable: bool = False
    """Whether its columns are those of a dataset, for the README to say so."""
    resumes: bool = True
    """Whether files that were begun can be gone on with."""


_PART = 128
"""More than the bytes of a part, or of a picture's path, without its text."""
WHOLE = {"empty_end": "a document whose last turn holds nothing: no reader takes it"}
WITHIN_RECORD = {**WHOLE, "too_large": f"a record of more than {MAX_RECORD:,} bytes"}


def whole(document: Document) -> Fitted:
    """Of a form that carries whatever can be read."""
    if not document.turns or not document.turns[-1].parts:
        return None, (Lack("empty_end", "its last turn holds nothing"),)
    return document, ()


def within_record(document: Document) -> Fitted:
    """Of a form that carries whatever can be read in one record of JSON."""
    if not document.turns or not document.turns[-1].parts:
        return whole(document)
    size = sum(len(part.text) if isinstance(part, Text) else 0 for part in document.parts)
    size += _PART * sum(1 for _ in document.parts) + len(document.id or "") + len(json.dumps(dict(document.meta)))
    # a character becomes six bytes at most: most documents need not be written to be measured
    if (
        size > MAX_RECORD // 8
        and len(record_bytes(named(document, lambda i, image: "x" * _PART).to_json())) > MAX_RECORD
    ):
        return None, (Lack("too_large", WITHIN_RECORD["too_large"]),)
    return document, ()


def record_bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def named(document: Document, name: Callable[[int, Image], str]) -> Document:
    """The document with pictures called `name` of their number; what `meta` knows of them follows.

    Two pictures of one document may share a path, and then what is known of it.
    """
    old = list(document.images)
    new = [Image(image.data, name(i, image)) for i, image in enumerate(old)]
    known = document.meta.get("images")
    meta = dict(document.meta)
    if isinstance(known, dict):
        paths = {image.path for image in old}
        moved = {str(b.path): known[a.path] for a, b in zip(old, new, strict=True) if a.path in known}
        meta["images"] = {path: about for path, about in known.items() if path not in paths} | moved
    return Document(document.with_images(new).turns, document.id, meta)


def suffix_of(data: bytes) -> str:
    """`png` and the like, by the first bytes; `bin` of what is no picture."""
    kinds = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for start, suffix in kinds if data.startswith(start)), "bin")


def shelve(document: Document, files: Files) -> Document:
    """The document with its pictures in files beside the records, each named by its SHA-256 and kept once."""

    def put(_: int, image: Image) -> str:
        assert image.data is not None  # a dataset holds its pictures
        digest = image.sha256
        name = f"images/{digest[:2]}/{digest}.{suffix_of(image.data)}"
        files.put(name, image.data)
        return name

    return named(document, put)


class Lines:
    """A file with a record a line."""

    def __init__(self, files: Files, name: str, encode: Callable[[Document], Mapping[str, Any]]) -> None:
        self._files, self._name, self._encode = files, name, encode
        files.append(name, b"")

    def add(self, document: Document) -> None:
        self._files.append(self._name, record_bytes(self._encode(shelve(document, self._files))) + b"\n")

    def close(self) -> None:
        pass


class Array:
    """A file with one JSON array of records."""

    def __init__(self, files: Files, name: str, encode: Callable[[Document], Mapping[str, Any]]) -> None:
        self._files, self._name, self._encode = files, name, encode
        if files.size(name) == 0:
            files.append(name, b"[")

    def add(self, document: Document) -> None:
        between = b"\n" if self._files.size(self._name) == 1 else b",\n"
        self._files.append(self._name, between + record_bytes(self._encode(shelve(document, self._files))))

    def close(self) -> None:
        self._files.append(self._name, b"\n]\n")


def data_files(path: Path, name: str, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One source: the file `name` of a folder that was exported, otherwise whatever there is at `path`."""
    own = path / name
    return [{**source, "path": str(own if own.is_file() else path)}]
