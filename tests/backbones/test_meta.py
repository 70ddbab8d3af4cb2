"""Meta's release of Chameleon, and Anole's: converted and loaded, it computes what Meta's own arithmetic gives."""

import json
import os
import shutil

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

from tests.codecs import classic_vqgan
from weft.atomic import verify_folder
from weft.backbones import chameleon, meta, shards
from weft.backbones.checkpoint import Checkpoint, LoadOptions
from weft.errors import CheckpointError, UsageError
from weft.layout import ImageSpan, TextSpan, lay_out

VQ = classic_vqgan.SMALL
CODES = [f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(k))}Z" for k in range(16)]
CONTROL = ["<s>", "<pad>", "</s>", "<unk>", *CODES, "<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08707>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
NAMES = {token: id for id, token in enumerate([*CONTROL, *LETTERS])}
HEADS, WIDTH, MLP = 8, 8, 40
SIZES = {
    "7b": (1, {"n_kv_heads": None, "swin_norm": False, "rope_theta": 10000.0, "norm_eps": 1e-5}),
    "30b": (4, {"n_kv_heads": 4, "swin_norm": True, "rope_theta": 500.0, "norm_eps": 1e-4}),
}


def shard_states(count, params, dtype=torch.float32):
    """`consolidated.*.pth` with every key of the release; block norms are the same in all shards."""
    generator = torch.Generator().manual_seed(0)
    dim, keys = HEADS * WIDTH, (params["n_kv_heads"] or HEADS) * WIDTH
    randn = lambda *shape, std=1.0: (torch.randn(*shape, generator=generator) * std).to(dtype)  # noqa: E731
    norms = {
        f"layers.{i}.{name}.weight": 1 + randn(dim, std=0.1) for i in (0, 1) for name in ("attention_norm", "ffn_norm")
    }
    norms["norm.weight"] = 1 + randn(dim, std=0.1)
    states = []
    for _ in range(count):
        state = {"tok_embeddings.weight": randn(len(NAMES), dim // count), "rope.freqs": randn(WIDTH // 2)}
        for i in range(2):
            attention, mlp = f"layers.{i}.attention", f"layers.{i}.feed_forward"
            state |= {
                f"{attention}.wq.weight": randn(dim // count, dim, std=0.2),
                f"{attention}.wk.weight": randn(keys // count, dim, std=0.2),
                f"{attention}.wv.weight": randn(keys // count, dim, std=0.2),
                f"{attention}.wo.weight": randn(dim, dim // count, std=0.2),
                f"{attention}.q_normalization.weight": 1 + randn(WIDTH, std=0.5),
                f"{attention}.q_normalization.bias": randn(WIDTH, std=0.5),
                f"{attention}.k_normalization.weight": 1 + randn(WIDTH, std=0.5),
                f"{attention}.k_normalization.bias": randn(WIDTH, std=0.5),
                f"{mlp}.w1.weight": randn(MLP // count, dim, std=0.2),
                f"{mlp}.w2.weight": randn(dim, MLP // count, std=0.2),
                f"{mlp}.w3.weight": randn(MLP // count, dim, std=0.2),
            }
        state["output.weight"] = randn(len(NAMES) // count, dim, std=0.2)
        states.append(state | norms)
    return states


def tokenizer():
    """With the reserved tokens as ordinary ones, and no placeholder of a picture yet."""
    made = Tokenizer(models.BPE(NAMES, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return made


def release(root, size, dtype=torch.float32):
    count, params = SIZES[size]
    weights, tokens = root / "models" / size, root / "tokenizer"
    weights.mkdir(parents=True)
    tokens.mkdir()
    training = {"n_layers": 2, "n_heads": HEADS, "dim": HEADS * WIDTH, "qk_normalization": True, **params}
    (weights / "params.json").write_text(json.dumps({"model": training, "model_parallel_size": 8}))
    (weights / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": count}))
    for i, state in enumerate(shard_states(count, params, dtype)):
        torch.save(state, weights / ("consolidated.pth" if count == 1 else f"consolidated.{i:02d}.pth"))
    tokenizer().save(str(tokens / "text_tokenizer.json"))
    inner = {
        "double_z": False, "z_channels": VQ["latent_channels"], "resolution": VQ["resolution"], "in_channels": 3,
        "out_ch": 3, "ch": VQ["base_channels"], "ch_mult": VQ["channel_multiplier"], "attn_resolutions": [],
        "num_res_blocks": VQ["num_res_blocks"], "dropout": 0.0,
    }  # fmt: skip
    outer = {"embed_dim": VQ["embed_dim"], "n_embed": 16, "ddconfig": inner, "lossconfig": {}, "ckpt_path": "x"}
    (tokens / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": outer}}))
    torch.save({"state_dict": classic_vqgan.random_state(VQ), "global_step": 7}, tokens / "vqgan.ckpt")
    return root


def metas_logits(shards, params, ids):
    """(L,) Meta's ids -> (L, V), on as many processes as there are shards, played one after the other."""

    def norm(name, x):
        return F.rms_norm(x, x.shape[-1:], shards[0][f"{name}.weight"], params["norm_eps"])

    def rotated(x):
        """(heads, L, width): neighbours are the two parts of a complex number that turns with the position."""
        speeds = params["rope_theta"] ** -(torch.arange(0, WIDTH, 2) / WIDTH)
        turns = torch.polar(torch.ones(()), torch.arange(len(ids))[:, None] * speeds)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    def attention(layer, x):
        total = 0
        for shard in shards:
            part = lambda name: shard[f"layers.{layer}.attention.{name}"]  # noqa: B023, E731
            q, k, v = (
                F.linear(x, part(f"w{name}.weight")).unflatten(-1, (-1, WIDTH)).transpose(0, 1) for name in "qkv"
            )
            q = F.layer_norm(q, (WIDTH,), part("q_normalization.weight"), part("q_normalization.bias"))
            k = F.layer_norm(k, (WIDTH,), part("k_normalization.weight"), part("k_normalization.bias"))
            k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (rotated(k), v))
            read = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
            total = total + F.linear(read.transpose(0, 1).flatten(1), part("wo.weight"))
        return total

    def mlp(layer, x):
        total = 0
        for shard in shards:
            w1, w2, w3 = (shard[f"layers.{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
            total = total + F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
        return total

    h = torch.cat([F.embedding(ids, shard["tok_embeddings.weight"]) for shard in shards], -1)
    for layer in range(params["n_layers"]):
        for block, name in ((attention, "attention_norm"), (mlp, "ffn_norm")):
            name = f"layers.{layer}.{name}"
            h = h + (norm(name, block(layer, h)) if params["swin_norm"] else block(layer, norm(name, h)))
    return torch.cat([F.linear(norm("norm", h), shard["output.weight"]) for shard in shards], -1)


def load(folder, **options):
    return chameleon.load(Checkpoint.open(folder), "x", LoadOptions(**options))


@pytest.mark.parametrize("size", SIZES)
def test_a_converted_release_computes_what_metas_code_computes(tmp_path, size):
    count, params = SIZES[size]
    meta.convert(release(tmp_path / "release", size), tmp_path / "out")
    model = load(tmp_path / "out")

    codes = [3, 0, 15, 9]
    text = [NAMES["<s>"], *map(NAMES.get, "ab"), NAMES["<racm3:break>"]]
    theirs = torch.tensor([*text, *(NAMES[CODES[k]] for k in codes), NAMES["<eoss>"], NAMES["c"]])
    ours = torch.tensor([[*text, *(model.vocabulary + k for k in codes), NAMES["<eoss>"], NAMES["c"]]])
    layout = lay_out([[TextSpan(4), ImageSpan(2, 2), TextSpan(2)]])
    with torch.no_grad():
        hidden = model(model.embed(ours, layout), layout)[0]
        logits = metas_logits(shard_states(count, params), {**params, "n_layers": 2}, theirs)
    assert logits.std() > 0.5
    rows = [NAMES[token] for token in CODES]
    torch.testing.assert_close(model.image_logits(hidden), logits[:, rows], rtol=0, atol=1e-5)
    logits[:, rows] = -torch.inf
    torch.testing.assert_close(model.text_logits(hidden), logits, rtol=0, atol=1e-5)


def test_its_pictures_are_those_of_the_original_codec(tmp_path):
    meta.convert(release(tmp_path / "release", "7b"), tmp_path / "out")
    codec, state = load(tmp_path / "out").codec, classic_vqgan.random_state(VQ)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = codec.encode(pixels)
    assert torch.equal(codes, classic_vqgan.encode(state, pixels, VQ))
    torch.testing.assert_close(
        codec.decode(codes), classic_vqgan.decode(state, codes, VQ).clamp(-1, 1), rtol=0, atol=2e-5
    )


def test_one_token_is_renamed_as_transformers_wants_it(tmp_path):
    meta.convert(release(tmp_path / "release", "7b"), tmp_path / "out")
    names = json.loads((tmp_path / "out" / "config.json").read_text())["vocabulary_map"]
    assert names == {("<image>" if token == "<reserved08707>" else token): id for token, id in NAMES.items()}
    model = load(tmp_path / "out")
    assert model.tokenizer.token_to_id("<image>") == NAMES["<reserved08707>"]
    assert model.tokens.others == (NAMES["<reserved08707>"],)
    assert model.detokenize(model.tokenize("a <image> b")) == "a <image> b"


def test_transformers_itself_reads_what_was_written(tmp_path):
    from transformers import ChameleonForConditionalGeneration

    meta.convert(release(tmp_path / "release", "30b"), tmp_path / "out")
    model, report = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(key.startswith("model.vqmodel.decoder.") for key in report["unexpected_keys"])
    ids = torch.arange(30, 40)
    with torch.no_grad():
        found = model.lm_head(model.model(input_ids=ids[None]).last_hidden_state)[0]
    count, params = SIZES["30b"]
    wanted = metas_logits(shard_states(count, params), {**params, "n_layers": 2}, ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    source = release(tmp_path / "release", "30b", torch.bfloat16)
    meta.convert(source, tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD", 100_000)
    meta.convert(source, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 4 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = (Checkpoint.open(tmp_path / name) for name in ("one", "many"))
    assert one.tensors.keys() == many.tensors.keys() and one.fingerprint == many.fingerprint
    held = [sum(info.bytes for info in many.tensors.values() if info.file == file) for file in files]
    largest = max(info.bytes for info in many.tensors.values())
    assert max(held) <= max(100_000, largest)
    verify_folder(tmp_path / "many")


def test_tensors_keep_their_dtype(tmp_path):
    meta.convert(release(tmp_path / "release", "30b", torch.bfloat16), tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert found.config["dtype"] == "bfloat16"
    for key, info in found.tensors.items():
        assert info.dtype == (torch.float32 if "vqmodel" in key else torch.bfloat16), key


def test_one_model_of_several_is_named(tmp_path):
    source = release(tmp_path / "release", "7b")
    shutil.copytree(source / "models" / "7b", source / "models" / "30b")
    with pytest.raises(CheckpointError, match="several models") as error:
        meta.convert(source, tmp_path / "out")
    assert str(source / "models" / "7b") in error.value.fix
    meta.convert(source / "models" / "7b", tmp_path / "out")
    assert load(tmp_path / "out").codes == 16


# --- what cannot be converted -----------------------------------------------------------------------------------------


def refused(source, out, match, error=CheckpointError):
    """Nothing is left behind."""
    with pytest.raises(error, match=match) as caught:
        meta.convert(source, out)
    assert not out.exists() and sorted(path.name for path in out.parent.iterdir()) == ["release"]
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    "name",
    ["models/30b/params.json", "models/30b/consolidated.02.pth", "models/30b/consolidated.03.pth", "tokenizer",
     "tokenizer/text_tokenizer.json", "tokenizer/vqgan.yaml", "tokenizer/vqgan.ckpt"],
)  # fmt: skip
def test_a_missing_file_is_named(tmp_path, name):
    source = release(tmp_path / "release", "30b")
    path = source / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(source, tmp_path / "out", path.name)


@pytest.mark.parametrize(
    ("key", "shape", "match"),
    [
        ("layers.1.attention.wo.weight", None, "missing: layers.1.attention.wo.weight"),
        ("layers.1.attention.bias", (3,), "unexpected: layers.1.attention.bias"),
        ("layers.2.ffn_norm.weight", (64,), "unexpected: layers.2.ffn_norm.weight"),
        ("layers.0.attention.wq.weight", (63, 64), "has shape .63, 64., which does not fit 8 heads"),
        ("layers.0.attention.wq.weight", (64,), "of another shape: .*q_proj.weight"),
        (
            "layers.0.feed_forward.w2.weight",
            (64, 39),
            "of another shape: .*down_proj.weight with .64, 39. for .64, 40.",
        ),
        ("tok_embeddings.weight", (12, 64), "beyond vocab_size 12"),
        ("tok_embeddings.weight", (12,), "does not fit"),
        ("layers.0.feed_forward.w1.weight", (40,), "of another shape: .*gate_proj.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, key, shape, match):
    source = release(tmp_path / "release", "7b")
    path = source / "models" / "7b" / "consolidated.pth"
    state = torch.load(path, weights_only=True)
    if shape is None:
        del state[key]
    else:
        state[key] = torch.zeros(shape)
    torch.save(state, path)
    refused(source, tmp_path / "out", match)


def test_shards_that_differ_are_named(tmp_path):
    source = release(tmp_path / "release", "30b")
    path = source / "models" / "30b" / "consolidated.02.pth"
    torch.save(torch.load(path, weights_only=True) | {"layers.0.attention.wv.weight": torch.zeros(4, 64)}, path)
    refused(source, tmp_path / "out", "unlike in other shards: layers.0.attention.wv.weight")


@pytest.mark.parametrize("key", ["decoder.up.1.upsample.conv.weight", "quant_conv.bias", "side.weight"])
def test_a_codec_that_does_not_fit_is_named(tmp_path, key):
    source = release(tmp_path / "release", "7b")
    path = source / "tokenizer" / "vqgan.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    if state.pop(key, None) is None:
        state[key] = torch.zeros(3)
    torch.save({"state_dict": state}, path)
    refused(source, tmp_path / "out", key)


def test_losses_of_the_codecs_training_are_left_out(tmp_path):
    source = release(tmp_path / "release", "7b")
    path = source / "tokenizer" / "vqgan.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"state_dict": state | {"loss.discriminator.main.0.weight": torch.zeros(3)}}, path)
    meta.convert(source, tmp_path / "out")
    assert not any("loss" in key for key in Checkpoint.open(tmp_path / "out").tensors)


class Harmful:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["models/7b/consolidated.pth", "tokenizer/vqgan.ckpt"])
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path, name):
    source = release(tmp_path / "release", "7b")
    torch.save({"state_dict": Harmful(tmp_path / "made")}, source / name)
    refused(source, tmp_path / "out", "cannot be read as tensors alone")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not an archive at all"])
def test_a_damaged_file_is_named(tmp_path, content):
    source = release(tmp_path / "release", "7b")
    (source / "models" / "7b" / "consolidated.pth").write_bytes(content)
    refused(source, tmp_path / "out", "cannot be read")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("models/7b/params.json", "{}", "no number n_heads"),
        ("models/7b/params.json", "{", "params.json cannot be read"),
        ("tokenizer/vqgan.yaml", "model: {params: {embed_dim: 8}}", "does not describe a VQGAN"),
        ("tokenizer/vqgan.yaml", "[", "does not describe a VQGAN"),
        ("tokenizer/text_tokenizer.json", "{}", "no 'model' in it"),
        ("tokenizer/text_tokenizer.json", '{"model": {"vocab": {"a": 0}}}', "no '<reserved08707>' in it"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, name, text, match):
    source = release(tmp_path / "release", "7b")
    (source / name).write_text(text)
    refused(source, tmp_path / "out", match)


def test_an_existing_folder_is_not_written_over(tmp_path):
    source = release(tmp_path / "release", "7b")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    for out in (tmp_path / "out", source):
        with pytest.raises(UsageError, match="not empty"):
            meta.convert(source, out)
    assert (tmp_path / "out" / "mine").read_text() == "kept" and (source / "tokenizer").is_dir()
