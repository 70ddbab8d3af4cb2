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
MM = ("mm_pretrain", "mm_vqa_caption", "mm_grounding", "mm_segmentation", "mm_story")
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "moss_emu2" else name for name in FAMILIES]
)
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


@pytest.mark.parametrize("name", [*FAMILIES, *MM])
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


# --- MM-Interleaved -------------------------------------------------------------------------------------------------

TABLES = {
    # learning rate, betas, eps, batch, steps, warm-up; and the rate of which parameters is another
    "mm_pretrain": (1e-4, (0.9, 0.995), 1e-6, None, 15_000, 1_000, {"unet": 1e-5}),
    "mm_vqa_caption": (1e-5, (0.9, 0.999), 1e-8, 256, 10_000, 500, {"decoder": 1e-6}),
    "mm_grounding": (2e-5, (0.9, 0.999), 1e-8, 256, 10_000, 500, {}),
    "mm_segmentation": (1e-4, (0.9, 0.98), 1e-5, 512, 4_000, 100, {"unet": 1e-5}),
    "mm_story": (1e-5, (0.9, 0.98), 1e-8, 128, 4_000, 200, {"unet": 1e-4}),
}
"""The paper's (sections 5.1 and 5.3 of its tables)."""
SLOW_OFFSETS = {"mm_pretrain": 1e-5, "mm_segmentation": 1e-5}
"""Recipes whose sampling offsets have a rate of their own."""


@pytest.fixture(scope="module")
def nano_mm():
    from weft.backbones import load_backbone

    return load_backbone("nano-mm_interleaved")


@pytest.fixture(scope="module")
def released_mm(nano_mm):
    """Parameter's name -> size, of the 13B model."""
    import torch

    from weft.backbones.mm_interleaved import MMInterleavedBackbone
    from weft.backbones.mm_interleaved.config import MMInterleavedConfig

    with torch.device("meta"):
        model = MMInterleavedBackbone(MMInterleavedConfig(), nano_mm.tokenizer, "released")
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MM)
def test_the_values_of_the_papers_tables(name, nano_mm):
    from weft.backbones.trained import choose_parts, trained_parameters
    from weft.training.groups import make_groups

    recipe = read(name)
    rate, betas, eps, batch, steps, warmup, others = TABLES[name]
    optim = recipe.optim
    assert (optim.learning_rate, optim.betas, optim.eps, optim.weight_decay) == (rate, betas, eps, 0.05)
    assert (recipe.schedule.steps, recipe.schedule.warmup, recipe.schedule.final) == (steps, warmup, 0)
    assert optim.batch == (batch or optim.batch)
    assert (recipe.loss.image_weight, recipe.adapter, recipe.synchronizer) == (10, None, None)
    (launch,) = (words for words in commands_of(name) if words[0] == "accelerate")
    assert optim.batch % int(launch[launch.index("--num_processes") + 1]) == 0

    parameters = trained_parameters(nano_mm, choose_parts(nano_mm, recipe.parts))
    names = {id(parameter): name.removeprefix("parts.") for name, parameter in parameters.items()}
    for group in make_groups(nano_mm, parameters, optim):
        for parameter in group["params"]:
            own = names[id(parameter)]
            wanted = others.get(own.split(".")[0], rate)
            if "sampling_offsets" in own:
                wanted = SLOW_OFFSETS.get(name, rate)
            decayed = not (own.endswith(("bias", ".gate")) or "sampling_offsets" in own)
            assert group["lr"] == wanted, own
            if not decayed:
                assert group["weight_decay"] == 0, own
            elif parameter.dim() > 1:
                assert group["weight_decay"] == 0.05, own
    nano_mm.requires_grad_(False)


@pytest.mark.parametrize("name", MM)
def test_what_each_recipe_leaves_frozen(name, nano_mm):
    from weft.backbones.trained import choose_parts

    chosen = {part.split(".")[0] for part in choose_parts(nano_mm, read(name).parts).parameters}
    nano_mm.requires_grad_(False)
    paints = name in ("mm_pretrain", "mm_segmentation", "mm_story")
    assert ({"unet", "unet_sync", "condition", "context_proj", "blank"} <= chosen) == paints
    assert ("decoder" in chosen) == (name == "mm_vqa_caption")
    assert not chosen & {"table", "head", "vae"}
    assert {"soi", "head_new", "decoder_sync", "eye"} <= chosen


