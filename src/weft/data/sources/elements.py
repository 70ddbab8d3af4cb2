"""One `doc.json` a folder: a title, and texts and pictures as a list of elements. The title becomes the instruction."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from weft.config import Config
from weft.data.sources.base import (
    OnBadImage,
    Plan,
    Source,
    Unit,
    load_picture,
    parse_json,
    read_limited,
    root_of,
    select,
    settle,
)
from weft.data.stage import Count, Loss, Record, RecordError, rejected
from weft.document import Document, Image, Part, Text, Turn, user

FILE = "doc.json"
INSTRUCTION = "write an illustrated document: {title}"


class Elements(Config):
    """A doc.json file, or a folder that holds some."""

    kind: Literal["elements"] = "elements"
    path: Path
    instruction: str = INSTRUCTION
    """What the user asks; {title} is replaced."""
    on_bad_image: OnBadImage = "record"
    """What a picture that cannot be read costs: the `record`, or only the `image`."""


def plan(config: Elements) -> Plan:
    files, others = select(config.path, lambda file: config.path.is_file() or PurePosixPath(file).name == FILE)
    return Plan(tuple(Unit("elements", file) for file in files), tuple(others))


def read(config: Elements, unit: Unit) -> Iterator[Record]:
    file = root_of(config.path) / unit.file
    try:
        yield _document(parse_json(read_limited(file)), file.parent, unit.file, config)
    except RecordError as error:
        yield rejected(unit.file, None, error)


def _document(value: Any, folder: Path, file: str, config: Elements) -> Record:
    if not isinstance(value, dict):
        raise RecordError("bad_record", "a doc.json must hold an object")
    title = _string(value, "title", "title")
    elements = value.get("elements")
    if not isinstance(elements, list) or not elements:
        raise RecordError("bad_record", "field elements must be a non-empty list", field="elements")
    parts: list[Part] = []
    losses: list[Loss] = []
    looked_at: set[str] = set()
    read = Count(1)
    for i, element in enumerate(elements):
        at = f"elements[{i}]"
        match element.get("type") if isinstance(element, dict) else None:
            case "text":
                read += Count(texts=1)
                text = _string(element, "text", f"{at}.text", empty=True)
                if text.strip():
                    parts.append(Text(text))
                else:
                    losses.append(Loss("text", "empty_text", "a text without a character", f"{at}.text"))
            case "image":
                read += Count(images=1)
                path = _string(element, "path", f"{at}.path")
                data = load_picture(folder, path, f"{at}.path", looked_at)
                if isinstance(data, Loss):
                    losses.append(data)
                else:
                    parts.append(Image(data, path))
            case _:
                raise RecordError("bad_record", f"field {at}.type must be text or image", field=f"{at}.type")
    identity = value.get("id")
    if identity is not None and not isinstance(identity, str):
        raise RecordError("bad_record", f"field id must be a string, got {identity!r}", field="id")
    turns = (user(config.instruction.replace("{title}", title)), Turn("assistant", tuple(parts)))
    meta = {key: item for key, item in value.items() if key not in ("id", "elements")}
    document, lost = settle(Document(turns, identity or file, meta), losses, config.on_bad_image)
    return Record(file, None, document, read, lost, added=1)


def _string(record: dict[str, Any], key: str, field: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise RecordError("bad_record", f"field {field} must be a string with content, got {value!r}", field=field)
    return value


SOURCE = Source(plan, read)
