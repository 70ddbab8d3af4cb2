"""Sources -> stages -> a dataset, with every dropped record, text and picture in its ledger.

The work is cut into units. What each came to is kept in a folder beside the dataset until all of them are merged: a
build that was killed goes on where it was, and several machines share one. The dataset appears at the end, as a whole.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from weft.atomic import verify_folder, write_folder, write_json, write_text
from weft.config import Config
from weft.data.attempts import work_off
from weft.data.card import card, made_on
from weft.data.commit import UNIQUE, Merged, merge, same_id
from weft.data.executor import ExecutorConfig
from weft.data.executors import open_executor
from weft.data.filters import DEFAULT, FilterConfig
from weft.data.filters.order import Order, ordered
from weft.data.ledger import Tally
from weft.data.parts import QUARANTINE, WorkFolder
from weft.data.shards import CARD, SUMMARY, times_of
from weft.data.sources import SOURCES, SourceConfig
from weft.data.sources.base import Unit
from weft.data.sources.picturebook_source import Picturebook
from weft.data.stage import Processed, Record, drop_record, run_stages, run_window
from weft.data.units import PASSING, Share, Work, plan_work
from weft.data.worker import Worker, stages_of, window_of, windows
from weft.errors import CheckpointError, UsageError


class BuildConfig(Config):
    """A recipe of `weft data build`."""

    sources: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    """Where documents come from, in this order."""
    filters: tuple[FilterConfig, ...] = DEFAULT
    """Which are kept."""
    order: Order = "given"
    """In which order filters run: as `given` here, the `cheapest` first, or as the `paper` has them."""
    executor: ExecutorConfig = ExecutorConfig()
    out: Path | None = None
    """The folder to make; a dataset that is there is replaced."""

    @property
    def stages(self) -> tuple[FilterConfig, ...]:
        """The filters, in the order in which they run."""
        return ordered(self.filters, self.order)

    @pydantic.field_validator("filters")
    @classmethod
    def _once(cls, filters: tuple[FilterConfig, ...]) -> tuple[FilterConfig, ...]:
        kinds = [config.kind for config in filters]
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind of filter is there twice")
        return filters


@dataclass(frozen=True)
class Source:
    """One source and one format, with what came of it."""

    number: int
    format: str
    tally: Tally


@dataclass(frozen=True)
class Progress:
    """How far a build, or a rank's share of it, is."""

    tally: Tally
    done: int
    units: int


@dataclass(frozen=True)
class Summary:
    """What a build did; `weft data build` prints it and the dataset keeps it."""

    total: Tally
    sources: tuple[Source, ...]
    quarantined: tuple[dict[str, Any], ...]
    """What the ledger says of records and units that were set aside because the work on them failed."""
    stages: tuple[str, ...]
    fingerprint: str
    files: tuple[str, ...]
    config: dict[str, Any]

    @property
    def skipped(self) -> dict[str, int]:
        """Files that were found and not read, by reason."""
        return {reason: n for (_, what, reason), n in self.total.reasons.items() if what == "file"}

    def to_json(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "files": self.files,
            **self.total.to_json(),
            "sources": [
                {"source": source.number, "format": source.format, **source.tally.to_json()} for source in self.sources
            ],
            "stages": self.total.funnel(self.stages),
            "skipped_files": self.skipped,
            "quarantined": self.quarantined,
            "config": self.config,
        }


OnProgress = Callable[[Progress], None]


def build(
    config: BuildConfig, out: Path, *, fresh: bool = False, on_progress: OnProgress = lambda progress: None
) -> Summary:
    """Write the dataset `out`, whole or not at all. The same input gives the same bytes, whoever does the work.

    What an unfinished build of the same thing has done is not done again. Work that fails is set aside (`Summary.
    quarantined`), and the work folder is kept then, so that a second call tries only that again.

    Args:
        fresh: forget what an unfinished build has done.
        on_progress: called after every unit of work.

    Raises:
        UsageError: a source holds nothing, `out` must not be replaced, or another build is at it.
        WeftError: too much of the work fails.
    """
    folder = _folder(config, out)
    with folder.locked():
        if fresh:
            folder.forget()
        work = _plan(config, folder)
        _do(config, work, folder, Share(), on_progress)
        return _finish(config, work, folder, out)


def work_share(
    config: BuildConfig, out: Path, share: Share, *, on_progress: OnProgress = lambda progress: None
) -> Progress:
    """Do one machine's share of the work for `out`. When all are done, `commit` makes the dataset.

    Raises:
        UsageError: as `build`.
        WeftError: as `build`.
    """
    folder = _folder(config, out)
    with folder.locked(share):
        return _do(config, _plan(config, folder), folder, share, on_progress)


