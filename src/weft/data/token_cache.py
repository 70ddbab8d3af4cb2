"""Documents as one model reads them, kept on disk: encoded once, whatever runs use them.

    folder/<key>/<sha256 of the file>.safetensors      some documents each, in no order; a file is whole or not there

The key is a hash of all that the encoding depends on, so that nothing of another dataset, model or version is ever
found; a file that is not what its name says is removed. Knows no model: whoever opens it says what the key is made
of.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weft.atomic import clean_leftovers, sha256_of, write_bytes
from weft.layout import ImageSpan, Pixels, Span, TextSpan, TokenSequence

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is written here."""
DOCUMENTS, BYTES = 256, 64 * 2**20
"""A file is written when so much is waiting."""
OPEN = 64
"""Files held open."""


class TokenCache:
    """Encoded documents of one dataset by their numbers. May be used by several threads; several processes may have the
    same folder open, and find each other's documents when they open it again."""

    def __init__(self, folder: Path, **key: str) -> None:
        """
        Args:
            key: all that the encoding depends on.
        """
        parts = json.dumps({**key, "version": VERSION}, sort_keys=True)
        self.folder = folder / hashlib.sha256(parts.encode()).hexdigest()[:32]
        self._lock = threading.Lock()
        self._waiting: dict[int, TokenSequence] = {}
        self._size = 0
        self._places: dict[int, tuple[_File, int]] = {}
        self._opened: dict[_File, None] = {}
        if self.folder.is_dir():
            clean_leftovers(self.folder)
            for path in sorted(self.folder.glob("*.safetensors")):
                self._add(_File(path))

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def get(self, number: int) -> TokenSequence | None:
        """A document as it was put, to the bit; None: it is not there, or damaged."""
        with self._lock:
            if number in self._waiting:
                return self._waiting[number]
            file, at = self._places.get(number, (None, 0))
            if file is None:
                return None
            self._opened.pop(file, None)
            self._opened[file] = None  # the last one used goes to the end
            if len(self._opened) > OPEN:
                oldest = next(iter(self._opened))
                del self._opened[oldest]
                oldest.close()
            found = file.read(at)
            if found is None:
                log.warning("%s in the cache is damaged; its documents are encoded again", file.path.name)
                file.path.unlink(missing_ok=True)
                self._places = {n: place for n, place in self._places.items() if place[0] is not file}
            return found

    def put(self, number: int, sequence: TokenSequence) -> None:
        """Keep a document; it is on disk after the next `flush` at the latest."""
        with self._lock:
            if number in self._waiting or number in self._places:
                return
            self._waiting[number] = sequence
            self._size += _bytes(sequence)
            if len(self._waiting) >= DOCUMENTS or self._size >= BYTES:
                self._write()

    def flush(self) -> None:
        """Write what is waiting."""
        with self._lock:
            if self._waiting:
                self._write()

    def _write(self) -> None:
        tensors, names = _pack(self._waiting)
        data = save(tensors, {"names": json.dumps(names)})
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_bytes(path, data)
        self._waiting, self._size = {}, 0
        self._add(_File(path))

    def _add(self, file: "_File") -> None:
        for at, number in enumerate(file.numbers()):
            self._places.setdefault(number, (file, at))


class _File:
    """One file of documents, opened when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[Any, _Index] | None = None
        self._is_checked = False

    def numbers(self) -> list[int]:
        """Of its documents; none if it is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                return cast(list[int], file.get_tensor("numbers").tolist())
        except (FileNotFoundError, SafetensorError):
            log.warning("%s in the cache is damaged; its documents are encoded again", self.path.name)
            self.path.unlink(missing_ok=True)
            return []

    def read(self, at: int) -> TokenSequence | None:
        """None: the file is damaged or gone."""
        if self._opened is None:
            try:
                if not self._is_checked and sha256_of(self.path) != self.path.stem:
                    return None
                self._is_checked = True
                file = safe_open(self.path, "pt")
                self._opened = file, _Index.of(file)
            except (FileNotFoundError, SafetensorError):
                return None
        file, index = self._opened
        return _unpack(file, index, at)

    def close(self) -> None:
        self._opened = None


