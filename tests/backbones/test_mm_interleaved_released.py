"""MM-Interleaved's files: the release, in its own names and sizes, converted and loaded, or refused by name.

Checkpoints are small and random, with the keys, shards and dtypes of the released one.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from weft.atomic import verify_folder
from weft.backbones import catalogue, emu2, family_of, load_backbone, mm_interleaved, save_backbone, shards
from weft.backbones.base import DecodingOptions
from weft.backbones.checkpoint import Checkpoint, LoadOptions
from weft.backbones.mm_interleaved import MMInterleavedBackbone, files
from weft.backbones.mm_interleaved.config import MMInterleavedConfig
from weft.backbones.mm_interleaved.released import key_map, released_key, tables
from weft.backbones.tokenizer import byte_tokenizer
from weft.errors import CheckpointError, UsageError
from weft.layout import FEATURE, layout_of_tokens
from weft.synchronizer.sight import see

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "mm_interleaved_loss"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tensors in {GOLDEN}")
NAMES = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def on_meta(config):
    with torch.device("meta"):
        return MMInterleavedBackbone(config, byte_tokenizer(), "meta")


def released_shapes(model):
    """By released name, of all that a release holds."""
    state = model.state_dict()
    shapes = {released: tuple(state[ours].shape) for released, ours in key_map(model).items()}
    return shapes | {released: tuple(make().shape) for released, make in tables(model).items()}


def write_release(folder, tensors, config=None, shards=2):
    """As the makers publish it; with a config.json of ours for other sizes than theirs."""
    folder.mkdir(parents=True)
    keys = list(tensors)
    parts = [keys[i * len(keys) // shards : (i + 1) * len(keys) // shards] for i in range(shards)]
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save({key: tensors[key] for key in part}, folder / name)
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / files.INDEX).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": index}))
    if config is not None:
        values = {"model_type": "mm_interleaved", **config.model_dump(mode="json")}
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def released_tensors(model, dtype=torch.float32):
    state = model.state_dict()
    tensors = {released: state[ours] for released, ours in key_map(model).items()}
    tensors |= {released: make() for released, make in tables(model).items()}
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def model():
    return mm_interleaved.nano()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A release with its tokenizer beside it, and what it was converted to."""
    root = tmp_path_factory.mktemp("written")
    write_release(root / "release", released_tensors(model), model.config)
    model.tokenizer.save(str(root / "release" / "tokenizer.json"))
    mm_interleaved.convert(root / "release", root / "out")
    return root


@pytest.fixture
def release(written, tmp_path):
    return Path(shutil.copytree(written / "release", tmp_path / "release"))


@pytest.fixture
def converted(written, tmp_path):
    return Path(shutil.copytree(written / "out", tmp_path / "out"))


def load(folder, **options):
    return mm_interleaved.load(Checkpoint.open(folder), "x", LoadOptions(**options))


# --- the released 13B model, without memory ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    return on_meta(files.shipped("full"))


@pytest.fixture(scope="module")
def full(large):
    return released_shapes(large)


def test_the_release_has_exactly_these_2659_tensors(full):
    assert len(full) == 2659
    counts = Counter(key.partition(".")[0] for key in full)
    # the published index has 309,332 bytes; only with these names it has
    weight_map = dict.fromkeys(sorted(full), NAMES[0])
    index = json.dumps({"metadata": {"total_size": 29_825_731_648}, "weight_map": weight_map}, indent=2) + "\n"
    assert len(index) == 309_332
    assert counts["mm_decoder"] == 40 * 9 + 10 * 15 + 2 and counts["text_decoder"] == 4


PARTS = {
    "mm_decoder.layers.36.llama_cross_attn.": (15, 36.30),
    "visual_tokenizer.perceiver_resampler.": (327, 101.65),
    "visual_tokenizer.encoder.vision_model.": (591, 326.41),
    "visual_tokenizer.encoder.vision_model.adapter_": (201, 23.23),
    "image_decoder.perceiver_resampler.": (29, 23.17),
    "image_decoder.decoder.unet.": (686, 865.9),
    "image_decoder.decoder.vae.": (248, 83.65),
    "image_decoder.decoder.mmfs_module.": (247, 101.55),
    "image_decoder.decoder.mmfs_module.mmfs_down_blocks.0.": (19, 3.168),
    "image_decoder.decoder.mmfs_module.mmfs_down_blocks.6.": (19, 5.692),
    "image_decoder.decoder.mmfs_module.mmfs_mid_block.": (19, 11.968),
    "": (2659, 14_913),
}
"""Prefix -> tensors, and millions of numbers in them."""


