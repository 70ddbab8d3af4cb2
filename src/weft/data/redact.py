"""A finished dataset without the documents that must not be in it: by URL, by a picture's SHA-256, by id.

Nothing is built again. The data files are those of a build that never kept these documents; the ledger, the summary and
the card say what was removed, and by which list.

    url https://...      of a page or a picture, with or without `url`; http or https, its #fragment and the case of its
                         host make no difference
    sha256 HEX           of a picture's bytes, with or without `sha256`
    id DOCUMENT          a document's id

Empty lines and lines that begin with # say nothing.
"""

import functools
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from weft.atomic import MANIFEST, sha256_of, verify_folder, write_folder, write_json, write_text
from weft.data.card import card, table
from weft.data.ledger import line_of
from weft.data.parts import WorkFolder
from weft.data.shards import CARD, LEDGER, SUMMARY, ShardWriter, fingerprint_of, from_row, size_of
from weft.data.sources.draft import url_name
from weft.data.stage import Count, Drop, Loss, count
from weft.errors import UsageError

REDACT = "redact"
"""The stage under which the ledger files what was removed from a finished dataset."""
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_SCANNED = ["id", "sha256", "images.list.element.path", "meta"]


@dataclass(frozen=True)
class BlockList:
    """What must not be in a dataset; each entry with the line that says so."""

    name: str
    sha256: str
    """Of the file."""
    urls: Mapping[str, int]
    hashes: Mapping[str, int]
    ids: Mapping[str, int]
    files: Mapping[str, int]
    """Names under which pictures of the blocked URLs are kept after they were fetched."""

    @property
    def lines(self) -> set[int]:
        """Numbers of those that say something for the first time."""
        return {*self.urls.values(), *self.hashes.values(), *self.ids.values()}


@dataclass(frozen=True)
class Hit:
    """A document to be removed, for the first thing in it that is on the list."""

    reason: str
    line: int
    """Of the list."""
    what: str
    field: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Redacted:
    """What was removed from a dataset."""

    removed: Count
    left: Count
    reasons: Mapping[str, int]
    """How many documents for each."""
    unmatched: int
    """Lines of the list that no document was removed for."""
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_block_list(file: Path) -> BlockList:
    """
    Raises:
        UsageError: it cannot be read, or a line is none of the three; names the line.
    """
    try:
        data = file.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the block list cannot be read", where=str(file), fix="name a text file in UTF-8") from error
    urls, hashes, ids, files = dict[str, int](), dict[str, int](), dict[str, int](), dict[str, int]()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        kind, *rest = line.split(maxsplit=1)
        value = rest[0] if rest else ""
        if kind not in ("url", "sha256", "id"):
            kind, value = _kind_of(line), line
        if kind == "url" and "://" in value:
            first, bare = urls.setdefault(_key(value), number), value.partition("://")[2]
            files |= {url_name(each): first for each in (value, f"http://{bare}", f"https://{bare}")}
        elif kind == "sha256" and _HEX.fullmatch(value):
            hashes.setdefault(value.lower(), number)
        elif kind == "id" and value:
            ids.setdefault(value, number)
        else:
            raise UsageError(
                f"{line[:80]!r} is no URL, SHA-256 or id",
                where=f"{file}, line {number}",
                fix="write `url https://...`, `sha256` and 64 hex digits, or `id` and a document's id",
            )
    if not urls and not hashes and not ids:
        raise UsageError("the block list is empty", where=str(file), fix="write one URL, SHA-256 or id to a line")
    return BlockList(file.name, hashlib.sha256(data).hexdigest(), urls, hashes, ids, files)


def redact(dataset: Path, blocked: BlockList, *, dry_run: bool = False) -> Redacted:
    """Remove every document with something on the list, all or none. A dataset without any is not touched.

    Args:
        dry_run: only say what would be removed.

    Raises:
        UsageError: `dataset` is none, or a build is at it.
        CheckpointError: it is not whole.
    """
    if not (dataset / MANIFEST).is_file() or not (dataset / SUMMARY).is_file():
        raise UsageError("this is no dataset", where=str(dataset), fix="name a folder made by weft data build")
    with WorkFolder(dataset).locked():
        verify_folder(dataset)
        summary = json.loads((dataset / SUMMARY).read_bytes())
        hits = dict(_hits(dataset, blocked))
        drops = list(_drops(dataset, hits, blocked, summary))
        if drops:
            summary = _after(summary, drops, blocked)
        if drops and not dry_run:
            with write_folder(dataset) as staging:
                summary |= _write(dataset, staging, hits, drops)
                write_json(staging / SUMMARY, summary)
                write_text(staging / CARD, card(summary, staging) + _section(summary["redactions"]))
    return Redacted(
        _total(drops),
        Count(**summary["kept"]),
        dict(Counter(hit.reason for hit in hits.values())),
        len(blocked.lines - {hit.line for hit in hits.values()}),
        summary["fingerprint"],
    )


