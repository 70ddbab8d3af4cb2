"""Reading the records of a case, and what came of it."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tests.data.records import instructions, stories, web
from tests.data.records.case import Case, Good
from weft.data.sources import SOURCES, SourceConfig
from weft.data.stage import Processed, run_stages
from weft.document import Document, Text

CASES: dict[str, Case] = {**web.CASES, **stories.CASES, **instructions.CASES}
ADAPTER: TypeAdapter[Any] = TypeAdapter(SourceConfig)


def config_of(case: Case, folder: Path, **changes: Any) -> Any:
    source = {"kind": case.kind, "path": str(folder), **case.config, **changes}
    return ADAPTER.validate_python(source)


def read(case: Case, folder: Path, **changes: Any) -> list[Processed]:
    """Every record of the folder; the sums hold."""
    config = config_of(case, folder, **changes)
    source, items = SOURCES[case.kind], []
    for unit in source.plan(config).units:
        for record in source.read(config, unit):
            items.append(run_stages(record, ()))
    for item in items:
        assert item.record.read == sum((drop.count for drop in item.drops), item.kept)
    return items


def shown(document: Document) -> Good:
    turns = [(turn.role, [p.text if isinstance(p, Text) else p.data for p in turn.parts]) for turn in document.turns]
    return document.id, turns


def kept(items: list[Processed]) -> list[Good]:
    return [shown(item.document) for item in items if item.document is not None]


def drops(items: list[Processed]) -> list[tuple[str, str]]:
    return [(drop.loss.what, drop.loss.reason) for item in items for drop in item.drops]
