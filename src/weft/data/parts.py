"""The work folder of a build, `.OUT.building` beside OUT: what every unit of work came to, whole or not at all.

parts/IDENTITY/          rows.arrow, ledger.jsonl, and manifest.json with their hashes and all counts
quarantine/IDENTITY.json what was set aside, and why
running/IDENTITY         the record that a worker is at, and where it hung
lock  rank-R-of-W.lock   held by those who write here

A part appears by renaming its folder. Its files are not forced to the disk: after a power failure one that is not whole
differs from its manifest, and is made again.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from weft.atomic import MANIFEST, clean_leftovers, remove, sha256_of, write_json
from weft.data.ledger import Tally, check_rows, entry_of, line_of
from weft.data.shards import LEDGER, ROW_BYTES, ROWS, SCHEMA, size_of, times_of, to_columns
from weft.data.stage import Count, Processed, Record
from weft.data.units import Chunk, Share
from weft.document import Document
from weft.errors import UsageError

QUARANTINE = "quarantine"
"""The stage under which the ledger files what was set aside because the work on it failed."""

_ROWS_FILE = "rows.arrow"
_SIZE = "_size"
_COUNTS = [(name, pa.int64()) for name in ("_texts", "_images", "_added")]
_ORIGIN = pa.schema([("_file", pa.string()), ("_line", pa.int64()), *_COUNTS])
"""Where a document comes from and what it holds, so that nobody has to make it again to know."""
_PLACE = pa.schema([(_SIZE, pa.int64()), *_ORIGIN])
_PART_SCHEMA = pa.schema([*SCHEMA, *_PLACE])
_LOCK = "lock"
_GRACE = 30.0
"""Seconds that a rank waits for the other ranks, which look whether a build runs."""


class WorkFolder:
    """Where the work for the dataset `out` is kept until it is a dataset."""

    def __init__(self, out: Path) -> None:
        out = out.resolve()
        self._out = out
        self.root = out.parent / f".{out.name}.building"
        self._parts, self._quarantine, self._running = (self.root / name for name in ("parts", "quarantine", "running"))

    @property
    def own(self) -> tuple[Path, ...]:
        """Hidden files and folders beside the dataset that come and go with its builds."""
        return self.root, times_of(self._out)

    @contextlib.contextmanager
    def locked(self, share: Share | None = None) -> Iterator[None]:
        """Hold the folder, alone or as one rank of several; what killed builds left unfinished is removed.

        Raises:
            UsageError: another build, or another one with this rank, holds it.
        """
        self._make()
        with contextlib.ExitStack() as locks:
            if share is None:
                locks.enter_context(self._lock(_LOCK))
                for rank in sorted(self.root.glob("rank-*.lock")):
                    locks.enter_context(self._lock(rank.name))
                self._clean_leftovers()
                locks.callback(self._remove_if_empty)
            else:
                locks.enter_context(self._lock(f"rank-{share.rank:05d}-of-{share.world:05d}.lock"))
                # other ranks look too, and hold it for a moment
                with self._lock(_LOCK, timeout=_GRACE):
                    pass
            yield

    def remove(self) -> None:
        """Forget all work, in one step."""
        grave = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.", suffix=".old", dir=self.root.parent))
        os.replace(self.root, grave / "content")
        shutil.rmtree(grave)

    def forget(self) -> None:
        """Start afresh, keeping the locks."""
        for folder in (self._parts, self._quarantine, self._running):
            shutil.rmtree(folder)
        self._make()

    @contextlib.contextmanager
    def write(self, chunk: Chunk) -> Iterator["PartWriter"]:
        """Make a part; it is there when the block ends without an error."""
        identity = chunk.identity
        staging = Path(tempfile.mkdtemp(prefix=f".{identity}.", suffix=".part", dir=self._parts))
        try:
            with PartWriter(staging, chunk) as part:
                yield part
            # a worker that was given up may have made it meanwhile: both are the same
            if self.part(identity) is None:
                self.drop_part(identity)
                os.rename(staging, self._parts / identity)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def part(self, identity: str) -> "Part | None":
        """What a unit came to, if it was done; its files have the sizes that its manifest says."""
        folder = self._parts / identity
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        except (OSError, ValueError):
            return None
        if sizes != {name: entry["bytes"] for name, entry in manifest["files"].items()}:
            return None
        return Part(folder, manifest)

    def drop_part(self, identity: str) -> None:
        shutil.rmtree(self._parts / identity, ignore_errors=True)

    def set_aside(self, identity: str, entry: Mapping[str, Any]) -> None:
        write_json(self._quarantine / f"{identity}.json", dict(entry))

    def quarantined(self, identity: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self._quarantine / f"{identity}.json").read_bytes()))
        except FileNotFoundError:
            return None

    def retry(self, identity: str) -> bool:
        """Forget that something of a unit was set aside, with what was made of the rest; whether anything was."""
        entry = self._quarantine / f"{identity}.json"
        if not entry.exists():
            return False
        self.drop_part(identity)
        entry.unlink()
        return True

    @property
    def quarantine(self) -> Path:
        return self._quarantine

    def running(self, identity: str) -> Path:
        return self._running / identity

    def _make(self) -> None:
        for folder in (self._parts, self._quarantine, self._running):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str, timeout: float = 0) -> Iterator[None]:
        lock = FileLock(self.root / name)
        try:
            lock.acquire(timeout=timeout)
        except Timeout as error:
            raise UsageError(
                "another build is writing this dataset",
                where=str(self._out),
                fix="wait until it ends, or name another folder with --out",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _clean_leftovers(self) -> None:
        """Nobody else is here: whatever is unfinished was left by the dead."""
        clean_leftovers(self._parts)
        clean_leftovers(self.root.parent, self._out.name)
        for running in self._running.iterdir():
            remove(running)

    def _remove_if_empty(self) -> None:
        folders = (self._parts, self._quarantine)
        if self.root.is_dir() and not any(any(folder.iterdir()) for folder in folders):
            self.remove()


class PartWriter:
    """Writes the rows and the ledger of a unit of work; at most a row group is in memory."""

    def __init__(self, folder: Path, chunk: Chunk) -> None:
        # the first array of a process loads pandas, where it is installed: seconds that are not the first record's
        pa.array([])
        self._folder, self._chunk = folder, chunk
        self._ledger = open(folder / LEDGER, "wb")  # noqa: SIM115 - closed in __exit__
        self._sink = pa.OSFile(str(folder / _ROWS_FILE), "wb")
        self._writer = pa.ipc.new_file(self._sink, _PART_SCHEMA)
        self._rows: list[tuple[Document, int, str, int | None, int, int, int]] = []
        """Documents, and what `_PLACE` says of each."""
        self._bytes = self._written = 0
        self.tally = Tally()
        self.seconds: dict[str, float] = {}
        """By step; to be set before the end."""
        self._quarantined: list[dict[str, Any]] = []

    def add(self, item: Processed) -> None:
        self.tally.add(item)
        for drop in item.drops:
            entry = entry_of(drop, self._chunk.source, self._chunk.format)
            self._ledger.write(line_of(entry))
            if drop.stage == QUARANTINE:
                self._quarantined.append(entry)
        if item.document is None:
            return
        size, kept, record = size_of(item.document), item.kept, item.record
        self._rows.append((item.document, size, record.file, record.line, kept.texts, kept.images, record.added))
        self._bytes += size
        if len(self._rows) == ROWS or self._bytes >= ROW_BYTES:
            self._flush()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            # on a full disk the ends cannot be written either; the first error is the one to tell
            for closing in (self._ledger.close, self._writer.close, self._sink.close):
                with contextlib.suppress(OSError):
                    closing()
            return
        self._flush()
        self._writer.close()
        self._sink.close()
        self._ledger.close()
        self.tally.check()
        check_rows(self._written, self.tally)
        files = {
            name: {"bytes": (self._folder / name).stat().st_size, "sha256": sha256_of(self._folder / name)}
            for name in (_ROWS_FILE, LEDGER)
        }
        manifest = {
            "files": files,
            "tally": self.tally.to_state(),
            "seconds": self.seconds,
            "quarantined": self._quarantined,
        }
        with open(self._folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file)

    def _flush(self) -> None:
        if self._rows:
            documents, *others = zip(*self._rows, strict=True)
            places = [pa.array(values, field.type) for values, field in zip(others, _PLACE, strict=True)]
            columns = [*to_columns(documents), *places]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_PART_SCHEMA))
            self._written += len(self._rows)
        self._rows, self._bytes = [], 0


class Part:
    """What a unit of work came to."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder, self._files = folder, manifest["files"]
        self.tally = Tally.from_state(manifest["tally"])
        self.seconds: dict[str, float] = manifest["seconds"]
        """By step."""
        self.quarantined: list[dict[str, Any]] = manifest["quarantined"]
        """What the ledger says of records that were set aside."""

    @property
    def ledger(self) -> Path:
        return self._folder / LEDGER

    def is_whole(self) -> bool:
        return all(sha256_of(self._folder / name) == entry["sha256"] for name, entry in self._files.items())

    def ids(self) -> Iterator[str | None]:
        for batch in self._batches(pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index("id")])):
            yield from batch.column(0).to_pylist()

    def rows(self) -> Iterator["Rows"]:
        return (Rows(batch) for batch in self._batches(pa.ipc.IpcReadOptions()))

    def _batches(self, options: pa.ipc.IpcReadOptions) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self._folder / _ROWS_FILE)) as source, pa.ipc.open_file(source, options=options) as reader:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


class Rows:
    """Some documents of a part."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    @property
    def columns(self) -> pa.RecordBatch:
        """Those of the dataset."""
        return self._batch.select(SCHEMA.names)

    @property
    def sizes(self) -> list[int]:
        return list(self._batch.column(_SIZE).to_pylist())

    def without(self, rows: Iterable[int]) -> "Rows":
        kept = sorted(set(range(len(self))).difference(rows))
        return Rows(self._batch.take(pa.array(kept, pa.int64())))

    def id(self, row: int) -> str | None:
        identity: str | None = self._batch.column("id")[row].as_py()
        return identity

    def __getitem__(self, row: int) -> Record:
        """Of one of them, what it was read as, without the document."""
        file, line, texts, images, added = (self._batch.column(name)[row].as_py() for name in _ORIGIN.names)
        return Record(file, line, None, Count(1, texts, images), added=added)
