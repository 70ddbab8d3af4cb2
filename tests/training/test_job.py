"""A run and its folder: resumed = uninterrupted, and nothing is mixed, lost or believed unseen."""

import errno
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file

from weft import atomic
from weft.adapters import adapter_parameters, attach, load_adapter
from weft.backbones import load_backbone
from weft.config import load_config
from weft.document import Turn
from weft.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ContextError,
    NonFiniteError,
    UsageError,
    WeftError,
)
from weft.generation import SamplingConfig, generate
from weft.training import TrainConfig, build, steps, train


def run(config, sampler=None):
    return list(train(config, sampler))


def stop_after(config, step, sampler=None):
    asked = itertools.count()  # once before the first step, and then after each
    return list(train(config, sampler, stop=lambda: next(asked) == step))


@pytest.fixture(scope="module")
def whole(recipe_in, results, echo, tmp_path_factory):
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(recipe_in(out), echo)
    files = results(out)
    assert {"metrics.jsonl", "adapter/adapter_model.safetensors", "samples/step_000012.html"} <= files.keys()
    return files


def test_what_a_run_leaves(recipe, echo):
    config = recipe()
    reports = run(config, echo)
    out = config.out
    assert [report.step for report in reports] == list(range(1, 13))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [report.to_json() for report in reports]
    assert [line["step"] for line in lines if "validation" in line] == [5, 10, 12]
    assert yaml.safe_load((out / "config.yaml").read_text())["adapter"]["dropout"] == 0.1
    assert sorted(folder.name for folder in (out / "checkpoints").iterdir()) == ["step_000008", "step_000012"]
    assert {"torch", "threads", "device"} <= json.loads((out / "environment.json").read_text()).keys()
    assert not list(out.rglob("*.part"))
    backbone = load_backbone("nano")
    load_adapter(backbone, out / "adapter")
    saved = load_file(out / "checkpoints" / "step_000012" / "adapter.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in adapter_parameters(backbone).items())


@pytest.mark.parametrize(
    "cut", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow), 11]
)
def test_resumed_is_uninterrupted(recipe, results, echo, whole, cut):
    config = recipe()
    assert stop_after(config, cut, echo)[-1].step == cut
    # as after a kill: lines and samples beyond the checkpoint, and what a killed writer left
    with open(config.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 99}\n{"ste')
    (config.out / "samples").mkdir(exist_ok=True)
    (config.out / "samples" / "step_000099.html").write_text("later")
    (config.out / "checkpoints" / ".step_000099.x.part").mkdir()
    assert run(config, echo)[0].step == cut + 1
    assert results(config.out) == whole
    assert not list(config.out.rglob("*.part"))


def test_a_run_can_go_back(recipe, results, echo, whole):
    config = recipe()
    run(config, echo)
    back = recipe(resume=config.out / "checkpoints" / "step_000008")
    assert [report.step for report in run(back, echo)] == [9, 10, 11, 12]
    assert results(config.out) == whole
    with pytest.raises(CheckpointError, match="not a checkpoint of this run") as caught:
        run(recipe(resume=config.out / "checkpoints" / "step_000004"))
    assert "step_000012" in caught.value.fix


def test_a_finished_run_is_left_as_it_is(recipe, results, echo):
    config = recipe()
    run(config, echo)
    before = results(config.out)
    assert run(config, echo) == []
    assert results(config.out) == before


def noisy(backbone, prompts):
    """Answers nothing, and leaves as much disorder as it can."""
    torch.manual_seed(0)
    torch.rand(7)
    backbone.decoder.eval()
    return [Turn("assistant", ()) for _ in prompts]


def engine(backbone, prompts):
    sampling = SamplingConfig(max_text_tokens=3, min_images=1, max_images=1)
    return [Turn("assistant", answer.parts) for answer in generate(backbone, prompts, sampling)]


@pytest.mark.parametrize("sampler", [noisy, pytest.param(engine, marks=pytest.mark.slow)])
def test_samples_do_not_change_what_is_learnt(recipe, results, whole, sampler):
    config = recipe()
    run(config, sampler)
    samples = (config.out / "samples" / "step_000004.html").read_text()
    assert samples.count("<img") >= (2 if sampler is engine else 0)
    without = recipe(out=config.out.parent / "without")
    run(without)
    learnt = [{k: v for k, v in files.items() if not k.startswith("samples")}
              for files in (whole, results(config.out), results(without.out))]  # fmt: skip
    assert learnt[0] == learnt[1] == learnt[2]


def test_sample_pages_hold_everything_and_trust_nothing(recipe, echo):
    config = recipe(sampling={"prompts": ["<script>alert(1)</script>"], "documents": 2})
    run(config, echo)
    pages = sorted((config.out / "samples").iterdir())
    assert [page.stem for page in pages] == ["step_000004", "step_000008", "step_000012"]
    page = pages[0].read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert 'src="data:image/png;base64,' in page
    assert "://" not in page
    assert "samples/step_000008.html" in (config.out / "samples.html").read_text()


def test_samples_answer_what_leaves_room(recipe, echo, tmp_path):
    file = tmp_path / "d.jsonl"
    lengths = (400, 5, 400, 6)
    file.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": "u" * n}, {"role": "assistant", "content": "x"}]}) + "\n"
        for n in lengths
    ))  # fmt: skip
    asked = []

    def sampler(backbone, prompts):
        asked.append(["".join(part.text for part in prompt.texts) for prompt in prompts])
        return echo(backbone, prompts)

    data = {"path": file, "validation": 0}
    run(recipe(data=data, sampling={"prompts": [], "documents": 3, "every": 12}), sampler)
    assert asked == [["u" * 5, "u" * 6]]
    with pytest.raises(ContextError, match="positions"):
        run(recipe(data=data, sampling={"prompts": ["v" * 300]}, out=tmp_path / "other"), sampler)


