"""What must not be in a finished dataset is taken out of it, and nothing else changes."""

import json
from pathlib import Path

import pytest

from tests.data.corpus import chat, line, png, write
from tests.data.running import config, contents, ledger
from weft.atomic import verify_folder
from weft.data.build import build
from weft.data.check import check
from weft.data.dataset import open_dataset
from weft.data.funnel import compare, read_funnel
from weft.data.redact import read_block_list, redact
from weft.data.sources.draft import url_name
from weft.document import Image
from weft.errors import CheckpointError, UsageError

PAGE = "https://pages.example.org/a?b=1"
PICTURE = "http://pictures.example.org/p.png"
N = 230
"""More than two row groups."""
WITHOUT = {"d7": "id", "d100": "sha256", "d150": "page", "d151": "picture", "d229": "file"}
"""What is blocked, and by what."""


def records(leave: frozenset[str] = frozenset()) -> bytes:
    rows = []
    for i in range(N):
        identity = f"d{i}"
        name = {"d100": "bad.png", "d229": f"{url_name(PICTURE)}.png"}.get(identity, "good.png")
        record = chat(identity, name, text=f"text {i}")
        if identity == "d150":
            record["meta"] = {"page": {"urls": [PAGE]}}
        if identity == "d151":
            record["meta"] = {"images": {"good.png": {"raw_url": PICTURE}}}
        if identity not in leave:
            rows.append(line(record))
    return b"".join(rows)


def made(folder: Path, leave: frozenset[str] = frozenset()) -> Path:
    pictures = {"good.png": png(1), "bad.png": png(2), f"{url_name(PICTURE)}.png": png(3)}
    write(folder / "in", {**pictures, "documents.jsonl": records(leave)})
    build(config({"kind": "chat_jsonl", "path": str(folder / "in")}), folder / "out")
    return folder / "out"


def listed(folder: Path, *lines: str) -> Path:
    (folder / "block.txt").write_text("\n".join(lines))
    return folder / "block.txt"


