"""`weft data import | export` as a person runs them."""

import json
import signal
import subprocess
import sys

import pytest

from tests.data.running import ROOT, contents, write_documents
from tests.data.test_commands import run


@pytest.fixture
def dataset(tmp_path, capsys):
    source = write_documents(tmp_path / "in", 6)
    assert run(capsys, "build", source, "--out", tmp_path / "d")[0] == 0
    return tmp_path / "d"


def test_a_dataset_goes_out_and_comes_in(dataset, tmp_path, capsys):
    code, out, _ = run(capsys, "export", dataset, "--to", "webdataset", "--out", tmp_path / "tar")
    assert (code, out.strip().replace("\n", "")) == (0, f"{tmp_path / 'tar'}: 6 of 6 documents as webdataset")
    code, out, _ = run(capsys, "import", "webdataset", tmp_path / "tar", "--out", tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(out)["kept"]["records"] == 6
    code, out, _ = run(capsys, "import", "webdataset", tmp_path / "tar", "--out", tmp_path / "again")
    assert code == 0
    assert "6 documents" in out


def test_what_does_not_fit_is_told_with_what_to_do(dataset, tmp_path, capsys):
    code, _, err = run(capsys, "export", dataset, "--to", "llama_factory", "--out", tmp_path / "out")
    assert code == 1
    assert "answer_picture in 6" in err
    assert "--on-lack part" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    options = ("--to", "llama_factory", "--out", tmp_path / "out", "--on-lack", "part")
    code, out, _ = run(capsys, "export", dataset, *options)
    assert code == 0
    assert "pictures in an answer" in out
    code, out, _ = run(capsys, "export", dataset, *options, "--json")
    assert json.loads(out)["lacks"] == {"answer_picture": 6}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "d", "--to", "excel", "--out", "x"], "llama_factory"),
        (["export", "none", "--to", "swift", "--out", "x"], "no such dataset"),
        (["export", "d", "--to", "swift", "--out", "d"], "another folder"),
        (["export", "d", "--to", "swift", "--out", "x", "--on-lack", "shrug"], "shrug"),
        (["export", "d", "--to", "swift"], "out"),
        (["import", "excel", "d", "--out", "x"], "llama_factory"),
        (["import", "swift", "none", "--out", "x"], "does not exist"),
        (["import", "webdataset", "in", "--out", "x"], "nothing to read"),
    ],
)
def test_wrong_use_says_what_is_right(dataset, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chat_jsonl", "webdataset"])
def test_an_export_that_was_killed_goes_on(form, dataset, tmp_path):
    script = tmp_path / "export.py"
    script.write_text(
        "import os, signal, sys\nfrom pathlib import Path\nfrom weft.data.exchange import transfer\n"
        "transfer._MARK_DOCUMENTS = 2\n"
        "def show(done, of):\n    if str(done) == sys.argv[2]: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"transfer.export_data(Path({str(dataset)!r}), {form!r}, Path(sys.argv[1]), on_progress=show)\n"
    )

    def export(out, stop):
        return subprocess.run([sys.executable, str(script), str(out), str(stop)], cwd=ROOT).returncode

    assert export(tmp_path / "0" / "out", 0) == 0
    for stop in (1, 3, 6):
        out = tmp_path / str(stop) / "out"
        assert export(out, stop) == -signal.SIGKILL
        assert not out.exists()
        assert export(out, 0) == 0
        assert contents(out) == contents(tmp_path / "0" / "out")
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