def _hits(dataset: Path, blocked: BlockList) -> Iterator[tuple[int, Hit]]:
    """By number of the document. No picture is read."""
    number = 0
    for file in sorted(dataset.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(columns=_SCANNED):
            for row in batch.to_pylist():
                hit = _hit(row, blocked)
                if hit is not None:
                    yield number, hit
                number += 1


def _hit(row: Mapping[str, Any], blocked: BlockList) -> Hit | None:
    if row["id"] in blocked.ids:
        return Hit("blocked_id", blocked.ids[row["id"]], "its id", "id")
    paths = [image["path"] for image in row["images"]]
    for i, (sha256, path) in enumerate(zip(row["sha256"], paths, strict=True)):
        if sha256 in blocked.hashes:
            return Hit("blocked_sha256", blocked.hashes[sha256], f"the SHA-256 of picture {i}", "sha256", path)
        name = Path(path or "").name.partition(".")[0]
        if name in blocked.files:
            return Hit("blocked_url", blocked.files[name], f"the URL of picture {i}", "images", path)
    for field, text in _strings(json.loads(row["meta"]), "meta"):
        if "://" in text and _key(text) in blocked.urls:
            return Hit("blocked_url", blocked.urls[_key(text)], f"a URL in {field}", field)
    return None


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _strings(each, f"{field}[{i}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _strings(each, f"{field}.{key}")


def _groups(dataset: Path) -> Iterator[tuple[str, int, Callable[[], pa.Table]]]:
    """Name of the file, number of rows, and the table, of every row group in order."""
    for file in sorted(dataset.glob("*.parquet")):
        with pq.ParquetFile(file) as shard:
            for group in range(shard.num_row_groups):
                rows = shard.metadata.row_group(group).num_rows
                yield file.name, rows, functools.partial(shard.read_row_group, group)


def _drops(dataset: Path, hits: Mapping[int, Hit], blocked: BlockList, summary: Mapping[str, Any]) -> Iterator[Drop]:
    """What the ledger says of every hit."""
    # An instruction that the build wrote itself is in none of its counts. Where only some documents have one, nobody
    # knows any more which: then it counts.
    added = Count(texts=1) if summary["instructions_added"] == summary["kept"]["records"] else Count()
    first = 0
    for name, rows, read in _groups(dataset):
        here = [row for row in range(rows) if first + row in hits]
        for row, values in zip(here, read().take(here).to_pylist() if here else [], strict=True):
            hit, document = hits[first + row], from_row(values)
            message = f"{hit.what} is on the block list {blocked.name}, line {hit.line}"
            loss = Loss("record", hit.reason, message, hit.field, hit.image)
            yield Drop(loss, REDACT, name, None, document.id, count(document) - added)
        first += rows


def _write(dataset: Path, staging: Path, hits: Container[int], drops: Iterable[Drop]) -> dict[str, Any]:
    """The data files without the hits, and the ledger with them; returns what the summary says of the files."""
    writer, first = ShardWriter(staging), 0
    try:
        for _, rows, read in _groups(dataset):
            left = [row for row in range(rows) if first + row not in hits]
            table = read().take(pa.array(left, pa.int64())).combine_chunks()
            sizes = iter([size_of(from_row(row)) for row in table.to_pylist()])
            for batch in table.to_batches():
                writer.add(batch, list(itertools.islice(sizes, batch.num_rows)))
            first += rows
    except BaseException:
        writer.abort()
        raise
    files = writer.close()
    with open(staging / LEDGER, "wb") as ledger:
        with open(dataset / LEDGER, "rb") as before:
            shutil.copyfileobj(before, ledger)
        for drop in drops:
            # it was kept of a source that the dataset no longer names
            ledger.write(line_of({"source": None, "format": None, **drop.to_json()}))
    return {"fingerprint": fingerprint_of(map(sha256_of, files)), "files": [file.name for file in files]}


def _after(summary: Mapping[str, Any], drops: Sequence[Drop], blocked: BlockList) -> dict[str, Any]:
    """The summary without the hits. What `sources` says of each source stays as the build left it."""
    removed, kept = _total(drops), Count(**summary["kept"])
    reasons = Counter(f"{drop.loss.what}: {drop.loss.reason}" for drop in drops)
    *stages, last = summary["stages"]
    if last["stage"] != REDACT:
        stages.append(last)
        last = {"stage": REDACT, "in": summary["kept"], "dropped": asdict(Count()), "reasons": {}}
    row = {
        **last,
        "dropped": asdict(Count(**last["dropped"]) + removed),
        "reasons": dict(sorted((reasons + Counter(last["reasons"])).items())),
    }
    added = summary["instructions_added"]
    note = {
        "list": blocked.name,
        "list_sha256": blocked.sha256,
        "entries": len(blocked.lines),
        "removed": asdict(removed),
        "reasons": dict(sorted(reasons.items())),
    }
    return {
        **summary,
        "kept": asdict(kept - removed),
        "dropped": asdict(Count(**summary["dropped"]) + removed),
        "instructions_added": added - (removed.records if added == kept.records else 0),
        "stages": [*stages, row],
        "redactions": [*summary.get("redactions", ()), note],
    }


def _section(redactions: Iterable[Mapping[str, Any]]) -> str:
    """Of the card."""
    rows = [
        (
            each["list"],
            each["list_sha256"][:16],
            *(f"{each['removed'][what]:,}" for what in ("records", "images")),
            ", ".join(f"{reason} {n}" for reason, n in each["reasons"].items()),
        )
        for each in redactions
    ]
    header = ("block list", "its SHA-256 begins", "documents", "images", "reasons")
    return f"\n## Removed after the build\n\n{table(header, rows)}\n"


def _total(drops: Iterable[Drop]) -> Count:
    return sum((drop.count for drop in drops), Count())


def _kind_of(line: str) -> str:
    if line.lower().startswith(("http://", "https://")):
        return "url"
    return "sha256" if _HEX.fullmatch(line) else ""


def _key(url: str) -> str:
    """What URLs of the same thing have in common."""
    try:
        parts = urlsplit(url.strip())
        port = "" if parts.port in (None, 80, 443) else f":{parts.port}"
    except ValueError:
        return url.strip()
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.hostname or ''}{port}{parts.path or '/'}{query}"
