"""CoMM: how-tos, stories and posts in steps. Each split is a list that torch saved, or the same list as JSON.

A saved list is read by torch's loader for weights, which builds numbers, texts, lists and objects and refuses whatever
else a pickle may ask for. It has to be read whole: convert a large one to JSON Lines first.
"""

import json
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, Plan, Source, Unit, check_unicode, root_of
from weft.data.sources.draft import Draft, identity
from weft.data.sources.elements import INSTRUCTION
from weft.data.sources.fields import Object, objects, of_type, plain, required
from weft.data.sources.files import ARRAYS, LINES, Place, chosen, units, values
from weft.data.stage import Record, RecordError, rejected
from weft.document import Part, assistant

_SAVED = (".pt", ".pth", ".bin", ".pkl")


class Comm(FileSource):
    """Files of CoMM; pictures are looked for in `images` (the folder of that name of the release)."""

    kind: Literal["comm"] = "comm"
    instruction: str = INSTRUCTION
    """What the user asks; {title} is replaced."""


def plan(config: Comm) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    files, others = chosen(config.path, "comm", (*_SAVED, *ARRAYS, *LINES))
    found: list[Unit] = []
    for file in files:
        saved = file.lower().endswith(_SAVED)
        found += [Unit("comm", file, number=0)] if saved else units(root_of(config.path), file, "comm")
    return Plan(tuple(found), tuple(others))


def read(config: Comm, unit: Unit) -> Iterator[Record]:
    root = root_of(config.path)
    saved = unit.file.lower().endswith(_SAVED)
    for number, value in _saved(config, unit) if saved else values(root, unit):
        try:
            if isinstance(value, RecordError):
                raise value
            yield _document(config, of_type(value, dict, "record"), Place(root, unit.file, number))
        except RecordError as error:
            yield rejected(unit.file, number, error)


def _saved(config: Comm, unit: Unit) -> Iterator[tuple[int, Any]]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the version of the pickle, which is no concern of the reader
            found = torch.load(root_of(config.path) / unit.file, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader promises no kinds of errors; refusing is one of several
        first = str(error).partition("\n")[0][:200]
        yield 1, RecordError("unsafe_file", f"not a list that can be loaded without running code: {first}")
        return
    if not isinstance(found, list):
        yield 1, RecordError("wrong_type", f"file must hold a list, got {type(found).__name__}")
        return
    for number, value in enumerate(found, start=1):
        try:
            yield number, check_unicode(value)
        except (TypeError, ValueError, RecursionError):
            yield number, RecordError("wrong_type", "record holds what JSON could not")
        except RecordError as error:
            yield number, error


def _document(config: Comm, record: Object, place: Place) -> Record:
    title = required(record, "title", str)
    if not title.strip():
        raise RecordError("empty_value", "field title is empty", field="title")
    native = record.get("data_id")
    draft = Draft(config, place)
    parts = _parts(draft, required(record, "summary_info", list), "summary_info")
    for i, step in enumerate(required(record, "step_info", list)):
        parts += _parts(draft, of_type(step, list, f"step_info[{i}]"), f"step_info[{i}]")
    meta = {"title": title, **plain(record, "dataset_type")}
    name = identity("comm", str(native) if isinstance(native, str | int) else None, record)
    return draft.record(name, [assistant(*parts)], meta, instruction=config.instruction.replace("{title}", title))


def _parts(draft: Draft, contents: list[Any], at: str) -> list[Part]:
    parts: list[Part] = []
    for i, content in enumerate(objects(contents, at)):
        here = f"{at}[{i}]."
        match required(content, "type", str, here):
            case "text":
                parts += draft.text(required(content, "content", str, here), f"{here}content")
            case "image":
                path = required(content, "image_path", str, here)
                parts += draft.image(path, f"{here}image_path", about=plain(content, "url"))
            case other:
                message = f"field {here}type must be text or image, got {json.dumps(other)[:80]}"
                raise RecordError("unknown_type", message, field=f"{here}type")
    return parts


SOURCE = Source(plan, read)
