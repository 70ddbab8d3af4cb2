"""`weft eval run | score | aggregate | compare | duel | verify | report | export | statistics | ...`: numbers."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from weft.cli.loading import Loading
from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.evaluation.evaluate import EvaluationConfig
    from weft.evaluation.score import Say
    from weft.evaluation.task import TaskConfig

app = App(name="eval", help="Answer a benchmark, score the answers, compare models, and report.")

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Json = Annotated[bool, Parameter(name="--json", negative=())]


@app.command
def run(
    model: str,
    task: str,
    *overrides: Overrides,
    data: Path | None = None,
    split: str | None = None,
    variant: str | None = None,
    limit: int | None = None,
    adapter: Path | None = None,
    config: Path | None = None,
    out: Path | None = None,
    json_output: Json = False,
    loading: Loading = Loading(),
) -> None:
    """Answer a task with a model, score the answers and sum them up. A run that was stopped goes on where it was.

    Settings of a --config file can be set by their path: `--slots 16`, `--sampling.seed 1`, `--metrics '[a/b, c/d]'`,
    `--judge.port.kind http`, `--weights.clip_b32 FOLDER`.

    Parameters
    ----------
    model: str
        A name such as `tiny`, the folder of a model, or owner/name of a repository on the hub.
    task: str
        One of `weft eval list`.
    data: Path | None
        The folder of the task's released files.
    split: str | None
        Which part of them.
    variant: str | None
        Of prompts or protocol, where the literature has several.
    limit: int | None
        Only so many samples, from the first on; the summary says so.
    adapter: Path | None
        The folder of a trained adapter.
    config: Path | None
        Settings (YAML): metrics, judge, weights, sampling, slots.
    out: Path | None
        The folder of the run; by default runs/eval/TASK/MODEL.
    json_output: bool
        Print the summary for programs.
    """
    from weft.evaluation.evaluate import evaluate

    name = f"{Path(model).name}-{adapter.parent.name or adapter.name}" if adapter else Path(model).name
    place = out or Path("runs/eval") / task / name
    with _progress() as say:
        summary = evaluate(
            model,
            _task(task, data, split, variant, limit),
            place,
            _settings(config, overrides),
            adapter=adapter,
            load=loading.config(),
            say=say,
        )
    _show(summary, place, json_output)


@app.command
def score(
    folder: Path,
    *overrides: Overrides,
    task: str | None = None,
    data: Path | None = None,
    split: str | None = None,
    variant: str | None = None,
    limit: int | None = None,
    model: str = "unknown",
    config: Path | None = None,
    subset: Annotated[bool, Parameter(negative=())] = False,
    json_output: Json = False,
) -> None:
    """Score a run's answers, or answers from elsewhere, and sum them up. Needs no model.

    Answers from elsewhere are a folder with `predictions.jsonl` and the pictures that it names; say with --task what
    they answer. Settings as for `weft eval run`.

    Parameters
    ----------
    folder: Path
        Of a run, or with predictions.jsonl.
    task: str | None
        What answers from elsewhere answer.
    data: Path | None
        The folder of that task's released files.
    split: str | None
        Which part of them.
    variant: str | None
        Of prompts or protocol.
    limit: int | None
        Only so many samples, from the first on.
    model: str
        Whose answers from elsewhere are.
    config: Path | None
        Settings (YAML): metrics, judge, weights.
    subset: bool
        Leave out samples without an answer, instead of stopping at them.
    json_output: bool
        Print the summary for programs.
    """
    from weft.evaluation.evaluate import adopt, rescore
    from weft.evaluation.run import Run

    settings = _settings(config, overrides)
    if subset:
        settings = settings.model_copy(update={"subset": True})
    if task is None and any(each is not None for each in (data, split, variant, limit)):
        raise UsageError("the run knows what it answers", where="weft eval score", fix="leave --data and the like out")
    of = Run(folder) if task is None else adopt(folder, _task(task, data, split, variant, limit), model)
    with _progress() as say:
        summary = rescore(of, settings, say=say)
    _show(summary, folder, json_output)


@app.command
def aggregate(folder: Path, *, resamples: int | None = None, json_output: Json = False) -> None:
    """Make the summary from the records again. Needs neither the model nor a judge.

    Parameters
    ----------
    folder: Path
        Of a run.
    resamples: int | None
        Draws of the bootstrap; 1000 by default.
    json_output: bool
        Print the summary for programs.
    """
    from weft.evaluation.evaluate import reaggregate

    summary = reaggregate(folder) if resamples is None else reaggregate(folder, resamples=resamples)
    _show(summary, folder, json_output)


@app.command
def verify(folder: Path) -> None:
    """Compute the summary from the records again and compare. Exits 1 and names what differs.

    Parameters
    ----------
    folder: Path
        Of a run.
    """
    from weft.evaluation.evaluate import verify_run
    from weft.evaluation.journal import EvaluationError

    found = verify_run(folder)
    for each in found[:20]:
        print(each)
    if found:
        raise EvaluationError(
            f"the summary does not follow from the records: {len(found)} differences",
            where=str(folder / "summary.json"),
            fix="weft eval aggregate",
        )
    print("the summary follows from the records")


@app.command
def compare(first: Path, second: Path, *, resamples: int | None = None, json_output: Json = False) -> None:
    """Differences between two runs on the samples that both have, with paired intervals.

    Parameters
    ----------
    first: Path
        Of a run.
    second: Path
        Of another run on the same data.
    resamples: int | None
        Draws of the bootstrap; 1000 by default.
    json_output: bool
        Print one JSON list for programs.
    """
    from weft.evaluation.evaluate import compare_runs

    found = compare_runs(first, second) if resamples is None else compare_runs(first, second, resamples=resamples)
    if json_output:
        print(json.dumps([each.to_json() for each in found], ensure_ascii=False))
        return
    rows = [
        (
            each.metric,
            each.value,
            f"{each.first:.4f}",
            f"{each.second:.4f}",
            f"{each.difference:+.4f}",
            "" if each.low is None else f"[{each.low:+.4f}, {each.high:+.4f}]",
            {"first": str(first), "second": str(second)}.get(each.better, each.better),
        )
        for each in found
    ]
    _table(("metric", "value", "first", "second", "difference", "95 %", "better"), rows)


@app.command
def duel(
    first: Path,
    second: Path,
    *overrides: Overrides,
    config: Path | None = None,
    out: Path | None = None,
    json_output: Json = False,
) -> None:
    """Let a judge say which of two runs' answers is better, in both orders; a verdict that flips is a tie.

    Parameters
    ----------
    first: Path
        Of a run.
    second: Path
        Of another run on the same data.
    config: Path | None
        Settings (YAML) that hold the judge.
    out: Path | None
        The folder for verdicts and raw replies; by default one in runs/eval/duels.
    json_output: bool
        Print the result for programs.
    """
    from weft.evaluation.evaluate import duel_runs

    settings = _settings(config, overrides)
    if settings.judge is None:
        raise UsageError("no judge is given", where="weft eval duel", fix="--judge.port.kind http and what it needs")
    place = out or Path("runs/eval/duels") / f"{first.name}-{second.name}"
    found = duel_runs(first, second, settings.judge, place)
    if json_output:
        print(json.dumps(found, ensure_ascii=False))
        return
    for name, count in found["verdicts"].items():
        print(f"{name}: {count}")
    print(f"{found['n']} pairs, {found['unparsed']} unparsed; A is {first}, B is {second}")
    print(place / "duel.json")


@app.command
def report(*folders: Path, out: Path = Path("runs/eval/report"), title: str = "Evaluation", shown: int = 12) -> None:
    """Tables and galleries of one or more runs: report.html, gallery.html, tables.md and tables.tex.

    The HTML pages hold everything they show. Tables have the layout of the papers, with the published rows beside.

    Parameters
    ----------
    folders: Path
        Of runs.
    out: Path
        The folder to write into.
    title: str
        Of the page.
    shown: int
        Answers in the gallery for each task.
    """
    from weft.evaluation.pages import write_report

    if not folders:
        raise UsageError("a report is made of runs", where="weft eval report", fix="name one folder or more")
    write_report(folders, out, title=title, shown=shown)
    print(out / "report.html")


@app.command
def export(folder: Path, to: Literal["opening", "lmms-eval", "vlmevalkit", "parts"], *, out: Path) -> None:
    """Write a run's answers as other tools read them.

    Parameters
    ----------
    folder: Path
        Of a run.
    to: str
        `opening`: a folder of OpenING; `lmms-eval`: its samples file; `vlmevalkit`: its table; `parts`: one JSON list.
    out: Path
        The folder to make.
    """
    from weft.evaluation.export import export_predictions

    print(export_predictions(folder, to, out))


@app.command
def miniature(
    *,
    budget: str = "quick",
    out: Path | None = None,
    workers: int | None = None,
    json_output: Json = False,
) -> None:
    """See whether the papers' claims hold in the drawn world, with the tiny generalist: one report with a verdict each.

    Full fine-tuning, LoRA, MoE-LoRA, SAM-ConvLoRA and MoSS on the same stories, at equal rank and at equal parameters;
    `full` adds ranks, kernels, routing, a shuffled order of patches, and pictures as other codes and as vectors. The
    same command goes on where it was stopped.

    Parameters
    ----------
    budget: str
        `quick`: the main arms, two seeds, a quarter of an hour on four cores. `full`: everything, a night. Or the file
        of a recipe; see recipes/miniature_locality.yaml.
    out: Path | None
        The folder of the runs and of the report; by default one in runs/miniature.
    workers: int | None
        Processes of one thread each; by default as many as there are cores.
    json_output: bool
        Print the report for programs.
    """
    from weft.evaluation.miniature.run import run_miniature

    if workers is not None and workers < 1:
        raise UsageError("at least one process works", where="weft eval miniature", fix="--workers 1 or more")
    place = out or Path("runs/miniature") / Path(budget).stem
    with _status() as say:
        found = run_miniature(place, budget, workers=workers, say=say)
    if json_output:
        print(json.dumps(found, ensure_ascii=False))
        return
    rows = [
        (name, claim["verdict"], f"{claim['estimate']:+.4f}", "[{:+.4f}, {:+.4f}]".format(*claim["interval"]))
        for name, claim in found["claims"].items()
    ]
    _table(("claim", "verdict", "estimate", "95 %"), rows)
    print(place / "report.html")


@app.command
def statistics(pictures: Path, *, variant: str, inception: Path, out: Path = Path("runs/eval/real")) -> None:
    """See real pictures once for all models: the file that `--weights.real_statistics` takes, for one variant of FID.

    Parameters
    ----------
    pictures: Path
        A folder; all PNG, JPEG and WebP files below it.
    variant: str
        `pytorch-fid`, `clean`, `clean-legacy-tf`, `torchmetrics-1.9` or `64`.
    inception: Path
        The weights of the Inception network of 2015-12-05, safetensors.
    out: Path
        The folder to write into; the file's name says what it was made of.
    """
    from weft.evaluation.evaluate import keep_real

    print(keep_real(pictures, variant, inception, out))


@app.command(name="list")
def list_(what: Literal["tasks", "metrics"] = "tasks", *, json_output: Json = False) -> None:
    """The tasks with the files they read, or the metrics with the weights they need.

    Parameters
    ----------
    what: str
        tasks or metrics.
    json_output: bool
        Print one JSON list for programs.
    """
    from weft.evaluation.evaluate import catalogue

    heads = {
        "tasks": ("task", "splits", "variants", "metrics", "files", "about"),
        "metrics": ("metric", "needs", "missing here", "scored with it", "about"),
    }[what]
    rows = catalogue()[what]
    if json_output:
        print(json.dumps([dict(zip(heads, row, strict=True)) for row in rows], ensure_ascii=False))
    else:
        for row in rows:
            print(row[0])
            for head, cell in zip(heads[1:], row[1:], strict=True):
                if cell and cell not in ("default", "-"):
                    print(f"    {head}: {cell}")


def _task(name: str, data: Path | None, split: str | None, variant: str | None, limit: int | None) -> "TaskConfig":
    from weft.config import load_config
    from weft.evaluation.task import TaskConfig

    given = {"name": name, "data": data, "split": split, "variant": variant, "limit": limit}
    return load_config(TaskConfig, overrides={key: value for key, value in given.items() if value is not None})


def _settings(file: Path | None, overrides: Sequence[str]) -> "EvaluationConfig":
    """`--sampling.seed 1` sets a key of a mapping whose keys are themselves dotted paths."""
    from weft.config import load_config, parse_overrides
    from weft.evaluation.evaluate import EvaluationConfig

    found: dict[str, Any] = parse_overrides(overrides)
    config = load_config(
        EvaluationConfig,
        file,
        {key: value for key, value in found.items() if not key.startswith(("sampling.", "beams."))},
    )
    for name in ("sampling", "beams"):
        own = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
        if own:
            config = config.model_copy(update={name: {**(getattr(config, name) or {}), **own}})
    return config


def _show(summary: dict[str, Any], folder: Path, json_output: bool) -> None:
    if json_output:
        print(json.dumps(summary, ensure_ascii=False))
        return
    rows = []
    for name, metric in summary["metrics"].items():
        for value, cell in metric["values"].items():
            interval = f"[{cell['low']:.4f}, {cell['high']:.4f}]" if "low" in cell else ""
            notes = [
                f"{cell[key]} {key.replace('_', ' ')}" for key in ("unparsed", "by_rule", "default") if key in cell
            ]
            shown = "-" if cell["value"] is None else f"{cell['value']:z.4f}"
            rows.append((name, value, shown, interval, str(cell["n"]), ", ".join(notes)))
    _table(("metric", "value", "mean", "95 %", "n", "of these"), rows)
    if summary["subset"]:
        print(f"a subset: {summary['n']} of {summary['of']} samples")
    for name, why in summary["skipped"].items():
        print(f"skipped {name}: {why}")
    for name, metric in summary["metrics"].items():
        if not metric["valid"]:
            print(f"not valid: {name}: {metric['unparsed']} of {metric['n']} replies could not be read")
    print(folder / "summary.json")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def _status() -> "Iterator[Callable[[str], None]]":
    """A status line on a terminal; in a log every line."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def say(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        yield say


@contextmanager
def _progress() -> "Iterator[Say]":
    """A status line on a terminal; in a log a line for each step."""
    from rich.console import Console

    console = Console(stderr=True)
    last = ""
    with console.status("starting") as status:

        def say(step: str, done: int, of: int) -> None:
            nonlocal last
            status.update(f"{step}: {done} of {of}")
            if not console.is_terminal and step != last:
                console.print(f"{step}: {of}")
            last = step

        yield say