# --- tensors of several documents, one after the other ----------------------------------------------------------------

_PER_DOCUMENT = ("ids", "spans", "features", "pictures")


@dataclass(frozen=True)
class _Index:
    """Where each document of a file is."""

    names: list[str | None]
    starts: dict[str, list[int]]
    """Of its rows in a tensor, by what is counted; one more than documents."""
    painted_before: list[int]
    """Pictures to be painted before each picture; one more than pictures."""

    @classmethod
    def of(cls, file: Any) -> "_Index":
        starts = {kind: _starts(file.get_tensor(f"{kind}_of_each")) for kind in _PER_DOCUMENT}
        return cls(json.loads(file.metadata()["names"]), starts, _starts(file.get_tensor("is_painted").int()))


def _starts(counts: Tensor) -> list[int]:
    return [0, *counts.cumsum(0).tolist()]


def _pack(documents: Mapping[int, TokenSequence]) -> tuple[dict[str, Tensor], list[str | None]]:
    sequences = list(documents.values())
    pictures = [picture for sequence in sequences for picture in sequence.pixels]
    counts = {
        "ids": [len(s) for s in sequences],
        "spans": [len(s.spans) for s in sequences],
        "features": [0 if s.features is None else len(s.features) for s in sequences],
        "pictures": [len(s.pixels) for s in sequences],
    }
    tensors = {
        "numbers": torch.tensor(list(documents)),
        "ids": torch.cat([s.ids for s in sequences]).int(),
        "is_target": torch.cat([s.is_target for s in sequences]),
        "spans": torch.tensor([_numbers_of(span) for s in sequences for span in s.spans], dtype=torch.int32),
        "is_painted": torch.tensor([picture.painted is not None for picture in pictures], dtype=torch.bool),
        **{f"{kind}_of_each": torch.tensor(each) for kind, each in counts.items()},
    }
    rows = {
        "features": [s.features for s in sequences if s.features is not None],
        "seen": [picture.seen[None] for picture in pictures],
        "painted": [picture.painted[None] for picture in pictures if picture.painted is not None],
    }
    tensors |= {name: torch.cat(each) for name, each in rows.items() if each}
    return tensors, [s.name for s in sequences]


def _unpack(file: Any, index: _Index, at: int) -> TokenSequence:
    first, last = ({kind: starts[at + step] for kind, starts in index.starts.items()} for step in (0, 1))

    def rows(name: str, kind: str) -> Tensor:
        return file.get_slice(name)[first[kind] : last[kind]]

    features = rows("features", "features") if last["features"] > first["features"] else None
    spans = tuple(map(_span_of, rows("spans", "spans").tolist()))
    pixels = tuple(_pixels(file, index, first["pictures"], last["pictures"]))
    return TokenSequence(rows("ids", "ids").long(), spans, rows("is_target", "ids"), index.names[at], features, pixels)


def _pixels(file: Any, index: _Index, first: int, last: int) -> Iterator[Pixels]:
    for number in range(first, last):
        (seen,) = file.get_slice("seen")[number : number + 1]
        before, after = index.painted_before[number : number + 2]
        painted = file.get_slice("painted")[before:after][0] if after > before else None
        yield Pixels(seen, painted)


def _numbers_of(span: Span) -> tuple[int, ...]:
    """Length, and what a picture has beside it; zeros for text."""
    if isinstance(span, TextSpan):
        return (span.length, 0, 0, 0, 0, 0)
    return (span.length, span.rows, span.cols, int(span.given), span.before, span.after)


def _span_of(numbers: list[int]) -> Span:
    length, rows, cols, given, before, after = numbers
    if not rows:
        return TextSpan(length)
    present = length if length < rows * cols else None
    return ImageSpan(rows, cols, present, bool(given), before, after)


def _bytes(sequence: TokenSequence) -> int:
    features = 0 if sequence.features is None else sequence.features.nbytes
    pictures = sum(p.seen.nbytes + (0 if p.painted is None else p.painted.nbytes) for p in sequence.pixels)
    return 5 * len(sequence) + features + pictures
