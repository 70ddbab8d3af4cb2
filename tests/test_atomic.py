"""Files and folders are whole or absent."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from weft.atomic import (
    MANIFEST,
    clean_leftovers,
    verify_folder,
    write_bytes,
    write_bytes_once,
    write_folder,
    write_json,
)
from weft.errors import CheckpointError


def full_disk(monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    before = file.read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_is_written_once_can_be_linked_while_others_write_it(tmp_path):
    def write_and_link(number):
        for file in files:
            write_bytes_once(file, b"the same" * 100)
            os.link(file, file.with_name(f"{file.name}.{number}"))

    files = [tmp_path / str(each) for each in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_and_link, range(8)))
    assert {file.stat().st_nlink for file in files} == {9}
    assert len(list(tmp_path.iterdir())) == 40 * 9


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, existing):
    folder = tmp_path / "out"
    if existing:
        with write_folder(folder) as staging:
            (staging / "a").write_text("old")

    def fail_half_way():
        with write_folder(folder) as staging:
            (staging / "a").write_text("new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    if existing:
        assert (folder / "a").read_text() == "old"
        verify_folder(folder)


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with write_folder(tmp_path / "out") as staging:
            (staging / text).write_text(text)
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "new"] and os.listdir(tmp_path) == ["out"]
    verify_folder(tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "missing", "no manifest", "shorter"])
def test_damage_is_found_by_name(tmp_path, damage):
    with write_folder(tmp_path / "out") as staging:
        (staging / "data").write_bytes(bytes(100))
    file = tmp_path / "out" / "data"
    if damage == "flip":
        file.write_bytes(bytes(50) + b"\1" + bytes(49))
    elif damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(bytes(99))
    else:
        (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="manifest" if damage == "no manifest" else "data"):
        verify_folder(tmp_path / "out")


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".out.x.part").mkdir()
    (tmp_path / ".out.x.part" / "half").write_text("")
    (tmp_path / ".file.y.part").write_text("")
    (tmp_path / "kept").write_text("")
    clean_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


def test_a_folder_that_was_moved_aside_when_its_writer_died_is_put_back(tmp_path, monkeypatch):
    for name in ("out", "out.b"):
        with write_folder(tmp_path / name) as staging:
            (staging / "a").write_text("old")
    replace = os.replace

    def die_before_the_new_one(source, target):
        if str(source).endswith(".part") and Path(target).name == "out":
            raise KeyboardInterrupt
        replace(source, target)

    # what follows a kill does not run: no clean-up either
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(os, "replace", die_before_the_new_one)
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("new")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    clean_leftovers(tmp_path, "out.b")
    assert not (tmp_path / "out").exists()
    clean_leftovers(tmp_path, "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.b"]
    verify_folder(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_folder_stays_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with write_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("old")
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".part"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), write_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == "old"
