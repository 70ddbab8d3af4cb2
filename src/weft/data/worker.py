"""One worker: reads a unit of work, takes its records through the stages, and writes what came of it.

Only the unit comes in and only counts go out. A record that cannot be worked on costs an attempt at its unit: it
raises, takes too long, or takes the process with it. A file of the work folder says which record it was, should nobody
be left to say so.
"""

import errno
import faulthandler
import functools
import gc
import itertools
import mmap
import signal
import struct
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from weft.data.filters import FILTERS, FilterConfig
from weft.data.filters.removal import rejected
from weft.data.ledger import Tally
from weft.data.parts import QUARANTINE, WorkFolder
from weft.data.shards import size_of
from weft.data.sources import SOURCES, SourceConfig
from weft.data.stage import (
    Loss,
    Outcome,
    Processed,
    Record,
    Stages,
    Together,
    drop_record,
    run_stages,
    run_window,
)
from weft.data.units import Chunk
from weft.document import Document
from weft.llm import LLMError

MAX_PICTURES = 512 * 2**20
"""Bytes of one document's pictures: a document is held in memory whole."""
WINDOW, WINDOW_BYTES = 64, 64 * 2**20
"""Documents that stages take together: at most so many, and as many as reach so many bytes."""

Failing = Literal["raised", "timed_out", "died"]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Not a record's fault: the next one would fail the same way."""
_ORDINAL = struct.Struct("<q")
_NOBODY = -1
_SLACK = 1.0
"""Seconds: the clock of a hanging record is set anew no more often than this."""
_TIMED_OUT = "it took longer than executor.record_seconds"


@dataclass(frozen=True)
class Job:
    """A unit to be worked on."""

    chunk: Chunk
    skip: tuple[tuple[int, str, str], ...] = ()
    """Records not to be worked on any more: the number of each in the unit, from 0, and the reason and message that the
    ledger gives."""
    alone: bool = False
    """Take records one by one, so that a failure has a name."""


@dataclass(frozen=True)
class Done:
    tally: Tally


@dataclass(frozen=True)
class Failed:
    """An attempt that came to nothing."""

    reason: Failing
    message: str
    details: str
    """A traceback, where there is one."""
    ordinal: int | None
    """The number in its unit of the record at fault, where that is known."""


@dataclass(frozen=True)
class Worker:
    """Does jobs. Travels to other processes once, and makes the stages there, when the first job comes."""

    sources: tuple[SourceConfig, ...]
    filters: tuple[FilterConfig, ...]
    folder: WorkFolder
    record_seconds: float
    """What a record may take."""
    is_own_process: bool = True
    """Whether the process does nothing else: one that hangs is ended then, and else interrupted."""

    def __call__(self, job: Job) -> Done | Failed:
        """Do one job.

        Raises:
            WeftError: a stage cannot be made.
            OSError: the part cannot be written.
        """
        stages, identity = self._stages, job.chunk.identity
        watch = Watch(self.folder.running(identity), self.record_seconds, _Ending if self.is_own_process else _Alarm)
        try:
            with _uncollected(), watch, self.folder.write(job.chunk) as part:
                for item in _guarded(self._processed(job, stages, watch)):
                    watch.step("write")
                    part.add(item)
                part.seconds = watch.seconds
                return Done(part.tally)
        except _StageError as failure:
            error = failure.error
            return Failed("raised", f"{type(error).__name__}: {error}", _traceback(error), watch.ordinal)
        except _Overtime as error:
            return Failed("timed_out", _TIMED_OUT, _traceback(error), watch.ordinal)

    def _processed(self, job: Job, stages: Stages, watch: "Watch") -> Iterator[Processed]:
        skip = {ordinal: Loss("record", reason, message) for ordinal, reason, message in job.skip}
        most = 1 if job.alone else window_of(stages)
        watch.step("read")
        for first, records in windows(records_of(self.sources, job.chunk), most):
            watch.first = first
            if first in skip:
                yield drop_record(run_stages(records[0], ()), QUARANTINE, skip[first])
            else:
                yield from run_window(records, stages, watch.step)
            watch.step("read")

    @functools.cached_property
    def _stages(self) -> Stages:
        return stages_of(self.filters)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