@pytest.mark.parametrize("name", MM)
def test_the_memory_that_a_header_promises(name, released_mm):
    recipe, text = read(name), " ".join(header_of(name).split())
    trained = sum(n for own, n in released_mm.items() if any(re.search(part, own) for part in recipe.parts))
    frozen = sum(released_mm.values()) - trained
    assert f"{trained / 1e9:.2f} billion trained parameters" in text
    assert f"{round(2 * frozen / GIB)} of frozen weights in bf16" in text
    assert f"{round(16 * trained / GIB)} of {trained / 1e9:.2f} billion" in text
    whole = round((2 * frozen + 16 * trained) / GIB)
    if name == "mm_vqa_caption":
        assert f"holds {whole} GiB" in text
        beside = sum(n for own, n in released_mm.items() if any(re.search(p, own) for p in recipe.parts[1:]))
        frozen = sum(released_mm.values()) - beside
        lora = 64 * 40 * (4 * (5120 + 5120) + 3 * (5120 + 13824))
        parts = [2 * frozen / GIB, 16 * beside / GIB, 16 * lora / GIB]
        assert f"{round(sum(parts))} GiB on each: {round(parts[0])} of frozen weights, {round(parts[1])} of" in text
        assert f"{beside / 1e9:.2f} billion parameters, {round(parts[2])} of the adapter" in text
    else:
        assert f"takes {whole} GiB on each before activations" in text
        assert f"takes up to {round(4 * trained / GIB)} more" in text
        assert f"A checkpoint has {round(12 * trained / GIB)} GiB" in text
    assert "Calculated, not measured" in text


def short_mm(name: str, documents: Path, out: Path) -> list[str]:
    changed = {
        "data.path": documents, "data.validation": 2, "model": "nano-mm_interleaved", "out": out, "optim.batch": 2,
        "schedule.steps": 2, "schedule.warmup": 1,
    }  # fmt: skip
    return [str(file_of(name)), *(word for key, value in changed.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mm_pretrain" else pytest.mark.slow) for name in MM]
)
def test_an_mm_recipe_runs_to_its_parts(name, documents, tmp_path):
    from safetensors.torch import load_file

    assert run(*short_mm(name, documents, tmp_path / "run")) == 0
    parts = load_file(tmp_path / "run" / "adapter" / "parts.safetensors")
    assert all(any(re.search(pattern, part) for pattern in read(name).parts) for part in parts)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and not any('"skipped": true' in line for line in lines)


def test_an_adapter_can_stand_in_for_a_language_model_that_is_too_large(documents, tmp_path):
    recipe = read("mm_vqa_caption")
    text = yaml.safe_load(file_of("mm_vqa_caption").read_text())
    text["adapter"] = {"kind": "lora", "rank": 64}
    text["parts"].remove(r"^decoder\.")
    text["optim"]["groups"] = [group for group in text["optim"]["groups"] if "decoder\\." not in group["match"]]
    file = tmp_path / "mm_vqa_caption.yaml"
    file.write_text(yaml.safe_dump(text))
    assert len(text["parts"]) == len(recipe.parts) - 1
    assert len(text["optim"]["groups"]) == len(recipe.optim.groups) - 1
    assert run(str(file), *short_mm("mm_vqa_caption", documents, tmp_path / "run")[1:]) == 0
    assert inspect_adapter(tmp_path / "run" / "adapter").kind == "lora"
    assert (tmp_path / "run" / "adapter" / "parts.safetensors").exists()


def test_an_mm_recipe_shows_its_plan(documents, tmp_path, capsys):
    assert run(*short_mm("mm_pretrain", documents, tmp_path / "run"), "--dry-run") == 0
    assert not (tmp_path / "run").exists()
    assert "trained" in capsys.readouterr().out
