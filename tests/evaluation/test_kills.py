"""`weft eval run` and `score`, killed from outside and started again: the same bytes as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

from tests.evaluation.making import png, write
from weft.cli import main

CAPTIONS = ("a red fox", "two birds", "rain", "a house by the sea", "nobody")
CONFIG = """
metrics: [edits/l1l2, psnr/rgb-255, prose/length, interleavedeval/v1]
judge: {port: {kind: rule}}
resamples: 50
slots: 2
context: 300
"""
SECONDS = 60


def weft(arguments, said):
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    main(arguments)


class Command:
    """A command line that is started again and again, each time in a process of its own."""

    def __init__(self, said, *arguments):
        self.said, self.arguments = said, [str(each) for each in arguments]

    def was_killed(self, is_time=lambda: False):
        """Start it and kill it when it is time, unless it comes to its end before."""
        # forked from here, where everything is imported: a second less than from anywhere else
        process = multiprocessing.get_context("fork").Process(target=weft, args=(self.arguments, self.said))
        process.start()
        until = time.monotonic() + SECONDS
        while process.exitcode is None:
            assert time.monotonic() < until
            if is_time():
                process.kill()
                break
            process.join(0.001)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.said.read_text()
        return process.exitcode == -signal.SIGKILL


class Place:
    """A task's files, settings, and a run that nobody disturbed."""

    def __init__(self, root):
        self.root = root
        rows = [{"image_id": i, "caption": caption} for i, caption in enumerate(CAPTIONS)]
        pictures = {f"data/val2017/{i:012d}.jpg": png("red") for i in range(len(CAPTIONS))}
        write(root, {"data/coco_val_captions.jsonl": rows, "settings.yaml": CONFIG, **pictures})
        with pytest.raises(SystemExit) as ended:
            main(self.evaluate("whole").arguments)
        assert not ended.value.code
        self.whole = contents(root / "whole")

    def evaluate(self, out):
        given = ("--data", self.root / "data", "--config", self.root / "settings.yaml", "--out", self.root / out)
        return Command(self.root / "said.txt", "eval", "run", "nano", "ln-coco", *given)

    def score(self, out):
        return Command(
            self.root / "said.txt", "eval", "score", self.root / out, "--config", self.root / "settings.yaml"
        )

    def answered(self, out):
        """A run that was not scored yet."""
        shutil.copytree(self.root / "whole", self.root / out)
        for name in ("records.jsonl", "scoring.json", "summary.json"):
            (self.root / out / name).unlink()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("kills"))


def contents(folder):
    """All files, those that a writer left half done as well."""
    files = (each for each in folder.rglob("*") if each.is_file() and each.name != ".lock")
    return {str(each.relative_to(folder)): each.read_bytes() for each in files}


def has_lines(file, n):
    return lambda: file.is_file() and file.read_bytes().count(b"\n") >= n


def is_being_written(folder, name):
    return lambda: any(folder.glob(f".{name}.*.part"))


def test_a_run_that_is_killed_from_outside_ends_with_the_same_bytes(place):
    folder, command = place.root / "run", place.evaluate("run")
    moments = (
        is_being_written(folder, "run.json"), has_lines(folder / "predictions.jsonl", 1),
        is_being_written(folder / "pictures", "*"), has_lines(folder / "records.jsonl", 7),
        is_being_written(folder, "scoring.json"), is_being_written(folder, "summary.json"),
    )  # fmt: skip
    assert sum(command.was_killed(moment) for moment in moments) >= 2
    assert not command.was_killed()
    assert contents(folder) == place.whole


def test_a_scoring_that_is_killed_from_outside_ends_with_the_same_bytes(place):
    place.answered("scored")
    folder, command = place.root / "scored", place.score("scored")
    assert command.was_killed(has_lines(folder / "records.jsonl", 1))
    command.was_killed(is_being_written(folder, "records.jsonl"))
    assert not command.was_killed()
    assert contents(folder) == place.whole


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["run", "score"])
def test_twenty_kills_at_drawn_moments_change_nothing(place, verb):
    def begun(name):
        if verb == "run":
            return place.evaluate(name)
        place.answered(name)
        return place.score(name)

    first = begun(f"{verb}-first")
    began = time.monotonic()
    assert not first.was_killed()
    takes, rng, kills = time.monotonic() - began, random.Random(verb), 0
    while kills < 20:
        name = f"{verb}-{rng.getrandbits(32)}"
        command = begun(name)
        while command.was_killed(in_seconds(rng.uniform(0, takes))):
            kills += 1
        assert contents(place.root / name) == place.whole


def in_seconds(seconds):
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
