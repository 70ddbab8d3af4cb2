"""MagicBrush: edits of photos, often several in a row. Train and dev only: the test split is refused.

    *.parquet             img_id, turn_index, source_img, mask_img, instruction, target_img
    edit_turns.json       [{input, mask, output, instruction}, ...]
    edit_sessions.json    {img_id: [{input, mask, output, instruction}, ...]}: one document with all turns

Pictures of the JSON files are `<img_id>/<name>` in `images`. The test split carries a canary string, so that models
which were trained on it can be told: a file with a canary, or with `test` in its name, is not read at all.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from weft.data.sources.base import FileSource, Plan, Source, root_of, skipped
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import Object, name, objects, of_type, only, plain, present, required
from weft.data.sources.files import ARRAYS, ROWS, Place, chosen, file_source, units
from weft.data.sources.rules.edits import Edit, edit_of, edits
from weft.data.stage import Record, RecordError
from weft.errors import UsageError

_TEST = re.compile(r"(?:^|[^a-z])test(?:[^a-z]|$)")
_CANARY = re.compile(rb"canary|BENCHMARK DATA SHOULD NEVER", re.IGNORECASE)
_CHUNK = 2**20


class MagicBrush(FileSource):
    """Parquet files, or the JSON files of the release with their pictures."""

    kind: Literal["magicbrush"] = "magicbrush"


def _documents(config: MagicBrush, value: Any, place: Place) -> Iterator[Record]:
    record = of_type(value, dict, "record")
    draft = Draft(config, place)
    if "source_img" in record or "target_img" in record:
        image, turn = name(record, "img_id"), name(record, "turn_index")
        fields = ("source_img", "instruction", "target_img")
        change = edit_of(record, fields)
        _refuse_canary(change.instruction)
        native = identity("magicbrush", f"{image}/{turn}", None)
        yield draft.record(native, edits(draft, [change]), plain(record, "img_id", "turn_index"))
    elif "output" in record:
        change = _turn(record, "")
        yield draft.record(identity("magicbrush", None, record), edits(draft, [change]), {})
    else:
        image, found = only(record, "session")
        session = [_turn(turn, f"{image}[{i}].") for i, turn in enumerate(objects(of_type(found, list, image), image))]
        if not session:
            raise RecordError("empty_value", "a session without a turn", field=image)
        yield draft.record(identity("magicbrush", image, None), edits(draft, _chained(session)), {"img_id": image})


def _turn(record: Object, at: str) -> Edit:
    before, after = (_path(required(record, key, str, at)) for key in ("input", "output"))
    _refuse_canary(record.get("instruction"))
    return Edit(before, present(record, "instruction", at), after, (at + "input", at + "instruction", at + "output"))


def _path(file: str) -> str:
    """123-output1.png is in the folder 123."""
    return f"{file.rpartition('-')[0]}/{file}"


def _chained(session: list[Edit]) -> Iterator[Edit]:
    """A picture that the turn before ended with is not shown again."""
    last = None
    for change in session:
        yield replace(change, goes_on=change.before == last)
        last = change.after


def _refuse_canary(text: Any) -> None:
    if isinstance(text, str) and _CANARY.search(text.encode(errors="replace")):
        raise RecordError("benchmark", "record holds the canary of a test split")


_FILES = file_source("magicbrush", _documents, (*ARRAYS, *ROWS), inside="")


def plan(config: MagicBrush) -> Plan:
    """Raises `UsageError` where nothing can be read, as for the test split alone."""
    root = root_of(config.path)
    files, others = chosen(config.path, "magicbrush", (*ARRAYS, *ROWS))
    refused = [file for file in files if _is_test(root, file)]
    if len(refused) == len(files):
        raise UsageError(
            "the test split of MagicBrush is a benchmark and is not read as training data",
            where=str(config.path),
            fix="use the splits train and dev",
        )
    found = tuple(u for file in files if file not in refused for u in units(root, file, "magicbrush", ""))
    return Plan(found, (*others, *(skipped(file, "benchmark") for file in refused)))


def _is_test(root: Path, file: str) -> bool:
    if _TEST.search(file.lower()):
        return True
    if not file.lower().endswith(ARRAYS):
        return False
    with open(root / file, "rb") as handle:
        rest = b""
        while chunk := handle.read(_CHUNK):
            if _CANARY.search(rest + chunk):
                return True
            rest = chunk[-64:]
    return False


SOURCE = Source(plan, _FILES.read)
