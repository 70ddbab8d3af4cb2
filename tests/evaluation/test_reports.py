"""Tables in the papers' layout beside published rows, pages that hold everything, files that other tools read."""

import csv
import json
import re

import pytest

from tests.evaluation.making import answered, png, write
from weft import cli
from weft.document import Document, Text, user
from weft.errors import UsageError
from weft.evaluation.evaluate import METRICS
from weft.evaluation.export import export_predictions
from weft.evaluation.pages import write_report
from weft.evaluation.score import ScoringConfig, score
from weft.evaluation.summary import aggregate
from weft.evaluation.tables import paper_tables, published, to_latex, to_markdown
from weft.evaluation.task import Sample, Task, TaskConfig

ASPECTS = ("text_quality", "perceptual_quality", "image_coherence", "text_image_coherence", "helpfulness")


def summary(task, metrics, *, model="ours", split="test", variant="default", subset=False, by=None):
    cells = {
        name: {"values": {value: {"value": number} for value, number in values.items()}, "valid": True, "by": by or {}}
        for name, values in metrics.items()
    }
    return {
        "task": {"name": task, "split": split, "variant": variant},
        "model": {"name": model, "adapter": None},
        "n": 5, "of": 9, "subset": subset, "metrics": cells,
    }  # fmt: skip


def aspects(*values):
    return dict(zip((*ASPECTS, "overall"), values, strict=True))


def test_our_row_stands_below_the_published_ones():
    ours = summary(
        "interleavedbench", {"interleavedeval/v1/gpt-4o-2024": aspects(1, 2, 3, 4, 5, 3)}, split="context-based"
    )
    table = paper_tables([ours])[0]
    assert table.rows[-1].cells == ("1.00", "2.00", "3.00", "4.00", "5.00", "3.00") and not table.rows[-1].published
    assert [row.name for row in table.rows[:2]] == ["Gemini 1.5 + SDXL", "GPT-4o + DALL-E 3"]


def test_scores_of_another_judge_are_never_in_the_published_table():
    metrics = {f"interleavedeval/v1/{judge}": aspects(1, 2, 3, 4, 5, 3) for judge in ("rule", "llama")}
    tables = paper_tables([summary("interleavedbench", metrics, split="context-based")])
    assert all(len(table.rows) == 1 and "not comparable" in table.note for table in tables) and len(tables) == 4


def test_only_the_published_split_is_compared():
    metrics = {"interleavedeval/v1/gpt-4o": aspects(1, 2, 3, 4, 5, 3)}
    assert paper_tables([summary("interleavedbench", metrics, split="full")]) == []


def test_cells_of_several_tasks_come_into_one_row():
    brushed = {"clip-i/b32": {"cosine": 0.8}, "dino/s16": {"cosine": 0.7}, "clip-t/b32": {"cosine": 0.3}}
    tables = paper_tables([
        summary("pope", {"pope/pope": {"accuracy": 0.876}}), summary("mme", {"mme/mme": {"perception": 1200.04}}),
        summary("refcoco", {"grounding/mm-interleaved": {"accuracy": 0.5}}, split="testA"),
        summary("magicbrush", brushed, variant="all-turns"),
    ])  # fmt: skip
    found = {table.title.split(",")[0]: table.rows[-1] for table in tables}
    assert found["Understanding and generation"].cells == ("-", "1200.0", "-", "87.6", "-", "-", "-")
    assert found["Referring expressions"].cells[:3] == ("-", "50.00", "-")
    brush = next(row for title, row in found.items() if title.startswith("MagicBrush"))
    assert brush.cells == ("80.00", "70.00", "30.00", "60.00") and brush.name == "ours, all-turns"


def test_a_subset_is_named_in_its_row():
    assert "(5 of 9)" in paper_tables([summary("pope", {"pope/pope": {"accuracy": 1.0}}, subset=True)])[0].rows[-1].name


