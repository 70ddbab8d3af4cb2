"""Training with a synchroniser beside the adapter, or alone: one loop, one folder, exact to resume."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from weft.backbones import load_backbone, load_model
from weft.backbones.reload import logits, probe, verify_adapter
from weft.config import load_config
from weft.data.collate import collate
from weft.data.dataset import ChatDataset
from weft.document import Document, assistant, user
from weft.errors import AdapterError, CheckpointError, ConfigError, DocumentError, NonFiniteError
from weft.synchronizer import SynchronizerConfig, attach_synchronizer, synchronizer_parameters
from weft.synchronizer.eye import EyeConfig
from weft.training import TrainConfig, build, make_plan, steps, train
from weft.training.objective import Objective, evaluate_loss

SMALL = SynchronizerConfig(eye=EyeConfig(side=16, width=8, stem=4, scales=2), every=2, value_width=8, heads=2, points=2)
ALONE = {"adapter": None, "synchronizer": SMALL}
BOTH = {"synchronizer": SMALL}


def files_of(run: Path) -> dict[str, bytes]:
    """What must not depend on when a run was interrupted, or on which of two it was."""
    last = max((run / "checkpoints").glob("step_*"))
    found = [run / "metrics.jsonl", *(run / "adapter").rglob("*"), *last.rglob("*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(found) if file.is_file()}


def stop_after(config, step):
    asked = itertools.count()  # once before the first step, and then after each
    return list(train(config, stop=lambda: next(asked) == step))


@pytest.mark.parametrize("settings", [ALONE, BOTH], ids=["alone", "beside an adapter"])
def test_losses_fall_and_nothing_else_moves(recipe, settings):
    config = recipe(schedule={"steps": 30, "warmup": 3}, data={"validation": 0}, **settings)
    training = build(config)
    own = {id(parameter) for parameter in training.parameters.values()}
    frozen = [p for p in training.backbone.parameters() if id(p) not in own]
    before = [p.clone() for p in frozen]
    start = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
    examples = [part for number in training.training for part in training.examples[number]]
    everything = collate(examples, training.backbone.tokens.pad)
    first = evaluate_loss(training.objective, [everything]).total
    list(steps(training))
    training.set_learning(False)
    assert evaluate_loss(training.objective, [everything]).total < 0.95 * first
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    moved = {name for name, tensor in training.parameters.items() if not torch.equal(tensor, start[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("synchronizer.")} == {"eye", "branches"}
    assert any(".moss_" in name for name in moved) == (settings is BOTH)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(ALONE, id="alone"), pytest.param(BOTH, id="beside an adapter", marks=pytest.mark.slow)],
)
def test_resumed_is_uninterrupted_and_twice_is_the_same(recipe, tmp_path, settings):
    ends = []
    for cut in (None, None, 1, 7):
        config = recipe(out=tmp_path / f"run{len(ends)}", **settings)
        if cut is not None:
            assert stop_after(config, cut)[-1].step == cut
        list(train(config))
        ends.append(files_of(config.out))
    assert {"adapter/synchronizer/synchronizer.safetensors", "metrics.jsonl"} <= ends[0].keys()
    assert ("adapter/adapter_model.safetensors" in ends[0]) == (settings is BOTH)
    assert all(end == ends[0] for end in ends[1:])


@pytest.fixture(scope="module")
def driver():
    """`driver.py`: forks `weft` commands; answers with a process id, then with the exit status."""
    command = [sys.executable, str(Path(__file__).with_name("driver.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


def start(driver, recipe, fault=None):
    order = {"arguments": ["train", str(recipe)], "fault": fault, "log": str(recipe.with_suffix(".log"))}
    driver.stdin.write(json.dumps(order) + "\n")
    driver.stdin.flush()
    return int(driver.stdout.readline())


def ended(driver):
    return int(driver.stdout.readline())


FAULTS = [
    {"call": "write", "path": "optimizer.safetensors", "nth": 2, "when": "amid"},
    {"call": "write", "path": "synchronizer.safetensors", "nth": 1, "when": "amid"},
    {"call": "replace", "path": "run/adapter", "nth": 1, "when": "before"},
]


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(driver, recipe_in, tmp_path):
    def new(name):
        (tmp_path / name).mkdir()
        config = recipe_in(
            tmp_path / name / "run", schedule={"steps": 40, "warmup": 5}, optim={"batch": 2, "micro_batch": 1},
            sampling={"every": None}, save_every=10, **BOTH,
        )  # fmt: skip
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
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 13):
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert ended(driver) == -signal.SIGKILL
    for fault in FAULTS:
        start(driver, killed, fault)
        assert ended(driver) == -signal.SIGKILL, "the fault point was never reached"
    assert finish(killed) == whole


@pytest.mark.slow
def test_a_fresh_process_has_the_last_word(recipe):
    config = recipe(verify=True, schedule={"steps": 4, "warmup": 1}, **BOTH)
    list(train(config))
    folder = config.out / "adapter"
    alone = load_backbone("nano")
    loaded = load_model("nano", folder)
    assert loaded.synchronizer is not None and alone.synchronizer is None
    sequences = probe(loaded)
    with_it, without = (logits(loaded, sequences, blind=blind) for blind in (False, True))
    assert not torch.equal(with_it["1.text"], without["1.text"])
    assert torch.equal(with_it["0.text"], without["0.text"])  # there are no pictures
    file = folder / "synchronizer" / "synchronizer.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="differs from what the manifest"):
        verify_adapter(folder)


def test_one_that_does_nothing_is_no_result(recipe):
    config = recipe(verify=True, schedule={"steps": 1, "warmup": 0}, optim={"learning_rate": 1e-30}, **ALONE)
    with pytest.raises(AdapterError, match="does nothing"):
        list(train(config))
    assert not (config.out / "adapter").exists()


@pytest.mark.slow
def test_both_give_another_run_than_either(recipe, tmp_path):
    ends = {}
    for name, settings in {"adapter": {}, "alone": ALONE, "both": BOTH}.items():
        config = recipe(out=tmp_path / name, **settings)
        ends[name] = list(train(config))[-1].losses.total
        folder = config.out / "adapter"
        assert (folder / "adapter_model.safetensors").exists() == (name != "alone")
        assert (folder / "synchronizer").exists() == (name != "adapter")
    assert len(set(ends.values())) == 3


def test_checkpointing_gives_the_same_run(recipe, tmp_path):
    """Up to the last bits: sums of gradients may be taken in another order."""
    ends = []
    for checkpointing in (False, True):
        config = recipe(out=tmp_path / str(checkpointing), checkpointing=checkpointing, **ALONE)
        training = build(config)
        calls = []
        training.backbone.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        losses = [report.losses.total for report in itertools.islice(steps(training), 3)]
        ends.append((len(calls), losses))
    assert ends[1][0] == 2 * ends[0][0]
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-6)


def test_text_without_pictures_teaches_a_synchroniser_nothing(recipe, monkeypatch):
    texts = [Document((user("say"), assistant(f"no picture {i}")), f"text{i}") for i in range(4)]
    monkeypatch.setattr(ChatDataset, "__getitem__", lambda _, number: texts[number % 4])
    training = build(recipe(**ALONE))
    start = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
    reports = list(itertools.islice(steps(training), 3))
    assert all(report.gradient_norm == 0 and not report.skipped for report in reports)
    assert all(torch.equal(tensor, start[name]) for name, tensor in training.parameters.items())


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run(recipe, monkeypatch):
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: forward(self, batch) * float("nan"))
    training = build(recipe(**BOTH))
    start = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
    loop = steps(training)
    assert [next(loop).skipped, next(loop).skipped] == [True, True]
    with pytest.raises(NonFiniteError, match="steps 1 to 3"):
        next(loop)
    assert all(torch.equal(tensor, start[name]) for name, tensor in training.parameters.items())


def test_nothing_to_learn_is_said(recipe, monkeypatch):
    silent = Document((user("nobody answers"),), "silent")
    monkeypatch.setattr(ChatDataset, "__getitem__", lambda *_: silent)
    with pytest.raises(DocumentError, match="has anything to learn"):
        next(steps(build(recipe(**BOTH))))


# --- what the optimizer is told --------------------------------------------------------------------------------------

GROUPS = [
    {"match": "gate$", "weight_decay": 0.0},
    {"match": "sampling_offsets", "learning_rate": 1e-3, "weight_decay": 0.0},
    {"match": "^synchronizer\\.", "learning_rate": 2e-3},  # the others, too, match this one
]


def figures(training):
    """Parameter's name -> peak rate, decay."""
    names = {id(parameter): name for name, parameter in training.parameters.items()}
    groups = training.optimizer.param_groups
    found = {names[id(p)]: (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    return found


def test_without_wishes_there_is_one_group_without_decay(recipe):
    training = build(recipe(**BOTH))
    (group,) = training.optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["peak"]) == ((0.9, 0.999), 1e-8, 0.0, 8e-3)
    assert [id(p) for p in group["params"]] == [id(p) for p in training.parameters.values()]


def test_the_first_group_that_matches_counts(recipe):
    optim = {"betas": [0.9, 0.98], "eps": 1e-5, "weight_decay": 0.05, "decays": "weights", "groups": GROUPS}
    training = build(recipe(optim=optim, **BOTH))
    found = figures(training)
    norms = {f"stem.{number}.weight" for number in (1, 4)} | {"down.0.1.weight", "out.0.1.weight", "out.1.1.weight"}
    for name, (rate, decay) in found.items():
        is_spared = name.endswith("bias") or name.removeprefix("synchronizer.eye.") in norms
        if name.endswith("gate"):
            wanted = (8e-3, 0.0)
        elif "sampling_offsets" in name:
            wanted = (1e-3, 0.0)
        else:
            wanted = (2e-3 if name.startswith("synchronizer.") else 8e-3, 0.0 if is_spared else 0.05)
        assert (rate, decay) == wanted, name
    # root-mean-square norms are decayed, as in the released model
    assert found["synchronizer.branches.0.query_norm.weight"] == (2e-3, 0.05)
    assert all(group["betas"] == (0.9, 0.98) and group["eps"] == 1e-5 for group in training.optimizer.param_groups)
    everything = build(recipe(optim={**optim, "decays": "all", "groups": []}, **BOTH))
    assert set(figures(everything).values()) == {(8e-3, 0.05)}


def test_each_group_keeps_to_the_schedule(recipe):
    training = build(recipe(optim={"groups": GROUPS}, schedule={"steps": 6, "warmup": 2}, **BOTH))
    for report in steps(training):
        shares = {round(group["lr"] / group["peak"], 12) for group in training.optimizer.param_groups}
        assert shares == {round(report.learning_rate / 8e-3, 12)}


def test_decay_is_that_of_adamw(recipe):
    """One step by hand, of a weight whose gradient is zero: a batch without pictures."""
    optim = {"weight_decay": 0.1, "learning_rate": 0.5}
    training = build(recipe(optim=optim, schedule={"steps": 2, "warmup": 0}, data={"validation": 0}, **ALONE))
    name, weight = next((n, p) for n, p in training.parameters.items() if n.endswith("query_relpos.weight"))
    before = weight.detach().clone()
    (report, *_) = steps(training)
    assert weight.grad is None
    # row 0 is no picture's: nothing else moves it
    done = (1 - 0.1 * report.learning_rate) * before[0]
    second = training.optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(weight[0], (1 - 0.1 * second) * done, rtol=1e-6, atol=0)
    assert name in training.parameters


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": None}, "nothing is trained"),
        ({"adapter": {"isolate_gradients": True}, "synchronizer": {}}, "isolate_gradients"),
        ({"parts": ["^nothing$"]}, "found in no parameter"),
        ({"optim": {"groups": [{"match": "nothing"}]}}, "in the name of no trained parameter"),
        ({"optim": {"betas": [0.9, 1.0]}}, "betas"),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe, tmp_path, settings, said):
    values = recipe().model_dump(mode="json")
    for key, value in settings.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and values[key] else value
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=said):
        build(load_config(TrainConfig, file))


