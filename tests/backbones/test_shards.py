import json

import pytest
import torch

from weft.backbones import shards
from weft.backbones.checkpoint import Checkpoint

base = torch.arange(24.0)
TENSORS = {"a": base.view(4, 6).T, "b": base[:6], "c": torch.ones(2, dtype=torch.bfloat16), "d": torch.tensor(3)}
"""Two share their storage, one of them transposed; 96, 24, 4 and 8 bytes."""


@pytest.mark.parametrize(
    ("size", "held"),
    [(1000, ["abcd"]), (132, ["abcd"]), (124, ["abc", "d"]), (40, ["a", "bcd"]), (1, ["a", "b", "c", "d"])],
)
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_what_is_written_reads_back_from_files_of_a_bounded_size(tmp_path, monkeypatch, size, held, stem):
    monkeypatch.setattr(shards, "SHARD", size)
    shards.write_weights(tmp_path, TENSORS, stem)
    (tmp_path / "config.json").write_text("{}")
    found = Checkpoint.open(tmp_path)
    assert all(torch.equal(found.get(key), tensor) for key, tensor in TENSORS.items())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert ["".join(sorted(k for k, info in found.tensors.items() if info.file == file)) for file in files] == held
    index = tmp_path / f"{stem}.safetensors.index.json"
    assert index.exists() == (len(held) > 1)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == 132


def test_tensors_are_made_when_their_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 8)
    written = []

    def make(key):
        written.append((key, len(list(tmp_path.iterdir()))))
        return torch.zeros(2)

    shards.write_made(dict.fromkeys("xyz", 8), make, tmp_path)
    assert written == [("x", 0), ("y", 1), ("z", 2)]