def commit(config: BuildConfig, out: Path) -> Summary:
    """Make the dataset of what all machines did.

    Raises:
        UsageError: something was not done, or a machine is still at it.
    """
    folder = _folder(config, out)
    with folder.locked():
        return _finish(config, _plan(config, folder), folder, out)


def process(config: BuildConfig) -> Iterator[tuple[int, Unit | None, list[Processed]]]:
    """Every record after all stages, by source and unit, in order, and nothing is written: for a look at little data.

    Skipped files come first, without a unit.
    """
    plans = [SOURCES[source.kind].plan(source) for source in config.sources]
    for number, plan in enumerate(plans):
        if plan.skipped:
            yield number, None, [run_stages(record, ()) for record in plan.skipped]
    stages = stages_of(config.stages)
    firsts: dict[str, Record] = {}
    for number, (source, plan) in enumerate(zip(config.sources, plans, strict=True)):
        for unit in plan.units:
            items: list[Processed] = []
            for _, records in windows(SOURCES[source.kind].read(source, unit), window_of(stages)):
                items += [_unique(item, firsts) for item in run_window(records, stages)]
            yield number, unit, items


def check_replaceable(out: Path, sources: Iterable[Path]) -> None:
    """Raise `UsageError` if making `out` would delete what is no dataset, or a source."""
    if any(source.resolve().is_relative_to(out.resolve()) for source in sources):
        raise UsageError("the output folder holds a source", where=str(out), fix="name another folder with --out")
    if out.is_dir() and any(out.iterdir()):
        try:
            verify_folder(out)
            replaceable = (out / SUMMARY).is_file()
        except CheckpointError:
            replaceable = False
        if not replaceable:
            raise UsageError(
                "the output folder exists and is no dataset", where=str(out), fix="name a new folder with --out"
            )
    elif out.exists() and not out.is_dir():
        raise UsageError("the output is a file", where=str(out), fix="name a folder with --out")


def _folder(config: BuildConfig, out: Path) -> WorkFolder:
    made_on()  # a wrong date is told before the work, not after it
    check_replaceable(out, [source.path for source in config.sources if not isinstance(source, Picturebook)])
    return WorkFolder(out)


def _plan(config: BuildConfig, folder: WorkFolder) -> Work:
    return plan_work(config.sources, config.stages, config.executor.records, folder.own)


def _do(config: BuildConfig, work: Work, folder: WorkFolder, share: Share, on_progress: OnProgress) -> Progress:
    chunks = work.chunks[share.rank :: share.world]
    total, left = Tally(), []
    for chunk in chunks:
        part = None if folder.retry(chunk.identity) else folder.part(chunk.identity)
        if part is None:
            left.append(chunk)
        else:
            total.merge(part.tally)
    done = len(chunks) - len(left)
    if not left:
        return Progress(total, done, len(chunks))
    executor = config.executor
    worker = Worker(config.sources, config.stages, folder, executor.record_seconds, executor.kind != "serial")
    with open_executor(executor, worker) as workers:
        for end in work_off(workers, left, executor, folder):
            done += 1
            if end.result is not None:
                total.merge(end.result.tally)
            on_progress(Progress(total, done, len(chunks)))
    return Progress(total, done, len(chunks))


def _finish(config: BuildConfig, work: Work, folder: WorkFolder, out: Path) -> Summary:
    with write_folder(out) as staging:
        merged = merge(work, folder, staging)
        summary = _summary(config, merged)
        write_json(staging / SUMMARY, summary.to_json())
        write_text(staging / CARD, card(summary.to_json(), staging))
    write_json(times_of(out), {step: round(seconds, 3) for step, seconds in sorted(merged.seconds.items())})
    if not merged.quarantined:
        folder.remove()
    return summary


def _summary(config: BuildConfig, merged: Merged) -> Summary:
    filters = [filter.kind for filter in config.stages]
    set_aside = [QUARANTINE] if merged.quarantined else []
    stages = ("read", *set_aside, *filters, "size", UNIQUE)
    merged.total.check(stages)
    return Summary(
        merged.total,
        tuple(Source(*key, tally) for key, tally in merged.sources.items()),
        tuple(merged.quarantined),
        stages,
        merged.fingerprint,
        merged.files,
        # who did the work, and where to, changes nothing
        config.model_dump(mode="json", exclude={"executor": True, "out": True, "filters": {"__all__": PASSING}}),
    )


def _unique(item: Processed, firsts: dict[str, Record]) -> Processed:
    if item.document is None or item.document.id is None:
        return item
    first = firsts.setdefault(item.document.id, item.record)
    return item if first is item.record else drop_record(item, UNIQUE, same_id(first))
