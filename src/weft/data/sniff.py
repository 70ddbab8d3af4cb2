"""A look at a file of unknown layout: keys and types of its first records, and a mapping that would read it."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from weft.data.sources.base import MAX_RECORD, PICTURES, parse_json
from weft.data.sources.files import ARRAYS, LINES, PACKED, ROWS, TARS, TEXT, arrays, units, values
from weft.data.sources.mapping import Mapping, Slot, record_of
from weft.data.stage import RecordError
from weft.errors import UsageError

_ID = re.compile(r"(?:.*_)?(?:id|uid|key|name)|__key__", re.IGNORECASE)
_ASIDE = re.compile(
    r".*(?:url|licen[cs]e|source|split|lang|score|prob|sim|hash|date|time|version|type|kind|format|status).*",
    re.IGNORECASE,
)
_PICTURE = re.compile(r".*(?:image|img|picture|photo|frame|figure|jpe?g|png|webp).*", re.IGNORECASE)
_INPUT = re.compile(
    r".*(?:instruct|prompt|question|query|input|goal|title|original|before|context|user|edit(?!ed)).*|source_im.*",
    re.IGNORECASE,
)
_OUTPUT = re.compile(r".*(?:output|target|answer|response|after|edited|result|caption|step).*", re.IGNORECASE)
_MESSAGES = ({"from", "value"}, {"role", "content"})


@dataclass(frozen=True)
class Field:
    name: str
    types: tuple[str, ...]
    """Of the values that were seen; `missing` where a record has none."""
    example: str


@dataclass(frozen=True)
class Sniffed:
    file: Path
    records: int
    """How many were looked at."""
    broken: tuple[str, ...]
    """Why others could not be read."""
    fields: tuple[Field, ...]
    mapping: Mapping | None
    """None: no field could be the answer."""

    def recipe(self) -> str:
        """The mapping as a recipe's `sources`."""
        if self.mapping is None:
            return "# no field looks like a text or a picture to learn\n"
        given = self.mapping.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump({"sources": [{"kind": "mapping", **given}]}, sort_keys=False, allow_unicode=True)

    def to_json(self) -> dict[str, Any]:
        fields = [{"name": f.name, "types": f.types, "example": f.example} for f in self.fields]
        mapping = self.mapping and self.mapping.model_dump(mode="json", exclude_defaults=True)
        return {"records": self.records, "broken": self.broken, "fields": fields, "mapping": mapping}


def sniff(file: Path, *, records: int = 5) -> Sniffed:
    """Look at the first records of a file.

    Raises:
        UsageError: there is no such file, it is of a kind that is not read, or it holds no record.
    """
    suffixes = (*LINES, *PACKED, *TEXT, *ARRAYS, *ROWS, *TARS)
    if not file.is_file() or not file.name.lower().endswith(suffixes):
        what = "is of a kind that is not read" if file.is_file() else "does not exist"
        raise UsageError(f"file {what}", where=str(file), fix=f"wanted: {', '.join(suffixes)}")
    inside = _inside(file) if file.name.lower().endswith(ARRAYS) else None
    seen, broken = [], []
    for value in itertools.islice(_values(file, inside), records):
        try:
            if isinstance(value, RecordError):
                raise value
            seen.append(record_of(value))
        except RecordError as error:
            broken.append(error.what)
    if not seen:
        raise UsageError(
            f"no record could be read: {broken[0]}" if broken else "file holds no record",
            where=str(file),
            fix="look at its beginning",
        )
    table = list(_fields(seen))
    fields = tuple(Field(name, _types(column), _example(column)) for name, column in table)
    return Sniffed(file, len(seen), tuple(broken), fields, _propose(file, inside, dict(table)))


def _values(file: Path, inside: str | None) -> Iterator[Any]:
    for unit in units(file.parent, file.name, "mapping", inside):
        yield from (value for _, value in values(file.parent, unit, inside))


