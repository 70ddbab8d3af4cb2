"""One HTML page of a dataset, or of what would become one: documents with their pictures, and drops by reason.

The page holds everything it shows and loads nothing; data never becomes markup. A dataset holds nothing of what was
dropped: some of it is read again from the sources, where these are still there.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.atomic import MANIFEST, write_text
from weft.data.build import BuildConfig
from weft.data.check import items_of
from weft.data.dataset import open_dataset
from weft.data.shards import LEDGER, SUMMARY
from weft.data.sources import SOURCES, SourceConfig
from weft.data.sources.base import Unit
from weft.data.stage import Count
from weft.document import Document, Image, Text
from weft.errors import ImageError, UsageError
from weft.images import data_uri, decode_image, encode_png

_SIDE, _SIDE_OF_DROPS = 480, 200
"""Pictures are shown at most so many pixels wide and high."""
_PER_REASON = 20
_PICTURES, _CHARACTERS = 8, 300
"""Of a dropped document, so many pictures and so much of its text are shown."""


@dataclass
class _Dropped:
    entry: dict[str, Any]
    """Of the ledger."""
    document: Document | None = None
    """As it was read."""


@dataclass
class _Reason:
    stage: str
    what: str
    reason: str
    number: int = 0
    shown: list[_Dropped] = field(default_factory=list)


@dataclass
class _View:
    counts: dict[str, dict[str, int]]
    documents: list[Document] = field(default_factory=list)
    reasons: dict[tuple[str, str, str], _Reason] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    """In order, where that is known."""

    def add_drop(self, entry: dict[str, Any], document: Document | None = None) -> None:
        key = (entry["stage"], entry["what"], entry["reason"])
        reason = self.reasons.setdefault(key, _Reason(*key))
        reason.number += 1
        if len(reason.shown) < _PER_REASON:
            reason.shown.append(_Dropped(entry, document))


def write_view(path: Path, out: Path, *, samples: int = 24, drops: int = 3) -> None:
    """Write the page of what is at `path`, a dataset folder or anything that `weft data build` reads.

    Args:
        samples: documents shown, evenly spread over all.
        drops: how many are shown as documents, with their pictures, of what was dropped for the same reason; of a
            dataset they are read again from its sources.
    """
    import jinja2

    view = _of_dataset(path, samples, drops) if (path / MANIFEST).is_file() else _of_source(path, samples, drops)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.data"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("view.html").render(
        title=path.resolve().name,
        counts=view.counts,
        documents=[_shown(document) for document in view.documents],
        stages=_stages(view),
    )
    write_text(out, page)


def _of_dataset(path: Path, samples: int, drops: int) -> _View:
    dataset = open_dataset(path)
    summary = json.loads((path / SUMMARY).read_text())
    view = _View({name: summary[name] for name in ("read", "kept", "dropped")})
    view.stages = tuple(row["stage"] for row in summary["stages"])
    view.documents = [dataset[i] for i in _spread(len(dataset), samples)]
    with open(path / LEDGER, encoding="utf-8") as ledger:
        for line in ledger:
            view.add_drop(json.loads(line))
    wanted = [dropped for reason in view.reasons.values() for dropped in reason.shown[:drops]]
    _read_again(wanted, summary["config"])
    return view


def _read_again(wanted: Sequence[_Dropped], config: dict[str, Any]) -> None:
    """Give what was dropped its document, if the sources still hold it."""
    sources = BuildConfig.model_validate(config).sources
    for number, source in enumerate(sources):
        entries = [
            dropped for dropped in wanted if dropped.entry["source"] == number and dropped.entry["what"] != "file"
        ]
        try:
            units = SOURCES[source.kind].plan(source).units if entries else ()
        except UsageError:
            continue  # it is no longer there
        for dropped in entries:
            dropped.document = _find(source, units, dropped.entry)


def _find(source: SourceConfig, units: Sequence[Unit], entry: dict[str, Any]) -> Document | None:
    of_file = [unit for unit in units if unit.file == entry["file"]]
    if entry["line"] is not None:
        of_file = [unit for unit in of_file if unit.first <= entry["line"]][-1:]
    for unit in of_file:
        for record in SOURCES[source.kind].read(source, unit):
            if record.line == entry["line"] and record.document is not None and record.document.id == entry["id"]:
                return record.document
    return None


def _of_source(path: Path, samples: int, drops: int) -> _View:
    read, kept, documents = Count(), Count(), list[Document]()
    view = _View({})
    for item in items_of(path):
        read, kept = read + item.record.read, kept + item.kept
        if item.document is not None and len(documents) < samples:
            documents.append(item.document)
        for drop in item.drops:
            key = (drop.stage, drop.loss.what, drop.loss.reason)
            has_room = key not in view.reasons or view.reasons[key].number < drops
            view.add_drop(drop.to_json(), item.record.document if has_room else None)
    view.documents = documents
    view.counts = {"read": asdict(read), "kept": asdict(kept), "dropped": asdict(read - kept)}
    return view


def _spread(n: int, samples: int) -> Iterator[int]:
    return (i * n // min(n, samples) for i in range(min(n, samples)))


def _shown(document: Document) -> dict[str, Any]:
    turns = []
    for turn in document.turns:
        parts = [
            {"text": part.text, "source": None} if isinstance(part, Text) else _picture(part) for part in turn.parts
        ]
        turns.append({"role": turn.role, "parts": parts})
    return {"id": document.id, "turns": turns}


def _stages(view: _View) -> list[tuple[str, list[dict[str, Any]]]]:
    """What was dropped by stage, in the order of the stages, the most frequent reason first."""
    found = dict.fromkeys([*view.stages, *(reason.stage for reason in view.reasons.values())])
    by_number = sorted(view.reasons.values(), key=lambda reason: -reason.number)
    stages = [(stage, [_reason(reason) for reason in by_number if reason.stage == stage]) for stage in found]
    return [(stage, reasons) for stage, reasons in stages if reasons]


def _reason(reason: _Reason) -> dict[str, Any]:
    return {
        "stage": reason.stage,
        "what": reason.what,
        "reason": reason.reason,
        "number": reason.number,
        "shown": [_drop(dropped) for dropped in reason.shown],
    }


def _drop(dropped: _Dropped) -> dict[str, Any]:
    entry, document = dropped.entry, dropped.document
    images = [] if document is None else list(document.images)
    text = "" if document is None else "\n".join(text.text for text in document.texts)
    return {
        **entry,
        # ledgers of older builds do not have these
        "value": entry.get("value"),
        "threshold": entry.get("threshold"),
        "pictures": [
            {**_picture(image, _SIDE_OF_DROPS), "is_meant": image.path is not None and image.path == entry["image"]}
            for image in images[:_PICTURES]
        ],
        "more_pictures": max(0, len(images) - _PICTURES),
        "text": text[:_CHARACTERS] + ("..." if len(text) > _CHARACTERS else ""),
    }


def _picture(image: Image, side: int = _SIDE) -> dict[str, str | None]:
    name = image.path or "picture"
    try:
        picture = decode_image(image.data or b"")
    except ImageError as error:
        return {"text": f"[{name}: {error.what}]", "source": None}
    small = max(picture.size) <= side // 2
    if small:
        data = encode_png(picture)
    else:
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        data = buffer.getvalue()
    return {"text": name, "source": data_uri(data)}
