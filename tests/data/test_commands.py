"""`weft data build | check | view` as a person runs them: exit codes, messages, and a page that data cannot break."""

import json
import re

import pytest

from tests.data.corpus import chat, line, png, write, write_mixed
from weft.cli import main


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_build_says_what_it_read_and_where_the_rest_is(tmp_path, capsys):
    source = write_mixed(tmp_path / "in")
    code, out, _ = run(capsys, "build", source, "--out", tmp_path / "out")
    assert code == 0
    assert "(chat_jsonl)" in out
    assert "broken_json" in out
    assert "ledger.jsonl" in out
    code, out, _ = run(capsys, "build", source, "--out", tmp_path / "out", "--json")
    assert json.loads(out) == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_build_reads_a_recipe_and_overrides(tmp_path, capsys):
    recipe = tmp_path / "stories.yaml"
    recipe.write_text(f"sources: [{{kind: picturebook, n: 3}}]\nout: {tmp_path / 'out'}\n")
    code, out, _ = run(capsys, "build", recipe, "--sources.0.n", "4", "--json")
    assert (code, json.loads(out)["kept"]["records"]) == (0, 4)
    for options, message in (
        (["--sources.0.seeed", "1"], "did you mean sources.0.picturebook.seed?"),
        (["--filters", "[{kind: sharpness}]"], "sharpness"),
        (["--sources.7.n", "4"], "7 is not a section"),
        (["--executor.workers", "0"], "executor.workers"),
    ):
        code, _, err = run(capsys, "build", recipe, *options)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
    code, _, err = run(capsys, "build", tmp_path / "nothing", "--out", tmp_path / "x")
    assert code == 2
    assert "does not exist" in err
    code, _, err = run(capsys, "build", tmp_path)
    assert code == 2
    assert "--out" in err


def test_check_finds_every_problem_and_exits_1(tmp_path, capsys):
    source = write_mixed(tmp_path / "in")
    code, out, err = run(capsys, "check", source, "--json")
    report = json.loads(out)
    assert code == 1
    assert not report["ok"]
    assert "problems" in err
    assert any(p["where"] == "mixed.jsonl, line 4" and p["reason"] == "broken_json" for p in report["problems"])

    assert run(capsys, "build", source, "--out", tmp_path / "out")[0] == 0
    code, out, _ = run(capsys, "check", tmp_path / "out")
    assert code == 0
    assert "read 3 records" in out

    (file,) = (tmp_path / "out").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    code, out, _ = run(capsys, "check", tmp_path / "out", "--json")
    assert code == 1
    assert json.loads(out)["problems"][0]["reason"] == "damaged_file"


@pytest.mark.parametrize("built", [True, False])
def test_the_page_holds_all_it_shows_and_data_stays_data(tmp_path, capsys, built):
    attack = "</p><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    records = line(chat(attack, "a.png", text=attack)) + line(chat("b", "none.png", text=attack)) + b'{"<i>": \n'
    write(tmp_path / "in", {"a.png": png(), f"{attack.replace('/', '')}.jsonl": records})
    path = tmp_path / "in"
    if built:
        path = tmp_path / "out"
        assert run(capsys, "build", tmp_path / "in", "--out", path)[0] == 0
    assert run(capsys, "view", path, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "onerror=alert(1)&gt;{{ 7 * 7 }}" in page
    assert "image_missing" in page
    assert "broken_json" in page
    sources = re.findall(r'(?:src|href)="([^#"][^"]*)"', page)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")


def test_help_loads_no_torch():
    import subprocess
    import sys

    program = (
        "import sys\nfrom weft.cli import main\n"
        "try: main(['data', 'build', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
