"""The units of work of a build: runs of records of one source. Each has an identity, made of what decides its result.

A unit that was done is found again by its identity. What changes its result changes its identity: the records it reads,
the settings of its source and of the stages, the size and age of its files and of those the settings name, and the
version of the code. Not so pictures that records name: start afresh after changing those. And not so the server that a
chat model runs on, or how it is asked there: the same model may be elsewhere tomorrow.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from weft.config import Config
from weft.data.sources import SOURCES, SourceConfig
from weft.data.sources.base import Unit, root_of
from weft.data.sources.picturebook_source import Picturebook
from weft.data.stage import Record
from weft.errors import UsageError

FORMAT = 2
"""Of what a unit leaves behind; another number, and nothing that was done before is used."""

_OF_SERVERS = (
    "base_url",
    "key_variable",
    "in_flight",
    "timeout",
    "attempts",
    "longest_wait",
    "failures_in_a_row",
    "max_requests",
    "max_tokens",
)
PASSING: Mapping[str, Any] = {"annotator": set(_OF_SERVERS), "cache": True}
"""Settings of a filter that decide nothing about the result. Addresses of servers are written nowhere."""


@dataclass(frozen=True)
class Share:
    """The part of the work that one of several machines does: every `world`-th unit, from number `rank` on."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"rank {self.rank} of {self.world} does not exist", fix="ranks count from 0 and end before --world"
            )


@dataclass(frozen=True)
class Chunk:
    """Units of one source and one format that one worker does in one go. This alone travels to a worker."""

    source: int
    units: tuple[Unit, ...]
    identity: str

    @property
    def format(self) -> str:
        return self.units[0].format

    @property
    def place(self) -> str:
        """File and line where it begins."""
        return f"{self.units[0].file}, line {self.units[0].first}"


@dataclass(frozen=True)
class Work:
    """Everything there is to do, in order."""

    chunks: tuple[Chunk, ...]
    skipped: tuple[tuple[int, Record], ...]
    """Files that were found and not read, by source."""


def plan_work(sources: Sequence[SourceConfig], filters: Sequence[Config], records: int, own: Collection[Path]) -> Work:
    """Ask every source for its units and join them to about so many records.

    Args:
        own: what the build itself writes; where it lies inside a source, it is no part of it.

    Raises:
        UsageError: a source holds nothing.
    """
    chunks: list[Chunk] = []
    skipped: list[tuple[int, Record]] = []
    for number, source in enumerate(sources):
        root = None if isinstance(source, Picturebook) else root_of(source.path).resolve()
        plan = SOURCES[source.kind].plan(source)
        skipped += [(number, record) for record in plan.skipped if root is None or root / record.file not in own]
        identities = _Identities(source, filters, root)
        chunks += [Chunk(number, units, identities.of(units)) for units in _joined(plan.units, records)]
    return Work(tuple(chunks), tuple(skipped))


def _joined(units: Iterable[Unit], records: int) -> Iterator[tuple[Unit, ...]]:
    joined: list[Unit] = []
    number = 0
    for unit in units:
        more = unit.number or records  # of a file whose records were not counted: all that one worker is given
        if joined and (joined[0].format != unit.format or number + more > records):
            yield tuple(joined)
            joined, number = [], 0
        joined.append(unit)
        number += more
    if joined:
        yield tuple(joined)


class _Identities:
    def __init__(self, source: Config, filters: Sequence[Config], root: Path | None) -> None:
        settings = {
            "format": FORMAT,
            "version": importlib.metadata.version("weft"),
            "source": source.model_dump(mode="json"),
            "filters": [config.model_dump(mode="json", exclude=PASSING) for config in filters],
            "files": [
                _stamp(path) for config in (source, *filters) for path in _paths(config.model_dump(exclude=PASSING))
            ],
        }
        self._base = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        self._root, self._stamps = root, dict[str, Any]()

    def of(self, units: Sequence[Unit]) -> str:
        digest = self._base.copy()
        digest.update(json.dumps([[*astuple(unit), self._stamp_of(unit.file)] for unit in units]).encode())
        return digest.hexdigest()[:32]

    def _stamp_of(self, file: str) -> Any:
        if self._root is not None and file not in self._stamps:
            # units of a file follow each other: one is enough to remember
            self._stamps = {file: _stamp(self._root / file)}
        return self._stamps.get(file)


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _paths(inner)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and age of a file; None for what is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns) if file.is_file() else None
