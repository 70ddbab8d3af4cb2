"""The files that records lie in: which a suffix means, how one is cut into units of work, and the records of a unit.

A record is a parsed value, a row, a sample of an archive, or why it is none of these. Nothing raises for what a file
holds: a source made by `file_source` gives one rejected record for each that cannot be read.
"""

import functools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from weft.data.sources.base import FileSource, Plan, Source, Unit, parse_json, root_of, select
from weft.data.sources.files import arrays, lines, rows, tars
from weft.data.stage import Record, RecordError, rejected
from weft.errors import UsageError

C = TypeVar("C", bound=FileSource)
Parse = Callable[[bytes], Any]
Make = Callable[[C, Any, "Place"], Iterable[Record]]
"""The documents of a record. Raises `RecordError` if it holds none."""

LINES, PACKED, TEXT = (".jsonl", ".jsonl.gz", ".jsonl.zip"), (".zip",), (".txt",)
ARRAYS, ROWS, TARS = (".json",), (".parquet",), (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Place:
    """Where a record is."""

    root: Path
    file: str
    number: int

    @property
    def folder(self) -> Path:
        return _folder(self.root, self.file)


@functools.lru_cache(maxsize=1)
def _folder(root: Path, file: str) -> Path:
    # asked for by every record of a file
    return (root / file).parent


def file_source(
    kind: str, make: "Make[C]", suffixes: tuple[str, ...], *, inside: str | None = None, parse: Parse = parse_json
) -> Source[C]:
    """A source of files with these suffixes, every record of which `make` turns into documents.

    Args:
        inside: where the records of a .json file are, see `arrays`.
        parse: of a line or a member.
    """

    def plan(config: C) -> Plan:
        return plan_files(config.path, kind, suffixes, inside)

    def read(config: C, unit: Unit) -> Iterator[Record]:
        root = root_of(config.path)
        for number, value in values(root, unit, inside, parse):
            try:
                if isinstance(value, RecordError):
                    raise value
                yield from make(config, value, Place(root, unit.file, number))
            except RecordError as error:
                yield rejected(unit.file, number, error)

    return Source(plan, read)


def plan_files(path: Path, kind: str, suffixes: tuple[str, ...], inside: str | None = None) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    files, others = chosen(path, kind, suffixes)
    return Plan(tuple(unit for file in files for unit in units(root_of(path), file, kind, inside)), tuple(others))


def chosen(path: Path, kind: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[Record]]:
    """Files with these suffixes, and those that are not to be read.

    Raises:
        UsageError: there are none.
    """
    files, others = select(path, lambda file: file.lower().endswith(suffixes))
    if not files:
        raise UsageError(
            f"source {kind} found nothing to read among {len(others)} files",
            where=str(path),
            fix=f"it reads {', '.join(suffixes)}",
        )
    return files, others


def units(root: Path, file: str, kind: str, inside: str | None = None) -> Iterator[Unit]:
    """Raises `UsageError` if the file cannot be opened."""
    try:
        if file.lower().endswith(ARRAYS):
            yield from arrays.units(root, file, kind, inside)
        elif file.lower().endswith(ROWS):
            yield from rows.units(root, file, kind)
        elif file.lower().endswith(TARS):
            yield from tars.units(root, file, kind)
        else:
            yield from lines.units(root, file, kind)
    except OSError as error:
        raise UsageError(f"file cannot be read: {error.strerror}", where=str(root / file)) from error


def values(
    root: Path, unit: Unit, inside: str | None = None, parse: Parse = parse_json
) -> Iterator[tuple[int, Any | RecordError]]:
    """Number and value of every record of a unit, or why it has none."""
    number = unit.first - 1
    try:
        for number, found in _items(root, unit, inside):
            yield number, _parsed(found, parse)
    except RecordError as error:
        yield number + 1, error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        yield number + 1, RecordError("damaged_file", f"file is damaged, the rest is lost: {error}")


def _items(root: Path, unit: Unit, inside: str | None) -> Iterator[tuple[int, Any]]:
    name = unit.file.lower()
    if name.endswith(ARRAYS):
        return arrays.items(root, unit, inside)
    if name.endswith(ROWS):
        return rows.items(root, unit)
    if name.endswith(TARS):
        return tars.items(root, unit)
    return lines.items(root, unit)


def _parsed(found: Any, parse: Parse) -> Any:
    if not isinstance(found, bytes):
        return found
    try:
        return parse(found)
    except RecordError as error:
        return error