def damage(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(recipe, results, echo, whole, caplog, name):
    config = recipe()
    stop_after(config, 10, echo)
    damage(config.out / "checkpoints" / "step_000010", name)
    assert run(config, echo)[0].step == 9
    assert "step_000010 is passed over" in caplog.text
    assert results(config.out) == whole


def test_no_whole_checkpoint_is_an_error(recipe):
    config = recipe()
    stop_after(config, 10)
    for folder in (config.out / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        run(config)


def test_a_checkpoint_of_another_shape_names_the_tensor(recipe):
    config = recipe()
    stop_after(config, 4)
    folder = config.out / "checkpoints" / "step_000004"
    tensors = load_file(folder / "adapter.safetensors")
    name = sorted(tensors)[3]
    save_file({**tensors, name: torch.zeros(5, 5)}, folder / "adapter.safetensors")
    with atomic.write_folder(folder) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(CheckpointError, match=r"the checkpoint has \(5, 5\), the adapter has") as caught:
        run(config)
    assert name in str(caught.value)


@pytest.mark.parametrize("shot", ["write", "manifest"])
def test_a_full_disk_leaves_the_checkpoint_before(recipe, results, echo, whole, monkeypatch, shot):
    config = recipe()
    stop_after(config, 4, echo)
    before = {file: file.read_bytes() for file in (config.out / "checkpoints").rglob("*") if file.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if shot == "write":
            patch.setattr(Path, "write_bytes", full)
        else:
            patch.setattr(atomic, "write_json", full)
        with pytest.raises(CheckpointError, match=r"step 8 cannot be written: No space left") as caught:
            run(config, echo)
    assert "make room" in caught.value.fix
    assert {file: file.read_bytes() for file in (config.out / "checkpoints").rglob("*") if file.is_file()} == before
    run(config, echo)
    assert results(config.out) == whole


def test_no_checkpoint_holds_a_number_that_is_none(recipe):
    config = recipe()
    loop = train(config)
    assert [next(loop).step, next(loop).step] == [1, 2]
    training = loop.gi_frame.f_locals["training"]
    next(iter(training.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        list(loop)
    assert not list((config.out / "checkpoints").glob("*"))


def test_another_recipe_is_refused(recipe):
    config = recipe()
    stop_after(config, 4)
    before = sorted(config.out.rglob("*"))
    with pytest.raises(ConfigError, match=r"optim\.learning_rate is 0\.001, but .* begun with 0\.008") as caught:
        run(recipe(optim={"learning_rate": 0.001}))
    assert "--out" in caught.value.fix
    assert sorted(config.out.rglob("*")) == before


def test_a_run_that_never_began_takes_the_mended_recipe(recipe, documents):
    wrong = recipe(data={"path": documents.parent / "none"})
    with pytest.raises(WeftError):
        run(wrong)
    stop_after(recipe(out=wrong.out), 1)
    assert (wrong.out / "metrics.jsonl").read_text().count("\n") == 1


def test_targets_that_are_not_there_are_named(recipe):
    with pytest.raises(AdapterError, match=r"nosuch[\s\S]*q_proj"):
        run(recipe(adapter={"targets": ["nosuch"]}))


def test_other_data_are_refused(recipe, tmp_path, documents):
    copy = shutil.copytree(documents.parent, tmp_path / "copy") / "documents.jsonl"
    config = recipe(data={"path": copy})
    stop_after(config, 4)
    copy.write_text(copy.read_text().replace("show 4", "show five"))
    with pytest.raises(CheckpointError, match="begun on something else: data was"):
        run(config)


def test_never_wants_a_new_folder(recipe):
    stop_after(recipe(), 2)
    with pytest.raises(UsageError, match="holds a run already"):
        run(recipe(resume="never"))


def test_a_folder_of_something_else_is_left_alone(recipe):
    config = recipe()
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        run(config)


def test_two_runs_in_one_folder_are_refused(recipe):
    config = recipe()
    loop = train(config)
    next(loop)
    with pytest.raises(UsageError, match="another process"):
        run(config)
    loop.close()
    run(config)


def test_the_lock_of_a_dead_process_is_no_obstacle(recipe):
    config = recipe()
    config.out.mkdir()
    lock = FileLock(config.out / ".lock")
    lock.acquire()
    lock.release()
    (config.out / ".lock").write_text("12345")
    assert len(run(config)) == 12


def test_metrics_that_were_cut_are_noticed(recipe):
    config = recipe()
    stop_after(config, 4)
    (config.out / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"0 bytes are left") as caught:
        run(config)
    assert "metrics.jsonl" in caught.value.where


def test_the_loop_alone_writes_nothing(recipe):
    config = recipe()
    list(steps(build(config)))
    assert not config.out.exists()


def test_an_unknown_key_names_the_file_and_the_nearest(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {path: x}\noptim: {learning_rte: 1}\n")
    with pytest.raises(ConfigError, match=r"optim\.learning_rte") as caught:
        load_config(TrainConfig, file)
    assert str(file) in str(caught.value)
    assert "optim.learning_rate" in caught.value.fix


def test_warmup_must_end_before_the_run():
    with pytest.raises(ValueError, match="warmup = 20 leaves nothing"):
        TrainConfig(data={"path": "x"}, schedule={"steps": 20})


def test_adapters_of_runs_start_alike(recipe):
    backbone = load_backbone("nano")
    config = recipe()
    attach(backbone, config.adapter, seed=config.seed)
    ours = adapter_parameters(backbone)
    assert all(torch.equal(ours[name], tensor) for name, tensor in build(config).parameters.items())
