"""A dataset into files of another form, and such files into a dataset.

Reading is a build like any other, with its ledger. Writing asks the form what it carries of each document: what it
lacks is refused, or left out where that was asked for, and always counted.

`.OUT.exporting` beside an export holds the files while they grow and `state.json`, which says how far they are: a run
that was killed is gone on with. The export appears at the end, as a whole.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from weft.atomic import MANIFEST, write_folder, write_json, write_text
from weft.data.build import BuildConfig, OnProgress, Summary, build
from weft.data.card import Contents, body, contents, front_matter, rights, table
from weft.data.dataset import Dataset, open_dataset
from weft.data.exchange import form_called
from weft.data.exchange.files import Files
from weft.data.exchange.form import Form, Lack
from weft.data.shards import CARD, SUMMARY
from weft.document import Document
from weft.errors import DocumentError, UsageError

OnLack = Literal["refuse", "document", "part"]
"""What something that the form cannot carry costs: the export, the `document` it is in, or only itself."""
EXPORT, LEFT_OUT = "export.json", "left_out.jsonl"
_FORMAT = 1
"""Of unfinished exports; one of another number is not gone on with."""
_MARK_BYTES, _MARK_DOCUMENTS = 64 * 2**20, 10_000
"""So much is done again at most after a kill."""


@dataclass
class Counts:
    """What came of the documents so far."""

    done: int = 0
    written: int = 0
    lacks: dict[str, int] = field(default_factory=dict)
    """Times that something was lacking, by reason."""
    documents: dict[str, int] = field(default_factory=dict)
    """In how many documents, by reason."""
    first: str | None = None
    """The first document that does not fit, and why."""

    def add(self, document: Document, lacks: tuple[Lack, ...]) -> None:
        for lack in lacks:
            self.lacks[lack.reason] = self.lacks.get(lack.reason, 0) + 1
        for reason in {lack.reason for lack in lacks}:
            self.documents[reason] = self.documents.get(reason, 0) + 1
        if lacks and self.first is None:
            self.first = f"{document.id}: {lacks[0].reason}, {lacks[0].message}"


@dataclass(frozen=True)
class Exported:
    """What an export did; its `export.json` says the same."""

    form: str
    on_lack: OnLack
    fingerprint: str
    """Of the dataset."""
    read: int
    written: int
    lacks: dict[str, int]
    """Times that something was lacking, by reason."""
    documents: dict[str, int]
    """In how many documents, by reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def import_data(
    form: str, path: Path, out: Path, *, fresh: bool = False, on_progress: OnProgress = lambda progress: None
) -> Summary:
    """Make the dataset `out` of files of a form. Documents keep the ids of their records; every drop is in the ledger.

    Raises:
        UsageError: there is no such form, or nothing of it at `path`; and as `build`.
    """
    config = BuildConfig.model_validate({"sources": form_called(form).sources(path)})
    return build(config, out, fresh=fresh, on_progress=on_progress)


