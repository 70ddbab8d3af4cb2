"""`weft data build | check | view | funnel | stats | sniff | calibrate | fetch | redact | import | export`.

Documents in, a dataset out, and a look at either.
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from weft.errors import DocumentError, UsageError, WeftError

if TYPE_CHECKING:
    from weft.data.build import BuildConfig, OnProgress, Progress, Summary
    from weft.data.sources import SourceConfig

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
        counts = (row.records_in, row.records_dropped, row.images_in, row.images_dropped)
        reasons: list[tuple[Any, ...]] = sorted(row.reasons.items(), key=lambda item: -item[1])
        reason, *more = reasons or [("", "")]
        shown.append((row.stage, *(f"{n:,}" for n in counts), seconds, *reason))
        shown += [("", "", "", "", "", "", *each) for each in more]
    header = ("stage", "records", "lost", "images", "lost", "s", "reason", "times")
    _print_table(header, shown, numbers=(1, 2, 3, 4, 5, 7))
    if rows:
        first, last = rows[0], rows[-1]
        records, images = last.records_in - last.records_dropped, last.images_in - last.images_dropped
        print(f"kept {records:,} of {first.records_in:,} records, {images:,} of {first.images_in:,} images")
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
        [(name, *(f"{value:,}" for value in values)) for name, values in found.of_a_document.items()],
        numbers=range(1, 1 + len(found.quantiles)),
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
def view(path: Path, *, out: Path | None = None, samples: int = 24, drops: int = 3) -> None:
    """Write one HTML page with documents and their pictures, and what was dropped by reason.

    Parameters
    ----------
    path: Path
        A dataset, or anything that `weft data build` reads but a recipe.
    out: Path | None
        The page; by default named after PATH, in the current folder.
    samples: int
        Documents shown, spread over all.
    drops: int
        Of what was dropped for the same reason, so many are shown with their pictures. Of a dataset they are read
        again from its sources, where these are still there; 0 leaves the sources alone.
    """
    from weft.data.view import write_view

    if samples < 1 or drops < 0:
        given = f"--samples {samples} --drops {drops}"
        raise UsageError(f"--samples must be 1 or more and --drops 0 or more, got {given}", where="weft data view")
    page = out or Path(f"{path.resolve().stem}.html")
    write_view(path, page, samples=samples, drops=drops)
    print(page)


@app.command
def calibrate(
    source: Path,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    samples: int = 200,
    keep: float = 0.95,
    page: Path | None = None,
    out: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Measure a sample of the sources, and propose thresholds: what each would keep, as text, a page and a recipe.

    The page shows the pairs of pictures near every threshold, and what the three readings of the paper's rule make of
    them. A recipe's keys can be set here by their path, as for `weft data build`.

    Parameters
    ----------
    source: Path
        A recipe, whose thresholds and models are taken; or a folder or file of documents.
    samples: int
        Documents measured: the first ones of units that are spread over all sources.
    keep: float
        The share of the sample that each proposed threshold keeps, or more.
    page: Path | None
        The HTML page; by default named after SOURCE, in the current folder.
    out: Path | None
        The proposed filters as YAML, to be put into a recipe; by default named after SOURCE, in the current folder.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data import calibrate as calibrating
    from weft.data.calibrate_page import write_page

    if samples < 1:
        raise UsageError(f"--samples must be 1 or more, got {samples}", where="weft data calibrate")
    config = _config(source, list(overrides))
    filters = config.stages if source.suffix in (".yaml", ".yml") else calibrating.DEFAULT
    report = calibrating.calibrate(filters, calibrating.sample(config.sources, samples), keep)
    name = source.resolve().stem
    page, out = page or Path(f"{name}_calibration.html"), out or Path(f"{name}_thresholds.yaml")
    write_page(report, page, f"Calibration of {name}")
    calibrating.write_fragment(report, out, source)
    print(json.dumps(report.to_json()) if json_output else f"{report}\n\n{page}\n{out}")


@app.command
def fetch(
    source: Path,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    out: Path,
    contact: str | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Fetch the pictures that a source names by URL, for a build to find. Nothing else in Weft sends such requests.

    Robots rules and opt-outs are kept, private addresses refused. What was fetched, or refused for good, is not asked
    for again: a fetch that was stopped goes on where it was. How, can be set by name: `--threads 16`, `--per-host 2`,
    `--delay 0` (seconds between requests to a host), `--seconds 10` and `--max-bytes 20971520` (for one picture),
    `--respect-noml true`, `--ports "[80, 443]"`.

    Parameters
    ----------
    source: Path
        A recipe of `weft data build`, a dataset that it made (its sources are meant), or a folder or file of documents.
    out: Path
        The folder to fill: pictures/ for a source's `images`, objects/ with the same bytes by their SHA-256, and
        fetch.jsonl with what came of every URL.
    contact: str | None
        Your mail address or page, for whoever runs a server: part of the user agent. Nothing is sent without it.
    dry_run: bool
        Send nothing: print how many pictures there are to fetch, by host.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.config import load_config, parse_overrides
    from weft.data import fetch as fetching

    wanted = fetching.wanted_in(_sources_of(source))
    if dry_run:
        hosts = fetching.count_hosts(wanted, out)
        if json_output:
            print(json.dumps({"dry_run": True, "hosts": hosts}))
            return
        _print_table(("host", "pictures to fetch"), list(hosts.most_common(_SHOWN)))
        print(f"{hosts.total():,} pictures of {len(hosts):,} hosts to fetch")
        return
    if contact is None:
        raise UsageError(
            "who fetches is not said, so nothing is fetched",
            where="weft data fetch",
            fix="add --contact with your mail address or page; --dry-run shows what would be fetched",
        )
    config = load_config(
        fetching.FetchConfig, overrides={**parse_overrides(list(overrides)), "enabled": True, "contact": contact}
    )
    found = fetching.fetch(wanted, config, out)
    if json_output:
        print(json.dumps(found.to_json()))
    else:
        if found.refused:
            _print_table(("not fetched", "pictures"), found.refused.most_common())
        print(f"{found.fetched:,} pictures fetched, {found.known:,} known before, {found.refused.total():,} refused")
        print(f"what came of every URL is in {out / 'fetch.jsonl'}")
        print(f"to use them, set images: {out / 'pictures'} in the source")
    if found.refused and not found.fetched and not found.known:
        raise WeftError(
            "no picture could be fetched", where=str(out / "fetch.jsonl"), fix="each line there says why for one URL"
        )


def _sources_of(source: Path) -> "tuple[SourceConfig, ...]":
    """Of a recipe, of the dataset that was made of them, or the one that a folder or file is."""
    from weft.data.build import BuildConfig
    from weft.data.shards import SUMMARY

    if (source / SUMMARY).is_file():
        return BuildConfig.model_validate(json.loads((source / SUMMARY).read_bytes())["config"]).sources
    return _config(source, []).sources


@app.command
def redact(
    dataset: Path,
    *,
    block: Path,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Take documents out of a finished dataset, by a list of URLs, SHA-256 and ids. Nothing is built again.

    The ledger, the summary and the card say what was removed, and by which list. A build of the same sources would
    bring the documents back: keep the list.

    Parameters
    ----------
    dataset: Path
        A dataset.
    block: Path
        One entry to a line: a URL of a page or a picture, 64 hex digits (a picture's SHA-256), or `id` and a
        document's id. A document with any of them goes, whole.
    dry_run: bool
        Only say what would be removed.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.redact import read_block_list
    from weft.data.redact import redact as redact_data

    found = redact_data(dataset, read_block_list(block), dry_run=dry_run)
    if json_output:
        print(json.dumps({"dry_run": dry_run, **found.to_json()}))
        return
    if found.reasons:
        _print_table(("reason", "documents"), sorted(found.reasons.items()))
    removed = f"{found.removed.records:,} documents with {found.removed.images:,} images"
    print(f"{removed} {'would be removed' if dry_run else 'removed'}, {found.left.records:,} left")
    if found.unmatched:
        print(f"{found.unmatched:,} entries of the list removed nothing more")
    if found.removed.records and not dry_run:
        print(f"{dataset}: fingerprint {found.fingerprint[:12]}; every removal is in {dataset / 'ledger.jsonl'}")


@app.command(name="import")
def import_(
    form: str,
    source: Path,
    /,
    *,
    out: Path,
    fresh: Annotated[bool, Parameter(negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Make a dataset of files of another form. Documents keep their ids; what is dropped is in the ledger.

    Parameters
    ----------
    form: str
        chat_jsonl, huggingface, llama_factory, llava, swift or webdataset.
    source: Path
        A folder of that form, or one of its data files. `weft data sniff` looks at files of unknown forms.
    out: Path
        The folder to make; a dataset that is there is replaced.
    fresh: bool
        Forget what a stopped run has done.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.build import BuildConfig
    from weft.data.exchange.transfer import import_data

    with _progress() as show:
        summary = import_data(form, source, out, fresh=fresh, on_progress=show)
    if json_output:
        print(json.dumps(summary.to_json(), ensure_ascii=False))
    else:
        _print_summary(summary, BuildConfig.model_validate(summary.config), out)
    _refuse_success(summary, out)


@app.command
def export(
    dataset: Path,
    /,
    *,
    to: str,
    out: Path,
    on_lack: Literal["refuse", "document", "part"] = "refuse",
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Write a dataset as files for other programs. What their form cannot carry is refused, and nothing is written.

    Pictures keep their bytes. An export that was stopped goes on where it was. The README of the export says how it is
    read, and what was left out of it.

    Parameters
    ----------
    dataset: Path
        A dataset, or a JSONL file in the chat form.
    to: str
        chat_jsonl, huggingface, llama_factory, llava, swift or webdataset.
    out: Path
        The folder to make; an export that is there is replaced.
    on_lack: Literal["refuse", "document", "part"]
        What something that the form cannot carry costs: everything, the document it is in, or only itself.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.data.exchange import form_called
    from weft.data.exchange.transfer import export_data

    with _documents_done("exporting") as show:
        done = export_data(dataset, to, out, on_lack=on_lack, on_progress=show)
    if json_output:
        print(json.dumps(done.to_json(), ensure_ascii=False))
        return
    if done.lacks:
        lacks = form_called(to).lacks
        rows = [(reason, lacks[reason], n, done.documents[reason]) for reason, n in sorted(done.lacks.items())]
        _print_table(("lacking", "what", "times", "in documents"), rows)
    print(f"{out}: {done.written} of {done.read} documents as {to}")


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


@contextmanager
def _documents_done(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, on a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Line

    columns = (*Line.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Line(*columns, console=Console(stderr=True), transient=True) as line:
        task = line.add_task(what)
        yield lambda done, of: line.update(task, completed=done, total=of)


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


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]], numbers: Collection[int] = ()) -> None:
    """Columns of `numbers` stand at the right, as integers do in the others."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, overflow="fold", justify="right" if i in numbers else "left")
    for row in rows:
        # Text, not a string: file names and messages are no markup
        at_right = [isinstance(cell, int) or i in numbers for i, cell in enumerate(row)]
        table.add_row(*(Text(str(c), justify="right" if r else "left") for c, r in zip(row, at_right, strict=True)))
    Console().print(table)
