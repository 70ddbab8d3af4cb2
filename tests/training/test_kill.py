"""`weft train` killed at any moment, then the same command: the same bytes as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from weft.training import latest_whole

STEPS = 60
AMID_A_SAVE = {"call": "write", "path": "optimizer.safetensors", "nth": 2, "when": "amid"}
BEFORE_THE_END = {"call": "replace", "path": "run/adapter", "nth": 1, "when": "before"}
FAULTS = [
    AMID_A_SAVE,
    BEFORE_THE_END,
    # the first file of the first checkpoint
    {"call": "write", "path": "adapter.safetensors", "nth": 1, "when": "amid"},
    # its manifest, and the rename that makes it a checkpoint
    {"call": "replace", "path": "manifest.json", "nth": 2, "when": "before"},
    {"call": "replace", "path": "checkpoints/step_000020", "nth": 1, "when": "before"},
    {"call": "replace", "path": "checkpoints/step_000020", "nth": 1, "when": "after"},
    # letting go of an old one
    {"call": "rmtree", "path": ".old", "nth": 1, "when": "before"},
    {"call": "replace", "path": "samples/step_000030", "nth": 1, "when": "before"},
    {"call": "replace", "path": "samples.html", "nth": 1, "when": "after"},
    {"call": "replace", "path": "config.yaml", "nth": 1, "when": "before"},
]


@dataclass
class Driver:
    process: subprocess.Popen

    def start(self, recipe: Path, fault=None, *options: str) -> int:
        """Begin `weft train`; its process id."""
        order = {"arguments": ["train", str(recipe), *options], "fault": fault, "log": str(recipe.with_suffix(".log"))}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def driver():
    command = [sys.executable, str(Path(__file__).with_name("driver.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield Driver(process)
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def new_recipe(recipe_in, tmp_path_factory):
    """A recipe file of 60 steps with dropout, accumulation, a schedule, validation and samples, in a new folder."""

    def write() -> Path:
        folder = tmp_path_factory.mktemp("killed")
        config = recipe_in(
            folder / "run",
            schedule={"steps": STEPS, "warmup": 5},
            sampling={"every": 15},
            optim={"batch": 2, "micro_batch": 1},
            adapter={"targets": ["v_proj", "down_proj"]},
            save_every=10,
            validate_every=20,
        )
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return file

    return write


@pytest.fixture(scope="module")
def whole(driver, new_recipe, results):
    """The files of an uninterrupted run."""
    recipe = new_recipe()
    driver.start(recipe)
    assert driver.wait() == 0, recipe.with_suffix(".log").read_text()
    files = results(recipe.parent / "run")
    assert files["metrics.jsonl"].count(b"\n") == STEPS
    assert sum(name.startswith("samples/") for name in files) == STEPS // 15
    return files


def steps_done(recipe: Path) -> int:
    metrics = recipe.parent / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def end_after(driver: Driver, recipe: Path, step: int, delay: float, number: int) -> int:
    """Start, and send a signal `delay` seconds after a step was noted; the exit status."""
    child = driver.start(recipe)
    while steps_done(recipe) < step:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, number)
    return driver.wait()


def finish(driver: Driver, recipe: Path) -> None:
    driver.start(recipe)
    assert driver.wait() == 0, recipe.with_suffix(".log").read_text()


def killed_at_random(driver, new_recipe, seed: int) -> Path:
    rng = random.Random(seed)
    recipe = new_recipe()
    assert end_after(driver, recipe, rng.randrange(STEPS - 5), rng.uniform(0, 0.1), signal.SIGKILL) == -signal.SIGKILL
    return recipe


def killed_at_fault(driver, new_recipe, fault) -> Path:
    recipe = new_recipe()
    driver.start(recipe, fault)
    assert driver.wait() == -signal.SIGKILL, "the fault point was never reached"
    return recipe


def test_killed_three_times(driver, new_recipe, results, whole):
    """At a random moment after the first save; in the middle of another save; when all but the adapter is there."""
    recipe = new_recipe()
    rng = random.Random(0)
    status = end_after(driver, recipe, rng.randrange(11, 15), rng.uniform(0, 0.02), signal.SIGKILL)
    assert status == -signal.SIGKILL
    for fault in (AMID_A_SAVE, BEFORE_THE_END):
        driver.start(recipe, fault)
        assert driver.wait() == -signal.SIGKILL, "the fault point was never reached"
    finish(driver, recipe)
    assert results(recipe.parent / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_ten_random_moments(driver, new_recipe, results, whole, seed):
    recipe = killed_at_random(driver, new_recipe, seed)
    finish(driver, recipe)
    assert results(recipe.parent / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault.values())))
def test_killed_at_named_points(driver, new_recipe, results, whole, fault):
    recipe = killed_at_fault(driver, new_recipe, fault)
    finish(driver, recipe)
    assert results(recipe.parent / "run") == whole
    assert not list(recipe.parent.rglob("*.part"))
    assert not list(recipe.parent.rglob("*.old"))


def test_asked_to_end_it_saves_and_leaves(driver, new_recipe, results, whole):
    recipe = new_recipe()
    for number, code, step in ((signal.SIGTERM, 143, 13), (signal.SIGINT, 130, 37)):
        assert end_after(driver, recipe, step, 0.01, number) == code
        done = steps_done(recipe)
        assert step <= done < step + 10
        assert (recipe.parent / "run" / "checkpoints" / f"step_{done:06d}" / "manifest.json").exists()
        assert f"step {done} is saved" in recipe.with_suffix(".log").read_text()
    finish(driver, recipe)
    assert results(recipe.parent / "run") == whole


def test_asked_twice_it_ends_at_once(driver, new_recipe):
    recipe = new_recipe()
    child = driver.start(recipe)
    while steps_done(recipe) < 12:
        time.sleep(0.002)
    os.kill(child, signal.SIGSTOP)  # so that both are there when it goes on; the lower number is heard first
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGCONT)
    assert driver.wait() == 143
    assert "saved" not in recipe.with_suffix(".log").read_text()
    assert latest_whole(recipe.parent / "run" / "checkpoints").name == "step_000010"