def test_none_is_a_section_left_out(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    values = {**recipe().model_dump(mode="json"), "adapter": "none", "synchronizer": {"every": 2}}
    file.write_text(yaml.safe_dump(values))
    config = load_config(TrainConfig, file)
    assert config.adapter is None and config.synchronizer.every == 2
    assert load_config(TrainConfig, file, {"adapter": None, "synchronizer.every": 1}).synchronizer.every == 1


def test_the_plan_counts_it(recipe):
    alone, both = (make_plan(recipe(**settings)) for settings in (ALONE, BOTH))
    backbone = load_backbone("nano")
    total = sum(parameter.numel() for parameter in backbone.parameters())
    attach_synchronizer(backbone, recipe(**BOTH).synchronizer)
    own = sum(parameter.numel() for parameter in synchronizer_parameters(backbone).values())
    assert alone.parameters.synchronizer == both.parameters.synchronizer == own
    assert (alone.parameters.all, alone.parameters.lora_rank) == (own, 0)
    assert alone.frozen_parameters == both.frozen_parameters == total
    assert {stretch.branch for stretch in alone.stretches} == {"none"}


def test_a_run_begun_before_there_were_these_keys_goes_on(recipe):
    config = recipe()
    stop_after(config, 4)
    file = config.out / "config.yaml"
    values = yaml.safe_load(file.read_text())
    for key in ("betas", "eps", "weight_decay", "decays", "groups"):
        del values["optim"][key]
    del values["synchronizer"], values["parts"]
    file.write_text(yaml.safe_dump(values))
    assert [report.step for report in train(config)] == list(range(5, 13))


def test_several_processes_see_all_that_is_trained(recipe):
    """What wraps the objective exchanges gradients of the parameters that it finds in it."""
    training = build(recipe(**BOTH))
    inside = {id(parameter) for parameter in training.objective.parameters() if parameter.requires_grad}
    assert inside == {id(parameter) for parameter in training.parameters.values()}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ALONE, BOTH], ids=["alone", "beside an adapter"])
def test_two_processes_give_the_run_of_one(recipe, tmp_path, settings):
    # dropout draws differ between processes, so it is off
    settings = {**settings, "adapter": {"dropout": 0.0} if settings is BOTH else None}
    ends = []
    for name in ("alone", "together"):
        config = recipe(out=tmp_path / name, optim={"batch": 4}, **settings)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if name == "together" else []
        done = subprocess.run(
            [sys.executable, *launch, "-m", "weft.cli", "train", str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ends.append([json.loads(line)["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()])
    # float32 sums in another order
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)
    one, two = (
        load_file(tmp_path / n / "adapter/synchronizer/synchronizer.safetensors") for n in ("alone", "together")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-3)


def test_it_is_refused_by_another_model(recipe):
    config = recipe(schedule={"steps": 2, "warmup": 1}, **ALONE)
    list(train(config))
    with pytest.raises(AdapterError, match="trained on nano with other weights"):
        load_model("nano-emu2", config.out / "adapter")
