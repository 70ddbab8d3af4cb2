"""The parts of a build, in order, become a dataset: global duplicates go, row groups and files get their size.

The bytes depend on the records and on what became of them, not on how they were cut into units or who did them.
"""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from weft.atomic import sha256_of
from weft.data.ledger import Tally, check_rows, entry_of, line_of
from weft.data.parts import QUARANTINE, Part, Rows, WorkFolder
from weft.data.shards import LEDGER, ShardWriter, fingerprint_of
from weft.data.stage import Count, Drop, Loss, Processed, Record, run_stages
from weft.data.units import Chunk, Work
from weft.errors import CheckpointError, UsageError, WeftError

UNIQUE = "unique"
"""The stage that sees all records: of those with the same id the first is kept."""


@dataclass
class Merged:
    """What a dataset was made of."""

    total: Tally = field(default_factory=Tally)
    sources: dict[tuple[int, str], Tally] = field(default_factory=dict)
    """By source and format."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """What the ledger says of records and units that were set aside."""
    seconds: Counter[str] = field(default_factory=Counter)
    """By step, all workers together."""
    files: tuple[str, ...] = ()
    fingerprint: str = ""

    def check(self, rows: int) -> None:
        """Raise `WeftError` unless everything that was read is in `rows` or was dropped, of each source and of all."""
        of_sources = Tally()
        for tally in self.sources.values():
            tally.check()
            of_sources.merge(tally)
        self.total.check()
        check_rows(rows, self.total)
        if (of_sources.read, of_sources.kept) != (self.total.read, self.total.kept):
            raise WeftError(f"the counts do not add up: {of_sources.read} of the sources, {self.total.read} in all")


def merge(work: Work, folder: WorkFolder, staging: Path) -> Merged:
    """Write the data files and the ledger of a dataset into the folder `staging`.

    Raises:
        UsageError: a unit was not done.
        CheckpointError: what a unit came to is damaged; it is gone then, and will be made again.
    """
    first_of = duplicates(identity for part in _parts(work.chunks, folder, check=True) for identity in part.ids())
    merge = _Merge(ShardWriter(staging), first_of)
    try:
        with open(staging / LEDGER, "wb") as ledger, tempfile.TemporaryFile(dir=folder.root) as at_the_end:
            for number, record in work.skipped:
                merge.add_skipped(number, record, ledger)
            for chunk in work.chunks:
                part = folder.part(chunk.identity)
                if part is None:
                    merge.add_missing(chunk, folder, ledger)
                else:
                    merge.add(chunk, part, ledger, at_the_end)
            at_the_end.seek(0)
            shutil.copyfileobj(at_the_end, ledger)
    except BaseException:
        merge.writer.abort()
        raise
    files = merge.writer.close()
    merge.result.check(merge.rows)
    merge.result.files = tuple(file.name for file in files)
    merge.result.fingerprint = fingerprint_of(map(sha256_of, files))
    return merge.result


def duplicates(ids: Iterable[str | None]) -> dict[int, int]:
    """The number of every id that was there before -> the number of the first one like it. None is like nothing.

    Takes 24 bytes an id while it runs.
    """
    import numpy as np

    digests = bytearray()
    for number, identity in enumerate(ids):
        key = f"{number}\0" if identity is None else f"={identity}"
        digests += hashlib.blake2b(key.encode(), digest_size=16).digest()
    keys = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first comes first
    is_same = np.all(keys[order[1:]] == keys[order[:-1]], axis=1)
    found: dict[int, int] = {}
    for i in np.flatnonzero(is_same):
        before, here = int(order[i]), int(order[i + 1])
        found[here] = found.get(before, before)
    return found


def same_id(first: Record) -> Loss:
    """Why a record goes that has the id of an earlier one."""
    here = first.file + (f", line {first.line}" if first.line else "")
    return Loss("record", "duplicate_id", f"{here} has the same id", "id")


def _parts(chunks: Iterable[Chunk], folder: WorkFolder, *, check: bool) -> Iterator[Part]:
    for chunk in chunks:
        part = folder.part(chunk.identity)
        if part is not None and check and not part.is_whole():
            folder.drop_part(chunk.identity)
            raise CheckpointError(
                "what a unit of work had come to is damaged, and was removed",
                where=f"{folder.root}, unit of {chunk.place}",
                fix="run the same command again: only that is done again",
            )
        if part is not None:
            yield part


class _Merge:
    def __init__(self, writer: ShardWriter, first_of: Mapping[int, int]) -> None:
        self.writer, self.result = writer, Merged()
        self._first_of = first_of
        self._firsts: dict[int, Record | None] = dict.fromkeys(first_of.values())
        self._row = 0
        self.rows = 0
        """Written so far."""

    def add_skipped(self, number: int, record: Record, ledger: IO[bytes]) -> None:
        item = run_stages(record, ())
        self.result.total.add(item)
        for drop in item.drops:
            ledger.write(line_of(entry_of(drop, number, None)))

    def add_missing(self, chunk: Chunk, folder: WorkFolder, ledger: IO[bytes]) -> None:
        entry = folder.quarantined(chunk.identity)
        if entry is None:
            raise UsageError(
                f"the unit of {chunk.place} was not done",
                where=str(folder.root),
                fix="run every rank to its end, or build without --rank, and then commit",
            )
        last = entry["set_aside"][-1]
        loss = Loss("unit", last["reason"], last["message"])
        drop = Drop(loss, QUARANTINE, chunk.units[0].file, chunk.units[0].first, None, Count())
        item = Processed(Record(drop.file, drop.line, None, Count()), None, (drop,))
        for tally in self._tallies(chunk):
            tally.add(item)
        self.result.quarantined.append(entry_of(drop, chunk.source, chunk.format))
        ledger.write(line_of(self.result.quarantined[-1]))

    def add(self, chunk: Chunk, part: Part, ledger: IO[bytes], at_the_end: IO[bytes]) -> None:
        for tally in self._tallies(chunk):
            tally.merge(part.tally)
        self.result.seconds.update(part.seconds)
        self.result.quarantined += part.quarantined
        with open(part.ledger, "rb") as lines:
            shutil.copyfileobj(lines, ledger)
        for rows in part.rows():
            rows = self._unique(rows, chunk, at_the_end)
            self.writer.add(rows.columns, rows.sizes)
            self.rows += len(rows)

    def _unique(self, rows: Rows, chunk: Chunk, ledger: IO[bytes]) -> Rows:
        numbers = range(self._row, self._row + len(rows))
        self._row = numbers.stop
        twice = []
        for i, number in enumerate(numbers):
            if number in self._firsts:
                self._firsts[number] = rows[i]
            elif number in self._first_of:
                twice.append(i)
                first = self._firsts[self._first_of[number]]
                assert first is not None  # it came before
                record = rows[i]
                drop = Drop(same_id(first), UNIQUE, record.file, record.line, rows.id(i), record.read)
                for tally in self._tallies(chunk):
                    tally.take_back(Processed(record, None, (drop,)))
                ledger.write(line_of(entry_of(drop, chunk.source, chunk.format)))
        return rows.without(twice) if twice else rows

    def _tallies(self, chunk: Chunk) -> tuple[Tally, Tally]:
        return self.result.total, self.result.sources.setdefault((chunk.source, chunk.format), Tally())
