"""`weft serve`: what it says before it serves."""

import json

import pytest

from weft import cli
from weft.cli import serve
from weft.serve.limits import Limits


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *arguments])
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "command, named", [(["tiny"], "httptools, uvicorn"), (["bench"], "aiohttp, httptools, uvicorn")]
)
def test_without_its_extra_it_says_what_to_install(command, named, capsys, monkeypatch):
    absent = ("uvicorn", "httptools", "aiohttp")
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in absent else name)
    code, _, said = run(capsys, *command)
    assert (code, said.splitlines()) == (
        1,
        [f"error: a server needs {named}", "where: weft serve", "fix: pip install 'weft[serve]'"],
    )


def test_limits_are_printed_as_they_would_be(tmp_path, capsys):
    recipe = tmp_path / "serve.yaml"
    recipe.write_text("limits:\n  images: 3\n")
    code, printed, _ = run(capsys, "nano", "--config", str(recipe), "--drain", "4", "--print-limits")
    assert not code
    assert Limits.model_validate(json.loads(printed)) == Limits(images=3, drain_seconds=4)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--port", "70000"], "port"),
        (["--slots", "0"], "slots"),
        (["--threads", "0"], "threads"),
        (["--drain", "0"], "drain_seconds"),
        (["--public-url", "weft.example"], "public_url"),
        (["--host", "0.0.0.0"], "--host"),
        (["--key-file", "nowhere"], "nowhere"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter"),
        (["--slot", "3"], "--slots"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(arguments, named, capsys, monkeypatch):
    monkeypatch.delenv("WEFT_API_KEY", raising=False)
    code, _, said = run(capsys, "nowhere/nothing", *arguments)
    assert code == 2
    assert named in said
    assert "Traceback" not in said
