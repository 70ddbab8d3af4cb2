"""Sources -> stages -> a dataset, with every dropped record, text and picture in its ledger."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from weft.atomic import sha256_of, verify_folder, write_folder, write_json, write_text
from weft.config import Config
from weft.data.executor import ExecutorConfig, run
from weft.data.filters import DEFAULT, FILTERS, FilterConfig
from weft.data.ledger import Tally
from weft.data.shards import CARD, LEDGER, SUMMARY, ShardWriter, fingerprint_of
from weft.data.sources import SOURCES, SourceConfig
from weft.data.sources.base import Plan, Unit
from weft.data.sources.picturebook_source import Picturebook
from weft.data.stage import Drop, Loss, Outcome, Processed, drop_record, run_stages
from weft.document import Document
from weft.errors import CheckpointError, UsageError

MAX_PICTURES = 512 * 2**20
"""Bytes of one document's pictures: a document is held in memory whole."""


class BuildConfig(Config):
    """A recipe of `weft data build`."""

    sources: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    """Where documents come from, in this order."""
    filters: tuple[FilterConfig, ...] = DEFAULT
    """Which are kept."""
    executor: ExecutorConfig = ExecutorConfig()
    out: Path | None = None
    """The folder to make; a dataset that is there is replaced."""

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
class Summary:
    """What a build did; `weft data build` prints it and the dataset keeps it."""

    total: Tally
    sources: tuple[Source, ...]
    skipped: dict[str, int]
    """Files that were found and not read, by reason."""
    stages: tuple[str, ...]
    fingerprint: str
    files: tuple[str, ...]
    config: dict[str, Any]

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
            "config": self.config,
        }


def build(config: BuildConfig, out: Path, *, on_progress: Callable[[Tally], None] = lambda tally: None) -> Summary:
    """Write the dataset `out`, whole or not at all. The same input gives the same bytes, whoever does the work.

    Args:
        on_progress: called with the counts so far, after every unit of work.

    Raises:
        UsageError: a source holds nothing, or `out` must not be replaced.
    """
    check_replaceable(out, [source.path for source in config.sources if not isinstance(source, Picturebook)])
    units = process(config)  # plans, so before the unfinished output is there to be found
    total, skipped = Tally(), dict[str, int]()
    sources: dict[tuple[int, str], Source] = {}
    with write_folder(out) as staging:
        writer = ShardWriter(staging)
        try:
            with open(staging / LEDGER, "w", encoding="utf-8") as ledger:
                for number, unit, items in units:
                    for item in items:
                        for drop in item.drops:
                            ledger.write(_line(number, unit, drop))
                            if drop.loss.what == "file":
                                skipped[drop.loss.reason] = skipped.get(drop.loss.reason, 0) + 1
                        if item.document is not None:
                            writer.add(item.document)
                        total.add(item)
                        if unit is not None:
                            key = number, unit.format
                            sources.setdefault(key, Source(number, unit.format, Tally())).tally.add(item)
                    on_progress(total)
        except BaseException:
            writer.abort()
            raise
        files = writer.close()
        total.check()
        summary = Summary(
            total,
            tuple(sources.values()),
            skipped,
            ("read", *(filter.kind for filter in config.filters), "size", "unique"),
            fingerprint_of(map(sha256_of, files)),
            tuple(file.name for file in files),
            # who did the work, and where to, changes nothing
            config.model_dump(mode="json", exclude={"executor", "out"}),
        )
        write_json(staging / SUMMARY, summary.to_json())
        write_text(staging / CARD, _card(summary))
    return summary


def process(config: BuildConfig) -> Iterator[tuple[int, Unit | None, list[Processed]]]:
    """Every record after all stages, by source and unit of work, in order. Skipped files come first, without a unit."""
    return _process(config, [SOURCES[source.kind].plan(source) for source in config.sources])


def _process(config: BuildConfig, plans: list[Plan]) -> Iterator[tuple[int, Unit | None, list[Processed]]]:
    for number, plan in enumerate(plans):
        if plan.skipped:
            yield number, None, [run_stages(record, ()) for record in plan.skipped]
    tasks = [(number, unit) for number, plan in enumerate(plans) for unit in plan.units]
    work = functools.partial(_work, config.sources, config.filters)
    seen: dict[str, str] = {}
    for (number, unit), items in zip(tasks, run(config.executor, work, tasks), strict=True):
        yield number, unit, [_unique(item, seen) for item in items]


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


def _work(
    sources: tuple[SourceConfig, ...], filters: tuple[FilterConfig, ...], task: tuple[int, Unit]
) -> list[Processed]:
    number, unit = task
    source = sources[number]
    stages = [*((config.kind, FILTERS[config.kind](config)) for config in filters), ("size", _fits)]
    return [run_stages(record, stages) for record in SOURCES[source.kind].read(source, unit)]


def _fits(document: Document) -> Outcome:
    size = sum(len(image.data or b"") for image in document.images)
    if size > MAX_PICTURES:
        return None, (Loss("record", "too_large", f"pictures of {size:,} bytes, more than {MAX_PICTURES:,}"),)
    return document, ()


def _unique(item: Processed, seen: dict[str, str]) -> Processed:
    if item.document is None or item.document.id is None:
        return item
    here = item.record.file + (f", line {item.record.line}" if item.record.line else "")
    first = seen.setdefault(item.document.id, here)
    if first is here:
        return item
    return drop_record(item, "unique", Loss("record", "duplicate_id", f"{first} has the same id", "id"))


def _line(number: int, unit: Unit | None, drop: Drop) -> str:
    place = {"source": number, "format": unit.format if unit else None}
    return json.dumps({**place, **drop.to_json()}, ensure_ascii=False) + "\n"


def _card(summary: Summary) -> str:
    kept, read = summary.total.kept, summary.total.read
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train-*.parquet\n---\n\n"
        f"Illustrated documents: {kept.records:,} of {read.records:,} records, {kept.texts:,} of {read.texts:,} texts, "
        f"{kept.images:,} of {read.images:,} images. What was dropped is in `{LEDGER}`, counts are in `{SUMMARY}`.\n"
    )
