"""Two processes do the steps of one."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from weft.training import train


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [{}, {"isolate_gradients": True, "modules_to_save": ["norm"]}], ids=["summed", "isolated"]
)
def test_two_processes_give_the_run_of_one(recipe, tmp_path, adapter):
    # dropout draws differ between processes, so it is off
    settings = {"adapter": {"dropout": 0.0, **adapter}, "optim": {"batch": 4}}
    alone = recipe(out=tmp_path / "alone", **settings)
    list(train(alone))
    together = recipe(out=tmp_path / "together", **settings)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(together.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "weft.cli"]
    done = subprocess.run(
        [*command, "train", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [
        [json.loads(line) for line in (c.out / "metrics.jsonl").read_text().splitlines()] for c in (alone, together)
    ]
    assert json.loads((together.out / "environment.json").read_text())["processes"] == 2
    for one, two in zip(*lines, strict=True):
        # float32 sums in another order
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["text_targets"] == one["text_targets"]
    adapters = [load_file(c.out / "adapter" / "adapter_model.safetensors") for c in (alone, together)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-2, atol=1e-4)
