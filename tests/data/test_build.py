"""A build loses nothing silently, gives the same bytes whoever works, and is there whole or not at all."""

import errno
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.data.corpus import DAMAGED, GOOD, MIXED, chat, line, png, write, write_mixed
from weft.data import open_dataset
from weft.data.build import BuildConfig, build
from weft.data.stage import Count, count
from weft.errors import CheckpointError, DocumentError, UsageError

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "samples"


def config(*sources: dict, **others) -> BuildConfig:
    return BuildConfig.model_validate({"sources": sources, **others})


def ledger(folder: Path) -> list[dict]:
    return [json.loads(entry) for entry in (folder / "ledger.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def dropped(entries: list[dict]) -> Count:
    """What the ledger alone says was dropped."""
    counted = Counter(entry["what"] for entry in entries)
    return Count(counted["record"], sum(e["texts"] for e in entries), sum(e["images"] for e in entries))


def test_every_bad_line_is_in_the_ledger_with_file_line_and_reason(tmp_path):
    source = write_mixed(tmp_path / "in")
    summary = build(config({"kind": "chat_jsonl", "path": str(source)}), tmp_path / "out")
    expected = {number: reason for number, (_, reason) in enumerate(MIXED, start=1) if reason}
    entries = ledger(tmp_path / "out")
    assert {entry["line"]: entry["reason"] for entry in entries} == expected
    assert {entry["file"] for entry in entries} == {"mixed.jsonl"}
    assert all(entry["message"] for entry in entries)
    images = {entry["image"]: entry for entry in entries}
    assert {f"bad/{name}" for name in DAMAGED} <= images.keys()
    assert "3,600,000,000" in images["bad/bomb.png"]["message"] or "60000 x 60000" in images["bad/bomb.png"]["message"]
    assert images["gone.png"]["field"] == "messages[1].content[1].image"
    assert next(e["field"] for e in entries if "role" in e["message"]) == "messages[0].role"
    assert summary.total.kept.records == GOOD
    assert [document.id for document in open_dataset(tmp_path / "out")] == ["first", "mixed.jsonl:2", "last"]


@pytest.mark.parametrize("seed", range(8))
def test_kept_and_dropped_are_what_was_read(tmp_path, seed):
    rng = random.Random(seed)
    lines = tuple(rng.choice(MIXED) for _ in range(rng.randint(1, 200)))
    write_mixed(tmp_path / "in", lines)
    write(
        tmp_path / "in",
        {
            "post.md": b"# T\n\nab ![](a.png) cd ![](http://x/y.png) ![](gone.png)",
            "page.html": b"<p>x<img src=b.png><svg></svg>",
            "doc/doc.json": line(
                {"title": "t", "elements": [{"type": "text", "text": " "}, {"type": "image", "path": "p.png"}]}
            ),
            "doc/p.png": png(),
        },
    )
    wanted = {"images": {"kind": "image_count", "min": rng.randint(0, 2)}, "decode": {"kind": "decode"}}
    wanted["decode"]["on_bad_image"] = rng.choice(["record", "image"])
    made = config({"kind": "auto", "path": str(tmp_path / "in")}, filters=list(wanted.values()))
    summary = build(made, tmp_path / "out").to_json()
    documents = list(open_dataset(tmp_path / "out"))
    kept = sum(map(count, documents), Count())
    # instructions made from titles were not read
    kept -= Count(texts=summary["instructions_added"])
    read = Count(**summary["read"])
    assert read == kept + dropped(ledger(tmp_path / "out"))
    assert asdict(kept) == summary["kept"]
    assert read.records == 3 + sum(1 for data, _ in lines if data.strip())
    for stage, following in itertools.pairwise(summary["stages"]):
        assert Count(**stage["in"]) - Count(**stage["dropped"]) == Count(**following["in"])


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs ../shared/data/samples")
def test_the_samples_are_kept_whole(tmp_path):
    build(config({"kind": "auto", "path": str(SAMPLES)}), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    documents = {document.id: document for document in dataset}
    files = sorted(SAMPLES.glob("*/doc.json"))
    assert len(files) == len(dataset) == 8
    for file in files:
        record = json.loads(file.read_bytes())
        instruction, answer = documents[record["id"]].turns
        assert instruction.parts[0].text == f"write an illustrated document: {record['title']}"
        read = [
            part.text if element["type"] == "text" else part.data
            for part, element in zip(answer.parts, record["elements"], strict=True)
        ]
        wanted = [
            element["text"] if element["type"] == "text" else (file.parent / element["path"]).read_bytes()
            for element in record["elements"]
        ]
        assert read == wanted
        assert count(documents[record["id"]]) == Count(1, record["n_text"] + 1, record["n_images"])
    not_read = {entry["file"] for entry in ledger(tmp_path / "out")}
    others = {str(f.relative_to(SAMPLES)) for f in SAMPLES.rglob("*") if f.is_file() and f.name != "doc.json"}
    assert not_read == {file for file in others if "/images/" not in file}


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs ../shared/data/samples")
@pytest.mark.parametrize("name", ["howto_infrared_bird_box", "howto_parent_detector", "howto_whoopi_cushion"])
def test_markdown_steps_hold_the_pictures_of_the_sample(tmp_path, name):
    source = {"kind": "folder", "path": str(SAMPLES / name / "original"), "documents": "steps"}
    build(config({**source, "images": str(SAMPLES / name)}), tmp_path / "out")
    (document,) = open_dataset(tmp_path / "out")
    elements = json.loads((SAMPLES / name / "doc.json").read_bytes())["elements"]
    wanted = [(SAMPLES / name / e["path"]).read_bytes() for e in elements if e["type"] == "image"]
    assert [image.data for image in document.images] == wanted

    # without the folder of pictures every one of them is in the ledger
    build(config(source), tmp_path / "bare")
    assert dropped(ledger(tmp_path / "bare")) == Count(images=len(wanted))


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_full_disk_leaves_no_dataset_and_the_work_that_was_done(tmp_path, monkeypatch, call):
    source = write_mixed(tmp_path / "in")
    made = config({"kind": "auto", "path": str(source)})
    build(made, tmp_path / "unharmed")
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        build(made, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir() if "out" in entry.name) == [".out.building", "outside.png"]
    monkeypatch.setattr("weft.data.worker.Worker.__call__", None)  # nothing is left to be done
    build(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "unharmed")
    assert not (tmp_path / ".out.building").exists()


def test_a_file_that_cannot_grow_leaves_nothing_and_says_why(tmp_path):
    program = (
        "import resource, signal, sys\nfrom weft.cli import main\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\nmain(sys.argv[1:])"
    )
    (tmp_path / "recipe.yaml").write_text("sources: [{kind: picturebook, n: 100}]")
    command = [sys.executable, "-c", program, "data", "build", "recipe.yaml", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_failed_build_leaves_the_dataset_that_was_there(tmp_path, monkeypatch):
    made = config({"kind": "picturebook", "n": 5})
    build(made, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("weft.data.commit.ShardWriter.close", fail)
    with pytest.raises(OSError, match="No space"):
        build(made, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.building", ".out.times.json", "out"]


def test_what_is_no_dataset_is_never_replaced(tmp_path):
    write(tmp_path / "mine", {"thesis.txt": b"years of work", "a.md": b"# T\n\ntext"})
    with pytest.raises(UsageError, match="no dataset"):
        build(config({"kind": "picturebook", "n": 1}), tmp_path / "mine")
    with pytest.raises(UsageError, match="holds a source"):
        build(config({"kind": "auto", "path": str(tmp_path / "mine" / "a.md")}), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_bytes() == b"years of work"


def test_a_dataset_inside_its_source_is_not_read_again(tmp_path):
    write(tmp_path, {"a.md": b"# T\n\ntext"})
    made = config({"kind": "auto", "path": str(tmp_path)})
    first = build(made, tmp_path / "out")
    second = build(made, tmp_path / "out")
    assert second.fingerprint == first.fingerprint
    assert ledger(tmp_path / "out")[0]["reason"] == "built_dataset"


def test_a_changed_byte_is_found_when_the_dataset_is_opened(tmp_path):
    build(config({"kind": "picturebook", "n": 5}), tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs"):
        open_dataset(tmp_path / "out")


def test_a_jsonl_file_opens_as_a_dataset_or_names_its_bad_line(tmp_path):
    write(tmp_path, {"a.png": png(), "good.jsonl": line(chat("x", "a.png")) * 2, "bad.jsonl": line(chat("x")) + b"{"})
    dataset = open_dataset(tmp_path / "good.jsonl")
    assert len(dataset) == 2
    assert next(dataset[1].images).data == png()
    first = dataset.fingerprint
    write(tmp_path, {"a.png": png(1)})
    assert open_dataset(tmp_path / "good.jsonl").fingerprint != first
    with pytest.raises(DocumentError, match="not JSON") as error:
        open_dataset(tmp_path / "bad.jsonl")
    assert error.value.where.endswith("bad.jsonl, line 2")
    with pytest.raises(UsageError, match="no such dataset"):
        open_dataset(tmp_path / "nothing")


def test_a_line_longer_than_the_limit_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.data.sources.files.lines.MAX_RECORD", 1000)
    exact = line(chat("exact", text="x" * 0))
    exact = line(chat("exact", text="x" * (1000 - len(exact) + 1)))
    assert len(exact) == 1001  # the end of the line is not part of it
    lines = (
        line(chat("a")),
        line(chat("b", text="x" * 5000)),
        exact,
        line(chat("c", text="y" * 1000)),
        line(chat("d")),
    )
    write(tmp_path, {"long.jsonl": b"".join(lines)})
    build(config({"kind": "chat_jsonl", "path": str(tmp_path / "long.jsonl")}), tmp_path / "out")
    assert [document.id for document in open_dataset(tmp_path / "out")] == ["a", "exact", "d"]
    assert [(entry["line"], entry["reason"]) for entry in ledger(tmp_path / "out")] == [
        (2, "too_large"),
        (4, "too_large"),
    ]


def test_a_dataset_of_many_row_groups_and_files_reads_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.data.shards.ROWS", 3)
    monkeypatch.setattr("weft.data.shards.FILE_BYTES", 40_000)
    summary = build(config({"kind": "picturebook", "n": 50}), tmp_path / "out")
    assert len(summary.files) > 2
    assert summary.files[0] == f"train-00000-of-{len(summary.files):05d}.parquet"
    dataset = open_dataset(tmp_path / "out")
    order = list(range(50))
    random.Random(0).shuffle(order)
    assert [dataset[i].id for i in order] == [f"story-0-{i + 1:06d}" for i in order]
    assert dataset.fingerprint == summary.fingerprint
    with pytest.raises(IndexError):
        dataset[50]
    with pytest.raises(IndexError):
        dataset[-1]


def test_an_empty_result_is_still_a_dataset(tmp_path):
    write(tmp_path / "in", {"a.jsonl": b"{\n"})
    summary = build(config({"kind": "auto", "path": str(tmp_path / "in")}), tmp_path / "out")
    assert summary.total.kept == Count()
    assert len(open_dataset(tmp_path / "out")) == 0
