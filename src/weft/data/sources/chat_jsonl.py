"""JSON Lines in the chat form, one document a line; pictures are named relative to the folder of their file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from weft.config import Config
from weft.data.sources.base import (
    MAX_RECORD,
    OnBadImage,
    Plan,
    Source,
    Unit,
    load_picture,
    parse_json,
    root_of,
    select,
    settle,
)
from weft.data.stage import Loss, Record, RecordError, count, rejected
from weft.document import Document, Image, Part, Turn, from_json
from weft.errors import DocumentError

_LINES = 64
"""Lines of a unit of work: with their pictures they are held in memory together."""


class ChatJsonl(Config):
    """A file in the chat form, or a folder whose *.jsonl files are."""

    kind: Literal["chat_jsonl"] = "chat_jsonl"
    path: Path
    on_bad_image: OnBadImage = "record"
    """What a picture that cannot be read costs: the `record`, or only the `image`."""


def plan(config: ChatJsonl) -> Plan:
    files, others = select(config.path, lambda file: config.path.is_file() or file.endswith(".jsonl"))
    return Plan(tuple(unit for file in files for unit in units(root_of(config.path), file)), tuple(others))


def units(root: Path, file: str) -> Iterator[Unit]:
    """Runs of lines, found without reading what they say."""
    with open(root / file, "rb") as handle:
        first, at, number = 1, 0, 0
        for number, (offset, _) in enumerate(_lines(handle), start=1):
            if number - first == _LINES:
                yield Unit("chat_jsonl", file, first, number - first, at)
                first, at = number, offset
        if number >= first:
            yield Unit("chat_jsonl", file, first, number - first + 1, at)


def read(config: ChatJsonl, unit: Unit) -> Iterator[Record]:
    root = root_of(config.path)
    with open(root / unit.file, "rb") as handle:
        handle.seek(unit.offset)
        for line, (_, data) in zip(range(unit.first, unit.first + unit.number), _lines(handle), strict=False):
            # an empty line is no record
            if data is None or data.strip(b"\xef\xbb\xbf \t\r\n"):
                try:
                    document = parse_line(data, unit.file, line)
                    yield _with_pictures(document, root / Path(unit.file).parent, unit.file, line, config.on_bad_image)
                except RecordError as error:
                    yield rejected(unit.file, line, error)


def parse_line(data: bytes | None, file: str, line: int) -> Document:
    """A line's document, its pictures still to be read. Without an id it is named after its place.

    Raises:
        RecordError: it has none.
    """
    if data is None:
        raise RecordError("too_large", f"line has more than {MAX_RECORD:,} bytes")
    try:
        document = from_json(parse_json(data))
    except RecordError:
        raise
    except DocumentError as error:
        named = re.match(r"field (\S+)", error.what)
        raise RecordError("bad_record", error.what, field=named and named[1]) from error
    return Document(document.turns, document.id or f"{file}:{line}", document.meta)


def _with_pictures(document: Document, folder: Path, file: str, line: int, on_bad_image: OnBadImage) -> Record:
    turns, losses = [], []
    for i, turn in enumerate(document.turns):
        parts: list[Part] = []
        for j, part in enumerate(turn.parts):
            if isinstance(part, Image):
                data = load_picture(folder, str(part.path), f"messages[{i}].content[{j}].image")
                if isinstance(data, Loss):
                    losses.append(data)
                    continue
                part = Image(data, part.path)
            parts.append(part)
        turns.append(Turn(turn.role, tuple(parts), turn.loss))
    left, lost = settle(Document(tuple(turns), document.id, document.meta), losses, on_bad_image)
    return Record(file, line, left, count(document), lost)


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of every line; None for one with more than `MAX_RECORD`."""
    offset = handle.tell()
    while line := handle.readline(MAX_RECORD + 1):
        end = line[-1:]
        whole: bytes | None = line
        if len(line) > MAX_RECORD and end != b"\n":
            whole = None
            while end not in (b"\n", b""):
                end = handle.readline(MAX_RECORD)[-1:]
        yield offset, whole
        offset = handle.tell()


SOURCE = Source(plan, read)
