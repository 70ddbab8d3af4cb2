"""Tables in the papers' layout: our rows beside the published ones, as Markdown and LaTeX.

`published.json` holds what was printed, with its source. Scores of different judges are never in one table: rows of
another judge than the published one get a table of their own.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED_JUDGE = "gpt-4o"
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[str, ...]
    published: bool


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """The published tables, by name."""
    found: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published.json").read_text())
    return found


def paper_tables(summaries: Sequence[Summary]) -> list[Table]:
    """Every published table that these runs have a cell of; runs of one model share a row."""
    found: list[Table] = []
    for name, spec in published().items():
        for judge, own in _rows(name, spec, summaries).items():
            printed = [
                Row(str(row[0]), tuple(_cell(value, spec["digits"]) for value in row[1:]), True) for row in spec["rows"]
            ]
            is_comparable = judge is None or judge.lower().startswith(PUBLISHED_JUDGE)
            note = spec["source"] if is_comparable else f"judge {judge}; not comparable with {spec['source']}"
            heads = ("model", *spec["heads"])
            found.append(Table(spec["title"], note, heads, (*(printed if is_comparable else ()), *own)))
    return found


def _rows(name: str, spec: Mapping[str, Any], summaries: Sequence[Summary]) -> dict[str | None, list[Row]]:
    """Our rows by judge (None: there is none)."""
    tasks = spec.get("task", name)
    tasks = [tasks] if isinstance(tasks, str) else tasks
    cells: dict[tuple[str | None, str], dict[int, str]] = {}
    for summary in summaries:
        if (
            summary["task"]["name"] not in tasks
            or spec.get("split", summary["task"]["split"]) != summary["task"]["split"]
        ):
            continue
        for judge in {_judge_of(metric) for metric in summary["metrics"]} | {None}:
            for i, column in enumerate(spec["columns"]):
                value = _value(summary, column, spec, judge)
                if value is not None:
                    scale = spec["scales"][i] if "scales" in spec else spec.get("scale", 1)
                    text = _cell(value * scale, spec["digits"])
                    cells.setdefault((judge, label(summary)), {})[i] = text
    found: dict[str | None, list[Row]] = {}
    for (judge, model), own in cells.items():
        row = [own.get(i, "-") for i in range(len(spec["columns"]))]
        if spec["columns"][-1] == "mean" and all(i in own for i in range(len(row) - 1)):
            row[-1] = _cell(sum(float(cell) for cell in row[:-1]) / (len(row) - 1), spec["digits"])
        found.setdefault(judge, []).append(Row(model, tuple(row), False))
    return found


def _value(summary: Summary, column: str, spec: Mapping[str, Any], judge: str | None) -> float | None:
    """The cell of a column, written `value`, `metric:value`, `task@metric:value` or `task/split@metric:value`."""
    where, _, rest = column.rpartition("@")
    if where and where not in (summary["task"]["name"], f"{summary['task']['name']}/{summary['task']['split']}"):
        return None
    metric, _, value = rest.rpartition(":")
    for wanted in [metric] if metric else spec["metrics"]:
        found = summary["metrics"].get(wanted if judge is None else f"{wanted}/{judge}")
        if found is None or not found["valid"]:
            continue
        if "facet" in spec:
            facet, of = spec["facet"]
            return found["by"].get(facet, {}).get("values", {}).get(of, {}).get(value)
        return found["values"].get(value, {}).get("value")
    return None


def _judge_of(metric: str) -> str | None:
    return "/".join(metric.split("/")[2:]) or None


def label(summary: Summary) -> str:
    """The model's name, with its adapter's, the variant and whether it is a subset."""
    model, task = summary["model"], summary["task"]
    name = Path(model["name"]).name
    if model["adapter"]:
        folder = Path(model["adapter"])
        name += f" + {folder.parent.name if folder.name == 'adapter' else folder.name}"
    if task["variant"] != "default":
        name += f", {task['variant']}"
    return f"{name} ({summary['n']} of {summary['of']})" if summary["subset"] else name


def run_table(summaries: Sequence[Summary]) -> Table:
    """Everything that was measured, a row for each number."""
    return Table(
        "All numbers",
        "95 % bootstrap intervals; n is how many answers a number is made of. An interval without width says that all "
        "answers scored alike, not that the number is certain",
        ("model", "task", "metric", "value", "mean", "95 %", "n", "unparsed", "by rule", "default"),
        tuple(Row(label(summary), cells, False) for summary in summaries for cells in _numbers(summary)),
    )


def _numbers(summary: Summary) -> Iterator[tuple[str, ...]]:
    for name, metric in summary["metrics"].items():
        for value, cell in metric["values"].items():
            interval = f"[{cell['low']:.4f}, {cell['high']:.4f}]" if "low" in cell else ""
            counts = tuple(str(cell.get(key, 0)) for key in ("unparsed", "by_rule", "default"))
            mean = "-" if cell["value"] is None else f"{cell['value']:z.4f}"
            marked = mean if metric["valid"] else f"{mean} (not valid)"
            yield (summary["task"]["name"], name, value, marked, interval, str(cell["n"]), *counts)


def to_markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", table.note, ""]
    heads = [*table.heads, "origin"]
    lines += [_pipe(heads), _pipe(["---"] * len(heads))]
    lines += [_pipe([row.name, *row.cells, "published" if row.published else "here"]) for row in table.rows]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """With booktabs; our rows stand below a line."""
    columns = "l" + "r" * (len(table.heads) - 1)
    lines = [rf"\begin{{table}}\centering\small\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, table.heads)) + r" \\", r"\midrule"]
    printed = [row for row in table.rows if row.published]
    ours = [row for row in table.rows if not row.published]
    lines += [" & ".join(map(_tex, (row.name, *row.cells))) + r" \\" for row in printed]
    lines += [r"\midrule"] if printed and ours else []
    lines += [" & ".join(map(_tex, (row.name, *row.cells))) + r" \\" for row in ours]
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_tex(table.title)}. {_tex(table.note)}.}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:z.{digits}f}"