class _StageError(Exception):
    """What a source or a stage raised, apart from what writing raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _guarded(items: Iterable[Processed]) -> Iterator[Processed]:
    try:
        yield from items
    except Exception as error:
        # a full disk, or a server that is gone, is no record's fault: work stops, and goes on here later
        if isinstance(error, LLMError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise
        raise _StageError(error) from error


def stages_of(filters: Iterable[FilterConfig]) -> Stages:
    return [*((config.kind, FILTERS[config.kind](config)) for config in filters), ("size", _fits)]


def records_of(sources: Sequence[SourceConfig], chunk: Chunk) -> Iterator[Record]:
    source = sources[chunk.source]
    return itertools.chain.from_iterable(SOURCES[source.kind].read(source, unit) for unit in chunk.units)


def window_of(stages: Stages) -> int:
    """How many records to take together: only stages that ask for it are worth the memory."""
    return WINDOW if any(isinstance(stage, Together) for _, stage in stages) else 1


def windows(records: Iterable[Record], most: int) -> Iterator[tuple[int, list[Record]]]:
    """Runs of records, and the number of the first of each."""
    window, size, first = list[Record](), 0, 0
    for record in records:
        window.append(record)
        if most > 1 and record.document is not None:
            size += size_of(record.document)
        if len(window) == most or size >= WINDOW_BYTES:
            yield first, window
            window, size, first = [], 0, first + len(window)
    if window:
        yield first, window


def _fits(document: Document) -> Outcome:
    size = sum([len(image.data or b"") for image in document.images])
    if size > MAX_PICTURES:
        return rejected("too_large", f"pictures of {size:,} bytes, more than {MAX_PICTURES:,}", size, MAX_PICTURES)
    return document, ()


class _Overtime(BaseException):
    """A record took too long. No `Exception`: whoever catches all that a decoder raises must not catch this."""


class _Ending:
    """Ends the process, wherever it hangs, and leaves a traceback."""

    def __init__(self, trace: Path) -> None:
        self._trace = open(trace, "w")  # noqa: SIM115 - closed in `close`

    def set(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._trace)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._trace.close()


class _Alarm:
    """Raises `_Overtime` where the process is, once Python has a chance to: a function in C must return first.

    Only a main thread can be interrupted, and not where somebody else has set the alarm: elsewhere there is no limit.
    """

    def __init__(self, trace: Path) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self._is_set = is_main and hasattr(signal, "SIGALRM") and not any(signal.getitimer(signal.ITIMER_REAL))
        if self._is_set:
            self._before = signal.signal(signal.SIGALRM, _interrupt)

    def set(self, seconds: float) -> None:
        if self._is_set:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def close(self) -> None:
        if self._is_set:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Overtime


class Watch:
    """Knows what a worker is at: to time the steps, to stop one that hangs, and to tell what a dead one was at."""

    def __init__(self, file: Path, limit: float, clock: type[_Ending | _Alarm]) -> None:
        self._file, self._limit, self._make_clock = file, limit, clock
        self.seconds: dict[str, float] = defaultdict(float)
        """By step."""
        self.first = 0
        """Number in its unit of the first record of the window."""
        self.ordinal: int | None = None
        """Number of the record that is being worked on; None: of several, or none."""
        self._step, self._since = "start", time.perf_counter()
        self._number, self._armed = 0, 0.0

    def step(self, step: str, place: int | None = None, number: int = 1) -> None:
        """Say what comes next: `OnStep`."""
        now = time.perf_counter()
        self.seconds[self._step] += now - self._since
        self._step, self._since = step, now
        ordinal = None if place is None else self.first + place
        if ordinal != self.ordinal:
            self.ordinal = ordinal
            _ORDINAL.pack_into(self._map, 0, _NOBODY if ordinal is None else ordinal)
        # to set the clock takes a thread: done once a second, it costs nothing
        if number != self._number or now - self._armed > _SLACK:
            self._clock.set(self._limit * number + _SLACK)
            self._number, self._armed = number, now

    def __enter__(self) -> "Watch":
        self._file.write_bytes(_ORDINAL.pack(_NOBODY))
        with open(self._file, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _ORDINAL.size)
        self._clock = self._make_clock(_trace_of(self._file))
        return self

    def __exit__(self, *error: object) -> None:
        self._clock.close()
        self._map.close()
        _remove(self._file)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles for the length of a unit: documents have none, and looking for them in all that
    is imported took a sixth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def post_mortem(file: Path, cause: str) -> Failed:
    """What a worker that is no more was at, by the file that its `Watch` kept."""
    try:
        (ordinal,) = _ORDINAL.unpack(file.read_bytes())
    except (FileNotFoundError, struct.error):
        ordinal = _NOBODY
    try:
        details = _trace_of(file).read_text(errors="replace")
    except FileNotFoundError:
        details = ""
    _remove(file)
    number = None if ordinal == _NOBODY else ordinal
    if details:
        return Failed("timed_out", _TIMED_OUT, details, number)
    return Failed("died", f"the worker process died: {cause}", details, number)


def _trace_of(file: Path) -> Path:
    return file.with_suffix(".trace")


def _remove(file: Path) -> None:
    for each in (file, _trace_of(file)):
        each.unlink(missing_ok=True)
