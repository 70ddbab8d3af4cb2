"""The README of a finished dataset: what it holds, whose it is, and what it was made with.

Everything in it follows from the records and the recipe, so it is the same on every machine; names of folders are left
out. The date is the one thing that does not follow: it is there where SOURCE_DATE_EPOCH gives it
(docs/decisions/0012-a-card-without-a-clock.md).
"""

import datetime
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from weft.data.annotate.material import source_of
from weft.data.filters.licence import ACCESS, Access, access_of
from weft.data.shards import FEATURES, LEDGER, SUMMARY
from weft.data.sources import SOURCES
from weft.document import Document
from weft.errors import UsageError

DATE = "SOURCE_DATE_EPOCH"
"""The environment variable with the date, in seconds since 1970."""
TERMS = {
    "mmc4": "annotations ODC-BY; pages and pictures under the terms of Common Crawl and of their owners",
    "mmdialog": "given on request, non-commercial, not to be passed on",
    "obelics": "annotations CC BY 4.0; pages and pictures keep the terms of their owners",
    "omnicorpus": "annotations CC BY 4.0; pages and pictures keep the terms of their owners",
    "vist": "every photo under its own licence",
    "wikiweb2m": "texts CC BY-SA; every picture under its own licence",
    "youcook2": "non-commercial research; videos keep the terms of their owners",
}
"""Source -> under which conditions it is given."""
_UNKNOWN = "see the source: its terms are not recorded"
_LICENCES = 20
"""Licences of pictures that are listed, the most frequent first."""


@dataclass
class Contents:
    """What the data files of a dataset hold, beside texts and pictures."""

    documents: int = 0
    stored: int = 0
    """Bytes of the files."""
    unpacked: int = 0
    """Bytes of the columns."""
    rights: Counter[tuple[str, Access]] = field(default_factory=Counter)
    """Documents by source and access class."""
    licences: Counter[str] = field(default_factory=Counter)
    """Pictures by licence, as their source writes it."""
    models: set[str] = field(default_factory=set)
    """That judged or wrote something, as they name themselves."""

    def add(self, document: Document) -> None:
        source = source_of(document)
        self.documents += 1
        self.rights[source if source in SOURCES else "", access_of(document)] += 1
        for picture in _objects(document.meta.get("images")):
            licence = picture.get("licence", picture.get("license"))
            if licence is not None:
                self.licences[str(licence)] += 1
        names = [note.get("annotator") for note in _objects(document.meta.get("annotations"))]
        coherence = document.meta.get("coherence")
        names += [coherence.get("model")] if isinstance(coherence, dict) else []
        self.models.update(name for name in names if isinstance(name, str))

    @property
    def access(self) -> Access:
        """The most restrictive class of any document."""
        return max((access for _, access in self.rights), key=ACCESS.index, default="open")


def card(summary: Mapping[str, Any], folder: Path) -> str:
    """The README of the dataset whose `summary.json` this is, and whose data files are in `folder`.

    Raises:
        UsageError: SOURCE_DATE_EPOCH is no number of seconds.
    """
    found = contents(folder)
    return front_matter(found, "train-*.parquet") + body(summary, found)


def contents(folder: Path) -> Contents:
    """Read the ids and the notes of all documents; pictures are not touched."""
    import pyarrow.parquet as pq

    found = Contents()
    for file in sorted(folder.glob("*.parquet")):
        found.stored += file.stat().st_size
        with pq.ParquetFile(file) as opened:
            groups = range(opened.metadata.num_row_groups)
            found.unpacked += sum(opened.metadata.row_group(group).total_byte_size for group in groups)
            for batch in opened.iter_batches(columns=["id", "meta"]):
                for identity, meta in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    found.add(Document((), identity, json.loads(meta)))
    return found


def front_matter(found: Contents, pattern: str) -> str:
    """What the `datasets` library reads of a README: where the data files are, and what is in them.

    Args:
        pattern: names of the data files, relative to the README.
    """
    split = {"name": "train", "num_bytes": found.unpacked, "num_examples": found.documents}
    value = {
        "license": "other",
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}],
        "dataset_info": {
            "features": _fields(FEATURES),
            "splits": [split],
            "download_size": found.stored,
            "dataset_size": found.unpacked,
        },
    }
    return f"---\n{yaml.safe_dump(value, sort_keys=False)}---\n\n"


