"""From a checkpoint on disk to a trained adapter and an answer, by the commands alone, for every family.

The checkpoints are small and random, in the layouts of the released ones.
"""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

from weft import cli
from weft.adapters import AdapterConfig, adapter_parameters, attach, save_adapter
from weft.backbones import FAMILIES, load_backbone, save_backbone
from weft.backbones.checkpoint import Checkpoint

BRIEF = ("--max-images", "1", "--min-images", "1", "--max-text-tokens", "6")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    return caught.value.code or 0


def write(family: str, folder: str = "model") -> Path:
    Path(folder).mkdir()
    save_backbone(load_backbone(f"nano-{family}"), Path(folder))
    return Path(folder)


def write_documents() -> None:
    PILImage.new("RGB", (24, 16), "green").save("one.png")
    image, text = {"type": "image", "image": "one.png"}, {"type": "text", "text": "so"}
    messages = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": [text, image]}]
    Path("documents.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(4)) + "\n")


def some(quick):
    """All families; those that are not named only with the slow tests."""
    return [pytest.param(family, marks=() if family in quick else pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize("family", some(("chameleon", "emu2")))
def test_a_folder_is_trained_on_and_answers(family, capsys):
    model = write(family)
    write_documents()
    Path("recipe.yaml").write_text(f"model: {model}\ndata: {{path: documents.jsonl}}\nadapter: {{rank: 2}}\n")
    short = ("--schedule.steps", "2", "--schedule.warmup", "1", "--optim.batch", "2", "--checkpointing", "true")
    # ends with a fresh process that loads the folder and the adapter and finds the same bits
    assert run("train", "recipe.yaml", *short, "--out", "run") == 0
    record = json.loads(Path("run/adapter/weft_base.json").read_text())
    assert (record["name"], record["revision"]) == (str(model), None)
    capsys.readouterr()
    arguments = ("--adapter", "run/adapter", "--image", "one.png", "--out", "answer", *BRIEF)
    assert run("generate", model, "a picture please", *arguments) == 0
    backbone = load_backbone(str(model))
    assert backbone.form_of(PILImage.open("answer/picture_1.png").size) == backbone.form
    made_by = json.loads(Path("answer/answer.json").read_text())["meta"]
    assert (made_by["model"], made_by["revision"]) == (str(model), None)


def test_weights_may_be_held_in_half_precision(capsys):
    model = write("janus")
    assert run("generate", model, "hi", "--dtype", "bf16", "--json", *BRIEF) == 0
    assert "picture_1.png" in capsys.readouterr().out
    assert run("generate", model, "hi", "--quantize", "4bit", "--out", "other", *BRIEF) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("family", some(("chameleon",)))
def test_an_adapter_is_trained_on_weights_in_half_precision(family, capsys):
    model = write(family)
    write_documents()
    Path("recipe.yaml").write_text(f"model: {model}\ndata: {{path: documents.jsonl}}\nadapter: {{rank: 2}}\n")
    short = ("--schedule.steps", "2", "--schedule.warmup", "1", "--optim.batch", "2")
    half = ("--load.dtype", "bf16", "--precision", "bf16")
    assert run("train", "recipe.yaml", *short, *half, "--out", "run") == 0
    adapter = load_file("run/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    if family == "emu2":
        assert run("adapter", "verify", "run/adapter", "--dtype", "bf16") == 0
        assert "bit by bit" in capsys.readouterr().out


def test_sizes_are_asked_for_by_pixels(capsys):
    assert run("generate", "nano-emu3", "hi", "--size", "8", "4", "--guidance", "1", "--out", "answer", *BRIEF) == 0
    assert PILImage.open("answer/picture_1.png").size == (8, 4)
    assert run("generate", "nano-emu3", "hi", "--size", "7", "4", *BRIEF) == 2
    assert "7 x 4" in capsys.readouterr().err


def test_the_diffusion_model_takes_as_many_steps_as_asked(capsys):
    pictures = []
    for steps in (1, 4):
        assert run("generate", "nano-emu2", "hi", "--steps", steps, "--out", f"a{steps}", *BRIEF) == 0
        pictures.append(Path(f"a{steps}/picture_1.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_a_text_branch_is_merged_into_a_released_layout(capsys):
    model = write("emu3")
    backbone = load_backbone(str(model))
    attach(backbone, AdapterConfig(rank=2))
    for i, parameter in enumerate(adapter_parameters(backbone).values()):
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(i))
    Path("adapter").mkdir()
    save_adapter(backbone, Path("adapter"))
    assert run("adapter", "merge", "adapter", "--text", "--out", "merged") == 0
    merged, base = Checkpoint.open(Path("merged")), Checkpoint.open(model)
    assert merged.tensors.keys() == base.tensors.keys()
    assert merged.fingerprint != base.fingerprint
    assert run("generate", "merged", "hi", *BRIEF) == 0


def truncate(folder: Path) -> None:
    (file,) = folder.rglob("model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (file,) = folder.rglob("model.safetensors")
    file.unlink()
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")


def other_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


def another_family(folder: Path) -> None:
    other = write(
        "janus" if "hidden_size" in json.loads((folder / "config.json").read_text()) else "chameleon", "other"
    )
    (file,) = folder.rglob("model.safetensors")
    file.write_bytes((other / "model.safetensors").read_bytes())


WRONG = {
    "missing config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "truncated": (truncate, "model.safetensors"),
    "pickle": (pickle_only, "weft models convert"),
    "other model": (other_model, "llama"),
    "another family's tensors": (another_family, "missing"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", ["chameleon", "janus", "emu3"])
def test_a_wrong_checkpoint_is_named_before_a_tensor_is_read(family, wrong, capsys, monkeypatch):
    model = write(family)
    spoil, named = WRONG[wrong]
    spoil(model)
    monkeypatch.setattr(Checkpoint, "get", lambda self, key: pytest.fail(f"{key} was read"))
    assert run("generate", model, "hi", *BRIEF) == 1
    said = capsys.readouterr().err
    assert named in said
    assert "fix:" in said
    assert "Traceback" not in said
    assert not Path("runs").exists()


def test_a_refused_checkpoint_costs_no_memory():
    """A file that claims tens of gigabytes, truncated: refused by a process that may not have one."""
    model = write("janus")
    header = {"lm_head.weight": {"dtype": "F32", "shape": [10_000_000, 1024], "data_offsets": [0, 40_960_000_000]}}
    raw = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    code = (
        "import resource, torch; from weft.backbones import load_backbone; from weft.errors import CheckpointError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_backbone('model'); print('loaded')\n"
        "except CheckpointError as error: print(error.what)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    what, grown = done.stdout.strip().splitlines()
    assert "bytes" in what
    assert int(grown) < 600_000  # KiB: libraries are imported, tensors are not read


def test_a_model_of_the_hub_is_used_by_its_name_and_its_commit_is_recorded(tmp_path, monkeypatch, capsys):
    """Fetched before, as the hub's library keeps it; nothing goes to the network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--model"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    save_backbone(load_backbone("nano-janus"), folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run("generate", "owner/model", "hi", "--out", "answer", *BRIEF) == 0
    made_by = json.loads(Path("answer/answer.json").read_text())["meta"]
    assert (made_by["model"], made_by["revision"]) == ("owner/model", commit)
    backbone = load_backbone("owner/model")
    attach(backbone, AdapterConfig(rank=2))
    save_adapter(backbone, Path("adapter"))
    assert json.loads(Path("adapter/weft_base.json").read_text())["revision"] == commit
