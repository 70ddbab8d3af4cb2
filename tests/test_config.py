"""Recipes: strict, with the nearest name."""

from typing import Literal

import pytest
import yaml

from weft.config import Config, load_config, parse_overrides, to_yaml
from weft.errors import ConfigError


class Branch(Config):
    rank: int = 4


class Near(Config):
    kind: Literal["near"] = "near"
    reach: int = 1


class Recipe(Config):
    steps: int
    branch: Branch = Branch()
    source: Near | None = None


def recipe(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_overrides_lie_over_the_file_and_defaults_are_spelled_out_when_saved(tmp_path):
    file = recipe(tmp_path, "steps: 3\nbranch: {rank: 8}\n")
    config = load_config(Recipe, file, parse_overrides(["--branch.rank", "16", "--source.reach=2"]))
    assert config == Recipe(steps=3, branch=Branch(rank=16), source=Near(reach=2))
    (tmp_path / "out.yaml").write_text(to_yaml(config))
    assert load_config(Recipe, tmp_path / "out.yaml") == config
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["source"]["kind"] == "near"


@pytest.mark.parametrize(
    "text,message",
    [
        ("stesp: 3", r"unknown key stesp[\s\S]*recipe.yaml[\s\S]*did you mean steps"),
        ("steps: 3\nbranch: {rnak: 8}", r"unknown key branch.rnak[\s\S]*did you mean branch.rank"),
        ("steps: 3\nsource: {raech: 8}", r"unknown key source.raech[\s\S]*did you mean source.reach"),
        ("steps: many", r"steps = 'many'[\s\S]*recipe.yaml, key steps"),
        ("branch: {}", r"key steps is required"),
        ("steps: 3\n  x: [", r"not valid YAML[\s\S]*line 2"),
        ("- 1", r"must be a mapping"),
    ],
)
def test_mistakes_in_a_file_name_file_key_and_nearest_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Recipe, recipe(tmp_path, text))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "tokens,message",
    [
        (["--steps"], "--steps needs a value"),
        (["steps", "3"], "expected an override"),
        (["--branch.rank", "2", "--branch.rank.deep", "3"], "rank is not a section"),
        (["--setps", "3"], r"did you mean steps"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tokens, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Recipe, overrides=parse_overrides(tokens))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read[\s\S]*none.yaml"):
        load_config(Recipe, tmp_path / "none.yaml")