BLOCK = (
    "# asked for on Monday",
    "",
    "id d7",
    Image(png(2)).sha256.upper(),
    "http://PAGES.example.org:443/a?b=1#top",
    f"url {PICTURE.replace('http', 'https')}",
    "id nobody",
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A dataset, redacted, and a dataset of what is left."""
    folder = tmp_path_factory.mktemp("redact")
    dataset = made(folder)
    before = contents(dataset)
    found = redact(dataset, read_block_list(listed(folder, *BLOCK)))
    return dataset, before, found, made(folder / "fewer", frozenset(WITHOUT))


def test_what_is_on_the_list_is_gone_and_what_is_left_is_the_same(both):
    dataset, _, found, fewer = both
    assert (found.removed.records, found.left.records, found.unmatched) == (5, N - 5, 1)
    assert found.reasons == {"blocked_id": 1, "blocked_sha256": 1, "blocked_url": 3}
    kept = open_dataset(dataset)
    assert {kept[i].id for i in range(len(kept))} == {f"d{i}" for i in range(N)} - set(WITHOUT)
    # bytes of a build that never had them
    assert {file.name: file.read_bytes() for file in dataset.glob("*.parquet")} == {
        file.name: file.read_bytes() for file in fewer.glob("*.parquet")
    }
    verify_folder(dataset)
    assert check(dataset).problems == ()
    assert not [entry for entry in dataset.parent.iterdir() if entry.name.startswith(".out.build")]


def test_ledger_summary_and_card_say_what_and_why(both):
    dataset, before, found, _ = both
    entries = ledger(dataset)[len(before["ledger.jsonl"].splitlines()) :]
    assert [entry["id"] for entry in entries] == list(WITHOUT)
    assert {(entry["stage"], entry["what"], entry["texts"], entry["images"]) for entry in entries} == {
        ("redact", "record", 2, 1)
    }
    assert entries[0]["message"] == "its id is on the block list block.txt, line 3"
    assert entries[3]["field"] == "meta.images.good.png.raw_url"
    summary = json.loads((dataset / "summary.json").read_text())
    for what in ("records", "texts", "images"):
        assert summary["read"][what] == summary["kept"][what] + summary["dropped"][what]
        lost = [row["dropped"][what] for row in summary["stages"]]
        assert sum(lost) == summary["dropped"][what]
    assert summary["stages"][-1]["in"]["records"] == N
    assert summary["redactions"][0]["removed"] == {"records": 5, "texts": 10, "images": 5}
    assert summary["fingerprint"] == found.fingerprint == open_dataset(dataset).fingerprint
    card = (dataset / "README.md").read_text()
    assert f"Illustrated documents: {N - 5} of {N} records" in card
    assert "## Removed after the build" in card
    assert "record: blocked_url 3" in card


def test_the_funnel_and_a_comparison_know_of_it(both):
    dataset, _, _, fewer = both
    last = read_funnel(dataset)[-1]
    assert (last.stage, last.records_in, last.records_dropped) == ("redact", N, 5)
    assert compare(dataset, fewer) == []


def test_a_second_list_adds_to_the_first_and_the_same_one_changes_nothing(tmp_path):
    dataset = made(tmp_path)
    redact(dataset, read_block_list(listed(tmp_path, "id d1", "id d2")))
    once = contents(dataset)
    assert redact(dataset, read_block_list(listed(tmp_path, "id d1", "id d2"))).removed.records == 0
    assert contents(dataset) == once
    second = read_block_list(listed(tmp_path, "id d3"))
    assert redact(dataset, second, dry_run=True).left.records == N - 3
    assert contents(dataset) == once
    redact(dataset, second)
    summary = json.loads((dataset / "summary.json").read_text())
    assert [row["stage"] for row in summary["stages"]].count("redact") == 1
    assert summary["stages"][-1]["dropped"]["records"] == 3
    assert summary["stages"][-1]["in"]["records"] == N
    assert len(summary["redactions"]) == 2
    assert [entry["id"] for entry in ledger(dataset)] == ["d1", "d2", "d3"]


def test_the_same_list_gives_the_same_bytes(tmp_path):
    found = []
    for name in "ab":
        dataset = made(tmp_path / name)
        redact(dataset, read_block_list(listed(tmp_path, *BLOCK)))
        found.append({file: data for file, data in contents(dataset).items() if file != "summary.json"})
    found[0].pop("manifest.json"), found[1].pop("manifest.json")  # the summary holds the path of the source
    assert found[0] == found[1]


def test_instructions_of_the_build_itself_stay_out_of_the_count(tmp_path):
    write(tmp_path / "in", {f"{name}.md": f"# {name}\n\nsome text".encode() for name in "abcd"})
    dataset = tmp_path / "out"
    build(config({"kind": "folder", "path": str(tmp_path / "in")}), dataset)
    before = json.loads((dataset / "summary.json").read_text())
    assert before["instructions_added"] == 4
    redact(dataset, read_block_list(listed(tmp_path, f"id {open_dataset(dataset)[0].id}")))
    after = json.loads((dataset / "summary.json").read_text())
    assert after["instructions_added"] == 3
    texts = sum(len(list(open_dataset(dataset)[i].texts)) for i in range(3))
    assert after["kept"]["texts"] + after["instructions_added"] == texts
    assert after["kept"]["texts"] < before["kept"]["texts"]


def test_a_failure_leaves_the_dataset_as_it_was(tmp_path, monkeypatch):
    dataset = made(tmp_path)
    before = contents(dataset)

    def fail(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr("weft.data.redact.line_of", fail)
    with pytest.raises(OSError, match="no space"):
        redact(dataset, read_block_list(listed(tmp_path, "id d1")))
    assert contents(dataset) == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "out", ".out.times.json", "block.txt"}


def test_everything_may_be_removed(tmp_path):
    dataset = made(tmp_path)
    assert redact(dataset, read_block_list(listed(tmp_path, *(f"id d{i}" for i in range(N))))).left.records == 0
    assert len(open_dataset(dataset)) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("f" * 63, "line 1"),
        ("id a\nid\n", "line 2"),
        ("url example.org/a", "line 1"),
        ("sha256 x", "line 1"),
        ("somebody", "line 1"),
    ],
)
def test_a_list_that_says_nothing_is_refused(tmp_path, text, message):
    with pytest.raises(UsageError) as refused:
        read_block_list(listed(tmp_path, text))
    assert message in str(refused.value)


def test_what_is_no_dataset_or_not_whole_is_refused(tmp_path):
    blocked = read_block_list(listed(tmp_path, "id d1"))
    with pytest.raises(UsageError, match="no dataset"):
        redact(tmp_path, blocked)
    with pytest.raises(UsageError, match="cannot be read"):
        read_block_list(tmp_path / "none")
    dataset = made(tmp_path)
    (file,) = dataset.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        redact(dataset, blocked)
