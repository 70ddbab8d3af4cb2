"""`weft train`: what it prints, refuses, and leaves alone."""

import json
from pathlib import Path

import pytest
import yaml

from weft import cli
from weft.adapters import AdapterConfig
from weft.config import load_config
from weft.training import TrainConfig, build, make_plan
from weft.training.plan import describe

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
    for shown in ("<begin_image>", "patches 0 to 2", "image", "picture 1", "yes", "no", "MiB", "s a step", "2 for",
                  "trained (", "in text branches", "in picture branches", "as many as plain LoRA of rank"):  # fmt: skip
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


def adapter_of(recipe, **values):
    return recipe().model_copy(update={"adapter": AdapterConfig(**values)})


@pytest.fixture
def described(recipe):
    """How a document with a picture that is given and one that is made is read by an adapter."""
    training = build(recipe())

    def describe_by(**values):
        return describe(training.backbone, training.examples[1][0], AdapterConfig(**values).to_peft())

    return describe_by


@pytest.mark.parametrize(
    "values,text,given,made",
    [
        ({}, "text", "image", "image"),
        ({"context_images": "text"}, "text", "text", "image"),
        ({"context_images": "none"}, "text", "none", "image"),
        ({"image": "none"}, "text", "none", "none"),
        ({"text": "none"}, "none", "image", "image"),
        ({"kind": "full_two"}, "text", "image", "image"),
        ({"kind": "lora", "image": "none", "context_images": "text"}, "text", "text", "none"),
    ],
)
def test_the_plan_follows_the_adapter(described, values, text, given, made):
    shown = {"text": set(), "given": set(), "made": set()}
    for stretch in described(**values):
        kind = "text" if stretch.predicts == "text" else "made" if stretch.is_learnt else "given"
        shown[kind].add(stretch.branch)
    assert shown == {"text": {text}, "given": {given}, "made": {made}}


def test_the_plan_routes_by_what_is_read_if_the_adapter_does(described):
    for stretch in described(routing="input"):
        assert (stretch.branch == "image") == stretch.shown.startswith("picture")


def test_the_plan_counts_parameters_by_what_they_serve(recipe):
    found = {
        kind: make_plan(adapter_of(recipe, kind=kind, **({} if "full" in kind else {"rank": 4}))).parameters
        for kind in ("lora", "moe_lora", "moss", "full", "full_two")
    }
    assert (found["lora"].image, found["lora"].other, found["lora"].lora_rank) == (0, 0, 4)
    assert found["lora"].text == found["moe_lora"].text == found["moe_lora"].image == found["moss"].text
    assert found["moe_lora"].lora_rank == 8
    assert found["moss"].image > found["moe_lora"].image
    assert found["full_two"].all == 2 * found["full"].text + found["full"].other
    assert found["full"].other > 0


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