def test_the_published_means_are_those_of_their_rows():
    for spec in published().values():
        assert spec["source"] and all(len(row) == len(spec["columns"]) + 1 for row in spec["rows"])
        assert len(spec["heads"]) == len(spec["columns"])
        if spec["columns"][-1] == "overall":
            for _, *values, mean in spec["rows"]:
                assert mean == pytest.approx(sum(values) / 5, abs=5e-4)
        if spec["columns"][-1] == "mean":
            for _, *values, mean in spec["rows"]:
                assert mean == pytest.approx(sum(values) / len(values), abs=0.01)


def test_tables_escape_what_names_hold():
    ours = summary("pope", {"pope/pope": {"accuracy": 1.0}}, model="a_b & 50% | x")
    table = paper_tables([ours])[0]
    assert r"a\_b \& 50\%" in to_latex(table) and to_latex(table).count(r"\midrule") == 2
    assert r"50% \| x | -" in to_markdown(table)
    assert len({line.count("|") - line.count(r"\|") for line in to_markdown(table).splitlines() if "|" in line}) == 1


# --- pages and exports of a run ---


def read(place):
    for i in range(4):
        yield Sample(f"s{i}", Document((user(f"story {i}"),)), {"outputs": ["text", "image"], "answer": f"a{i}"})


TASKS = {"stories": Task("stories", "", read, ("prose/length", "interleavedeval/v1"))}
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path, monkeypatch):
    for place in ("evaluate", "pages", "export"):
        monkeypatch.setattr(f"weft.evaluation.{place}.TASKS", TASKS)
    answers = {"s0": [HOSTILE, png()], "s1": ["b", png("blue"), png("red"), "c"], "s2": [], "s3": ["only"]}
    run = answered(tmp_path / "run", TaskConfig(name="stories"), answers, model="someone")
    score(run, TASKS, METRICS, ScoringConfig(judge={"port": {"kind": "rule"}}))
    aggregate(run, METRICS)
    return run


def test_the_report_holds_everything_and_escapes_what_models_write(run, tmp_path):
    write_report([run.folder, run.folder], tmp_path / "report", title="Mine & yours", shown=3)
    page, gallery = ((tmp_path / "report" / name).read_text() for name in ("report.html", "gallery.html"))
    assert "Mine &amp; yours" in page and "interleavedeval/v1/rule" in page and "<svg" in page
    assert "<script" not in gallery and "&lt;script&gt;" in gallery
    assert gallery.count('<section class="sample">') == 3 and gallery.count("data:image/png;base64,") == 6
    assert "(an empty answer)" in gallery
    for text in (page, gallery):
        assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "| interleavedeval/v1/rule | overall |" in (tmp_path / "report/tables.md").read_text()
    assert r"\begin{tabular}" in (tmp_path / "report/tables.tex").read_text()


def test_answers_as_opening_keeps_them(run, tmp_path):
    out = export_predictions(run.folder, "opening", tmp_path / "out")
    record = json.loads((out / "s1.json").read_text())
    assert record["conversations"][0]["input"] == [{"text": "story 1", "image": None}]
    assert record["conversations"][1]["output"] == [
        {"text": "b", "image": "s1-o-0.jpg"},
        {"text": "", "image": "s1-o-1.jpg"},
        {"text": "c", "image": None},
    ]
    assert (out / "s1-o-1.jpg").read_bytes()[:3] == b"\xff\xd8\xff"


def test_answers_as_one_list_of_parts(run, tmp_path):
    out = export_predictions(run.folder, "parts", tmp_path / "out")
    told = json.loads((out / "predictions.json").read_text())
    assert [part["type"] for part in told[1]["parts"]] == ["text", "image", "image", "text"]
    assert (out / told[1]["parts"][1]["image"]).read_bytes() == png("blue")