@pytest.mark.parametrize("prefix", PARTS)
def test_every_part_has_its_published_size(full, prefix):
    tensors, millions = PARTS[prefix]
    shapes = [shape for key, shape in full.items() if key.startswith(prefix)]
    assert len(shapes) == tensors
    digits = len(str(millions).partition(".")[2])
    assert round(sum(torch.Size(shape).numel() for shape in shapes) / 1e6, digits) == millions


SHAPES = {
    "soi_token": (1, 5120),
    "context_feat_proj.bias": (5120,),
    "mm_decoder.embed_tokens.weight": (32002, 5120),
    "mm_decoder.layers.39.mlp.down_proj.weight": (5120, 13824),
    "mm_decoder.layers.4.llama_cross_attn.gate": (1,),
    "mm_decoder.layers.4.llama_cross_attn.norm1.weight": (5120,),
    "mm_decoder.layers.4.llama_cross_attn.norm2.weight": (1024,),
    "mm_decoder.layers.4.llama_cross_attn.attn.dynamic_offset_mask.weight": (5120, 5120),
    "mm_decoder.layers.4.llama_cross_attn.attn.sampling_offsets.weight": (256, 5120),
    "mm_decoder.layers.4.llama_cross_attn.attn.attention_weights.weight": (432, 5120),
    "mm_decoder.layers.4.llama_cross_attn.attn.output_proj.weight": (5120, 1024),
    "mm_decoder.layers.4.llama_cross_attn.attn.query_relpos.weight": (50, 5120),
    "mm_decoder.layers.4.llama_cross_attn.attn.ignore_token": (1, 1, 1, 1024),
    "text_decoder.head.bias": (32002,),
    "text_decoder.head_new.weight": (2, 5120),
    "visual_tokenizer.clip_std": (1, 3, 1, 1),
    "visual_tokenizer.pos_embed": (257, 1024),
    "visual_tokenizer.proj.weight": (5120, 768),
    "visual_tokenizer.perceiver_resampler.queries": (1, 64, 768),
    "visual_tokenizer.perceiver_resampler.blip2qformer.layernorm.weight": (768,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.1.attention.attention.k_norm.bias": (64,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.1.attention.output.dense.weight": (768, 768),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.1.attention.output.LayerNorm.bias": (768,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.2.crossattention.output.dense.bias": (768,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.2.crossattention.output.LayerNorm.bias": (768,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.1.intermediate_query.dense.weight": (3072, 768),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.1.output_query.LayerNorm.weight": (768,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.10.crossattention.attention.key.weight": (
        768, 1024,
    ),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.11.output_query.dense.weight": (768, 3072),
    "visual_tokenizer.encoder.vision_model.embeddings.position_ids": (1, 257),
    "visual_tokenizer.encoder.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "visual_tokenizer.encoder.vision_model.pre_layrnorm.bias": (1024,),
    "visual_tokenizer.encoder.vision_model.adapter_level_embed": (3, 1024),
    "visual_tokenizer.encoder.vision_model.encoder.layers.23.self_attn.out_proj.weight": (1024, 1024),
    "visual_tokenizer.encoder.vision_model.adapter_spm.conv4.0.weight": (256, 256, 3, 3),
    "visual_tokenizer.encoder.vision_model.adapter_interactions.0.extractor.ffn.dwconv.dwconv.bias": (256,),
    "visual_tokenizer.encoder.vision_model.adapter_interactions.3.injector.attn.sampling_offsets.weight": (384, 1024),
    "visual_tokenizer.encoder.vision_model.adapter_interactions.3.extra_extractors.1.ffn.dwconv.dwconv.weight": (
        256, 1, 3, 3,
    ),
    "visual_tokenizer.encoder.vision_model.adapter_up.weight": (1024, 1024, 2, 2),
    "image_decoder.neg_prompt_embeds": (1, 77, 1024),
    "image_decoder.perceiver_resampler.blip2qformer.encoder.layer.0.crossattention.attention.value.weight": (
        1024, 5120,
    ),
    "image_decoder.decoder.unet.conv_in.weight": (320, 4, 3, 3),
    "image_decoder.decoder.vae.encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
    "image_decoder.decoder.mmfs_module.mmfs_down_blocks.11.mmfs.query_relpos.weight": (10, 1280),
    "image_decoder.decoder.mmfs_module.mmfs_down_blocks.0.mmfs.attention_weights.weight": (576, 320),
    "image_decoder.decoder.mmfs_module.mmfs_mid_block.pos_embed": (4096, 1280),
}  # fmt: skip


@pytest.mark.parametrize("key", SHAPES)
def test_released_tensors_have_their_published_shapes(full, key):
    assert full[key] == SHAPES[key]


def test_no_other_name_is_invented():
    with pytest.raises(KeyError):
        released_key("pixels.unet.conv_in.weight")


# --- the shipped configurations ---------------------------------------------------------------------------------------


def test_the_full_configuration_is_the_default_and_spells_out_stable_diffusion():
    import diffusers

    full, default = files.shipped("full"), MMInterleavedConfig()
    parts = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    assert full.model_copy(update={part: getattr(default, part) for part in parts}) == default
    for part, cls in parts.items():
        with torch.device("meta"):
            spelled, ours = (cls.from_config(getattr(config, part)).config for config in (full, default))
        assert plain(spelled) == plain(ours)
    assert json.loads((files.CONFIGS / "full.json").read_text()).keys() == {"model_type", *type(full).model_fields}


def plain(config):
    """Of what diffusers resolved, what matters to the model."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


def test_the_small_configuration_is_a_third_of_it():
    config = files.shipped("small")
    small = released_shapes(on_meta(config))
    assert 4.9e9 < sum(torch.Size(shape).numel() for shape in small.values()) < 5.1e9
    assert config.canvas == 256 and config.grid[0] * config.grid[1] == 32


def test_its_row_in_the_catalogue(large):
    known = catalogue.by_name("OpenGVLab/MM-Interleaved")
    assert known.parameters == pytest.approx(sum(t.numel() for t in large.state_dict().values()), rel=1e-4)
    linears = [part for part in large.decoder.modules() if isinstance(part, torch.nn.Linear)]
    assert catalogue.linear_parameters(known.shape) == sum(part.weight.numel() for part in linears)
    assert (known.shape.vocabulary, known.shape.hidden) == tuple(large.table.weight.shape)
    assert (known.context, known.elements) == (large.context_length, large.form.patches)
    assert known.extra == large.form.length - large.form.patches


# --- conversion -------------------------------------------------------------------------------------------------------


def outputs(model):
    """Of every part: logits behind a picture, errors of painting, and a picture that is painted."""
    tokens, vectors = model.tokens, model.form.patches
    picture = [tokens.begin_image, *[FEATURE] * vectors]
    ids = torch.tensor([[tokens.begin, 60, *picture, 61, 62, *picture, 63]])
    marks = ids.masked_fill(ids == FEATURE, model.config.tokens.placeholder)
    layout = layout_of_tokens(
        marks, begin_image=tokens.begin_image, grid=(model.form.rows, model.form.cols), pad=tokens.pad
    )
    draw = torch.Generator().manual_seed(3)
    side, canvas = model.config.eye.vision.side, model.canvas
    seen, painted = (torch.randint(256, (2, 3, n, n), generator=draw, dtype=torch.uint8) for n in (side, canvas))
    with torch.no_grad():
        layout, features, looks = see(model.synchronizer, seen, ids, layout, tokens.begin)
        hidden = model(model.embed(ids, layout, features), layout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            errors = model.painting_errors(hidden, ids, layout, looks, painted)
    before = replace(looks, maps=tuple(maps[:1] for maps in looks.maps), tokens=None)
    context = hidden[0, : ids[0].tolist().index(tokens.begin_image) + 1]
    options = DecodingOptions(seed=1, steps=2, guidance=2.0)
    picture = model.paint(context, before, options)
    logits = model.text_logits(hidden)[..., : tokens.begin_image + 1]  # a placeholder's may be -inf
    return {"logits": logits, "errors": errors, "picture": picture.tobytes()}


def same(found, wanted):
    for key, value in wanted.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


def test_a_converted_release_is_the_model_it_was_taken_from(model, converted):
    verify_folder(converted)
    found = load(converted)
    assert found.config == model.config
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    wanted = outputs(model)
    assert wanted["logits"].std() > 0.5 and len(set(wanted["picture"])) > 20 and (wanted["errors"] > 0).all()
    same(outputs(found), wanted)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    assert found.tokenizer.to_str() == model.tokenizer.to_str()


def test_it_is_found_in_the_makers_repository_and_told_from_others(model, release, tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(release, root / "mm_interleaved_pretrain")
    (root / "assets").mkdir()
    assert files.is_release(root) and files.is_release(release)
    mm_interleaved.convert(root, tmp_path / "out")
    assert load(tmp_path / "out").config == model.config
    one = tmp_path / "one.bin"
    torch.save(released_tensors(model), one)
    assert files.is_release(one)
    torch.save(emu2.nano().state_dict(), one)
    assert not files.is_release(one)


def test_tensors_keep_their_dtype_and_the_autoencoder_is_held_in_float32(model, tmp_path):
    tensors = released_tensors(model, torch.bfloat16)
    release = write_release(tmp_path / "release", tensors, model.config)
    model.tokenizer.save(str(release / "tokenizer.json"))
    mm_interleaved.convert(release, tmp_path / "out")
    stored = Checkpoint.open(tmp_path / "out").tensors
    assert {info.dtype for info in stored.values()} == {torch.bfloat16}
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    wide, narrow = load(tmp_path / "out").state_dict(), half.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(wide[key], tensor.bfloat16().float()), key
        assert narrow[key].dtype == (torch.float32 if key.startswith("vae.") else torch.bfloat16), key
    assert outputs(half)["logits"].isfinite().all()


def test_a_wider_autoencoder_is_not_rounded(model, tmp_path):
    """Its tensors may be stored in float32 beside others in half precision."""
    (tmp_path / "out").mkdir()
    mm_interleaved.save(model, tmp_path / "out")
    half = load(tmp_path / "out", dtype=torch.float16)
    for key, tensor in model.vae.state_dict().items():
        assert torch.equal(half.vae.state_dict()[key], tensor), key


def test_what_was_saved_is_loaded_bit_by_bit(model, tmp_path, monkeypatch):
    for name, size in (("one", shards.SHARD), ("many", 100_000)):
        monkeypatch.setattr(shards, "SHARD", size)
        (tmp_path / name).mkdir()
        save_backbone(model, tmp_path / name)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (load_backbone(str(tmp_path / name)) for name in ("one", "many"))
    assert one.fingerprint == many.fingerprint and one.config == model.config
    for state in (one.state_dict(), many.state_dict()):
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert family_of(tmp_path / "one") == "mm_interleaved"
    found = catalogue.examine(tmp_path / "one", "mm_interleaved")
    assert found.pixels and found.layout == "Weft's own" and found.context == model.context_length
    assert (found.shape.hidden, found.shape.vocabulary) == (model.config.llm.width, model.vocabulary)


def test_memory_holds_one_written_file(model, release, tmp_path, monkeypatch):
    """Tensors are copied only when the file they go into is written."""
    monkeypatch.setattr(shards, "SHARD", 100_000)
    sizes, write = [], safetensors.torch.save_file

    def save(tensors, path, metadata):
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    mm_interleaved.convert(release, tmp_path / "out")
    assert len(sizes) > 3 and max(sizes) <= 100_000
    assert sum(sizes) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_tensors_that_share_memory_are_written_apart(model, tmp_path):
    tensors = released_tensors(model)
    layer = "mm_decoder.layers.1.self_attn"
    tensors[f"{layer}.k_proj.weight"] = tensors[f"{layer}.q_proj.weight"]
    tensors[f"{layer}.o_proj.weight"] = tensors[f"{layer}.o_proj.weight"].T
    mm_interleaved.convert(write_release(tmp_path / "release", tensors, model.config), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("q_proj", "k_proj", "o_proj"):
        assert torch.equal(written[f"decoder.layers.1.self_attn.{name}.weight"], tensors[f"{layer}.{name}.weight"])


def golden_config():
    """The sizes of the golden folder; what of it is no size is checked in test_mm_interleaved.py."""
    values = json.loads((GOLDEN / "config.json").read_text())
    llm, special, vis, dec = (values[part] for part in ("llm", "special", "vis", "dec"))

    def resampler(part):
        return {
            "queries": part["num_queries"], "width": part["hidden_size"], "source_width": part["encoder_hidden_size"],
            "layers": part["num_hidden_layers"], "cross_every": part["cross_attention_frequency"],
            "heads": part["num_attention_heads"], "mlp": part["intermediate_size"],
            "qk_norm": part["qk_normalization"],
        }  # fmt: skip

    width, features, side = llm["hidden_size"], values["image_embed_dim"], dec["unet"]["sample_size"]
    return MMInterleavedConfig.model_validate({
        "llm": {
            "vocabulary": values["txt_vocab_size"], "width": width, "mlp": llm["intermediate_size"],
            "layers": llm["num_hidden_layers"], "heads": llm["num_attention_heads"],
        },
        "tokens": {
            "pad": special["pad_token_id"], "begin_image": special["soi_token_id"],
            "placeholder": special["image_token_id"],
        },
        "eye": {
            "vision": {
                "side": vis["image_size"], "patch": vis["patch_size"], "width": vis["hidden_size"],
                "heads": vis["num_attention_heads"], "mlp": vis["intermediate_size"], "stem": vis["conv_inplane"],
            },
            "resampler": resampler(vis["perceiver"]),
            "width": width,
        },
        "decoder_sync": {
            "every": values["cross_attention_frequency"], "feature_width": features, "value_width": features,
            "sides": values["spatial_shapes"], "without_images": "bias",
        },
        "condition": resampler(dec["perceiver"]),
        "unet": dec["unet"],
        "unet_sync": {
            "side": side, "feature_width": features, "value_width": dec["block"]["attn_dim"],
            "heads": dec["block"]["num_heads"], "without_images": "bias",
        },
        "vae": {
            **dec["vae"], "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4
        },
    })  # fmt: skip


@needs_golden
def test_tensors_of_the_released_code_convert_completely(tmp_path):
    weights = load_file(GOLDEN / "weights.safetensors")
    config = golden_config()
    release = write_release(tmp_path / "release", weights, config)
    mm_interleaved.convert(release, tmp_path / "out")
    model = on_meta(config)
    assert released_shapes(model) == {key: tuple(tensor.shape) for key, tensor in weights.items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(weights) == 1866 and len(written) == 1866 - 17
    for released, ours in key_map(model).items():
        assert torch.equal(written[ours], weights[released]), released


# --- configuration and tokenizer --------------------------------------------------------------------------------------


def test_without_a_tokenizer_it_is_converted_and_loading_says_what_to_do(release, tmp_path):
    (release / "tokenizer.json").unlink()
    mm_interleaved.convert(release, tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no tokenizer") as error:
        load(tmp_path / "out")
    assert "tokenizer.model" in error.value.fix and error.value.where == str(tmp_path / "out")


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    trainer = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = [f"the {a} cat sat on the {b} mat: {a}{b}" for a in ("red", "blue", "odd") for b in ("old", "new", "wet")]
    trainer.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 4), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return folder, trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_llamas_own_tokenizer_gets_the_two_tokens_of_pictures(model, sentencepiece_folder, tmp_path):
    folder, theirs = sentencepiece_folder
    pieces = len(theirs)
    llm = model.config.llm.model_copy(update={"vocabulary": pieces + 2})
    ids = {"pad": pieces - 1, "begin_image": pieces, "placeholder": pieces + 1}
    tokens = model.config.tokens.model_copy(update=ids)
    config = model.config.model_copy(update={"llm": llm, "tokens": tokens})
    other = MMInterleavedBackbone(config, byte_tokenizer(), "other")
    release = write_release(tmp_path / "release", released_tensors(other), config)
    shutil.copy(folder / "tokenizer.model", release)
    mm_interleaved.convert(release, tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.tokenizer.token_to_id("<|beginofimage|>") == pieces == found.tokens.begin_image
    assert found.tokenizer.token_to_id("<|image|>") == pieces + 1
    for text in ("the odd cat", "a  wet ü mat 😀:", "<|image|> is text here"):
        assert found.tokenize(text) == theirs.encode(text)
    assert found.detokenize([1, *theirs.encode("the odd cat"), pieces, pieces + 1, 2]) == "the odd cat"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda values: values["tokens"].update(begin=3), "<s> is token 1 of the tokenizer and 3 of the model"),
        (
            lambda values: (
                values["llm"].update(vocabulary=300), values["tokens"].update(begin_image=298, placeholder=299)
            ),
            r"<\|beginofimage\|> is token 260 of the tokenizer and 298 of the model",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_model_is_refused(release, tmp_path, change, match):
    edit(release / "config.json", change)
    refused(release, tmp_path / "out", match)


def test_a_tokenizer_with_more_tokens_is_refused(model, release, tmp_path):
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.add_tokens(["more"])
    tokenizer.save(str(release / "tokenizer.json"))
    refused(release, tmp_path / "out", "the tokenizer has 263 tokens, the model 262")


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda values: values.update(model_type="llama"), "type 'llama', not 'mm_interleaved'"),
        (lambda values: values.pop("model_type"), "type None, not 'mm_interleaved'"),
        (lambda values: values["llm"].update(width="wide"), "llm.width: "),
        (lambda values: values.update(colour=3), "colour: "),
        (lambda values: values["eye"].update(width=31), "eye.width 31 is not llm.width 32"),
        (lambda values: values["unet"].pop("cross_attention_dim"), "cross_attention_dim"),
        (lambda values: values["unet"].update(down_block_types=["Sideways"] * 2), "no model that can be built"),
        (lambda values: values["llm"].update(heads=3), "no model that can be built"),
        (lambda values: values["llm"].update(layers=3), r"missing: mm_decoder.layers.2\S+, .* more"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(release, tmp_path, change, match):
    edit(release / "config.json", change)
    refused(release, tmp_path / "out", match)


def test_without_a_configuration_the_released_sizes_are_expected(release, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (release / name).unlink()
    error = refused(release, tmp_path / "out", r"missing: .*of another shape: .* for \(32002, 5120\)")
    assert "put its config.json beside them" in error.fix


def test_a_converted_folder_without_its_configuration_is_named(converted):
    (converted / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(converted)


# --- what cannot be converted -----------------------------------------------------------------------------------------


def refused(source, out, match, error=CheckpointError):
    """Nothing is left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        mm_interleaved.convert(source, out)
    assert not out.exists() and sorted(out.parent.iterdir()) == before
    assert caught.value.where and caught.value.fix
    return caught.value


GATE = "mm_decoder.layers.0.llama_cross_attn.gate"


@pytest.mark.parametrize(
    ("key", "tensor", "match"),
    [
        (GATE, None, f"1 missing: {GATE}"),
        ("visual_tokenizer.pos_embed", None, "1 missing: visual_tokenizer.pos_embed"),
        ("mm_decoder.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8), "1 unexpected: .*inv_freq"),
        ("decoder.norm.weight", torch.ones(32), "1 unexpected: decoder.norm.weight"),
        (GATE, torch.ones(2), rf"1 of another shape: {GATE} with \(2,\) for \(1,\)"),
        (GATE, torch.ones(1, dtype=torch.int8), f"1 of another kind: {GATE} of torch.int8"),
        ("visual_tokenizer.pos_embed", torch.full((17, 16), 1.5), r"pos_embed differs by 2\.5"),
        ("visual_tokenizer.clip_mean", torch.full((1, 3, 1, 1), 0.45), "clip_mean differs by 0.04"),
        ("visual_tokenizer.encoder.vision_model.embeddings.position_ids", torch.zeros(1, 17).long(), "differs by 16"),
        ("image_decoder.decoder.mmfs_module.mmfs_mid_block.pos_embed", torch.full((256, 16), torch.nan), "by nan"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, tmp_path, key, tensor, match):
    tensors = released_tensors(model)
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    refused(write_release(tmp_path / "release", tensors, model.config), tmp_path / "out", match)


def test_a_null_slot_that_holds_something_is_kept(model, tmp_path):
    """In the release it is zero; where it is not, what is computed with it stays."""
    key = "mm_decoder.layers.0.llama_cross_attn.attn.ignore_token"
    tensors = released_tensors(model)
    tensors[key] = torch.full_like(tensors[key], 0.5)
    release = write_release(tmp_path / "release", tensors, model.config)
    model.tokenizer.save(str(release / "tokenizer.json"))
    mm_interleaved.convert(release, tmp_path / "out")
    found = load(tmp_path / "out")
    assert torch.equal(found.decoder_sync.branches["0"].mmfs.ignore_token, tensors[key])
    assert not torch.allclose(outputs(found)["logits"], outputs(model)["logits"], atol=1e-3)


class Harmful:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def truncate(release):
    path = release / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1000])


def run_code(release):
    torch.save({"soi_token": Harmful(release / "made")}, release / NAMES[0])


def name_outside(release):
    edit(release / files.INDEX, lambda values: values["weight_map"].update(soi_token="../elsewhere.bin"))


def lose_a_tensor(release):
    path = release / NAMES[0]
    tensors = torch.load(path, weights_only=True)
    del tensors["soi_token"]
    torch.save(tensors, path)


SPOILT = {
    "a truncated shard": (truncate, f"{NAMES[1]}|cannot be read as tensors alone"),
    "a pickle that runs code": (run_code, "cannot be read as tensors alone"),
    "a missing shard": (lambda release: (release / NAMES[1]).unlink(), "this shard, and it is missing"),
    "a missing index": (lambda release: (release / files.INDEX).unlink(), "2 pickled files and no index"),
    "an index without files": (lambda release: (release / files.INDEX).write_text("{}"), "no weight_map"),
    "a damaged index": (lambda release: (release / files.INDEX).write_text("{"), "index.json cannot be read"),
    "an index that leads outside": (name_outside, "names ../elsewhere.bin, which is not in its folder"),
    "a shard without a tensor that the index names": (lose_a_tensor, "the index disagree about soi_token"),
    "no weights at all": (lambda release: [path.unlink() for path in release.glob("pytorch*")], "no pickled file"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_release_is_named(release, tmp_path, how):
    spoil, match = SPOILT[how]
    spoil(release)
    refused(release, tmp_path / "out", match)
    assert not (release / "made").exists()


def test_an_existing_folder_is_not_written_over(release, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    for out in (tmp_path / "out", release):
        with pytest.raises(UsageError, match="not empty"):
            mm_interleaved.convert(release, out)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_write_that_fails_leaves_nothing(release, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_made", full)
    with pytest.raises(OSError, match="No space"):
        mm_interleaved.convert(release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "of another shape", "cut off"])
def test_a_damaged_converted_folder_is_named_before_a_tensor_is_read(converted, wrong, monkeypatch):
    path = converted / "model.safetensors"
    tensors = load_file(path)
    if wrong == "missing":
        del tensors["soi"]
    elif wrong == "unexpected":
        tensors["eye.positions"] = torch.zeros(16, 16)
    elif wrong == "of another shape":
        tensors["soi"] = torch.zeros(1, 31)
    save_file(tensors, path)
    if wrong == "cut off":
        path.write_bytes(path.read_bytes()[:-8])
    monkeypatch.setattr(Checkpoint, "get", lambda self, key: pytest.fail(f"{key} was read"))
    with pytest.raises(CheckpointError, match=wrong):
        load(converted)