def body(summary: Mapping[str, Any], found: Contents, *, beside: bool = True) -> str:
    """The part for people.

    Args:
        beside: the ledger and the summary lie beside this README.
    """
    kept, read = summary["kept"], summary["read"]
    where = f" What was dropped is in `{LEDGER}`, counts and settings are in `{SUMMARY}`." if beside else ""
    date = f" Made on {made_on()}." if made_on() else ""
    parts = [
        f"Illustrated documents: {kept['records']:,} of {read['records']:,} records, {kept['texts']:,} of "
        f"{read['texts']:,} texts, {kept['images']:,} of {read['images']:,} images." + where + date,
        rights(found),
        _models(summary["config"], found),
        _settings(summary["config"]),
        _funnel(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rights(found: Contents) -> str:
    """Where documents come from, and under which conditions."""
    rows = [
        (source or "own documents", f"{n:,}", access, TERMS.get(source, _UNKNOWN))
        for (source, access), n in sorted(found.rights.items())
    ]
    text = (
        "## Sources and licences\n\n"
        f"Access class of the whole: **{found.access}**, the most restrictive of its documents.\n\n"
        + table(("source", "documents", "access", "terms"), rows)
    )
    if found.licences:
        listed = found.licences.most_common(_LICENCES)
        more = len(found.licences) - len(listed)
        text += "\n\n" + table(("licence of pictures", "pictures"), [(name, f"{n:,}") for name, n in listed])
        text += f"\n\nand {more} more licences." if more else ""
    return text


def made_on() -> str | None:
    """The date that SOURCE_DATE_EPOCH gives.

    Raises:
        UsageError: it is no number of seconds.
    """
    given = os.environ.get(DATE)
    if not given:
        return None
    try:
        return datetime.datetime.fromtimestamp(int(given), datetime.UTC).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"{DATE} must be a number of seconds, got {given!r}", fix="set it as in: date +%s, or unset it"
        ) from error


def _objects(value: Any) -> list[dict[str, Any]]:
    return [inner for inner in value.values() if isinstance(inner, dict)] if isinstance(value, dict) else []


def _models(config: Mapping[str, Any], found: Contents) -> str:
    names = found.models | set(_named(config.get("filters", ())))
    if not names:
        return "## Models\n\nNo model judged or wrote anything."
    return "## Models\n\n" + "\n".join(f"- {_cell(name)}" for name in sorted(names))


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("model", "threshold_model") and isinstance(inner, str):
                yield PurePath(inner).name if os.path.isabs(inner) else inner
            else:
                yield from _named(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _named(inner)


def _settings(config: Mapping[str, Any]) -> str:
    rows = [
        (each["kind"], ", ".join(_flat({k: v for k, v in each.items() if k != "kind"}))) for each in config["filters"]
    ]
    return "## Thresholds\n\n" + (table(("stage", "settings"), rows) if rows else "Nothing was filtered.")


def _flat(value: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{at}{key}.")
        else:
            # a folder of this machine is nobody's business
            shown = PurePath(inner).name if isinstance(inner, str) and os.path.isabs(inner) else inner
            yield f"{at}{key} {json.dumps(shown, ensure_ascii=False)}"


def _funnel(summary: Mapping[str, Any]) -> str:
    rows = [
        (
            row["stage"],
            *(str(row[side][what]) for what in ("records", "images") for side in ("in", "dropped")),
            ", ".join(f"{reason} {n}" for reason, n in row["reasons"].items()),
        )
        for row in summary["stages"]
    ]
    header = ("stage", "records in", "dropped", "images in", "dropped", "reasons")
    return "## Funnel\n\n" + table(header, rows)


def table(header: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; what is in the cells is no markup."""
    lines: list[Sequence[str]] = [header, ("---",) * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    plain = " ".join(text.split())
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("`", "\\`")):
        plain = plain.replace(mark, instead)
    return plain


def _fields(features: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, **_feature(spec)} for name, spec in features.items()]


def _feature(spec: Any) -> dict[str, Any]:
    """A type as the `datasets` library writes it in a README."""
    if isinstance(spec, list):
        inner = _feature(spec[0])
        return {"list": inner.get("dtype", inner.get("struct"))}
    if spec.get("_type") == "Image":
        return {"dtype": "image"}
    return {"dtype": spec["dtype"]} if spec.get("_type") == "Value" else {"struct": _fields(spec)}
