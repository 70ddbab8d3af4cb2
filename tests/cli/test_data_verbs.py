"""`weft data fetch | redact` as a person runs them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.corpus import line, png, write
from tests.data.test_fetch import NETWORK, Server
from weft.cli import main
from weft.data.dataset import open_dataset


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr("weft.data.fetch.Network", lambda: NETWORK)
    yield made
    made.server.shutdown()
    made.server.server_close()


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def fetched(capsys, server, *arguments) -> tuple[int, str, str]:
    return run(capsys, "fetch", *arguments, "--contact", "me@example.org", "--ports", f"[{server.port}]")


def write_obelics(folder: Path, *urls: str) -> None:
    record = {
        "images": [None, *urls],
        "texts": ["a text.", *(None for _ in urls)],
        "metadata": json.dumps([None, *({"src": url} for url in urls)]),
        "general_metadata": json.dumps({"url": "https://a.example/"}),
    }
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([record]), folder / "a.parquet")


def test_a_page_of_pictures_on_the_network_is_fetched_and_then_built(server, tmp_path, capsys):
    urls = [server.url("/a.png"), server.url("/b.png"), server.url("/gone.png")]
    server.behave["/gone.png"] = lambda handler: handler.say(b"", 404)
    text = f"# Title\n\nfirst\n\n![]({urls[0]})\n\nsecond\n\n![]({urls[1]})\n\n![]({urls[2]})\n"
    write(tmp_path / "in", {"page.md": text.encode()})
    place = tmp_path / "fetched"

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{kind: folder, path: {tmp_path / 'in'}}}]\n")
    assert run(capsys, "build", recipe, "--out", tmp_path / "before")[0] == 0
    entries = [json.loads(entry) for entry in (tmp_path / "before" / "ledger.jsonl").read_text().splitlines()]
    assert [(entry["reason"], entry["image"]) for entry in entries] == [("image_remote", url) for url in urls]
    assert all("weft data fetch SOURCE" in entry["message"] for entry in entries)

    code, _, err = run(capsys, "fetch", recipe, "--out", place)
    assert code == 2
    assert "--contact" in err
    code, out, _ = run(capsys, "fetch", tmp_path / "before", "--out", place, "--dry-run", "--json")
    assert (code, json.loads(out)["hosts"]) == (0, {f"pictures.example.org:{server.port}": 3})
    assert server.seen == []
    assert not place.exists()

    code, out, _ = fetched(capsys, server, tmp_path / "before", "--out", place, "--json")
    assert (code, json.loads(out)) == (0, {"fetched": 2, "known": 0, "refused": {"status": 1}})
    asked = len(server.pictures())
    code, out, _ = fetched(capsys, server, recipe, "--out", place)
    assert "0 pictures fetched, 3 known before, 0 refused" in out
    assert len(server.pictures()) == asked

    options = ("--sources.0.images", place / "pictures", "--out", tmp_path / "after")
    assert run(capsys, "build", recipe, *options)[0] == 0
    (document,) = [open_dataset(tmp_path / "after")[0]]
    assert [image.data for image in document.images] == [png(), png()]


def test_every_picture_of_a_record_is_wanted_though_one_costs_the_record(server, tmp_path, capsys):
    write_obelics(tmp_path / "in", server.url("/a.png"), server.url("/b.png"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{kind: obelics, path: {tmp_path / 'in'}, on_bad_image: record}}]\n")
    code, out, err = fetched(capsys, server, recipe, "--out", tmp_path / "fetched")
    assert code == 0, err
    assert "2 pictures fetched" in out


def test_mmc4_looks_for_pictures_by_their_names(server, tmp_path, capsys):
    info = [
        {"image_name": name, "raw_url": server.url(f"/{name}"), "matched_text_index": 0, "matched_sim": 0.3}
        for name in ("0a.png", "1b.png")
    ]
    record = {
        "text_list": ["a text."],
        "url": "https://a.example/",
        "image_info": info,
        "similarity_matrix": [[0.3]] * 2,
    }
    write(tmp_path / "in", {"docs_shard_0_v2.jsonl": line(record), "0a.png": png()})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{kind: mmc4, path: {tmp_path / 'in'}}}]\n")
    assert fetched(capsys, server, recipe, "--out", tmp_path / "fetched")[0] == 0
    assert server.pictures() == ["/1b.png"]
    assert (tmp_path / "fetched" / "pictures" / "1b.png").read_bytes() == png()


def test_a_fetch_that_gets_nothing_fails_and_a_wrong_setting_is_refused(server, tmp_path, capsys):
    write(tmp_path / "in", {"page.md": b"# Title\n\n![](http://nowhere.example.org/a.png)\n"})
    code, _, err = fetched(capsys, server, tmp_path / "in", "--out", tmp_path / "fetched")
    assert code == 1
    assert "no picture could be fetched" in err
    code, _, err = fetched(capsys, server, tmp_path / "in", "--out", tmp_path / "fetched", "--thread", "3")
    assert code == 2
    assert "threads" in err


def test_redact_says_what_it_did(tmp_path, capsys):
    write(tmp_path / "in", {f"{name}.md": f"# {name}\n\nsome text".encode() for name in "abcd"})
    assert run(capsys, "build", tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    (tmp_path / "block.txt").write_text("id a.md\nid nobody\n")
    options = ("redact", tmp_path / "out", "--block", tmp_path / "block.txt")
    code, out, _ = run(capsys, *options, "--dry-run")
    assert code == 0
    assert "1 documents with 0 images would be removed, 3 left" in out
    assert len(open_dataset(tmp_path / "out")) == 4
    code, out, _ = run(capsys, *options, "--json")
    found = json.loads(out)
    assert (code, found["removed"]["records"], found["unmatched"]) == (0, 1, 1)
    assert len(open_dataset(tmp_path / "out")) == 3
    assert run(capsys, "check", tmp_path / "out")[0] == 0
    code, _, err = run(capsys, "redact", tmp_path / "in", "--block", tmp_path / "block.txt")
    assert (code, "no dataset" in err) == (2, True)
