"""`weft data build | check | view | funnel | stats | sniff`: documents in, a dataset out, and a look at either."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from weft.errors import DocumentError, UsageError, WeftError

if TYPE_CHECKING:
    from weft.data.build import BuildConfig, OnProgress, Progress, Summary

app = App(name="data", help="Build, check and view training data made of illustrated documents.")

_SHOWN = 20
"""Lines of problems printed; a program gets all of them with --json."""


@app.command
def build(
    source: Path,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    out: Path | None = None,
    rank: int | None = None,
    world: int | None = None,
    commit: Annotated[bool, Parameter(negative=())] = False,
    fresh: Annotated[bool, Parameter(negative=())] = False,
    put: str | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Read documents, keep the good ones, and write a dataset with a ledger of everything that was dropped.

    A recipe's keys can be set here by their path, and those of a folder too: `--executor.kind processes`,
    `--sources.0.instruction 'draw: {title}'`. A build that was stopped goes on where it was. Exits 1 if nothing is
    kept, or if the work on something failed and it was set aside.

    Several machines with a common disk share a build: each runs it with --rank and --world, then one with --commit.

    Parameters
    ----------
    source: Path
        A folder (JSONL in the chat form, doc.json, Markdown, HTML, as found), one such file, or a recipe (YAML).
    out: Path | None
        The folder to make; a dataset that is there is replaced.
    rank: int | None
        The number of this machine, from 0 on: do its share of the work and no more.
    world: int | None
        How many machines there are.
    commit: bool
        Do no work: make the dataset of what all machines did.
    fresh: bool
        Forget what a stopped build has done; for when pictures changed that it had read.
    put: str | None
        Where to copy the finished dataset to, as fsspec has it: s3://bucket/name, gs://bucket/name, ...
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data import build as building
    from weft.data.units import Share

    config = _config(source, list(overrides))
    place = out or config.out
    if place is None:
        raise UsageError("where to write is not said", where="weft data build", fix="add --out FOLDER")
    if (rank is None) != (world is None) or (rank is not None and (commit or fresh or put)):
        raise UsageError(
            "--rank and --world go together, and without --commit, --fresh and --put",
            where="weft data build",
            fix="run every rank with both, then once with --commit alone",
        )
    with _progress() as show:
        if rank is not None and world is not None:
            progress = building.work_share(config, place, Share(rank, world), on_progress=show)
            print(f"rank {rank} of {world}: {progress.done} units done; when all ranks are, run with --commit")
            return
        if commit:
            summary = building.commit(config, place)
        else:
            summary = building.build(config, place, fresh=fresh, on_progress=show)
    if put is not None:
        from weft.data.remote import put_folder

        put_folder(place, put)
    if json_output:
        print(json.dumps(summary.to_json(), ensure_ascii=False))
    else:
        _print_summary(summary, config, place)
    _refuse_success(summary, place)


@app.command
def check(path: Path, *, json_output: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Read a dataset, or what would become one, and decode every picture. Exits 1 if anything is wrong.

    Parameters
    ----------
    path: Path
        A dataset, or anything that `weft data build` reads but a recipe.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.check import check as check_data

    report = check_data(path)
    if json_output:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        rows = [(p.reason, p.where, p.message) for p in report.problems[:_SHOWN]]
        if rows:
            _print_table(("problem", "where", "what"), rows)
        read = report.read
        print(f"read {read.records} records, {read.texts} texts, {read.images} images; {report.skipped} files not read")
    if report.problems:
        raise DocumentError(
            f"{len(report.problems)} problems",
            where=str(path),
            fix="mend what is listed (--json lists all), or let `weft data build` drop it",
        )


@app.command
def funnel(
    path: Path,
    other: Path | None = None,
    *,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print how many records every stage of a dataset's build took in and dropped, why, and how long it took.

    Parameters
    ----------
    path: Path
        A dataset.
    other: Path | None
        Another one, of the same sources: print which documents are in one of them alone, and what dropped them.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.funnel import compare, read_funnel

    rows = read_funnel(path)
    changes = [] if other is None else compare(path, other)
    if json_output:
        print(json.dumps({"stages": [row.to_json() for row in rows], "changes": [c.to_json() for c in changes]}))
        return
    shown: list[tuple[Any, ...]] = []
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        shown.append((row.stage, row.records_in, row.records_dropped, row.images_in, row.images_dropped, seconds, ""))
        shown += [("", "", "", "", "", "", f"{reason} {n}") for reason, n in row.reasons.items()]
    _print_table(("stage", "records in", "dropped", "images in", "dropped", "seconds", "reason"), shown)
    if other is not None:
        print()
        _print_table(
            ("document", f"in {path}", f"in {other}"),
            [(change.document, change.first, change.second) for change in changes[:_SHOWN]],
        )
        print(f"{len(changes)} documents changed side" + (", --json lists all" if len(changes) > _SHOWN else ""))


@app.command
def stats(path: Path, *, json_output: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Print what a dataset holds: documents, texts, pictures, and how many there are in a document.

    Parameters
    ----------
    path: Path
        A dataset.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.stats import read_stats

    found = read_stats(path)
    if json_output:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    for name, value in found.totals.items():
        print(f"{name}: {value:,}")
    print()
    _print_table(
        ("of a document", *found.quantiles),
        [(name, *values) for name, values in found.of_a_document.items()],
    )


@app.command
def sniff(
    file: Path,
    /,
    *,
    records: int = 5,
    out: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Look at a file of unknown layout, and propose how to read it.

    Parameters
    ----------
    file: Path
        JSONL, JSON, CSV, Parquet, a tar of records, or one of these packed.
    records: int
        How many of its first records are looked at.
    out: Path | None
        Where to write the proposal, a recipe for `weft data build`. Otherwise it is printed.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.atomic import write_text
    from weft.data.sniff import sniff as look

    found = look(file, records=records)
    if out is not None:
        write_text(out, found.recipe())
    if json_output:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    _print_table(("field", "types", "such as"), [(f.name, ", ".join(f.types), f.example) for f in found.fields])
    for why in found.broken:
        print(f"not read: {why}")
    print(found.recipe() if out is None else f"written to {out}", end="" if out is None else "\n")


@app.command
def view(path: Path, *, out: Path | None = None, samples: int = 24) -> None:
    """Write one HTML page with documents and their pictures, and what was dropped by reason.

    Parameters
    ----------
    path: Path
        A dataset, or anything that `weft data build` reads but a recipe.
    out: Path | None
        The page; by default named after PATH, in the current folder.
    samples: int
        Documents shown, spread over all.
    """
    from weft.data.view import write_view

    if samples < 1:
        raise UsageError(f"--samples must be 1 or more, got {samples}", where="weft data view")
    page = out or Path(f"{path.resolve().stem}.html")
    write_view(path, page, samples=samples)
    print(page)


def _config(source: Path, overrides: list[str]) -> "BuildConfig":
    from weft.config import load_config, parse_overrides
    from weft.data.build import BuildConfig

    changes = parse_overrides(overrides)
    if source.suffix in (".yaml", ".yml"):
        return load_config(BuildConfig, source, changes)
    return load_config(BuildConfig, overrides={"sources": [{"kind": "auto", "path": str(source)}], **changes})


@contextmanager
def _progress() -> "Iterator[OnProgress]":
    """A line on standard error while the build runs, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Line
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Line(*columns, console=Console(stderr=True), transient=True) as line:
        task = line.add_task("reading")

        def show(progress: "Progress") -> None:
            tally = progress.tally
            counts = f"{tally.read.records} records read, {tally.kept.records} kept"
            line.update(task, description=f"{counts}, unit {progress.done} of {progress.units}")

        yield show


