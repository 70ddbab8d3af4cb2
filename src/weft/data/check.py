"""What is wrong with data, before training finds out: a dataset folder, or anything that `weft data build` reads."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.atomic import MANIFEST
from weft.data.build import BuildConfig, process
from weft.data.dataset import open_dataset
from weft.data.filters import DEFAULT, FILTERS
from weft.data.sources.auto import Auto
from weft.data.stage import Count, Loss, Processed, Record, count, run_stages
from weft.errors import CheckpointError


@dataclass(frozen=True)
class Problem:
    where: str
    reason: str
    message: str


@dataclass(frozen=True)
class Report:
    read: Count
    problems: tuple[Problem, ...]
    skipped: int
    """Files beside the data that were not read."""

    def to_json(self) -> dict[str, Any]:
        problems = [asdict(problem) for problem in self.problems]
        return {"ok": not problems, "read": asdict(self.read), "problems": problems, "skipped_files": self.skipped}


def check(path: Path) -> Report:
    """Read everything at `path` and decode every picture.

    Raises:
        UsageError: there is nothing to read.
    """
    read, problems, skipped = Count(), [], 0
    for item in items_of(path):
        read += item.record.read
        for drop in item.drops:
            if drop.loss.what == "file":
                skipped += 1
            else:
                line = f", line {drop.line}" if drop.line else ""
                at = f", {drop.loss.field}" if drop.loss.field else ""
                problems.append(Problem(f"{drop.file}{line}{at}", drop.loss.reason, drop.loss.message))
    return Report(read, tuple(problems), skipped)


def items_of(path: Path) -> Iterator[Processed]:
    """Every record at `path` after the default filters, of a dataset as of a source."""
    if (path / MANIFEST).is_file():
        yield from _dataset(path)
    else:
        for _, _, items in process(BuildConfig(sources=(Auto(path=path),))):
            yield from items


def _dataset(path: Path) -> Iterator[Processed]:
    try:
        dataset = open_dataset(path)
    except CheckpointError as error:
        loss = Loss("record", "damaged_file", error.what)
        yield run_stages(Record(error.where or str(path), None, None, Count(), (loss,)), ())
        return
    stages = [(config.kind, FILTERS[config.kind](config)) for config in DEFAULT]
    for i in range(len(dataset)):
        document = dataset[i]
        yield run_stages(Record(f"document {document.id}", None, document, count(document)), stages)
