"""One HTML page of a dataset, or of what would become one: documents with their pictures, and drops by reason.

The page holds everything it shows and loads nothing; data never becomes markup.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.atomic import MANIFEST, write_text
from weft.data.check import items_of
from weft.data.dataset import open_dataset
from weft.data.shards import LEDGER, SUMMARY
from weft.data.stage import Count
from weft.document import Document, Image, Text
from weft.errors import ImageError
from weft.images import data_uri, decode_image, encode_png

_SIDE = 480
"""Pictures are shown at most so many pixels wide and high."""
_PER_REASON = 20


@dataclass
class _View:
    counts: dict[str, dict[str, int]]
    documents: list[Document] = field(default_factory=list)
    drops: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def add_drop(self, drop: dict[str, Any]) -> None:
        reason = f"{drop['what']}: {drop['reason']}"
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.drops.setdefault(reason, [])
        if len(shown) < _PER_REASON:
            shown.append(drop)


def write_view(path: Path, out: Path, *, samples: int = 24) -> None:
    """Write the page of what is at `path`, a dataset folder or anything that `weft data build` reads.

    Args:
        samples: documents shown, evenly spread over all.
    """
    import jinja2

    view = _of_dataset(path, samples) if (path / MANIFEST).is_file() else _of_source(path, samples)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.data"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("view.html").render(
        title=path.resolve().name,
        counts=view.counts,
        documents=[_shown(document) for document in view.documents],
        drops=view.drops,
        dropped=view.dropped,
    )
    write_text(out, page)


def _of_dataset(path: Path, samples: int) -> _View:
    dataset = open_dataset(path)
    summary = json.loads((path / SUMMARY).read_text())
    view = _View({name: summary[name] for name in ("read", "kept", "dropped")})
    view.documents = [dataset[i] for i in _spread(len(dataset), samples)]
    with open(path / LEDGER, encoding="utf-8") as ledger:
        for line in ledger:
            view.add_drop(json.loads(line))
    return view


def _of_source(path: Path, samples: int) -> _View:
    read, kept, documents = Count(), Count(), list[Document]()
    view = _View({})
    for item in items_of(path):
        read, kept = read + item.record.read, kept + item.kept
        if item.document is not None and len(documents) < samples:
            documents.append(item.document)
        for drop in item.drops:
            view.add_drop(drop.to_json())
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


def _picture(image: Image) -> dict[str, str | None]:
    name = image.path or "picture"
    try:
        picture = decode_image(image.data or b"")
    except ImageError as error:
        return {"text": f"[{name}: {error.what}]", "source": None}
    small = max(picture.size) <= _SIDE // 2
    if small:
        data = encode_png(picture)
    else:
        picture.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        data = buffer.getvalue()
    return {"text": name, "source": data_uri(data)}
