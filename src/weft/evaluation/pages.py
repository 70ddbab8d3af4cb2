"""The report of some runs: `report.html` and `gallery.html`, which hold all they show, `tables.md`, `tables.tex`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.atomic import write_text
from weft.document import Part, Text
from weft.evaluation.journal import EvaluationError
from weft.evaluation.records import with_pictures
from weft.evaluation.run import Run
from weft.evaluation.tables import label, paper_tables, run_table, to_latex, to_markdown
from weft.evaluation.task import Place, Sample, choose, read_json
from weft.evaluation.tasks import TASKS
from weft.images import data_uri, decode_image, encode_png

SIDE = 256
"""Of pictures in a gallery, at most."""


def write_report(folders: Sequence[Path], out: Path, *, title: str, shown: int) -> None:
    """
    Args:
        shown: answers of each task in the gallery, the first ones.

    Raises:
        EvaluationError: a run has no summary.
    """
    runs = [Run(folder) for folder in folders]
    summaries = [_summary(run) for run in runs]
    tables = [*paper_tables(summaries), run_table(summaries)]
    page = _template("evaluation.html").render(
        title=title,
        tables=tables,
        charts=[chart(task, of_task) for task, of_task in _by_task(summaries).items()],
        runs=[_facts(summary, run) for summary, run in zip(summaries, runs, strict=True)],
    )
    gallery = _template("gallery.html").render(title=title, tasks=_gallery(runs, summaries, shown))
    write_text(out / "report.html", page)
    write_text(out / "gallery.html", gallery)
    write_text(out / "tables.md", f"# {title}\n\n" + "\n".join(map(to_markdown, tables)))
    write_text(out / "tables.tex", "\n".join(map(to_latex, tables)))


def _summary(run: Run) -> dict[str, Any]:
    if not run.summary_file.is_file():
        raise EvaluationError("there is no summary", where=str(run.folder), fix=f"weft eval aggregate {run.folder}")
    summary: dict[str, Any] = read_json(run.summary_file)
    return summary


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name)


def _by_task(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        found.setdefault(summary["task"]["name"], []).append(summary)
    return found


def chart(task: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Numbers of a task's first metric with their intervals, a colour for each model, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    first = next(iter(summaries[0]["metrics"]), None)
    names = list(summaries[0]["metrics"][first]["values"]) if first else []
    with matplotlib.rc_context({"svg.hashsalt": "weft", "font.size": 10}):
        figure = Figure(figsize=(8, 1.2 + 0.28 * len(names) * max(1, len(summaries))), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for m, summary in enumerate(summaries):
            cells = summary["metrics"].get(first, {}).get("values", {})
            known = [(i, cells[name]) for i, name in enumerate(names) if cells.get(name, {}).get("value") is not None]
            reach = [
                [cell["value"] - cell.get("low", cell["value"]) for _, cell in known],
                [cell.get("high", cell["value"]) - cell["value"] for _, cell in known],
            ]
            heights = [i + 0.8 * (m + 0.5) / len(summaries) - 0.4 for i, _ in known]
            axes.errorbar(
                [cell["value"] for _, cell in known], heights, xerr=reach, fmt="o", ms=4, label=label(summary)
            )
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return {"title": f"{task}: {first}", "svg": svg[svg.index("<svg") :]}


def _facts(summary: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """What a reader needs to judge or repeat a run."""
    made = summary["made_with"]
    versions = {**(made["scoring"] or {}), **(made["generating"] or {})}
    judges = {name: metric["judge"] for name, metric in summary["metrics"].items() if "judge" in metric}
    return {
        "name": f"{label(summary)}, {summary['task']['name']}",
        "facts": {
            "folder": str(run.folder),
            "task": ", ".join(f"{key} {value}" for key, value in summary["task"].items() if value is not None),
            "answers": f"{summary['n']} of {summary['of']}, {summary['empty']} empty",
            "fingerprints": ", ".join(f"{key} {value[:12]}" for key, value in summary["fingerprints"].items()),
            "judge": "; ".join(f"{name}: {settings}" for name, settings in judges.items()) or "none",
            "skipped": "; ".join(f"{name}: {why}" for name, why in summary["skipped"].items()) or "nothing",
            "bootstrap": f"{summary['bootstrap']['resamples']} draws, seed {summary['bootstrap']['seed']}",
            "generation": str(summary["generation"]),
            "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        },
    }


def _gallery(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], shown: int) -> list[dict[str, Any]]:
    """Task -> samples -> each model's answer with its values."""
    found: dict[str, dict[str, Any]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        task, config, place = choose(run.task(), TASKS)
        of_task = found.setdefault(config.name, {"name": config.name, "samples": {}})
        predictions, records = run.read_predictions(), run.read_records()
        for sample in task.read(place):
            if len(of_task["samples"]) >= shown and sample.id not in of_task["samples"]:
                break
            if sample.id not in predictions:
                continue
            entry = of_task["samples"].setdefault(
                sample.id, {"id": sample.id, "asked": _asked(sample, place), "arms": []}
            )
            answer = with_pictures(predictions[sample.id], run.folder)
            values = {
                f"{name} {value}": cell
                for name, of_metric in records.items()
                if sample.id in of_metric
                for value, cell in of_metric[sample.id].values.items()
            }
            entry["arms"].append({"name": label(summary), "parts": [_shown(p) for p in answer.parts], "values": values})
    return [{"name": each["name"], "samples": list(each["samples"].values())} for each in found.values()]


def _asked(sample: Sample, place: Place) -> list[dict[str, str]]:
    return [_shown(place.loaded(part)) for part in (*sample.prompt.parts, *(p for parts in sample.then for p in parts))]


def _shown(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"text": part.text, "picture": ""}
    picture = decode_image(part.data or b"")
    if max(picture.size) <= SIDE:
        return {"text": "", "picture": data_uri(part.data or b"")}
    picture.thumbnail((SIDE, SIDE))
    return {"text": "", "picture": data_uri(encode_png(picture))}