def _inside(file: Path) -> str | None:
    """The key of the largest list or object of a root object; "" if that object is made of records itself."""
    with open(file, "rb") as handle:
        first, second = handle.readline(MAX_RECORD), handle.readline(MAX_RECORD)
    if not first.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"{") or (second.startswith(b"{") and _is_json(first)):
        return None
    sizes: dict[str, int] = {}
    for begin, end in arrays.spans(file, ""):
        with open(file, "rb") as handle:
            handle.seek(begin)
            head = re.match(rb'\s*"([^"\\]*)"\s*:\s*[\[{]', handle.read(1024))
        if head is not None:
            sizes[head[1].decode(errors="replace")] = end - begin
    largest = max(sizes, key=sizes.__getitem__, default="")
    return largest if sizes and sizes[largest] > sum(sizes.values()) / 2 and len(sizes) < 12 else ""


def _is_json(data: bytes) -> bool:
    try:
        parse_json(data)
    except RecordError:
        return False
    return True


def _fields(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Every field by its path with its values, None where there is none; objects are looked into."""
    for key in dict.fromkeys(key for record in records for key in record):
        column: list[Any] = [record.get(key) for record in records]
        if all(isinstance(value, dict) and "bytes" not in value for value in column):
            yield from ((f"{key}.{inner}", values) for inner, values in _fields(column))
        else:
            yield key, column


def _propose(file: Path, inside: str | None, table: dict[str, list[Any]]) -> Mapping | None:
    whole = {name: column for name, column in table.items() if all(value is not None for value in column)}
    identity = next((name for name, column in whole.items() if _is_id(name, column)), None)
    for name, column in whole.items():
        if all(_are_messages(value) for value in column):
            shown = next((n for n, c in table.items() if n != name and _is_picture(n, c)), None)
            return Mapping(path=file, inside=inside, id=identity, conversations=name, pictures=shown)
    slots = [(name, slot) for name, column in whole.items() if name != identity and (slot := _slot(name, column))]
    asked = [slot for name, slot in slots if _INPUT.fullmatch(name) and not _OUTPUT.fullmatch(name)]
    answer = [slot for _, slot in slots if slot not in asked]
    if not answer:
        asked, answer = [], asked
    return Mapping(path=file, inside=inside, id=identity, input=tuple(asked), output=tuple(answer)) if answer else None


def _slot(name: str, column: Sequence[Any]) -> Slot | None:
    if _is_picture(name, column):
        return Slot(image=name)
    if all(isinstance(value, list) and value and all(isinstance(row, dict) for row in value) for value in column):
        rows = [row for value in column for row in value]
        inner = [
            _slot(key, [row.get(key) for row in rows]) for key in dict.fromkeys(key for row in rows for key in row)
        ]
        of = tuple(slot for slot in inner if slot is not None)
        return Slot(each=name, of=of) if of else None
    is_text = all(_is_text(value) for value in column)
    return Slot(text=name) if is_text and not (_ASIDE.fullmatch(name) or _ID.fullmatch(name)) else None


def _is_text(value: Any) -> bool:
    several = value if isinstance(value, list) and value else [value]
    return all(isinstance(each, str) and each.strip() for each in several)


def _is_picture(name: str, column: Sequence[Any]) -> bool:
    values = [each for value in column if value is not None for each in (value if isinstance(value, list) else [value])]
    return bool(values) and all(_names_picture(name, value) for value in values)


def _names_picture(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return "bytes" in value or "path" in value
    if isinstance(value, str) and not re.match(r"https?:", value):
        return value.lower().endswith(PICTURES)
    return isinstance(value, bytes) and _PICTURE.fullmatch(name) is not None


def _is_id(name: str, column: Sequence[Any]) -> bool:
    simple = all(isinstance(value, str | int) and not isinstance(value, bool) for value in column)
    return simple and _ID.fullmatch(name) is not None and len(set(column)) == len(column)


def _are_messages(value: Any) -> bool:
    rows = value if isinstance(value, list) and value else [None]
    return all(isinstance(row, dict) and any(keys <= row.keys() for keys in _MESSAGES) for row in rows)


def _types(column: Sequence[Any]) -> tuple[str, ...]:
    return tuple(sorted({_type(value) for value in column}))


def _type(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, list):
        return f"list of {', '.join(sorted({_type(each) for each in value}))}" if value else "empty list"
    if isinstance(value, dict):
        return f"object {{{', '.join(map(str, list(value)[:8]))}}}"
    return type(value).__name__


def _example(column: Sequence[Any]) -> str:
    value = next((value for value in column if value is not None), None)
    text = f"{len(value):,} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
