"""What a source is tested with: records made from its field list, the documents they are, and ways to damage them."""

import copy
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.corpus import png, write

Good = tuple[str, list[tuple[str, list[str | bytes]]]]
"""Id, and of every turn the role with its texts and the bytes of its pictures."""


@dataclass(frozen=True)
class Damage:
    change: Callable[[Any], Any]
    """Of a valid record; gives another, or bytes to be written as they are."""
    reason: str
    costs: str = "record"
    """Or only `image` or `text`."""
    last: bool = False
    """Hides where the record ends: no other can follow."""


@dataclass(frozen=True)
class Case:
    kind: str
    record: Callable[[int], Any]
    document: Callable[[int], Good]
    pictures: Callable[[int], dict[str, bytes]]
    write: Callable[[Path, Sequence[Any]], None]
    damages: dict[str, Damage]
    config: dict[str, Any] = field(default_factory=dict)
    sniffed: bool = False
    """The mapping that is proposed for the file reads every record."""

    def lay(self, folder: Path, records: Sequence[Any]) -> None:
        for n in range(1, 6):
            write(folder, self.pictures(n))
        self.write(folder, records)


def put(*path: Any, value: Any) -> Callable[[Any], Any]:
    """The record with one value replaced."""

    def change(record: Any) -> Any:
        changed = inner = copy.deepcopy(record)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return changed

    return change


def drop(*path: Any) -> Callable[[Any], Any]:
    def change(record: Any) -> Any:
        changed = inner = copy.deepcopy(record)
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return changed

    return change


def text_of(record: Any) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def with_field(field: bytes) -> Callable[[Any], bytes]:
    """The JSON object with one more member, as text."""
    return lambda record: text_of(record)[:-1] + b", " + field + b"}"


JSON = {
    "not UTF-8": Damage(with_field(b'"note": "\xff"'), "not_utf8"),
    "NaN": Damage(with_field(b'"note": NaN'), "bad_number"),
    "a key twice": Damage(with_field(b'"note": 1, "note": 2'), "duplicate_key"),
    "half a surrogate pair": Damage(with_field(b'"note": "\\ud800"'), "lone_surrogate"),
    "a trailing comma": Damage(with_field(b'"note": 1,'), "broken_json"),
    "absurd nesting": Damage(lambda record: b"[" * 100_000 + b"]" * 100_000, "too_deep"),
    "a number instead": Damage(lambda record: 7, "wrong_type"),
    "null instead": Damage(lambda record: None, "wrong_type"),
}
"""Of any record that is a JSON object."""
CUT = {"cut off": Damage(lambda record: text_of(record)[:-3], "broken_json")}


def lines(name: str) -> Callable[[Path, Sequence[Any]], None]:
    return lambda folder, records: write(folder, {name: b"".join(text_of(record) + b"\n" for record in records)})


def array(name: str, head: bytes = b"[", tail: bytes = b"]") -> Callable[[Path, Sequence[Any]], None]:
    """With `head` and `tail` the array stands inside of something. A record that is cut off ends the file."""

    def put_down(folder: Path, records: Sequence[Any]) -> None:
        write(folder, {name: head + b",\n ".join(map(text_of, records)) + tail})

    return put_down


def members(name: str, head: bytes = b"{", tail: bytes = b"}") -> Callable[[Path, Sequence[Any]], None]:
    """Records {key: value}, put together into one object."""

    def put_down(folder: Path, records: Sequence[Any]) -> None:
        inner = (text_of(r).strip()[1:-1] if text_of(r).strip()[:1] == b"{" else text_of(r) for r in records)
        write(folder, {name: head + b",\n".join(inner) + tail})

    return put_down


def parquet(name: str, schema: Any) -> Callable[[Path, Sequence[Any]], None]:
    """Bytes in place of a row's string are written unchecked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def put_down(folder: Path, records: Sequence[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(records), schema=schema), folder / name, row_group_size=2)

    return put_down


def tar(name: str) -> Callable[[Path, Sequence[dict[str, Any]]], None]:
    """Records are {member: bytes}; other values are made into links to them."""

    def put_down(folder: Path, records: Sequence[dict[str, Any]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / name, "w") as archive:
            for record in records:
                for member, data in record.items():
                    info = tarfile.TarInfo(member)
                    if isinstance(data, str):
                        info.type, info.linkname = tarfile.SYMTYPE, data
                        archive.addfile(info)
                    else:
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))

    return put_down


def picture(n: int, i: int = 0) -> bytes:
    return png(10 * n + i)
