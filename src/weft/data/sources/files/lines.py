"""Lines of a text file, plain or compressed: found by their ends alone, each of bounded size."""

import gzip
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from weft.data.sources.base import MAX_RECORD, Unit
from weft.data.stage import RecordError

LINES = 64
"""Lines of a unit of work: with their pictures they may be held in memory together."""
MAX_RATIO = 200
"""Of a packed file's size before and after packing; text reaches 10, a bomb 1000."""

Line = bytes | RecordError


def units(root: Path, file: str, form: str) -> Iterator[Unit]:
    """Runs of lines, found without reading what they say; a compressed file is one."""
    if _is_packed(file):
        yield Unit(form, file, number=0)
        return
    with open(root / file, "rb") as handle:
        first, at, number = 1, 0, 0
        for number, (offset, _) in enumerate(_lines(handle), start=1):
            if number - first == LINES:
                yield Unit(form, file, first, number - first, at)
                first, at = number, offset
        if number >= first:
            yield Unit(form, file, first, number - first + 1, at)


def items(root: Path, unit: Unit) -> Iterator[tuple[int, Line]]:
    """Number and bytes of every line that is not empty."""
    most = unpacked_limit(root / unit.file) if _is_packed(unit.file) else None
    with _open(root / unit.file) as handle:
        handle.seek(unit.offset)
        for number, (offset, line) in enumerate(_lines(handle), start=unit.first):
            if most is not None and offset > most:
                yield number, RecordError("archive_ratio", f"more than {MAX_RATIO} times its size; the rest is lost")
                return
            if unit.number and number >= unit.first + unit.number:
                return
            if isinstance(line, RecordError) or line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, line


def unpacked_limit(file: Path) -> int:
    """Bytes that a packed file may hold."""
    return max(MAX_RATIO * file.stat().st_size, MAX_RECORD)


def _lines(handle: IO[bytes]) -> Iterator[tuple[int, Line]]:
    """Offset and bytes of every line."""
    offset = handle.tell()
    while line := handle.readline(MAX_RECORD + 1):
        found: Line = line
        next_offset = offset + len(line)
        if len(line) > MAX_RECORD and not line.endswith(b"\n"):
            found = RecordError("too_large", f"line has more than {MAX_RECORD:,} bytes")
            while line and not line.endswith(b"\n"):
                line = handle.readline(MAX_RECORD)
                next_offset += len(line)
        yield offset, found
        offset = next_offset


def _is_packed(file: str) -> bool:
    return file.lower().endswith((".gz", ".zip"))


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    if file.suffix.lower() == ".gz":
        with gzip.open(file, "rb") as handle:
            yield handle  # type: ignore[misc]  # a GzipFile reads like any other
    elif file.suffix.lower() == ".zip":
        with zipfile.ZipFile(file) as archive, archive.open(_only_member(archive)) as handle:
            yield handle
    else:
        with open(file, "rb") as handle:
            yield handle


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise RecordError("archive_members", f"archive holds {len(members)} files, wanted one file of lines")
    (member,) = members
    if member.flag_bits & 1:
        raise RecordError("archive_encrypted", "archive is encrypted")
    if member.file_size > max(MAX_RATIO * member.compress_size, MAX_RECORD):
        raise RecordError("archive_ratio", f"archive claims to hold more than {MAX_RATIO} times its size")
    return member
