"""The recipes of the real generalists: every key in them is used, with a small random model of the same family."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from weft import cli
from weft.adapters.inspection import inspect_adapter
from weft.backbones.catalogue import adapter_parameters, by_name, train_bytes, weight_bytes
from weft.config import load_config
from weft.training import TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"
FAMILIES = {"moss_emu2": "emu2", "moss_chameleon": "chameleon", "janus": "janus", "emu3": "emu3"}
PAPERS = ("moss_emu2", "moss_chameleon")
GIB = 2**30
LEAFINSTRUCT = 184_982


def file_of(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def read(name: str) -> TrainConfig:
    return load_config(TrainConfig, file_of(name))


def header_of(name: str) -> str:
    lines = file_of(name).read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def commands_of(name: str) -> list[list[str]]:
    text = header_of(name).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if re.match(r"(weft|accelerate) ", line)]


def short(name: str, documents: Path, out: Path) -> list[str]:
    """What makes a recipe a matter of seconds, and leaves all else as it is written."""
    changed = {
        "data.path": documents, "data.validation": 2, "model": f"nano-{FAMILIES[name]}", "out": out,
        "optim.batch": 2, "schedule.steps": 2, "schedule.warmup": 1, "sampling.every": 2, "sampling.documents": 1,
        "sampling.max_images": 1, "sampling.max_text_tokens": 4,
    }  # fmt: skip
    return [str(file_of(name)), *(word for key, value in changed.items() for word in (f"--{key}", str(value)))]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *arguments])
    return caught.value.code or 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_runs_to_its_adapter(name, documents, tmp_path):
    # one of them ends with the proof, in a fresh process, that the adapter reads back
    verify = str(name == "moss_emu2").lower()
    assert run(*short(name, documents, tmp_path / "run"), "--verify", verify) == 0
    recipe = read(name)
    found = inspect_adapter(tmp_path / "run" / "adapter")
    assert (found.kind, found.config.text.rank, found.config.text.alpha) == ("moss", 256, 512)
    assert (found.config.image.kernel, found.config.image.dropout) == (2, 0.05)
    assert not found.idle("text") and not found.idle("image")
    assert (tmp_path / "run" / "samples" / "step_000002.html").exists()
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (used["load"]["dtype"], used["precision"], used["checkpointing"]) == ("bf16", "bf16", recipe.checkpointing)


def test_the_noise_that_emu2s_recipe_offers_can_be_switched_on(documents, tmp_path):
    offered = re.sub(r"^  # (corruption:|  \w+:)", r"  \1", file_of("moss_emu2").read_text(), flags=re.MULTILINE)
    recipe = tmp_path / "noisy.yaml"
    recipe.write_text(offered)
    assert load_config(TrainConfig, recipe).loss.corruption.model_dump() == {"noise": 0.3, "replaced": 1.0}
    assert read("moss_emu2").loss.corruption is None
    _, *changes = short("moss_emu2", documents, tmp_path / "run")
    assert run(str(recipe), *changes, "--verify", "false") == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_papers_values(name):
    recipe = read(name)
    adapter, optim = recipe.adapter, recipe.optim
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.kernel, adapter.dropout) == ("moss", 256, 512, 2, 0.05)
    assert (adapter.targets, optim.learning_rate, optim.micro_batch) == ("all-linear", 1e-4, 1)
    (launch,) = (words for words in commands_of(name) if words[0] == "accelerate")
    processes = int(launch[launch.index("--num_processes") + 1])
    assert optim.batch == 16 * processes
    assert recipe.schedule.warmup == pytest.approx(0.03 * recipe.schedule.steps, abs=0.5)
    if name in PAPERS:
        assert recipe.schedule.steps == math.ceil((LEAFINSTRUCT - recipe.data.validation) / optim.batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_commands_of_a_header_are_spelled_right(name):
    from accelerate.commands.launch import launch_command_parser

    verbs = set()
    for words in commands_of(name):
        if words[0] == "accelerate":
            launch = launch_command_parser().parse_args(words[2:])
            assert (launch.module, launch.training_script) == (True, "weft.cli")
            words = ["weft", *launch.training_script_args]
        cli.build_app().parse_args(words[1:], exit_on_error=False, print_error=False)
        verbs.add(words[1])
        if words[1] == "train":
            assert words[2] == f"recipes/{name}.yaml"
        if words[1] == "generate":
            assert words[2] == read(name).model
            assert Path(words[words.index("--adapter") + 1]) == read(name).out / "adapter"
    assert {"data", "train", "generate"} <= verbs


@pytest.mark.parametrize("name", FAMILIES)
def test_the_memory_of_a_header_is_that_of_the_catalogue(name):
    recipe, text = read(name), " ".join(header_of(name).split())
    known = by_name(recipe.model)
    assert known.family == FAMILIES[name]
    context = min(recipe.data.context or known.context, known.context)
    at_64 = train_bytes(known.parameters, known.shape, context, "bf16")
    adapter = adapter_parameters(known.shape, recipe.adapter.rank)
    whole = at_64 + 16 * (adapter - adapter_parameters(known.shape))
    weights = weight_bytes(known.parameters, known.shape, "bf16")
    for said, count in (
        ("Training takes {} GiB", whole), ("at rank 64, {} GiB", at_64), ("{} of frozen weights", weights),
        ("{} of adapter, gradients", 16 * adapter), ("checkpoint has {} GiB", 12 * adapter),
    ):  # fmt: skip
        assert said.format(round(count / GIB)).lower() in text.lower()
    assert "Calculated" in text and "not measured" in text


@pytest.mark.slow
def test_accelerate_starts_several_processes_by_the_line_of_a_header(documents, tmp_path):
    """On a CPU the same line starts the same processes, which then exchange gradients by another way."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, "-m", "weft.cli", "train", *short("moss_chameleon", documents, tmp_path / "run"), "--verify=false"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    environment = yaml.safe_load((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2
    assert inspect_adapter(tmp_path / "run" / "adapter").config.text.rank == 256