def export_data(
    path: Path,
    form: str,
    out: Path,
    *,
    on_lack: OnLack = "refuse",
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Exported:
    """Write the dataset at `path` as files of a form into the folder `out`, whole or not at all.

    Args:
        path: a dataset folder, or a JSONL file in the chat form.
        on_lack: what something that the form cannot carry costs.
        on_progress: called after every document, with their number and how many there are.

    Raises:
        UsageError: there is no such form, `out` must not be replaced, or another export is at it.
        DocumentError: documents hold what the form cannot carry, and that is refused; or none is left.
        CheckpointError: the dataset is not whole.
    """
    row = form_called(form)
    if on_lack not in get_args(OnLack):
        raise UsageError(f"what a lack costs is one of {', '.join(get_args(OnLack))}, got {on_lack!r}")
    _check_replaceable(path, out)
    dataset = open_dataset(path)
    with _work_folder(out) as work:
        counts, files = _write(dataset, row, form, on_lack, work, on_progress)
        if on_lack == "refuse" and counts.lacks:
            raise _refused(form, counts, str(path))
        if not counts.written:
            raise DocumentError(
                f"no document fits the form {form}" if counts.done else "the dataset is empty",
                where=str(path),
                fix="--on-lack part keeps what fits of each document; or choose another form",
            )
        done = Exported(form, on_lack, dataset.fingerprint, counts.done, counts.written, counts.lacks, counts.documents)
        # from here on the files are moved, and what is left of them cannot be gone on with
        (work / "state.json").unlink(missing_ok=True)
        with write_folder(out) as staging:
            for entry in sorted(files.folder.iterdir()):
                os.replace(entry, staging / entry.name)
            write_json(staging / EXPORT, done.to_json())
            write_text(staging / CARD, _card(done, row, dataset, path, staging, out.resolve().name))
    return done


def _write(
    dataset: Dataset, row: Form, form: str, on_lack: OnLack, work: Path, on_progress: Callable[[int, int], None]
) -> tuple[Counts, Files]:
    what = json.dumps([_FORMAT, form, on_lack, dataset.fingerprint])
    identity = hashlib.sha256(what.encode()).hexdigest()
    state = _state(work, identity) if row.resumes else None
    files = Files(work / "files", state["sizes"] if state else None)
    counts = Counts(**state["counts"]) if state and not files.is_fresh else Counts()
    sink = row.write(files)
    try:
        for i in range(counts.done, len(dataset)):
            document = dataset[i]
            fitted, lacks = row.fit(document)
            counts.done += 1
            counts.add(document, lacks)
            if lacks and on_lack == "document":
                fitted = None
            if on_lack == "refuse" and counts.lacks:
                pass  # nothing is written any more, but everything that is wrong is told at once
            elif fitted is None:
                files.append(LEFT_OUT, _left_out(document, lacks))
            else:
                sink.add(fitted)
                counts.written += 1
            if row.resumes and (files.written >= _MARK_BYTES or counts.done % _MARK_DOCUMENTS == 0):
                write_json(work / "state.json", {"identity": identity, "sizes": files.mark(), "counts": asdict(counts)})
            on_progress(counts.done, len(dataset))
        sink.close()
    finally:
        files.close()
    return counts, files


def _left_out(document: Document, lacks: tuple[Lack, ...]) -> bytes:
    entry = {"id": document.id, "lacks": [asdict(lack) for lack in lacks]}
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _state(work: Path, identity: str) -> dict[str, Any] | None:
    try:
        state = json.loads((work / "state.json").read_bytes())
    except (OSError, ValueError):
        return None
    return state if state["identity"] == identity else None


def _refused(form: str, counts: Counts, where: str) -> DocumentError:
    reasons = ", ".join(f"{reason} in {n}" for reason, n in sorted(counts.documents.items()))
    return DocumentError(
        f"the form {form} cannot carry everything: of {counts.done} documents {reasons}; the first is {counts.first}",
        where=where,
        fix="--on-lack document leaves such documents out, --on-lack part only what does not fit",
    )


def _check_replaceable(path: Path, out: Path) -> None:
    if path.resolve().is_relative_to(out.resolve()):
        raise UsageError("the output folder holds the dataset", where=str(out), fix="name another folder with --out")
    if out.exists() and not out.is_dir():
        raise UsageError("the output is a file", where=str(out), fix="name a folder with --out")
    is_export = (out / EXPORT).is_file() and (out / MANIFEST).is_file()
    if out.is_dir() and any(out.iterdir()) and not is_export:
        raise UsageError(
            "the output folder exists and is no export", where=str(out), fix="name a new folder with --out"
        )


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` for what is unfinished, locked; it goes when the block comes to its end."""
    out = out.resolve()
    work = out.parent / f".{out.name}.exporting"
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            "another export is writing this folder",
            where=str(out),
            fix="wait until it ends, or name another folder with --out",
        ) from error
    with lock:
        unfinished = re.compile(re.escape(f".{out.name}.") + r"[a-z0-9_]{8}\.(part|old)")
        for leftover in out.parent.iterdir():
            if unfinished.fullmatch(leftover.name):
                shutil.rmtree(leftover)
        try:
            yield work
        except DocumentError:
            # it would be the same again
            shutil.rmtree(work)
            raise
        shutil.rmtree(work)


def _card(done: Exported, row: Form, dataset: Dataset, path: Path, folder: Path, name: str) -> str:
    rows = [(reason, row.lacks[reason], f"{n:,}", f"{done.documents[reason]:,}") for reason, n in done.lacks.items()]
    told = (
        "Nothing of them was lost."
        if not rows
        else "What the form cannot carry:\n\n" + table(("reason", "what", "times", "in documents"), sorted(rows))
    )
    if done.written < done.read:
        told += f"\n\n{done.read - done.written:,} documents were left out: `{LEFT_OUT}`."
    text = (
        f"{done.written:,} of {done.read:,} documents of a dataset of Weft (fingerprint `{done.fingerprint[:12]}`), in "
        f"the form `{done.form}`. {told}\n\nTo read it: {row.usage.format(name=name)}\n\n"
        f"Back into a dataset: `weft data import {done.form} {name} --out DATASET`.\n"
    )
    if (path / SUMMARY).is_file():
        summary = json.loads((path / SUMMARY).read_bytes())
        text += "\n# The dataset\n\n" + body(summary, contents(path), beside=False)
    else:
        found = Contents()
        for i in range(len(dataset)):
            found.add(dataset[i])
        text += f"\n{rights(found)}\n"
    return (front_matter(contents(folder / "data"), row.data) if row.is_loadable else "") + text
