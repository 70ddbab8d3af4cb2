"""A folder whose formats are found by looking: each file is read in the format of its name, or named as not read.

*.jsonl               the chat form
doc.json              its folder is one document; nothing else in that folder is
*.md *.html           one document each, but a README describes its folder
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from weft.config import Config
from weft.data.sources import chat_jsonl, elements, folder
from weft.data.sources.base import PICTURES, Plan, Source, Unit, root_of, skipped, walk
from weft.data.sources.files import lines
from weft.data.stage import Record
from weft.errors import UsageError


class Auto(Config):
    """A folder, or a file, of any of the file formats."""

    kind: Literal["auto"] = "auto"
    path: Path
    instruction: str = elements.INSTRUCTION
    """What the user asks where a document has only a title; {title} is replaced."""


def plan(config: Auto) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    root = root_of(config.path)
    files = list(walk(config.path))
    claimed = {PurePosixPath(file).parent for file, why in files if why is None and _name(file) == elements.FILE}
    units: list[Unit] = []
    others: list[Record] = []
    for file, why in files:
        path = PurePosixPath(file)
        if why is not None:
            others.append(skipped(file, why))
        elif path.name == elements.FILE:
            units.append(Unit("elements", file))
        elif path.suffix.lower() in PICTURES:
            # pictures are read where documents name them
            continue
        elif not claimed.isdisjoint(path.parents):
            others.append(skipped(file, "beside_doc_json"))
        elif path.suffix == ".jsonl":
            units += lines.units(root, file, "chat_jsonl")
        elif path.suffix.lower() not in folder.MARKDOWN + folder.HTML:
            others.append(skipped(file, "other_format"))
        elif path.stem.lower() == "readme" and config.path.is_dir():
            others.append(skipped(file, "readme"))
        else:
            units.append(Unit("folder", file))
    if not units:
        raise UsageError(
            f"nothing to read among {len(files)} files",
            where=str(config.path),
            fix="wanted: *.jsonl in the chat form, doc.json, *.md or *.html",
        )
    return Plan(tuple(units), tuple(others))


def read(config: Auto, unit: Unit) -> Iterator[Record]:
    match unit.format:
        case "chat_jsonl":
            yield from chat_jsonl.read(chat_jsonl.ChatJsonl(path=config.path), unit)
        case "elements":
            yield from elements.read(elements.Elements(path=config.path, instruction=config.instruction), unit)
        case _:
            yield from folder.read(folder.Folder(path=config.path, instruction=config.instruction), unit)


def _name(file: str) -> str:
    return PurePosixPath(file).name


SOURCE = Source(plan, read)
