"""LLaMA-Factory: a JSON array in its ShareGPT form with pictures, and `dataset_info.json`, which names it."""

import json
from pathlib import Path
from typing import Any

from weft.data.exchange.conversations import Limits, about, fit, paths_of, texts_of
from weft.data.exchange.files import Files
from weft.data.exchange.form import DATA, Array, Form
from weft.data.sources.base import read_json
from weft.data.stage import RecordError
from weft.document import Document
from weft.errors import PathError, UsageError
from weft.images import inside

_FILE, _INFO = f"{DATA}.json", "dataset_info.json"
_LIMITS = Limits(marks=("<image>", "<video>", "<audio>"), answer_pictures=False)
_ENTRY = {
    "file_name": _FILE,
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def _record(document: Document) -> dict[str, Any]:
    messages = [{"role": role, "content": text} for role, text, _ in texts_of(document)]
    return {"messages": messages, "images": paths_of(document), **about(document)}


def _write(files: Files) -> Array:
    files.append(_INFO, b"")
    if files.size(_INFO) == 0:
        files.append(_INFO, json.dumps({"weft": _ENTRY}, indent=2).encode() + b"\n")
    return Array(files, _FILE, _record)


def _sources(path: Path) -> list[dict[str, Any]]:
    """The files of a folder that its `dataset_info.json` names, or the one file.

    Raises:
        UsageError: it names none that is there, or one outside of the folder.
    """
    if not (path / _INFO).is_file():
        return [_source(path)]
    try:
        entries = read_json(path, _INFO)
        names = [entry["file_name"] for entry in entries.values() if isinstance(entry.get("file_name"), str)]
        files = [inside(path, name) for name in names]
    except (RecordError, PathError) as error:
        raise UsageError(error.what, where=str(path / _INFO), fix="mend it, or name the data file itself") from error
    except (AttributeError, TypeError) as error:
        raise UsageError(
            "not an object of datasets", where=str(path / _INFO), fix="name the data file itself"
        ) from error
    found = [_source(file) for file in files if file.exists()]
    if not found:
        raise UsageError("it names no file that is there", where=str(path / _INFO), fix="name the data file itself")
    return found


def _source(path: Path) -> dict[str, Any]:
    return {"kind": "swift", "path": str(path), "own_ids": True}


FORM = Form(
    lacks=_LIMITS.lacks,
    fit=lambda document: fit(document, _LIMITS),
    write=_write,
    sources=_sources,
    data=_FILE,
    usage="`dataset_dir: {name}` and `dataset: weft` in a recipe of LLaMA-Factory.",
)
