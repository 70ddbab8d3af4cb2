"""Members of one large JSON array or object: found by brackets and commas alone, so that each is parsed by itself.

A damaged member costs itself, not the file. An object's member `"key": value` is given as `{"key": value}`. Damage that
hides where a member ends costs the rest of the file, as one record.

`inside` is the key of the root object whose array or object is meant; "" is the root itself; None is the root if it is
an array, and else the file is JSON Lines in spite of its name.
"""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from weft.data.sources.base import MAX_RECORD, Unit
from weft.data.sources.files import lines
from weft.data.sources.files.lines import LINES, Line
from weft.data.stage import RecordError

_CHUNK, _HEAD = 2**16, 2**12
_REST = rb'(?:[^"\\]++|\\.)*+("|\\?\Z)'
"""Of a string, up to its closing quote or to where the bytes end."""
_STRING, _MARK = re.compile(_REST, re.DOTALL), re.compile(rb'[\[\]{},]|"' + _REST, re.DOTALL)
_KEY = re.compile(rb'\s*"(?:[^"\\]|\\.)*"\s*:', re.DOTALL)
_BLANK = b"\xef\xbb\xbf \t\r\n"

Span = tuple[int, int]


def units(root: Path, file: str, form: str, inside: str | None) -> Iterator[Unit]:
    """Runs of members; the file is scanned once. A file without what is looked for is one run of none."""
    if _is_lines(root / file, inside):
        yield from lines.units(root, file, form)
        return
    first, at, number = 1, 0, 0
    for number, (begin, _) in enumerate(spans(root / file, inside), start=1):
        if number == first:
            at = begin
        elif number - first == LINES:
            yield Unit(form, file, first, LINES, at)
            first, at = number, begin
    yield Unit(form, file, first, number - first + 1, at)


def items(root: Path, unit: Unit, inside: str | None) -> Iterator[tuple[int, Line]]:
    """Number and bytes of every member of a unit."""
    file = root / unit.file
    if _is_lines(file, inside):
        yield from lines.items(root, unit)
        return
    with open(file, "rb") as handle, open(file, "rb") as again:
        if unit.number == 0:
            if _opening(handle, inside) is None:
                yield 1, RecordError("broken_json", f"no JSON array or object{f' at {inside!r}' if inside else ''}")
            return
        for number, span in enumerate(_members(handle, unit.offset), start=unit.first):
            if number == unit.first + unit.number:
                return
            yield number, read_member(again, span)


def spans(file: Path, inside: str | None) -> Iterator[Span]:
    """Begin and end of every member."""
    with open(file, "rb") as handle:
        opening = _opening(handle, inside)
        if opening is not None:
            yield from _members(handle, opening + 1)


def read_all(file: Path, inside: str | None) -> Iterator[Line]:
    """Bytes of every member, one after the other."""
    with open(file, "rb") as handle:
        for span in spans(file, inside):
            yield read_member(handle, span)


def read_member(handle: BinaryIO, span: Span) -> Line:
    if span[1] - span[0] > MAX_RECORD:
        return RecordError("too_large", f"member has more than {MAX_RECORD:,} bytes")
    handle.seek(span[0])
    data = handle.read(span[1] - span[0])
    return b"{" + data + b"}" if _KEY.match(data) else data


def _is_lines(file: Path, inside: str | None) -> bool:
    with open(file, "rb") as handle:
        return inside is None and handle.read(_HEAD).lstrip(_BLANK)[:1] != b"["


def _opening(handle: BinaryIO, inside: str | None) -> int | None:
    """Where the bracket of the wanted array or object is."""
    handle.seek(0)
    head = handle.read(_HEAD)
    root = len(head) - len(head.lstrip(_BLANK))
    if head[root : root + 1] not in (b"[", b"{"):
        return None
    if not inside:
        return root
    wanted = re.compile(rb'\s*"' + re.escape(inside.encode()) + rb'"\s*:\s*(?=[\[{])')
    for at in itertools.chain([root], (at for at, ends in _borders(handle, root + 1) if not ends)):
        found = wanted.match(os.pread(handle.fileno(), len(inside) + 256, at + 1))
        if found is not None:
            return at + 1 + found.end()
    return None


def _members(handle: BinaryIO, begin: int) -> Iterator[Span]:
    """Members from `begin` on, up to the bracket that closes their array or object."""
    for at, ends in _borders(handle, begin):
        # nothing between the last comma, or the opening bracket, and the closing one is no member
        if not ends or at - begin > MAX_RECORD or os.pread(handle.fileno(), at - begin, begin).strip(_BLANK):
            yield begin, at
        begin = at + 1
        if ends:
            return
    # never closed: the file ends in the middle
    yield begin, os.fstat(handle.fileno()).st_size


def _borders(handle: BinaryIO, at: int) -> Iterator[tuple[int, bool]]:
    """Places of the commas of the array or object that `at` is in, then that of its closing bracket, which ends it."""
    handle.seek(at)
    inside = escaped = False
    depth = 0
    while chunk := handle.read(_CHUNK):
        i = 1 if escaped else 0
        if inside:
            found = _STRING.match(chunk, i)
            assert found is not None
            i, inside, escaped = found.end(), found[1] != b'"', found[1] == b"\\"
        for found in _MARK.finditer(chunk, i):
            if found[1] is not None:
                # a string: if it goes on in the next chunk, that may be behind the backslash of an escape
                inside, escaped = found[1] != b'"', found[1] == b"\\"
                continue
            mark = chunk[found.start()]
            if mark in b"[{":
                depth += 1
            elif mark in b"]}":
                if depth == 0:
                    yield at + found.start(), True
                    return
                depth -= 1
            elif depth == 0:
                yield at + found.start(), False
        at += len(chunk)