def test_pictures_have_no_place_in_tables_of_texts(run, tmp_path):
    with pytest.raises(UsageError, match="holds pictures"):
        export_predictions(run.folder, "lmms-eval", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_as_harnesses_keep_them(tmp_path, monkeypatch):
    def rows(place):
        options = {"A": "x\ty", "B": "z"}
        yield Sample("7", Document((user(Text("Which?")),)), {"options": options, "answer": "B", "index": 7})

    tasks = {"stories": Task("choices", "", rows, ("prose/length",))}
    for place in ("evaluate", "export"):
        monkeypatch.setattr(f"weft.evaluation.{place}.TASKS", tasks)
    run = answered(tmp_path / "run", TaskConfig(name="stories"), {"7": ["B."]}, model="someone")
    out = export_predictions(run.folder, "lmms-eval", tmp_path / "a")
    (line,) = [json.loads(each) for each in (out / "samples_stories.jsonl").read_text().splitlines()]
    assert (line["doc_id"], line["target"], line["resps"], line["filtered_resps"]) == (0, "B", [["B."]], ["B."])
    out = export_predictions(run.folder, "vlmevalkit", tmp_path / "b")
    with open(out / "someone_stories.tsv", newline="") as file:
        head, row = csv.reader(file, delimiter="\t")
    assert dict(zip(head, row, strict=True)) == {
        "index": "7", "question": "Which?", "A": "x\ty", "B": "z", "answer": "B", "prediction": "B."
    }  # fmt: skip


# --- the command line ---


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", *map(str, arguments)])
    return caught.value.code or 0


@pytest.fixture
def predicted(tmp_path):
    """MM-Vet in small, and somebody's answers."""
    rows = {
        f"v1_{i}": {"imagename": "v.jpg", "question": "Why?", "answer": "so", "capability": ["ocr"]} for i in range(3)
    }
    write(tmp_path / "data", {"mm-vet.json": rows, "images/v.jpg": png()})
    lines = [{"id": f"v1_{i}", "parts": [{"type": "text", "text": "so " * (i + 1)}]} for i in range(3)]
    write(tmp_path / "theirs", {"predictions.jsonl": lines})
    return tmp_path


def test_answers_from_elsewhere_by_command(predicted, capsys):
    theirs = predicted / "theirs"
    task = ("--task", "mm-vet", "--data", predicted / "data", "--model", "theirs")
    assert command("score", theirs, *task, "--metrics", "[prose/length]") == 0
    shown = capsys.readouterr().out
    assert "prose/length  words       2.0000" in shown and "summary.json" in shown
    assert command("aggregate", theirs, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "theirs"
    assert command("verify", theirs) == 0
    assert command("compare", theirs, theirs) == 0
    assert "not resolved" in capsys.readouterr().out
    assert command("report", theirs, "--out", predicted / "report") == 0
    assert command("export", theirs, "vlmevalkit", "--out", predicted / "export") == 0


def test_a_tampered_summary_fails_by_command(predicted, capsys):
    theirs = predicted / "theirs"
    command("score", theirs, "--task", "mm-vet", "--data", predicted / "data", "--metrics", "[prose/length]")
    file = theirs / "summary.json"
    file.write_text(file.read_text().replace('"n": 3', '"n": 4'))
    capsys.readouterr()
    assert command("verify", theirs) == 1
    told = capsys.readouterr()
    assert "n is 4, not 3" in told.out and "does not follow" in told.err


def test_a_missing_prediction_is_named_by_command(predicted, capsys):
    theirs = predicted / "theirs"
    file = theirs / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    task = ("--task", "mm-vet", "--data", predicted / "data", "--metrics", "[prose/length]")
    assert command("score", theirs, *task) == 1
    assert "no prediction for sample v1_2" in capsys.readouterr().err
    assert command("score", theirs, "--subset", "--metrics", "[prose/length]") == 0
    assert "a subset: 2 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,what",
    [
        (("run", "nano", "pop"), "no task 'pop'"),
        (("run", "nano", "pope"), "reads released files"),
        (("aggregate", "absent"), "not the folder of an evaluation"),
        (("score", "absent", "--split", "x"), "the run knows"),
        (("run", "nano", "pope", "--slotz", "3"), "unknown key slotz"),
    ],
)
def test_wrong_lines_exit_2(arguments, what, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert what in capsys.readouterr().err


def test_the_list_names_files_and_weights(capsys):
    assert command("list") == 0
    assert "interleaved_bench.json" in capsys.readouterr().out
    assert command("list", "metrics", "--json") == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["fid/clean"]["needs"] == "weights.inception" and rows["mm-vet/v1"]["needs"] == "judge"
