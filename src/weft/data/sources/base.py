"""What a source is: a plan of units of work, and a reader of one unit. And the ways in that sources share."""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from weft.config import Config
from weft.data.stage import Count, Loss, Outcome, Record, RecordError
from weft.document import Document
from weft.errors import ImageError, PathError, UsageError
from weft.images import inside, read_image

MAX_RECORD = 16 * 2**20
"""Bytes of one line, or of one Markdown, HTML or JSON file."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

NOT_FETCHED = (
    "a picture on the network that was not fetched: `weft data fetch SOURCE --out FOLDER` does, "
    "and then the source needs `images: FOLDER/pictures`"
)

OnBadImage = Literal["record", "image"]


class FileSource(Config):
    """What every source made of files of records can be told."""

    path: Path
    """A file, or a folder of such files."""
    images: Path | None = None
    """The folder that pictures' paths are relative to, and must stay in; None: that of the file which names them."""
    on_bad_image: OnBadImage = "record"
    """What a picture that cannot be read costs: the `record`, or only the `image`."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Unit:
    """A run of records that one worker reads: `number` of them in `file`, from number `first`, at byte `offset`.

    Where they cannot be told apart without being read (compressed files), `number` is 0: all to the end.
    """

    format: str
    file: str
    first: int = 1
    number: int = 1
    offset: int = 0
    """Of its first record; in a Parquet file the number of the row group."""


@dataclass(frozen=True)
class Plan:
    units: tuple[Unit, ...]
    skipped: tuple[Record, ...] = ()
    """Files that were found and will not be read, with the reason."""


@dataclass(frozen=True)
class Source(Generic[C]):
    """One row of the table: what there is to read, in a stable order, and the reading of one unit of it."""

    plan: Callable[[C], Plan]
    read: Callable[[C, Unit], Iterator[Record]]


def root_of(path: Path) -> Path:
    """The folder that files and pictures are relative to, and must stay in."""
    return path if path.is_dir() else path.parent


def walk(path: Path) -> Iterator[tuple[str, str | None]]:
    """Files under a folder, relative, in natural order (2 before 10), or the one file; with why each is not to be read.

    Raises:
        UsageError: there is nothing at `path`, or it cannot be listed.
    """
    if path.is_file():
        yield path.name, None
        return
    if not path.is_dir():
        raise UsageError("source does not exist", where=str(path), fix="check the path")
    yield from _walk(path, "")


def _walk(root: Path, below: str) -> Iterator[tuple[str, str | None]]:
    try:
        entries = sorted(os.scandir(root / below), key=lambda entry: natural(entry.name))
    except OSError as error:
        raise UsageError(f"folder cannot be listed: {error.strerror}", where=str(root / below)) from error
    for entry in entries:
        name = f"{below}{entry.name}"
        if not _is_unicode(name):
            yield os.fsencode(name).decode(errors="backslashreplace"), "name_not_utf8"
        elif entry.name.startswith("."):
            yield name, "hidden"
        elif entry.is_symlink():
            yield name, "link"
        elif entry.is_dir() and (Path(entry) / "summary.json").is_file() and (Path(entry) / "manifest.json").is_file():
            yield name, "built_dataset"
        elif entry.is_dir():
            yield from _walk(root, f"{name}/")
        else:
            yield name, None if entry.is_file() else "not_a_file"


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key: digits by value."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], name


def skipped(file: str, reason: str) -> Record:
    return Record(file, None, None, Count(), (Loss("file", reason, _WHY[reason]),))


_WHY = {
    "hidden": "its name begins with a dot",
    "link": "symbolic links in a source are not followed",
    "not_a_file": "it is neither a file nor a folder",
    "name_not_utf8": "its name is not UTF-8",
    "built_dataset": "this folder is a dataset that was built before",
    "other_format": "this source does not read files of this kind",
    "beside_doc_json": "doc.json of this folder is the document",
    "pickled": "it is a pickle, which can run code when it is loaded; such files are never read",
    "benchmark": "it belongs to a test split, which must not be trained on",
    "readme": "a README describes the folder; name the file itself as the source to read it",
}


def select(path: Path, is_wanted: Callable[[str], bool]) -> tuple[list[str], list[Record]]:
    """Files under `path` that a format reads, and those it does not; pictures are read where documents name them."""
    wanted, others = [], []
    for file, reason in walk(path):
        if reason is not None:
            others.append(skipped(file, reason))
        elif is_wanted(file):
            wanted.append(file)
        elif not file.lower().endswith(PICTURES):
            others.append(skipped(file, "other_format"))
    return wanted, others


def read_limited(file: Path) -> bytes:
    """A whole file of at most `MAX_RECORD` bytes."""
    try:
        with open(file, "rb") as handle:
            data = handle.read(MAX_RECORD + 1)
    except OSError as error:
        raise RecordError("unreadable", f"file cannot be read: {error.strerror}") from error
    if len(data) > MAX_RECORD:
        raise RecordError("too_large", f"more than {MAX_RECORD:,} bytes")
    return data


def decode_utf8(data: bytes) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise RecordError("not_utf8", f"byte {error.start} is not UTF-8") from error


def parse_json(data: bytes) -> Any:
    """JSON as the standard has it: no NaN, no key twice in one object, no half of a surrogate pair.

    Raises:
        RecordError: with the reason.
    """
    text = decode_utf8(data)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RecordError("broken_json", f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise RecordError("too_deep", "brackets are nested too deeply") from error
    except ValueError as error:
        raise RecordError("bad_number", f"not JSON: {error}") from error
    return check_unicode(value) if "\\u" in text and "\\ud" in text.lower() else value


def check_unicode(value: Any) -> Any:
    """The same value; `RecordError` if a string in it holds half of a surrogate pair."""
    if not _is_unicode(json.dumps(value, ensure_ascii=False)):
        raise RecordError("lone_surrogate", "a string holds half of a surrogate pair")
    return value


def _refuse_constant(name: str) -> None:
    raise RecordError("bad_number", f"{name} is not a number that JSON knows")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError("duplicate_key", f"key {twice!r} is there twice", field=twice)
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_picture(
    root: Path, relative: str, field: str | None = None, looked_at: set[str] | None = None
) -> bytes | Loss:
    """Bytes of a picture under `root`, or why there are none.

    Args:
        looked_at: of one record's pictures, see `read_image`.
    """
    try:
        return read_image(root, relative, looked_at=looked_at)
    except PathError as error:
        return Loss("image", "image_path", error.what, field, relative)
    except ImageError as error:
        return Loss("image", error.reason, error.what, field, relative)


def has_picture(root: Path, relative: str) -> bool:
    """Whether `load_picture` would find a file."""
    try:
        return inside(root, relative).is_file()
    except (PathError, OSError):
        return False


def read_json(root: Path, relative: str) -> Any:
    """The value of a small JSON file under `root` that a record names.

    Raises:
        RecordError: it is not there, outside, too large or not JSON.
    """
    try:
        return parse_json(read_limited(inside(root, relative)))
    except PathError as error:
        raise RecordError("path", error.what) from error


def settle(document: Document, losses: list[Loss], on_bad_image: OnBadImage) -> Outcome:
    """A document without the parts in `losses`; nothing of it, if lost pictures cost the record or leave no answer."""
    bad = [loss for loss in losses if loss.what == "image"]
    if bad and on_bad_image == "record":
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return None, (Loss("record", bad[0].reason, bad[0].message + more, bad[0].field, bad[0].image),)
    if not document.turns[-1].parts:
        return None, (Loss("record", "empty", "the last turn holds no text and no picture that could be read"),)
    return document, tuple(losses)
