"""Training a model's own parameters, by name: MM-Interleaved as its recipes do it."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.training.test_synchronizer import driver, ended, files_of, start, stop_after  # noqa: F401 - a fixture
from weft.adapters import AdapterConfig, attach
from weft.backbones import load_backbone, load_model, save_backbone
from weft.backbones.reload import logits, probe
from weft.backbones.trained import choose_parts, load_trained, own_parameters, save_trained, trained_parameters
from weft.config import load_config
from weft.data.collate import collate
from weft.data.dataset import ChatDataset
from weft.document import Document, assistant, user
from weft.errors import AdapterError, ConfigError, DocumentError, NonFiniteError
from weft.training import TrainConfig, build, evaluate_loss, make_plan, steps, train
from weft.training.loop import validate
from weft.training.objective import Objective

MM = "nano-mm_interleaved"
RECIPE = load_config(TrainConfig, Path(__file__).parents[2] / "recipes" / "mm_pretrain.yaml")
NEVER = ("decoder.", "table.", "head.", "vae.", "eye.encoder.trunk.")
"""What pre-training leaves alone."""


@pytest.fixture
def pretraining(recipe):
    """A short run that trains what pre-training does."""

    def make(**changes):
        values = {
            "model": MM, "adapter": None, "parts": RECIPE.parts, "loss": RECIPE.loss, "sampling": {"every": None},
            "optim": {"learning_rate": 1e-3, "weight_decay": 0.05, "decays": "weights", "batch": 3, "micro_batch": 2},
        }  # fmt: skip
        return recipe(**{**values, **changes})

    return make


def test_losses_fall_and_only_the_parts_move(pretraining):
    training = build(pretraining(schedule={"steps": 12, "warmup": 0}, data={"validation": 0}))
    before = {name: parameter.detach().clone() for name, parameter in own_parameters(training.backbone)}
    examples = [part for number in training.training for part in training.examples[number]]
    batch = collate(examples, training.backbone.tokens.pad)

    def loss():
        training.set_learning(False)
        torch.manual_seed(0)
        return evaluate_loss(training.objective, [batch])

    first = loss()
    list(steps(training))
    last = loss()
    assert last.text < 0.97 * first.text
    assert last.image < 0.97 * first.image
    moved = {name for name, parameter in own_parameters(training.backbone) if not torch.equal(parameter, before[name])}
    assert moved <= training.parts.parameters.keys()
    assert not any(name.startswith(NEVER) for name in training.parts.parameters)
    # what no loss of these documents reaches is decayed at most
    assert {name.split(".")[0] for name in moved} == {
        "soi", "head_new", "decoder_sync", "eye", "context_proj", "condition", "blank", "unet", "unet_sync"
    }  # fmt: skip


def test_resumed_is_uninterrupted_and_twice_is_the_same(pretraining, tmp_path):
    ends = []
    for cut in (None, None, 3):
        changes = {"schedule": {"steps": 4, "warmup": 1}, "save_every": 2, "validate_every": 3}
        config = pretraining(out=tmp_path / f"run{len(ends)}", **changes)
        if cut is not None:
            assert stop_after(config, cut)[-1].step == cut
        list(train(config))
        ends.append(files_of(config.out))
    assert {"adapter/parts.json", "adapter/parts.safetensors"} <= ends[0].keys()
    assert not any("adapter_model" in name or "synchronizer" in name for name in ends[0])
    assert all(end == ends[0] for end in ends[1:])


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(driver, pretraining, tmp_path):  # noqa: F811
    def new(name):
        (tmp_path / name).mkdir()
        changes = {"schedule": {"steps": 4, "warmup": 1}, "save_every": 2, "optim": {"batch": 2, "micro_batch": 1}}
        config = pretraining(out=tmp_path / name / "run", **changes)
        file = tmp_path / name / "recipe.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return file

    def finish(file):
        start(driver, file)
        assert ended(driver) == 0, file.with_suffix(".log").read_text()
        return files_of(file.parent / "run")

    whole, killed = finish(new("whole")), new("killed")
    child = start(driver, killed)
    metrics = killed.parent / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert ended(driver) == -signal.SIGKILL
    start(driver, killed, {"call": "write", "path": "parts.safetensors", "nth": 1, "when": "amid"})
    assert ended(driver) == -signal.SIGKILL, "the fault point was never reached"
    assert finish(killed) == whole


@pytest.mark.slow
def test_a_fresh_process_has_the_last_word(pretraining):
    """With products in bf16; parts are in fp32 all the same."""
    config = pretraining(verify=True, schedule={"steps": 1, "warmup": 0}, precision="bf16", data={"validation": 0})
    list(train(config))
    saved = load_file(config.out / "adapter" / "parts.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = load_model(MM, config.out / "adapter")
    own = dict(own_parameters(loaded))
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())
    sequences = probe(loaded)
    here, base = logits(loaded, sequences), logits(load_backbone(MM), sequences)
    assert {name for name in here if not torch.equal(here[name], base[name])} == {"0.text", "1.text", "1.image"}


def test_parts_are_trained_in_fp32_and_then_held_as_the_rest():
    backbone = load_backbone(MM).to(torch.bfloat16)
    parts = choose_parts(backbone, ["^unet\\.", "^soi$"])
    assert {parameter.dtype for parameter in parts.parameters.values()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in parts.parameters.values())
    assert {p.dtype for name, p in own_parameters(backbone) if name not in parts.parameters} == {torch.bfloat16}
    parts.lower()
    assert {parameter.dtype for _, parameter in own_parameters(backbone)} == {torch.bfloat16}


def test_a_whole_model_can_be_saved(pretraining, tmp_path):
    training = build(pretraining(schedule={"steps": 2, "warmup": 0}))
    list(steps(training))
    training.set_learning(False)
    save_backbone(training.backbone, tmp_path)
    again = load_backbone(str(tmp_path))
    sequences = probe(again)
    for name, tensor in logits(training.backbone, sequences).items():
        assert torch.equal(logits(again, sequences)[name], tensor)


def test_parts_beside_an_adapter_have_the_names_of_the_bare_model(pretraining, tmp_path):
    """The language model's own norms, and low-rank updates of its linear layers, in one run."""
    config = pretraining(
        adapter=AdapterConfig(rank=2), parts=("^decoder\\..*norm", "^soi$"), schedule={"steps": 2, "warmup": 0}
    )
    list(train(config))
    folder = config.out / "adapter"
    bare = dict(own_parameters(load_backbone(MM)))
    assert load_file(folder / "parts.safetensors").keys() <= bare.keys()
    assert (folder / "adapter_model.safetensors").exists()
    one, two = load_backbone(MM), load_backbone(MM)
    load_trained(one, folder)
    assert {name for name in trained_parameters(one) if ".moss_" not in name} == set()
    attach(two, AdapterConfig(rank=2))
    names = {name for name, _ in own_parameters(two)}
    assert names == bare.keys()


