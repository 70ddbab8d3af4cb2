import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.backbones.stacks import stack
from weft.backbones import checkpoint as module
from weft.backbones.checkpoint import (
    BLOCK,
    BLOCKS,
    WHOLE,
    Checkpoint,
    fill,
    materialise_buffers,
)
from weft.errors import CheckpointError

WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.bias": torch.arange(3.0).bfloat16(),
    "b.weight": torch.arange(6).reshape(2, 3),
    "b.scalar": torch.tensor(7.0),
    "b.empty": torch.empty(0, 3),
}


def write(folder, weights=WEIGHTS, shards=1, stem="model", variant=None, config='{"width": 4}'):
    """A checkpoint as the libraries write it; a name per shard in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(config)
    part = f".{variant}" if variant else ""
    if shards == 1:
        save_file(weights, folder / f"{stem}{part}.safetensors")
        return folder
    where = {key: f"{stem}-{i % shards + 1:05}-of-{shards:05}{part}.safetensors" for i, key in enumerate(weights)}
    for name in set(where.values()):
        save_file({key: weights[key] for key in weights if where[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.safetensors.index{part}.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def no_reads(monkeypatch):
    """Fails whatever reads a tensor."""

    def refuse(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(module, "_read_into", refuse)


def same(found: Checkpoint, weights) -> bool:
    return found.tensors.keys() == weights.keys() and all(
        torch.equal(found.get(key), tensor) and found.get(key).dtype == tensor.dtype for key, tensor in weights.items()
    )


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("variant", [None, "bf16"])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_every_layout_of_the_libraries_is_read(tmp_path, stem, variant, shards):
    write(tmp_path / "unet", shards=shards, stem=stem, variant=variant)
    found = Checkpoint.open(tmp_path, subfolder="unet", variant=variant)
    assert same(found, WEIGHTS) and found.config == {"width": 4} and found.folder == tmp_path / "unet"
    info = found.tensors["a.bias"]
    assert info.shape == (3,) and info.dtype == torch.bfloat16 and info.file.parent == found.folder


def test_every_dtype_is_read(tmp_path):
    weights = {name: torch.tensor([[0.0, 1.0]]).to(dtype) for name, dtype in module.DTYPES.items()}
    found = Checkpoint.open(write(tmp_path, weights))
    for name, tensor in weights.items():
        assert found.get(name).dtype == tensor.dtype
        assert torch.equal(found.get(name).float(), tensor.float())


@pytest.mark.parametrize("shards", [1, 2])
def test_the_only_variant_need_not_be_named_and_the_plain_files_go_first(tmp_path, shards):
    write(tmp_path, shards=shards, variant="bf16")
    assert same(Checkpoint.open(tmp_path), WEIGHTS)
    write(tmp_path, {"plain": torch.ones(1)})
    assert Checkpoint.open(tmp_path).tensors.keys() == {"plain"}
    assert same(Checkpoint.open(tmp_path, variant="bf16"), WEIGHTS)


def test_the_index_of_a_variant_is_found_in_both_its_spellings(tmp_path):
    write(tmp_path, shards=2, variant="bf16")
    (tmp_path / "model.safetensors.index.bf16.json").rename(tmp_path / "model.bf16.safetensors.index.json")
    assert same(Checkpoint.open(tmp_path, variant="bf16"), WEIGHTS)


def test_a_tensor_outlives_its_file(tmp_path):
    found = Checkpoint.open(write(tmp_path))
    tensor = found.get("a.weight")
    (tmp_path / "model.safetensors").write_bytes(b"\1" * 400)
    assert torch.equal(tensor, WEIGHTS["a.weight"])


# --- what is damaged --------------------------------------------------------------------------------------------------


def replaced_header(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def lengthened(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    return path.name


def without_a_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def index_with(folder, key, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][key] = name
    path.write_text(json.dumps(index))


def key_in_no_shard(folder):
    index_with(folder, "c.weight", "model-00001-of-00002.safetensors")
    return "c.weight"


def shard_elsewhere(folder):
    index_with(folder, "c.weight", "../other.safetensors")
    return "../other.safetensors"


def header_of(text):
    def damage(folder):
        path = folder / "model-00001-of-00002.safetensors"
        path.write_bytes(text)
        return path.name

    return damage


def entry(key, **changes):
    def damage(folder):
        path = folder / "model-00001-of-00002.safetensors"
        replaced_header(path, lambda header: header[key].update(changes))
        return path.name

    return damage


def text_in(name, text):
    def damage(folder):
        (folder / name).write_text(text)
        return name

    return damage


def without_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


DAMAGES = {
    "a shard is cut off": (cut, "cut off"),
    "a shard is too long": (lengthened, "longer"),
    "a shard is missing": (without_a_shard, "missing"),
    "a key is in no shard": (key_in_no_shard, "does not"),
    "a shard is outside": (shard_elsewhere, "not in its folder"),
    "a shard is empty": (header_of(b""), "cut off or damaged"),
    "a header is cut off": (header_of(struct.pack("<Q", 900) + b"{"), "cut off or damaged"),
    "a header is no JSON": (header_of(struct.pack("<Q", 4) + b"{\xff:}"), "header is damaged"),
    "a header is a list": (header_of(struct.pack("<Q", 2) + b"[]"), "header is damaged"),
    "a pointer of Git LFS": (header_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "an entry has an unknown dtype": (entry("a.weight", dtype="Q4"), "Q4"),
    "an entry has a shape of other size": (entry("a.weight", shape=[3, 5]), "48 bytes for 60"),
    "an entry has a negative shape": (entry("a.weight", shape=[-3, -4]), "no tensor"),
    "entries overlap": (entry("a.weight", data_offsets=[1, 49]), "begins at byte"),
    "the index is no JSON": (text_in("model.safetensors.index.json", "{"), "cannot be read"),
    "the index has no map": (text_in("model.safetensors.index.json", "{}"), "weight_map"),
    "config.json is missing": (without_config, "missing"),
    "config.json is no JSON": (text_in("config.json", "width: 4"), "cannot be read"),
    "config.json is no object": (text_in("config.json", "[4]"), "list"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_before_a_tensor_is_read(tmp_path, no_reads, name):
    damage, words = DAMAGES[name]
    write(tmp_path, shards=2)
    culprit = damage(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert culprit in str(caught.value) and caught.value.fix and caught.value.where


def test_pickles_alone_point_at_the_converter(tmp_path, no_reads):
    (tmp_path / "models" / "7b").mkdir(parents=True)
    (tmp_path / "models" / "7b" / "consolidated.pth").touch()
    with pytest.raises(CheckpointError, match=r"pickled \(models/7b/consolidated.pth\)") as caught:
        Checkpoint.open(tmp_path)
    assert f"weft models convert {tmp_path}" in caught.value.fix


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint.open(tmp_path)
    write(tmp_path, variant="bf16")
    with pytest.raises(CheckpointError, match=r"no model\.fp16\.safetensors.*among model\.bf16\.safetensors"):
        Checkpoint.open(tmp_path, variant="fp16")
    write(tmp_path, variant="fp32")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*among model\.bf16.*, model\.fp32"):
        Checkpoint.open(tmp_path)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path):
    found = Checkpoint.open(write(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="became shorter"):
        [found.get(key) for key in WEIGHTS]


# --- fingerprint ------------------------------------------------------------------------------------------------------


def big() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"big": torch.randn(2 * WHOLE // 4 + 5), "small": torch.randn(5), "flag": torch.tensor(True)}


def print_of(folder, weights, **how):
    return Checkpoint.open(write(folder, weights, **how), variant=how.get("variant")).fingerprint


def test_a_fingerprint_does_not_depend_on_files_and_their_order(tmp_path):
    weights = big()
    found = print_of(tmp_path / "one", weights)
    assert found == print_of(tmp_path / "two", weights, shards=2) == print_of(tmp_path / "v", weights, variant="bf16")
    assert found == print_of(tmp_path / "turned", dict(reversed(weights.items())), shards=3)


def test_a_fingerprint_sees_names_types_shapes_and_values(tmp_path):
    weights = big()
    last = weights["big"].clone()
    last[-1] += 1
    others = [
        weights,
        {**weights, "small": weights["small"] + 2**-20},
        {**weights, "big": weights["big"] * (1 + 2**-20)},
        {**weights, "big": last},
        {**weights, "big": weights["big"].reshape(1, -1)},
        {**weights, "big": weights["big"].view(torch.int32)},
        {"big": weights["big"], "small": weights["small"], "other": weights["flag"]},
        {"big": weights["big"], "small": weights["small"]},
    ]
    prints = [print_of(tmp_path / str(i), each) for i, each in enumerate(others)]
    assert len(set(prints)) == len(prints)


def test_a_fingerprint_reads_little_of_a_large_tensor(tmp_path, monkeypatch):
    found = Checkpoint.open(write(tmp_path, {"big": torch.zeros(8 * WHOLE), "whole": torch.zeros(WHOLE // 4)}))
    reads = []
    monkeypatch.setattr(module, "_read_into", lambda info, offset, into: reads.append(len(into)))
    assert found.fingerprint
    assert sum(reads) == BLOCKS * BLOCK + WHOLE


# --- fill -------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.up.bias.requires_grad_(False)


def on_meta(build=Model):
    with torch.device("meta"):
        return build()


def weights_of(seed=0):
    torch.manual_seed(seed)
    return {key: torch.randn(t.shape) if t.is_floating_point() else t for key, t in Model().state_dict().items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_module_on_meta_gets_its_tensors(tmp_path, shards):
    weights, model = weights_of(), on_meta()
    fill(model, Checkpoint.open(write(tmp_path, weights, shards=shards)))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert model.up.weight.requires_grad and not model.up.bias.requires_grad
    wanted = Model()
    wanted.load_state_dict(weights)
    x = torch.randn(2, 4)
    assert torch.equal(model.eval().norm(model.up(x)), wanted.eval().norm(wanted.up(x)))


def test_a_dtype_is_given_to_floating_point_tensors_alone(tmp_path):
    found = Checkpoint.open(write(tmp_path, weights_of()))
    model = on_meta()
    fill(model, found, dtype=torch.bfloat16)
    assert model.up.weight.dtype == torch.bfloat16 and model.norm.num_batches_tracked.dtype == torch.int64
    fill(model, found)
    assert model.up.weight.dtype == torch.float32


def test_keys_are_renamed_and_tensors_transformed(tmp_path):
    weights = weights_of()
    stored = {f"m.{key}": tensor for key, tensor in weights.items()} | {"rope": torch.ones(3)}
    stored["m.up.weight"] = weights["up.weight"].t().contiguous()
    model, seen = on_meta(), []

    def transform(key, tensor):
        seen.append((key, tensor.is_meta))
        return tensor.t() if key == "up.weight" else tensor

    found = Checkpoint.open(write(tmp_path, stored))
    fill(model, found, lambda key: None if key == "rope" else key.removeprefix("m."), transform)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert model.up.weight.is_contiguous()
    metas = [is_meta for _, is_meta in seen]
    assert metas == [True] * len(weights) + [False] * len(weights)


def test_a_part_of_a_stored_tensor_does_not_keep_the_rest(tmp_path):
    stored = weights_of() | {"up.weight": torch.randn(300, 4)}
    model = on_meta()
    fill(model, Checkpoint.open(write(tmp_path, stored)), transform=lambda k, t: t[:3] if k == "up.weight" else t)
    assert torch.equal(model.up.weight, stored["up.weight"][:3])
    assert model.up.weight.untyped_storage().nbytes() == model.up.weight.nbytes


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("up.bias"), r"1 missing: up\.bias"),
        (lambda w: w.clear() or w.update(other=torch.ones(1)), r"7 missing: up.*, norm\.weight and 4 more; .*: other"),
        (lambda w: w.update({f"x{i}": torch.ones(1) for i in range(5)}), "5 unexpected: x0, x1, x2 and 2 more"),
        (lambda w: w.update({"up.weight": torch.ones(4, 3)}), r"up\.weight with \(4, 3\) for up\.weight with \(3, 4\)"),
        (lambda w: w.update({"old.up.bias": torch.ones(3)}), r"2 named twice: .*old\.up\.bias for up\.bias"),
    ],
)  # fmt: skip
def test_another_model_s_weights_are_refused_from_headers_alone(tmp_path, no_reads, change, words):
    weights = weights_of()
    change(weights)
    model = on_meta()
    with pytest.raises(CheckpointError, match=words) as caught:
        fill(model, Checkpoint.open(write(tmp_path, weights)), lambda key: key.removeprefix("old."))
    assert str(tmp_path / "model.safetensors") in caught.value.where
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_one_tensor_is_held_at_a_time_beside_the_module(tmp_path, monkeypatch):
    import weakref

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(10))

    weights = {key: torch.randn(t.shape) for key, t in Wide().state_dict().items()}
    found, model, alive, most = Checkpoint.open(write(tmp_path, weights, shards=3)), on_meta(Wide), [], 0
    get = Checkpoint.get

    def watched(self, key):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = get(self, key)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "get", watched)
    fill(model, found, dtype=torch.bfloat16)
    assert most == 0 and len(alive) == 10


# --- buffers that no checkpoint holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama with scaled frequencies", "chameleon", "emu3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_are_those_of_a_normal_build(tmp_path, family, dtype):
    torch.manual_seed(0)
    wanted = stack(family).eval()
    found = Checkpoint.open(write(tmp_path, {k: t.contiguous() for k, t in wanted.state_dict().items()}))
    model = on_meta(lambda: stack(family)).eval()
    fill(model, found, dtype=dtype)
    wanted.to(dtype)
    ours, theirs = dict(model.named_buffers()), dict(stack(family).named_buffers())
    assert ours.keys() == theirs.keys() and any("inv_freq" in name for name in ours)
    for name, buffer in theirs.items():
        if "inv_freq" in name:
            assert ours[name].dtype == torch.float32 and torch.equal(ours[name], buffer)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    if dtype == torch.float32:
        ids = torch.arange(8)[None]
        assert torch.equal(model(input_ids=ids).last_hidden_state, wanted(input_ids=ids).last_hidden_state)


def test_janus_positions_are_those_of_a_normal_build():
    import transformers as hf
    from transformers.models.janus.modeling_janus import JanusVisionModel

    def build():
        return JanusVisionModel(
            hf.JanusVisionConfig(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=16
            )
        )

    model = on_meta(build)
    materialise_buffers(model)
    for name, buffer in build().named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_a_buffer_that_nothing_computes_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("window", torch.ones(3), persistent=False)

    model = on_meta(lambda: nn.Sequential(Odd()))
    with pytest.raises(CheckpointError, match=r"0\.window"):
        materialise_buffers(model)
