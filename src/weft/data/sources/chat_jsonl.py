"""JSON Lines in the chat form, one document a line; pictures are named relative to the folder of their file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from weft.config import Config
from weft.data.sources.base import (
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
from weft.data.sources.files import lines
from weft.data.stage import Loss, Record, RecordError, count, rejected
from weft.document import Document, Image, Part, Turn, from_json
from weft.errors import DocumentError


class ChatJsonl(Config):
    """A file in the chat form, or a folder whose *.jsonl files are."""

    kind: Literal["chat_jsonl"] = "chat_jsonl"
    path: Path
    on_bad_image: OnBadImage = "record"
    """What a picture that cannot be read costs: the `record`, or only the `image`."""


def plan(config: ChatJsonl) -> Plan:
    files, others = select(config.path, lambda file: config.path.is_file() or file.endswith(".jsonl"))
    return Plan(
        tuple(unit for file in files for unit in lines.units(root_of(config.path), file, "chat_jsonl")), tuple(others)
    )


def read(config: ChatJsonl, unit: Unit) -> Iterator[Record]:
    root = root_of(config.path)
    folder = root / Path(unit.file).parent
    for line, data in lines.items(root, unit):
        try:
            if isinstance(data, RecordError):
                raise data
            document = parse_line(data, unit.file, line)
            yield _with_pictures(document, folder, unit.file, line, config.on_bad_image)
        except RecordError as error:
            yield rejected(unit.file, line, error)


def parse_line(data: bytes, file: str, line: int) -> Document:
    """A line's document, its pictures still to be read. Without an id it is named after its place.

    Raises:
        RecordError: it has none.
    """
    try:
        document = from_json(parse_json(data))
    except RecordError:
        raise
    except DocumentError as error:
        named = re.match(r"field (\S+)", error.what)
        raise RecordError("bad_record", error.what, field=named and named[1]) from error
    return document if document.id else Document(document.turns, f"{file}:{line}", document.meta)


def _with_pictures(document: Document, folder: Path, file: str, line: int, on_bad_image: OnBadImage) -> Record:
    read = count(document)
    if not read.images:
        left, lost = settle(document, [], on_bad_image)
        return Record(file, line, left, read, lost)
    turns, losses, looked_at = [], [], set[str]()
    for i, turn in enumerate(document.turns):
        parts: list[Part] = []
        for j, part in enumerate(turn.parts):
            if isinstance(part, Image):
                data = load_picture(folder, str(part.path), f"messages[{i}].content[{j}].image", looked_at)
                if isinstance(data, Loss):
                    losses.append(data)
                    continue
                part = Image(data, part.path)
            parts.append(part)
        turns.append(Turn(turn.role, tuple(parts), turn.loss))
    left, lost = settle(Document(tuple(turns), document.id, document.meta), losses, on_bad_image)
    return Record(file, line, left, read, lost)


SOURCE = Source(plan, read)