def test_checkpointing_gives_the_same_run(pretraining):
    """Of the language model and of the U-Net, up to the last bits: sums may be taken in another order."""
    plain = [report.losses.total for report in itertools.islice(steps(build(pretraining())), 2)]
    training = build(pretraining(checkpointing=True))
    calls = {"decoder": 0, "unet": 0}  # the first layers of these

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    training.backbone.decoder.layers[0].mlp.register_forward_pre_hook(count("decoder"))
    training.backbone.unet.down_blocks[0].resnets[0].conv1.register_forward_pre_hook(count("unet"))
    losses = [report.losses.total for report in itertools.islice(steps(training), 2)]
    assert losses == pytest.approx(plain, rel=1e-6)
    # two micro-batches in each of two steps, each with a picture to be painted
    assert calls == {"decoder": 8, "unet": 8}


def test_the_same_noise_every_time_that_is_measured(pretraining):
    training = build(pretraining())
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = validate(training)
    assert first.image_targets > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    assert validate(training) == first


def test_a_step_of_text_alone_leaves_the_rest_where_it_is(pretraining, monkeypatch):
    texts = [Document((user("say"), assistant(f"no picture {i}")), f"text{i}") for i in range(4)]
    monkeypatch.setattr(ChatDataset, "__getitem__", lambda _, number: texts[number % 4])
    training = build(pretraining(optim={"weight_decay": 0.0}))
    start = {name: parameter.detach().clone() for name, parameter in training.parts.parameters.items()}
    (report, *_) = itertools.islice(steps(training), 2)
    assert not report.skipped and report.losses.image is None
    moved = {name for name, p in training.parts.parameters.items() if not torch.equal(p, start[name])}
    assert {name.split(".")[0] for name in moved} <= {"head_new", "decoder_sync"}
    assert "head_new.weight" in moved


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run(pretraining, monkeypatch):
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: forward(self, batch) * float("nan"))
    training = build(pretraining())
    start = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
    loop = steps(training)
    assert [next(loop).skipped, next(loop).skipped] == [True, True]
    with pytest.raises(NonFiniteError, match="steps 1 to 3"):
        next(loop)
    assert all(torch.equal(tensor, start[name]) for name, tensor in training.parameters.items())


def test_nothing_to_learn_is_said(pretraining, monkeypatch):
    silent = Document((user("nobody answers"),), "silent")
    monkeypatch.setattr(ChatDataset, "__getitem__", lambda *_: silent)
    with pytest.raises(DocumentError, match="has anything to learn"):
        next(steps(build(pretraining())))


def test_a_pattern_that_finds_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"'\^unet_\$' is found in no parameter") as caught:
        choose_parts(load_backbone(MM), ["^soi$", "^unet_$"])
    assert "unet_sync" in caught.value.fix


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "parts.json").unlink(), "record of the trained parts"),
        (lambda folder: (folder / "parts.safetensors").unlink(), "trained parts cannot be read"),
        (lambda folder: (folder / "parts.safetensors").write_bytes(b"no"), "trained parts cannot be read"),
        (lambda folder: save_file({"soi": torch.zeros(1, 3)}, folder / "parts.safetensors"), "part soi has shape"),
        (lambda folder: save_file({"sol": torch.zeros(1, 32)}, folder / "parts.safetensors"), "no such parameter"),
        (lambda f: save_file({"soi": torch.full((1, 32), torch.nan)}, f / "parts.safetensors"), "not finite"),
        (lambda folder: (folder / "parts.json").write_text('{"base": {"name": "x", "fingerprint": "0"}}'), "other wei"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(tmp_path, spoil, said):
    backbone = load_backbone(MM)
    save_trained(backbone, choose_parts(backbone, ["^soi$"]), tmp_path)
    load_trained(load_backbone(MM), tmp_path)
    spoil(tmp_path)
    with pytest.raises(AdapterError, match=said):
        load_trained(load_backbone(MM), tmp_path)


def test_the_plan_counts_them(pretraining):
    plan = make_plan(pretraining())
    backbone = load_backbone(MM)
    own = sum(parameter.numel() for parameter in choose_parts(backbone, RECIPE.parts).parameters.values())
    assert plan.parameters.parts == plan.parameters.all == own
    assert plan.frozen_parameters == sum(parameter.numel() for parameter in backbone.parameters()) - own