def _refuse_success(summary: "Summary", place: Path) -> None:
    """Raises where a script that goes on would go on with less than it thinks."""
    if summary.quarantined:
        first = summary.quarantined[0]
        raise WeftError(
            f"the work on {len(summary.quarantined)} units or records failed, and they were set aside; "
            f"the first: {first['file']}, line {first['line']}: {first['message']}",
            where=str(place.resolve().parent / f".{place.resolve().name}.building" / "quarantine"),
            fix="mend the cause and run the same command again: only those units are done again",
        )
    if not summary.total.kept.records:
        raise DocumentError(
            "no document was kept; the dataset is empty", where=str(place), fix=f"see {place / 'ledger.jsonl'}"
        )


def _print_summary(summary: "Summary", config: "BuildConfig", place: Path) -> None:
    rows: list[tuple[Any, ...]] = []
    tallies = [(f"{_name_of(config, s.number)} ({s.format})", s.tally) for s in summary.sources]
    for name, tally in (*tallies, ("total", summary.total)):
        read, kept, lost = tally.read, tally.kept, tally.lost
        for i, what in enumerate(("records", "texts", "images")):
            first = name if i == 0 else ""
            rows.append((first, what, *(getattr(count, what) for count in (read, kept, lost))))
    _print_table(("source (format)", "", "read", "kept", "dropped"), rows)
    reasons = [(stage, what, reason, n) for (stage, what, reason), n in sorted(summary.total.reasons.items())]
    if reasons:
        print()
        _print_table(("stage", "dropped", "reason", "times"), reasons)
    added = f", {summary.total.added} instructions added" if summary.total.added else ""
    print(f"\n{place}: {summary.total.kept.records} documents{added}, fingerprint {summary.fingerprint[:12]}")
    print(f"every drop is in {place / 'ledger.jsonl'}")


def _name_of(config: "BuildConfig", number: int) -> str:
    from weft.data.sources.picturebook_source import Picturebook

    source = config.sources[number]
    return source.kind if isinstance(source, Picturebook) else str(source.path)


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text, not a string: file names and messages are no markup
        table.add_row(*(Text(str(cell), justify="right" if isinstance(cell, int) else "left") for cell in row))
    Console().print(table)
