"""Lines of JSON that outlive a kill: appended one by one, read up to the last whole one, put in order at the end.

An object that ends with its brace is whole, whether or not its line was ended: half of one is never JSON.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from weft.atomic import write_text
from weft.errors import WeftError


class EvaluationError(WeftError):
    """An evaluation cannot be done, or what is on the disk is not one."""

    code = "evaluation"


class Journal:
    """One file of lines. Only one process writes it; `Run.locked` sees to that."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> Iterator[dict[str, Any]]:
        """
        Raises:
            EvaluationError: a line that was written to its end is not JSON.
        """
        if not self.file.is_file():
            return
        with open(self.file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and not _is_whole(line):  # a process died while it wrote this one
                    return
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise _damaged(self.file, number) from error
                if not isinstance(value, dict):
                    raise _damaged(self.file, number)
                yield value

    def append(self, values: Iterable[dict[str, Any]]) -> None:
        """Add lines; each is on the disk's queue before the next value is asked for."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab+") as file:
            self._end_the_last_line(file)
            for value in values:
                file.write(to_line(value).encode())
                file.flush()

    def settle(self, values: Iterable[dict[str, Any]]) -> None:
        """Replace everything, in one step."""
        write_text(self.file, "".join(map(to_line, values)))

    def _end_the_last_line(self, file: BinaryIO) -> None:
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if _is_whole(content[whole:]):
            file.write(b"\n")
        elif whole < len(content):
            os.ftruncate(file.fileno(), whole)


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def to_line(value: Any) -> str:
    return _json(value, allow_nan=False) + "\n"


def _json(value: Any, *, allow_nan: bool = True, sort_keys: bool = False) -> str:
    """As it is read; escaped where it holds halves of letters, which models write and no encoding has."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan, sort_keys=sort_keys)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=allow_nan, sort_keys=sort_keys)
    return text


def fingerprint(values: Iterable[Any]) -> str:
    """SHA-256 of values as JSON, in order; keys of objects in any order."""
    found = hashlib.sha256()
    for value in values:
        found.update(_json(value, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def _damaged(file: Path, number: int) -> EvaluationError:
    return EvaluationError("a line is damaged", where=f"{file}, line {number}", fix="remove the line, then score again")
