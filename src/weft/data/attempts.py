"""Units of work that fail are tried again, then lose the record at fault, and at last are set aside whole."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from weft.data.executor import Died, Executor, ExecutorConfig
from weft.data.parts import WorkFolder
from weft.data.units import Chunk
from weft.data.worker import Done, Failed, Job, post_mortem
from weft.errors import WeftError

MOST_RECORDS = 3
"""Records of one unit that may be set aside; where more fail, the unit is."""


@dataclass(frozen=True)
class Ended:
    """A unit that nobody will work on any more. Without a result it was set aside."""

    chunk: Chunk
    result: Done | None


def work_off(
    executor: Executor[Job, Done | Failed], chunks: Iterable[Chunk], config: ExecutorConfig, folder: WorkFolder
) -> Iterator[Ended]:
    """Work on every unit until it is done or set aside; as they end.

    Raises:
        WeftError: something was set aside in more units than `max_bad_units`; what was done stays done.
    """
    judge = _Judge(config, folder)
    jobs = (Job(chunk) for chunk in chunks)
    running = 0
    while True:
        for job in itertools.islice(jobs, executor.slots - running):
            executor.submit(job)
            running += 1
        if not running:
            return
        job, outcome = executor.next()
        running -= 1
        if isinstance(outcome, Died):
            outcome = post_mortem(folder.running(job.chunk.identity), outcome.cause)
        if isinstance(outcome, Done):
            yield Ended(job.chunk, outcome)
        elif (again := judge.after(job, outcome)) is not None:
            executor.submit(again)
            running += 1
        else:
            yield Ended(job.chunk, None)


class _Judge:
    """Decides what becomes of a unit that failed."""

    def __init__(self, config: ExecutorConfig, folder: WorkFolder) -> None:
        self._config, self._folder = config, folder
        self._failures: dict[str, Counter[int | None]] = {}
        self._entries: dict[str, list[dict[str, Any]]] = {}
        """What was set aside, by unit."""

    def after(self, job: Job, failed: Failed) -> Job | None:
        """The next attempt; None where there is none."""
        identity = job.chunk.identity
        failures = self._failures.setdefault(identity, Counter())
        failures[failed.ordinal] += 1
        if failures[failed.ordinal] < self._config.max_attempts:
            return replace(job, alone=True)
        is_record = failed.ordinal is not None and len(job.skip) < MOST_RECORDS
        self._set_aside(job.chunk, failed, is_record)
        if failed.ordinal is None or not is_record:
            return None
        return Job(job.chunk, (*job.skip, (failed.ordinal, failed.reason, failed.message)), alone=True)

    def _set_aside(self, chunk: Chunk, failed: Failed, is_record: bool) -> None:
        entries = self._entries.setdefault(chunk.identity, [])
        entries.append({"record": failed.ordinal if is_record else None, **asdict(failed)})
        self._folder.set_aside(chunk.identity, {"begins": chunk.place, "is_whole": not is_record, "set_aside": entries})
        if len(self._entries) > self._config.max_bad_units:
            raise WeftError(
                f"the work failed in {len(self._entries)} units, more than executor.max_bad_units; "
                f"at last in that of {chunk.place}: {failed.message}",
                where=str(self._folder.quarantine),
                fix="mend the cause and run the same command again: what was done is not done again",
            )
