"""`weft data build | check | view`: documents in, a dataset out, and a look at either."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from weft.errors import DocumentError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weft.data.build import BuildConfig, Summary
    from weft.data.ledger import Tally

app = App(name="data", help="Build, check and view training data made of illustrated documents.")

_SHOWN = 20
"""Lines of problems printed; a program gets all of them with --json."""


@app.command
def build(
    source: Path,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    out: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Read documents, keep the good ones, and write a dataset with a ledger of everything that was dropped.

    A recipe's keys can be set here by their path, and those of a folder too: `--executor.kind processes`,
    `--sources.0.instruction 'draw: {title}'`.

    Parameters
    ----------
    source: Path
        A folder (JSONL in the chat form, doc.json, Markdown, HTML, as found), one such file, or a recipe (YAML).
    out: Path | None
        The folder to make; a dataset that is there is replaced.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.build import build as build_dataset

    config = _config(source, list(overrides))
    place = out or config.out
    if place is None:
        raise UsageError("where to write is not said", where="weft data build", fix="add --out FOLDER")
    with _progress() as show:
        summary = build_dataset(config, place, on_progress=show)
    if json_output:
        print(json.dumps(summary.to_json(), ensure_ascii=False))
    else:
        _print_summary(summary, config, place)


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
def _progress() -> "Iterator[Callable[[Tally], None]]":
    """A line on standard error while the build runs, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")

        def show(tally: "Tally") -> None:
            progress.update(task, description=f"{tally.read.records} records read, {tally.kept.records} kept")

        yield show


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
