"""`weft train`: what it prints, refuses, and leaves alone."""

import json
from pathlib import Path

import pytest
import yaml

from weft import cli
from weft.config import load_config
from weft.training import TrainConfig, make_plan

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe_file(recipe, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(schedule={"steps": 4, "warmup": 1}).model_dump(mode="json")))
    return file


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *map(str, arguments)])
    return caught.value.code or 0


def test_a_line_of_json_for_each_step(recipe_file, tmp_path, capsys):
    assert run(recipe_file, "--schedule.steps", "6", "--out", tmp_path / "other") == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["seconds"] > 0 for line in lines)
    assert str(tmp_path / "other" / "adapter") in said.err
    assert (tmp_path / "other" / "samples" / "step_000004.html").exists()
    assert not (tmp_path / "run").exists()


def test_a_bar_on_a_terminal(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run(recipe_file) == 0
    said = capsys.readouterr().out
    assert "4/4" in said
    assert "validation: text" in said
    assert "{" not in said


def test_dry_run_shows_routing_and_loss_and_writes_nothing(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    before = sorted(tmp_path.rglob("*"))
    assert run(recipe_file, "--dry-run") == 0
    said = capsys.readouterr().out
    for shown in ("<begin_image>", "patches 0 to 2", "image", "picture 1", "yes", "no", "MiB", "s a step", "2 for"):
        assert shown in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_is_the_rule(recipe):
    plan = make_plan(recipe())
    assert [stretch.start for stretch in plan.stretches[1:]] == [stretch.stop for stretch in plan.stretches[:-1]]
    for before, stretch in zip(plan.stretches, plan.stretches[1:], strict=False):
        if stretch.shown.startswith("picture"):
            # [IMG] and all patches but the last predict patches
            assert before.branch == "image"
        assert (stretch.branch == "image") == stretch.predicts.startswith("picture")
    assert {stretch.branch for stretch in make_plan(recipe(adapter={"kind": "lora"})).stretches} == {"text"}
    assert plan.seconds == pytest.approx(plan.seconds_per_step * 12)
    assert plan.trainable_parameters > make_plan(recipe(adapter={"kind": "lora"})).trainable_parameters


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--optim.learning_rte", "1"), ("optim.learning_rte", "optim.learning_rate")),
        (("--schedule.steps", "none"), ("schedule.steps",)),
        (("--data.path", "/nowhere"), ("/nowhere",)),
        (("--model", "tinny"), ("tinny", "tiny")),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe_file, capsys, change, said):
    assert run(recipe_file, *change) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in said)
    assert "Traceback" not in error


def test_an_unknown_key_in_the_file_names_the_file(recipe_file, capsys):
    recipe_file.write_text(recipe_file.read_text() + "sed: 1\n")
    assert run(recipe_file) == 2
    error = capsys.readouterr().err
    assert str(recipe_file) in error
    assert "seed" in error


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_recipes_are_readable_and_say_how_to_run_them(file):
    header = "".join(line for line in file.read_text().splitlines(True) if line.startswith("#"))
    assert "weft " in header
    assert "Hardware:" in header
    assert "Expected:" in header
    if "model" in yaml.safe_load(file.read_text()):
        assert f"weft train recipes/{file.name}" in header
        load_config(TrainConfig, file)
