import json

import pytest

from weft.cli import doctor as module
from weft.errors import WeftError


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_this_installation_is_sound(capsys, tmp_path):
    module.doctor(json_output=True, out=tmp_path / "runs")
    found = report(capsys)
    names = {check["name"] for check in found["checks"]}
    assert found["ok"]
    assert {"python", "torch", "transformers", "memory", "weft[dev]", "runs folder"} <= names


def test_a_missing_package_fails_with_the_command_that_installs_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["surely-absent>=3,<4", "pillow<1"])
    with pytest.raises(WeftError) as caught:
        module.doctor(json_output=True, out=tmp_path)
    assert "surely-absent" in caught.value.fix
    failed = {check["name"]: check["fix"] for check in report(capsys)["checks"] if check["status"] == "failed"}
    assert failed.keys() == {"surely-absent", "pillow"}
    assert all("pip install" in fix for fix in failed.values())


def test_a_missing_extra_is_a_note(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["surely-absent>=3; extra == 'dev'"])
    module.doctor(json_output=True, out=tmp_path)
    (extra,) = (check for check in report(capsys)["checks"] if check["name"] == "weft[dev]")
    assert (extra["status"], extra["fix"]) == ("note", "pip install 'weft[dev]'")


def test_a_folder_without_permission_fails_with_a_fix(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(WeftError, match="cannot be written to") as caught:
        module.doctor(json_output=True, out=tmp_path / "deep" / "runs")
    assert "--out" in caught.value.fix


def test_the_table_shows_names_with_brackets(capsys, tmp_path):
    module.doctor(out=tmp_path)
    assert "weft[dev]" in capsys.readouterr().out
