"""How many records went into every stage of a build and came out; and which documents two builds disagree about."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.data.shards import LEDGER, SUMMARY, times_of
from weft.errors import UsageError

KEPT, UNKNOWN = "kept", "not read"


@dataclass(frozen=True)
class FunnelRow:
    stage: str
    records_in: int
    records_dropped: int
    images_in: int
    images_dropped: int
    reasons: dict[str, int]
    seconds: float | None
    """Of all workers; None where the folder does not say."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Change:
    """A document that one of two datasets holds and the other does not; each side says `kept` or what dropped it."""

    document: str
    first: str
    second: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def read_funnel(path: Path) -> list[FunnelRow]:
    """The stages of a dataset's build, in order.

    Raises:
        UsageError: `path` is no dataset.
    """
    summary = _summary(path)
    times = times_of(path)
    seconds = json.loads(times.read_bytes()) if times.is_file() else {}
    return [
        FunnelRow(
            row["stage"],
            row["in"]["records"],
            row["dropped"]["records"],
            row["in"]["images"],
            row["dropped"]["images"],
            row["reasons"],
            seconds.get(row["stage"]),
        )
        for row in summary["stages"]
    ]


def compare(first: Path, second: Path) -> list[Change]:
    """Documents that are in one dataset alone, in the order of the first. Those that neither holds are left out.

    Raises:
        UsageError: one of them is no dataset.
    """
    sides = [_fates(path) for path in (first, second)]
    found = []
    for document in {**sides[0], **sides[1]}:
        fates = [side.get(document, UNKNOWN) for side in sides]
        if fates.count(KEPT) == 1:
            found.append(Change(document, *fates))
    return found


def _fates(path: Path) -> dict[str, str]:
    """By id: kept, or stage and reason."""
    _summary(path)
    # what was dropped first: of documents with the same id one was kept
    return {**dict(_dropped(path)), **dict.fromkeys(_kept(path), KEPT)}


def _kept(path: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    for file in sorted(path.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(columns=["id"]):
            yield from (identity for identity in batch.column(0).to_pylist() if identity is not None)


def _dropped(path: Path) -> Iterator[tuple[str, str]]:
    with open(path / LEDGER, encoding="utf-8") as ledger:
        for line in ledger:
            entry = json.loads(line)
            if entry["what"] == "record" and entry["id"] is not None:
                yield entry["id"], f"{entry['stage']}: {entry['reason']}"


def _summary(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / SUMMARY).read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError("this is no dataset", where=str(path), fix="name a folder made by weft data build") from error
