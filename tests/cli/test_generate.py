"""`weft generate` on the instant model."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image as PILImage

from weft import cli

BRIEF = ("--max-images", "1", "--min-images", "1", "--max-text-tokens", "6")
"""The untrained model rarely ends by itself."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", *arguments])
    return caught.value.code or 0


def photo(name: str) -> None:
    PILImage.new("RGB", (30, 20), "green").save(name)


def test_a_folder_by_default_and_text_as_it_comes(capsys):
    photo("photo.jpg")
    assert run("nano", "hello", "--image", "photo.jpg", *BRIEF) == 0
    said = capsys.readouterr()
    assert "[picture_1.png]" in said.out
    (folder,) = Path("runs/generate").iterdir()
    assert str(folder) in said.err
    assert {file.name for file in folder.iterdir()} >= {"answer.md", "answer.json", "picture_1.png", "prompt_1.jpg"}


def test_json_names_what_was_written_and_the_seed_decides(capsys):
    answers = []
    for i, seed in enumerate((1, 1, 2)):
        assert run("nano", "hello", "--json", "--seed", str(seed), "--temperature", "1", "--out", f"o{i}", *BRIEF) == 0
        answers.append(json.loads(capsys.readouterr().out))
        assert answers[-1].pop("written_to") == f"o{i}"
    assert answers[0] == answers[1] != answers[2]
    assert {"type": "image", "image": "picture_1.png"} in answers[0]["parts"]


def test_one_page(capsys):
    assert run("nano", "hello", "--html", "page.html", *BRIEF) == 0
    assert Path("page.html").read_text().count("<img") == 1
    assert not Path("runs").exists()


def test_a_conversation_from_a_file_and_text_from_standard_input(monkeypatch, capsys):
    photo("photo.png")
    content = [{"type": "image", "image": "photo.png"}, {"type": "text", "text": "hello"}]
    Path("chat.json").write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    assert run("nano", "@chat.json", "--out", "a", *BRIEF) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run("nano", "-", "--out", "b", "--image", "photo.png", *BRIEF) == 0
    asked = [json.loads(Path(folder, "answer.json").read_text()) for folder in "ab"]
    assert asked[0]["messages"] == asked[1]["messages"]


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["nine", "hello"], 2, "no model 'nine'"),
        (["nano", ""], 2, "the prompt is empty"),
        (["nano", "hello", "--image", "absent.png"], 1, "absent.png does not exist"),
        (["nano", "hello", "--image", "cut.png"], 1, "image is truncated"),
        (["nano", "hello", "--out", "full"], 2, "not an empty folder"),
        (["nano", "hello", "--html", "full"], 2, "names a folder"),
        (["nano", "hello", "--html", "a", "--out", "b"], 2, "both say where"),
        (["nano", "hello", "--adapter", "full"], 1, "adapter_config.json"),
        (["nano", "hello", "--max-images", "-1"], 2, "max_images"),
        (["nano", "@absent.json"], 2, "cannot be read"),
        (["nano", "@broken.json"], 1, "not JSON"),
        (["nano", "@answered.json"], 1, "last turn"),
        (["nano", "@outside.json"], 1, "leaves the folder"),
        (["nano", "word " * 1000], 1, "context"),
    ],
)
def test_a_clear_error_and_nothing_written(arguments, code, what, capsys):
    photo("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:60])
    Path("full").mkdir()
    Path("full/mine").touch()
    Path("broken.json").write_text('{"messages": [')
    Path("answered.json").write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    image = {"type": "image", "image": "../x.png"}
    Path("outside.json").write_text(json.dumps({"messages": [{"role": "user", "content": [image]}]}))
    before = sorted(Path().rglob("*"))
    assert run(*arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "fix"]
    assert what in lines[0]
    assert sorted(Path().rglob("*")) == before


def test_guided_pictures_find_their_second_slot():
    assert run("nano", "hello", "--guidance", "2", "--out", "guided", *BRIEF) == 0
    assert Path("guided/picture_1.png").exists()


def test_a_place_under_a_file_is_named(capsys):
    photo("photo.png")
    assert run("nano", "hello", "--out", "photo.png/answer", *BRIEF) == 1
    assert "a file stands where a folder is needed" in capsys.readouterr().err


def test_beams_give_the_likeliest_text_and_draw_nothing(tmp_path, capsys):
    out = tmp_path / "answer"
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "nano", "hi", "--beams", "3", "--max-text-tokens", "4", "--out", str(out), "--json"])
    assert not caught.value.code
    first = json.loads(capsys.readouterr().out)
    assert [part["type"] for part in first["parts"]] == ["text"]
    assert first["usage"]["text_tokens"] <= 4
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "nano", "hi", "--beams", "3", "--seed", "1"])
    assert caught.value.code == 2
    assert "--seed says how to draw" in capsys.readouterr().err
