"""`weft adapter` on the instant model: what is sound passes in a fresh process, what is not is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weft import cli
from weft.adapters import AdapterConfig, adapter_parameters, attach, load_adapter, save_adapter
from weft.adapters.inspection import inspect_adapter
from weft.atomic import write_folder
from weft.backbones import load_backbone, load_model
from weft.backbones.reload import verify_adapter
from weft.backbones.trained import choose_parts, save_trained
from weft.errors import AdapterError, CheckpointError
from weft.synchronizer import SynchronizerConfig, attach_synchronizer, save_synchronizer, synchronizer_parameters

FIRST = "layers.0.mlp.down_proj"
"""The first layer in the order of the names."""


def trained(kind: str = "moss"):
    """The instant model with an adapter that changes its answers."""
    backbone = load_backbone("nano")
    attach(backbone, AdapterConfig(kind=kind, rank=3), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(backbone).values():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return backbone


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    save_adapter(trained(), Path("adapter"))
    return Path("adapter")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["adapter", *map(str, arguments)])
    return caught.value.code or 0


def change(folder: Path, changed) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in changed(load_file(file)).items()}, file)


def configure(folder: Path, changed) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    changed(config)
    file.write_text(json.dumps(config))


def zero(modalities):
    def changed(tensors):
        return {k: t * 0 if any(f"moss_{m}_B" in k for m in modalities) else t for k, t in tensors.items()}

    return changed


def swap(tensors):
    other = {"moss_text": "moss_image", "moss_image": "moss_text"}
    return {k.replace(p, other[p]): t for k, t in tensors.items() for p in other if p in k}


def test_inspect_shows_what_an_adapter_is(folder, capsys):
    assert run("inspect", folder) == 0
    shown = capsys.readouterr().out
    for fact in ("moss adapter of nano", "14 layers: down_proj, ", "2 x 2 up_left", "routing by output"):
        assert fact in shown
    assert "does nothing" not in shown


def test_inspect_counts_what_is_in_the_file(folder, capsys):
    assert run("inspect", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    tensors = load_file(folder / "adapter_model.safetensors")
    for modality in ("text", "image"):
        assert found["parameters"][modality] == sum(t.numel() for k, t in tensors.items() if f"moss_{modality}" in k)
    assert found["parameters"]["all"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["layers"] == 14 and len(found["branches"]) == 28
    norm = tensors[f"base_model.model.{FIRST}.moss_text_B"].norm().item()
    assert found["branches"][0]["layer"] == FIRST and found["branches"][0]["norm"] == pytest.approx(norm)
    assert found["base"]["name"] == "nano" and found["bytes"] > 0


def test_inspect_shows_synchroniser_and_parts_beside_an_adapter(folder, tmp_path, capsys):
    backbone = load_model("nano", adapter=folder)
    attach_synchronizer(backbone, SynchronizerConfig())
    parts = choose_parts(backbone, ["norm.weight"])
    (tmp_path / "all").mkdir()
    save_trained(backbone, parts, tmp_path / "all")
    assert run("inspect", tmp_path / "all") == 0
    shown = capsys.readouterr().out
    for fact in (
        "moss adapter of nano",
        "synchroniser of nano",
        "note: the synchroniser does nothing",
        "own parameters",
    ):
        assert fact in shown
    with torch.no_grad():
        synchronizer_parameters(backbone)["branches.0.gate"].fill_(0.5)
    save_synchronizer(backbone, tmp_path / "all" / "synchronizer")
    for place in (tmp_path / "all", tmp_path / "all" / "synchronizer"):
        assert run("inspect", place, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["synchronizer"]["gates"] == [0.5]
        size = sum(parameter.numel() for parameter in synchronizer_parameters(backbone).values())
        assert found["synchronizer"]["parameters"]["all"] == size
        assert (found["parts"] is not None) == (place.name == "all") == ("kind" in found)


def test_inspect_tells_branches_that_differ_by_layer_apart(folder, capsys):
    configure(folder, lambda config: config.update(patterns={"q_proj": {"text": {"alpha": 30.0}}}))
    assert run("inspect", folder) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("text ")]
    assert sorted((row[3], row[4]) for row in rows) == [("10", "2"), ("2", "12")]


@pytest.mark.parametrize("kind", ["lora", "moe_lora", "moss", "sam_conv_lora"])
def test_every_kind_has_its_name(kind, tmp_path):
    save_adapter(trained(kind), tmp_path / "kind")
    assert inspect_adapter(tmp_path / "kind").kind == kind


def test_an_adapter_that_was_never_trained_is_visible(folder, capsys):
    change(folder, zero(["image"]))
    assert run("inspect", folder) == 0
    assert "the image branch does nothing" in capsys.readouterr().out
    assert run("inspect", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["idle"] == ["image"]


@pytest.mark.usefixtures("started_processes")
def test_verify_loads_in_a_fresh_process_and_reproduces_every_bit(folder, capsys):
    change(folder, zero(["image"]))
    assert run("verify", folder) == 0
    said = capsys.readouterr()
    assert "bit by bit" in said.out
    assert "note: the image branch does nothing" in said.err


def test_verify_finds_zeroed_up_projections(folder, capsys):
    change(folder, zero(["text", "image"]))
    assert run("verify", folder) == 1
    assert (
        f"the adapter does nothing: its up-projections are zero, from {FIRST}.moss_text_B on" in capsys.readouterr().err
    )


def test_a_tensor_that_is_not_finite_is_named(folder, capsys):
    change(folder, lambda tensors: {k: t / 0 if "q_proj.moss_text_B" in k else t for k, t in tensors.items()})
    for verb in ("inspect", "verify"):
        assert run(verb, folder) == 1
        assert "self_attn.q_proj.moss_text_B holds values that are not finite" in capsys.readouterr().err


def test_a_missing_tensor_is_named(folder, capsys):
    change(folder, lambda tensors: {k: t for k, t in tensors.items() if "q_proj.moss_image_B" not in k})
    for verb in ("inspect", "verify"):
        assert run(verb, folder) == 1
        assert "tensor layers.0.self_attn.q_proj.moss_image_B is missing" in capsys.readouterr().err


def test_an_extra_tensor_is_named(folder, capsys):
    key = "base_model.model.layers.0.self_attn.q_proj.moss_image_gate"
    change(folder, lambda tensors: {**tensors, key: torch.zeros(2, 3)})
    for verb in ("inspect", "verify"):
        assert run(verb, folder) == 1
        assert "q_proj.moss_image_gate is not what the configuration asks for" in capsys.readouterr().err


def test_a_layer_that_the_base_does_not_have_is_named(folder, capsys):
    key = "base_model.model.layers.7.self_attn.q_proj.moss_"
    extra = {f"{key}{p}": torch.ones(s) for p, s in
             {"text_A": (3, 32), "text_B": (32, 3), "image_A": (12, 32), "image_B": (32, 3)}.items()}  # fmt: skip
    change(folder, lambda tensors: {**tensors, **extra})
    assert run("verify", folder) == 1
    assert "layers.7.self_attn.q_proj.moss_image_A" in capsys.readouterr().err


def test_a_wrong_rank_is_named(folder, capsys):
    configure(folder, lambda config: config["text"].update(rank=4))
    for verb in ("inspect", "verify"):
        assert run(verb, folder) == 1
        assert (
            f"tensor {FIRST}.moss_text_A has shape (3, 64), the configuration asks for 4 x any"
            in capsys.readouterr().err
        )


def test_swapped_branches_are_named_by_their_shape(folder, capsys):
    change(folder, swap)
    assert run("inspect", folder) == 1
    assert (
        f"tensor {FIRST}.moss_image_A has shape (3, 64), the configuration asks for 12 x any" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_swapped_branches_of_one_shape_are_found_by_what_was_trained():
    backbone = trained("moe_lora")
    save_adapter(backbone, Path("swapped"))
    change(Path("swapped"), swap)
    with pytest.raises(AdapterError, match=rf"tensor base_model.model.{FIRST}.moss_image_A.default reads back changed"):
        verify_adapter(Path("swapped"), trained=backbone)


def test_a_file_that_changed_since_it_was_written_is_named():
    with write_folder(Path("whole")) as staging:
        save_adapter(trained("moe_lora"), staging)
    change(Path("whole"), swap)
    with pytest.raises(CheckpointError, match="differs from what the manifest recorded") as caught:
        verify_adapter(Path("whole"))
    assert caught.value.where == str(Path("whole/adapter_model.safetensors"))


def test_another_base_is_refused_by_name_and_without_a_record_by_tensor(folder, capsys):
    assert run("verify", folder, "--model", "tiny") == 1
    assert "trained on nano with other weights than this tiny" in capsys.readouterr().err
    (folder / "weft_base.json").unlink()
    assert run("verify", folder, "--model", "tiny") == 1
    assert "base_model.model.layers.0." in capsys.readouterr().err


def test_a_folder_that_names_no_base_asks_for_it(folder, capsys):
    (folder / "weft_base.json").unlink()
    configure(folder, lambda config: config.update(base_model_name_or_path=None))
    assert run("verify", folder) == 2
    assert "--model NAME" in capsys.readouterr().err


@pytest.mark.slow
def test_a_merged_model_is_one_that_generate_reads(folder, capsys):
    assert run("merge", folder, "--text", "--out", "merged", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["from_adapted"] <= 1e-5 < 1e-2 < found["from_base"]
    with pytest.raises(AdapterError, match="other weights"):
        load_adapter(load_backbone("merged"), folder)
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "merged", "hello", "--out", "answer", "--max-images", "0", "--max-text-tokens", "3"])
    assert not caught.value.code and Path("answer/answer.md").exists()


def test_merging_everything_is_refused_and_says_what_is_possible(folder, capsys):
    assert run("merge", folder, "--out", "merged") == 2
    assert "add --text" in capsys.readouterr().err
    change(folder, zero(["text"]))
    assert run("merge", folder, "--text", "--out", "merged") == 1
    assert "the text branch does nothing" in capsys.readouterr().err
    assert not Path("merged").exists()


def test_export_writes_a_lora_of_its_own_kind(folder, capsys):
    assert run("export", folder, "--out", "lora") == 0
    tensors = load_file("lora/adapter_model.safetensors")
    source = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 28
    key = f"base_model.model.{FIRST}."
    assert torch.equal(tensors[f"{key}lora_A.weight"], source[f"{key}moss_text_A"])
    assert run("inspect", "lora") == 1
    assert "this is a LORA adapter, not one of Weft's" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["merge", "--text"], ["export"]])
def test_a_folder_that_holds_something_is_not_written_to(verb, folder, capsys):
    Path("full").mkdir()
    Path("full/mine").touch()
    assert run(*verb, folder, "--out", "full") == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [file.name for file in Path("full").iterdir()] == ["mine"]


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize("harm, what", [
    (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"), "safetensors cannot be read"),
    (lambda folder: (folder / "weft_base.json").write_text("{"), "cannot be read"),
    (lambda folder: configure(folder, lambda config: config["image"].update(kernel=9)), "kernel must be 1 to 4"),
    (lambda folder: change(folder, lambda tensors: {"x": torch.zeros(1)}), "holds no adapted layer"),
])  # fmt: skip
def test_what_is_no_adapter_folder_is_said_in_three_lines(verb, harm, what, folder, capsys):
    harm(folder)
    assert run(verb, folder) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "fix"]
    assert what in lines[0] and "mend what is named" not in lines[2]
