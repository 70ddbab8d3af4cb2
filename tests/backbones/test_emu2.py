"""Emu2 against released tensors, every released layout against a computation without our loader, and its pictures."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from weft.backbones import emu2, emu2_layouts, emu2_tokens, shards
from weft.backbones.base import DecodeStep, DecodingOptions, encode_document
from weft.backbones.checkpoint import Checkpoint, LoadOptions
from weft.codecs.diffusion import DiffusionConfig, DiffusionDecoder
from weft.codecs.eva import EvaConfig, EvaTower
from weft.document import Document, Text, assistant, user
from weft.document import Image as Picture
from weft.errors import CheckpointError, UsageError
from weft.layout import FEATURE, ImageSpan, TextSpan, lay_out

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "emu2"
released = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the tensors of the released code are not at hand")


@pytest.fixture(scope="module")
def nano():
    return emu2.nano()


def picture(seed=0, size=(40, 30)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def plain_tokenizer(pieces=40):
    """LLaMA's tokenizer before Emu2's tokens are added: here a few pieces without meaning."""
    names = ["<unk>", "<s>", "</s>", "▁", ":", *(f"piece{i}" for i in range(pieces - 5))]
    return Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", fuse_unk=True))


def lengths(mask):
    return lay_out([[TextSpan(int(row.sum()))] for row in mask], length=mask.shape[1], left=True)


# --- released tensors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Released code's tiny model through our loader: its one-file layout, and the hub's way to write its sizes."""
    folder = tmp_path_factory.mktemp("golden")
    sizes = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**sizes["llm"], "vision_config": sizes["vision"]}))
    shutil.copy(GOLDEN / "weights.safetensors", folder / "model.safetensors")
    plain_tokenizer(sizes["spm"]).save(str(folder / "tokenizer.json"))
    return emu2.load(emu2.open_folder(folder), "golden")


def case(name):
    return load_file(GOLDEN / f"case_{name}.safetensors")


def close(made, wanted, real=None):
    """The same to 1e-5, of the number or absolutely; where `real` is given, at these positions only."""
    if real is not None:
        made, wanted = made[real], wanted[real]
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def released_features(model, ids, images):
    """(B, L) the released ids with FEATURE for `<image>`, and (B, L, F) the features of `images` there, in order."""
    is_feature = ids == model.placeholders[0]
    spread = torch.zeros(*ids.shape, model.feature_width)
    spread[is_feature] = model.visual.pooled(images, 4).flatten(0, 1)
    return ids.masked_fill(is_feature, FEATURE), spread


@released
def test_released_token_ids_are_found_by_name(golden):
    ids = json.loads((GOLDEN / "config.json").read_text())["special_token_ids"]
    tokens = golden.tokens
    assert (tokens.begin, tokens.end, tokens.pad) == tuple(ids[f"DEFAULT_{t}_TOKEN"] for t in ("BOS", "EOS", "PAD"))
    assert (tokens.begin_image, tokens.end_image) == (ids["DEFAULT_IMG_TOKEN"], ids["DEFAULT_IMG_END_TOKEN"])
    assert golden.placeholders == [ids["DEFAULT_IMAGE_TOKEN"], ids["DEFAULT_gIMG_TOKEN"]]
    assert set(ids.values()) <= set(tokens)
    assert [golden.tokenizer.token_to_id(t) for t in ("[USER]", "[ASSISTANT]")] == [312, 313]


@released
def test_released_pictures_as_features(golden):
    wanted = case("encode_image")
    features = golden.visual.pooled(wanted["in.image"], 4)
    close(features, wanted["out.encode_image"])
    close(golden.project_up(wanted["out.encode_image"]), wanted["out.project_up"])
    close(golden.image_features(golden.project_up(features)), wanted["out.project_down_of_project_up"])


@released
@pytest.mark.parametrize("name", ["text_text_only", "text_interleaved"])
def test_released_text_logits(golden, name):
    wanted = case(name)
    ids, real = wanted["in.input_ids"], wanted["in.attention_mask"].bool()
    images = case("encode_image")["in.image"]
    features = None
    if name == "text_interleaved":
        ids, features = released_features(golden, ids, images)
    embeds = golden.embed(ids, lengths(real), features)
    close(embeds, wanted["aux.inputs_embeds"], real)
    text = [i for i in range(golden.vocabulary) if i not in golden.placeholders]
    logits = golden.text_logits(golden(embeds, lengths(real)))
    close(logits[..., text], wanted["out.prefill_logits"][..., text], real)
    assert torch.isneginf(logits[..., golden.placeholders]).all()
    greedy = wanted["out.greedy_ids"]
    for step in range(1, 6):
        # the released loop took these steps one position each, on a cache
        assert (logits[:, -1].argmax(-1) == greedy[:, step]).all()
        embeds = torch.cat([embeds, golden.embed(greedy[:, step : step + 1], lengths(real))], 1)
        real = torch.cat([real, torch.ones(2, 1, dtype=torch.bool)], 1)
        logits = golden.text_logits(golden(embeds, lengths(real)))
        close(logits[:, -1:, text], wanted[f"out.step{step}_logits"][..., text])


@released
@pytest.mark.parametrize(
    "name, images", [("image_text_only", None), ("image_single", slice(0, 1)), ("image_interleaved", slice(0, 3))]
)
def test_released_picture_embeddings_from_cached_steps(golden, name, images):
    wanted = case(name)
    first = wanted["aux.inputs_embeds_first_step"].shape[1]
    ids, real = wanted["in.input_ids_last_step"][:, :first], wanted["in.attention_mask_last_step"][:, :first].bool()
    features = None
    if images is not None:
        ids, features = released_features(golden, ids, case("encode_image")["in.image"][images])
    embeds = golden.embed(ids, lengths(real), features)
    close(embeds, wanted["aux.inputs_embeds_first_step"], real)
    close(golden(embeds, lengths(real)), wanted["aux.last_hidden_state_first_step"], real)
    for row in range(len(ids)):
        made, states = write_cached(golden, embeds[row : row + 1][:, real[row]])
        close(made, wanted["out.image_embeds"][row])
        close(states, wanted["aux.last_hidden_state_last_step"][row, -4:])


# --- pictures in steps of one position --------------------------------------------------------------------------------


def at(start, count, cache):
    """Positions start .. start + count of one row, on transformers' own cache."""
    positions = torch.arange(start, start + count)[None]
    readable = torch.arange(start + count) <= positions[:, None, :, None]
    return DecodeStep(torch.tensor([0]), positions, readable, cache, None)


def write_cached(model, embeds):
    """(1, L, D) inputs up to `[IMG]` -> (Q, F) the picture written after them, (Q, D) the states it came from."""
    cache, length = DynamicCache(), embeds.shape[1]
    prompt = lay_out([[TextSpan(length)]])
    if length > 1:
        model(embeds[:, :-1], prompt, at(0, length - 1, cache))
    features, states, here = [], [], embeds[:, -1:]
    for i in range(model.form.patches):
        hidden = model(here, prompt, at(length - 1 + i, 1, cache))
        states.append(hidden[0, 0])
        features.append(model.image_features(hidden))
        here = model.embed(torch.tensor([[FEATURE]]), prompt, features[-1])
    return torch.cat(features, 1)[0], torch.stack(states)


def write_again_and_again(model, embeds):
    """The same, with everything computed anew for each feature."""
    made = []
    for _ in range(model.form.patches):
        hidden = model(embeds, lay_out([[TextSpan(embeds.shape[1])]]))
        made.append(model.image_features(hidden[:, -1:]))
        embeds = torch.cat([embeds, model.project_up(made[-1])], 1)
    return torch.cat(made, 1)[0]


def sixty_four(std, dtype):
    """Nano with pictures of 8 x 8 features."""
    vision = EvaConfig(side=64, patch=8, width=24, layers=1, heads=2, mlp=48)
    nano = emu2.nano()
    config = replace(nano.config, vision=vision, queries=64, read_queries=64, pixels=None)
    torch.manual_seed(0)
    model = emu2.Emu2Backbone(config, nano.tokenizer, "sixty-four")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False).eval().to(dtype)


# With large weights each feature multiplies the rounding of those before it, whoever computes it: 1e-7 grows to 3 over
# 64 steps. Hence they are compared in float64, and in float32 weights that let rounding alone.
@pytest.mark.parametrize(("std", "dtype"), [(0.2, torch.float64), (0.05, torch.float32)])
def test_a_cached_picture_is_the_recomputed_one_and_costs_64_positions(std, dtype):
    model = sixty_four(std, dtype)
    document = Document(turns=(user(Text("Draw it."), Picture(data=png())),))
    prompt = encode_document(model, document, answer=True)
    ids = torch.cat([prompt.ids, torch.tensor([model.tokens.begin_image])])[None]
    features = torch.zeros(1, ids.shape[1], model.feature_width)
    features[ids == FEATURE] = prompt.features
    embeds = model.embed(ids, lay_out([[TextSpan(ids.shape[1])]]), features)
    seen = []
    hook = model.decoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    cached, _ = write_cached(model, embeds)
    hook.remove()
    assert seen == [ids.shape[1] - 1] + [1] * 64
    assert cached.std(0).mean() > 0.1, "the features differ from each other, or the comparison says nothing"
    torch.testing.assert_close(cached, write_again_and_again(model, embeds), rtol=1e-5, atol=1e-5)


# --- layouts ----------------------------------------------------------------------------------------------------------

WIDTH, HIDDEN = (
    emu2_layouts.TOWER_HEAD,
    emu2_layouts.DECODER_HEAD,
)  # one head each: what a checkpoint without config.json must mean
SIDE, PATCH = 16, 2
LAYERS = 2
PIECES = 40
VOCABULARY = PIECES + len(emu2_tokens.ADDED)
CONFIG = {
    "architectures": ["EmuForCausalLM"], "d_model": WIDTH, "hidden_size": HIDDEN, "intermediate_size": 96,
    "num_hidden_layers": LAYERS, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "model_version": "base",
    "vision_config": {
        "head_width": WIDTH, "image_size": SIDE, "intermediate_size": 60, "layer_norm_eps": 1e-6, "layers": LAYERS,
        "mlp_ratio": 60 / WIDTH, "n_query": 64, "v_query": 64, "patch_size": PATCH, "width": WIDTH, "postnorm": True,
    },
}  # fmt: skip
UNET = {
    **emu2_layouts.UNET, "sample_size": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": WIDTH,
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}  # fmt: skip
VAE = {
    **emu2_layouts.VAE, "block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


def native():
    """A state dict of the one-file layout, key by key, with the old buffers."""
    vision = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    block = {
        "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
        "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,),
        "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
        "mlp.fc1.weight": (60, WIDTH), "mlp.fc1.bias": (60,), "mlp.fc2.weight": (WIDTH, 60), "mlp.fc2.bias": (WIDTH,),
    }  # fmt: skip
    layer = {
        **{f"self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"},
        "mlp.gate_proj.weight": (96, HIDDEN), "mlp.up_proj.weight": (96, HIDDEN), "mlp.down_proj.weight": (HIDDEN, 96),
        "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.rotary_emb.inv_freq": (HIDDEN // 2,),
    }  # fmt: skip
    shapes = {
        **{f"visual.{key}": shape for key, shape in vision.items()},
        **{f"visual.blocks.{i}.{key}": shape for i in range(LAYERS) for key, shape in block.items()},
        "decoder.lm.model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **{f"decoder.lm.model.layers.{i}.{key}": shape for i in range(LAYERS) for key, shape in layer.items()},
        "decoder.lm.model.norm.weight": (HIDDEN,), "decoder.lm.lm_head.weight": (VOCABULARY, HIDDEN),
        "project_up.weight": (HIDDEN, WIDTH), "project_down.weight": (WIDTH, HIDDEN),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}


def diffusion():
    torch.manual_seed(1)
    parts = {"unet": UNet2DConditionModel.from_config(UNET), "vae": AutoencoderKL.from_config(VAE)}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def hub(state):
    return {key if key.startswith("project_") else f"model.{key}": tensor for key, tensor in state.items()}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_shards(folder, state, stem="model", variant=""):
    keys = sorted(state)
    shards = [keys[0::2], keys[1::2]]
    names = [f"{stem}{variant}-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, own in zip(names, shards, strict=True):
        save_file({key: state[key].contiguous() for key in own}, folder / name)
    index = {key: name for name, own in zip(names, shards, strict=True) for key in own}
    write_json(folder / f"{stem}.safetensors.index{variant}.json", {"metadata": {}, "weight_map": index})


def write_pixel_configs(folder):
    write_json(folder / "unet/config.json", UNET)
    write_json(folder / "vae/config.json", VAE)
    write_json(folder / "scheduler/scheduler_config.json", emu2_layouts.SCHEDULER)


def part_of(state, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def write_native(folder, state, pixels):
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", {})
    plain_tokenizer().save(str(folder / "tokenizer.json"))


def write_native_gen(folder, state, pixels):
    whole = {f"multimodal_encoder.{key}": tensor for key, tensor in state.items()}
    save_file({**whole, **pixels, "safety_checker.concept_embeds": torch.zeros(3)}, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    write_pixel_configs(folder)
    plain_tokenizer().save(str(folder / "tokenizer.json"))


def write_hub(folder, state, pixels):
    write_shards(folder, hub(state))
    write_json(folder / "config.json", CONFIG)
    plain_tokenizer().save(str(folder / "tokenizer.json"))


def write_hub_gen(folder, state, pixels, variant=""):
    encoder = folder / "multimodal_encoder"
    write_json(encoder / "config.json", CONFIG)
    write_shards(encoder, hub(state), variant=variant)
    write_pixel_configs(folder)
    for part in ("unet", "vae"):
        save_file(part_of(pixels, f"{part}."), folder / part / f"diffusion_pytorch_model{variant}.safetensors")
    for part in ("safety_checker", "feature_extractor", "tokenizer"):
        (folder / part).mkdir()
    save_file({"concept_embeds": torch.zeros(3)}, folder / "safety_checker" / f"model{variant}.safetensors")
    write_json(folder / "model_index.json", {"_class_name": "EmuVisualGenerationPipeline"})
    plain_tokenizer().save(str(folder / "tokenizer/tokenizer.json"))


def write_hub_gen_bf16(folder, state, pixels):
    narrow = {key: tensor.bfloat16() for key, tensor in state.items()}
    write_hub_gen(folder, narrow, {key: tensor.bfloat16() for key, tensor in pixels.items()}, variant=".bf16")


LAYOUTS = {
    "native": write_native,
    "native Gen": write_native_gen,
    "hub": write_hub,
    "hub Gen": write_hub_gen,
    "hub Gen bf16": write_hub_gen_bf16,
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    state, pixels = native(), diffusion()
    LAYOUTS[request.param](tmp_path, state, pixels)
    if "bf16" in request.param:
        state, pixels = ({k: v.bfloat16().float() for k, v in part.items()} for part in (state, pixels))
    return tmp_path, state, pixels if "Gen" in request.param else None


def test_every_layout_loads_completely_and_computes_what_its_tensors_say(layout):
    folder, state, pixels = layout
    model = emu2.load(emu2.open_folder(folder), "loaded")
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training and model.fingerprint
    # transformers' own class on the released keys
    sizes = {key: value for key, value in CONFIG.items() if key not in ("architectures", "vision_config", "rope_theta")}
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    lm = part_of(state, "decoder.lm.")
    llama.load_state_dict({key: tensor for key, tensor in lm.items() if not key.endswith("inv_freq")})
    tower = EvaTower(EvaConfig(SIDE, PATCH, WIDTH, LAYERS, 1, 60))
    tower.load_state_dict(part_of(state, "visual."))
    shown = picture(3, (SIDE, SIDE))
    mean, std = torch.tensor(emu2.MEAN), torch.tensor(emu2.STD)
    normal = ((torch.from_numpy(np.asarray(shown).copy()) / 255.0 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        wanted = tower(normal)[:, 1:]  # 8 x 8 patches are the 64 features as they are
    (made,) = model.encode_images([shown], generated=True)
    torch.testing.assert_close(made.features, wanted[0], rtol=1e-5, atol=1e-5)

    ids = torch.tensor([[1, model.tokens.begin_image, *[FEATURE] * 64, model.tokens.end_image, 7, 9, 2]])
    spread = torch.zeros(1, ids.shape[1], WIDTH)
    spread[:, 2:66] = made.features
    spans = lay_out([[TextSpan(2), ImageSpan(8, 8), TextSpan(4)]])
    hidden = model(model.embed(ids, spans, spread), spans)
    with torch.no_grad():
        inputs = llama.model.embed_tokens(ids.clamp_min(0))
        inputs[:, 2:66] = made.features @ state["project_up.weight"].T
        out = llama(inputs_embeds=inputs, output_hidden_states=True)
    keep = [i for i in range(VOCABULARY) if i not in model.placeholders]
    torch.testing.assert_close(model.text_logits(hidden)[..., keep], out.logits[..., keep], rtol=1e-5, atol=1e-5)
    down = out.hidden_states[-1] @ state["project_down.weight"].T
    torch.testing.assert_close(model.image_features(hidden), down, rtol=1e-5, atol=1e-5)

    if pixels is None:
        with pytest.raises(CheckpointError, match="Emu2-Gen"):
            model.decode_image(made)
        return
    decoder = DiffusionDecoder(DiffusionConfig(UNET, VAE, emu2_layouts.SCHEDULER))
    decoder.load_state_dict(pixels)
    with torch.no_grad():
        blank = tower(torch.zeros(1, 3, SIDE, SIDE))[:, 1:]
    drawn = decoder(made.features[None], blank, steps=2, guidance=3.0, seed=5)[0]
    image = model.decode_image(made, DecodingOptions(seed=5, steps=2))
    difference = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) - drawn * 255
    assert difference.abs().max() < 0.51  # rounding to bytes, and to float32 before


def test_released_steps_and_guidance_are_the_default(tmp_path):
    write_hub_gen(tmp_path, native(), diffusion())
    model = emu2.load(emu2.open_folder(tmp_path), "loaded")
    assert (model.pixels.config.steps, model.pixels.config.guidance) == (50, 3.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model.visual.blocks.1.mlp.fc2.bias": None}, "1 missing: visual.blocks.1.mlp.fc2.bias"),
        ({"model.decoder.lm.extra.weight": torch.zeros(2)}, "1 unexpected: model.decoder.lm.extra.weight"),
        ({"project_up.weight": torch.zeros(HIDDEN, 5)}, "1 of another shape: project_up.weight"),
        ({"model.visual.cls_token": None}, "this is no Emu2: there is no tensor model.visual.cls_token"),
    ],
)
def test_what_is_missing_or_too_much_is_named(tmp_path, change, words):
    state = {**hub(native()), **change}
    write_shards(tmp_path, {key: tensor for key, tensor in state.items() if tensor is not None})
    write_json(tmp_path / "config.json", CONFIG)
    plain_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=words):
        emu2.load(emu2.open_folder(tmp_path), "broken")


@pytest.mark.parametrize("key", ["unet.conv_in.weight", "vae.decoder.conv_in.bias"])
def test_a_gap_in_the_pixel_decoder_is_found_before_anything_is_read(tmp_path, key, monkeypatch):
    pixels = diffusion()
    del pixels[key]
    write_hub_gen(tmp_path, native(), pixels)
    monkeypatch.setattr(Checkpoint, "get", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=f"1 missing: pixels.{key}"):
        emu2.load(emu2.open_folder(tmp_path), "broken")


def test_an_emu2_gen_without_its_unet_is_no_emu2_gen(tmp_path):
    write_hub_gen(tmp_path, native(), diffusion())
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"there is no such folder(.|\n)*unet"):
        emu2.load(emu2.open_folder(tmp_path), "broken")


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("vision_config", "n_query"), 9, "do not divide into 9 equal squares"),
        (("vision_config", "head_width"), 0, "config.json is damaged"),
        (("hidden_size",), "wide", "config.json is damaged"),
        (("vision_config",), [], "vision_config of config.json is no object"),
        (("vocab_size",), VOCABULARY + 1, "the tokenizer has 40 tokens, the model 313"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, path, value, words):
    write_hub(tmp_path, native(), {})
    config = json.loads(json.dumps(CONFIG))
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=words):
        emu2.load(emu2.open_folder(tmp_path), "broken")


def test_weights_in_another_dtype(tmp_path):
    write_hub_gen(tmp_path, native(), diffusion())
    model = emu2.load(emu2.open_folder(tmp_path), "narrow", LoadOptions(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (made,) = model.encode_images([picture()], generated=True)
    assert made.features.dtype == torch.float32
    assert model.decode_image(made, DecodingOptions(steps=1)).size == (8, 8)
    assert model.decoder.rotary_emb.inv_freq.dtype == torch.float32
    model = emu2.load(emu2.open_folder(tmp_path), "half", LoadOptions(dtype=torch.float16))
    assert {p.dtype for p in model.pixels.vae.parameters()} == {torch.float32}


# --- pickles ----------------------------------------------------------------------------------------------------------


def pickle_one_file(folder, state):
    torch.save({"module": {**state}}, folder / "pytorch_model.bin")


def pickle_oldest_names(folder, state):
    renamed = {
        "project_down.weight": "decoder.lm.stu_regress_head.weight",
        "project_up.weight": "vl_adapter.projection.weight",
    }
    torch.save({renamed.get(key, key): tensor for key, tensor in state.items()}, folder / "emu2.pt")


def pickle_shards(folder, state):
    keys = sorted(hub(state))
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    parts = dict(zip(names, (keys[:20], keys[20:]), strict=True))
    for name, own in parts.items():
        torch.save({key: hub(state)[key] for key in own}, folder / name)
    index = {key: name for name, own in parts.items() for key in own}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": index})


@pytest.mark.parametrize("pickled", [pickle_one_file, pickle_oldest_names, pickle_shards])
@pytest.mark.parametrize("shard", [2**31, 100_000])
def test_pickles_are_converted_once(tmp_path, pickled, shard, monkeypatch):
    source, out, state = tmp_path / "in", tmp_path / "out", native()
    source.mkdir()
    pickled(source, state)
    plain_tokenizer().save(str(source / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="weft models convert"):
        emu2.open_folder(source)
    monkeypatch.setattr(shards, "SHARD", shard)
    emu2.convert(source, out)
    assert (len(list(out.glob("*.safetensors"))) == 1) == (shard == 2**31)
    stored = emu2.open_folder(out)
    assert stored.tensors.keys() == {key for key in hub(state) if not key.endswith("inv_freq")}
    assert all(torch.equal(stored.get(key), tensor) for key, tensor in hub(state).items() if key in stored.tensors)
    assert emu2.load(stored, "converted").config.vision == EvaConfig(SIDE, PATCH, WIDTH, LAYERS, 1, 60)


def test_a_pickled_emu2_gen_becomes_the_hubs_folders(tmp_path):
    state, pixels = native(), diffusion()
    whole = {f"multimodal_encoder.{key}": tensor for key, tensor in state.items()}
    torch.save({**whole, **pixels, "safety_checker.concept_embeds": torch.zeros(3)}, tmp_path / "emu2-gen.bin")
    write_json(tmp_path / "unet/config.json", UNET)
    write_json(tmp_path / "vae/config.json", VAE)
    plain_tokenizer().save(str(tmp_path / "tokenizer.json"))
    emu2.convert(tmp_path / "emu2-gen.bin", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "multimodal_encoder", "unet", "vae", "scheduler", "tokenizer", "model_index.json", "manifest.json"
    }  # fmt: skip
    model = emu2.load(emu2.open_folder(tmp_path / "out"), "converted")
    for key, tensor in pixels.items():
        assert torch.equal(model.pixels.state_dict()[key], tensor)


class _Runs:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda state: {**state, "project_up.weight": _Runs()}, "cannot be read as tensors alone"),
        (lambda state: {**state, "step": 7}, "more than tensors"),
        (lambda state: {k: v for k, v in state.items() if k != "project_up.weight"}, "the first is project_up.weight"),
        (lambda state: {"weight": torch.zeros(2)}, "this is no Emu2"),
    ],
)
def test_of_a_conversion_that_fails_nothing_remains(tmp_path, spoil, words, capsys):
    source = tmp_path / "in"
    source.mkdir()
    torch.save(spoil(native()), source / "emu2.bin")
    plain_tokenizer().save(str(source / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=words):
        emu2.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert "this ran" not in capsys.readouterr().out


# --- tokens -----------------------------------------------------------------------------------------------------------


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


def test_a_sentencepiece_tokenizer_gives_the_same_ids_and_text(sentencepiece_folder, tmp_path):
    folder, theirs = sentencepiece_folder
    added = {
        token: len(theirs) + i for i, token in enumerate((*emu2_tokens.ADDED, emu2_tokens.USER, emu2_tokens.ASSISTANT))
    }
    shutil.copy(folder / "tokenizer.model", tmp_path)
    write_json(tmp_path / "added_tokens.json", dict(reversed(added.items())))
    ours = emu2_tokens.find_tokenizer(tmp_path)
    emu2_tokens.complete(ours, len(theirs) + len(added), "test")
    for text in ("the odd cat", "a  wet ü mat 😀:", " the", "x", "red\nblue", "[IMG] is text here </s>"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text
    assert {token: ours.token_to_id(token) for token in added} == added


def test_added_tokens_that_do_not_follow_are_named(sentencepiece_folder, tmp_path):
    folder, theirs = sentencepiece_folder
    shutil.copy(folder / "tokenizer.model", tmp_path)
    write_json(tmp_path / "added_tokens.json", {"[PAD]": len(theirs) + 1})
    with pytest.raises(CheckpointError, match=r"\[PAD\] becomes token \d+ and should be \d+"):
        emu2_tokens.find_tokenizer(tmp_path)


def test_without_sentencepiece_the_error_says_what_to_install(sentencepiece_folder, monkeypatch):
    def missing(*_):
        raise ImportError("no sentencepiece")

    # transformers has a function of the same name
    monkeypatch.setattr(import_module("transformers.convert_slow_tokenizer"), "requires_backends", missing)
    with pytest.raises(UsageError, match="pip install sentencepiece protobuf"):
        emu2_tokens.find_tokenizer(sentencepiece_folder[0])


def test_without_a_tokenizer_the_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model(.|\n)*" + tmp_path.name):
        emu2_tokens.find_tokenizer(tmp_path)


def test_chat_words_and_their_absence(nano):
    ids = nano.tokenizer.token_to_id
    colon = nano.tokenize(":")
    document = Document(turns=(user(Text("Hi")), assistant(Text("Yo")), user(Text("So"))))
    made = encode_document(nano, document, answer=True).ids.tolist()
    assert made == [
        ids("<s>"), *nano.tokenize(emu2_tokens.SYSTEM),
        ids("[USER]"), *colon, *nano.tokenize("Hi"), ids("[ASSISTANT]"), *colon, *nano.tokenize("Yo"), ids("</s>"),
        ids("[USER]"), *colon, *nano.tokenize("So"), ids("[ASSISTANT]"), *colon,
    ]  # fmt: skip
    base = plain_tokenizer()
    emu2_tokens.complete(base, 40 + len(emu2_tokens.ADDED), "base")
    chat = emu2_tokens.chat_format(base)
    assert (chat.start, chat.user, chat.assistant, chat.end) == ((1,), ((), ()), ((), (2,)), (2,))


def test_text_that_spells_a_token_is_text(nano):
    text = "[IMG] <image> </s> [USER]: ok"
    ids = nano.tokenize(text)
    assert not set(ids) & set(nano.tokens)
    assert nano.detokenize([nano.tokens.begin, *ids, FEATURE, nano.tokens.end]) == text


# --- the small one ----------------------------------------------------------------------------------------------------


def png(seed=0):
    from io import BytesIO

    buffer = BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_read_finer_than_they_are_written(nano):
    read, written = (nano.encode_images([picture(), picture(1)], generated=g) for g in (False, True))
    assert [e.features.shape for e in (*read, *written)] == [(16, 24)] * 2 + [(4, 24)] * 2
    assert (read[0].form.rows, read[0].form.cols, written[0].form) == (4, 4, nano.form)
    assert nano.form.before == (nano.tokens.begin_image,) and nano.form.after == (nano.tokens.end_image,)
    assert all((e.ids == FEATURE).all() for e in read)
    blocks = read[0].features.reshape(2, 2, 2, 2, 24).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(written[0].features, blocks, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read[1].features, nano.encode_images([picture(1)], generated=False)[0].features)


def test_a_picture_is_stretched_to_the_square(nano):
    wide = picture(0, (56, 14))
    square = wide.resize((28, 28), Image.Resampling.BICUBIC)
    for each in zip(*(nano.encode_images([p], generated=True) for p in (wide, square)), strict=True):
        assert torch.equal(each[0].features, each[1].features)


def test_embed_takes_words_from_the_table_and_features_through_the_projection(nano):
    ids = torch.tensor([[1, FEATURE, 5], [FEATURE, 2, 7]])
    features = torch.randn(2, 3, 24)
    spans = lay_out([[TextSpan(3)]] * 2)
    made = nano.embed(ids, spans, features)
    for b in range(2):
        for i in range(3):
            wanted = nano.project_up(features[b, i]) if ids[b, i] == FEATURE else nano.table.weight[ids[b, i]]
            torch.testing.assert_close(made[b, i], wanted)
    assert torch.equal(nano.embed(ids.clamp_min(3), spans), nano.table(ids.clamp_min(3)))


def test_drawing_depends_on_seed_steps_guidance_and_what_it_leads_away_from(nano):
    (elements,) = nano.encode_images([picture()], generated=True)
    draw = lambda **options: np.asarray(nano.decode_image(elements, DecodingOptions(**options)))  # noqa: E731
    usual = draw()
    assert usual.shape == (16, 16, 3) and usual.std() > 10
    assert np.array_equal(usual, draw(steps=2, guidance=3.0, negative=nano._blank()))
    others = [draw(seed=1), draw(steps=3), draw(guidance=1.0), draw(negative=torch.ones(4, 24))]
    assert not any(np.array_equal(usual, other) for other in others)


def test_what_it_cannot_draw_is_named(nano):
    assert nano.form_of((16, 16)) is nano.form
    with pytest.raises(UsageError, match=r"no pictures of 16 x 32(.|\n)*16 x 16"):
        nano.form_of((16, 32))
    (read,) = nano.encode_images([picture()], generated=False)
    with pytest.raises(UsageError, match=r"vectors \(4, 24\), and got a tensor \(16, 24\)"):
        nano.decode_image(read)
    with pytest.raises(TypeError, match="image_features"):
        nano.image_logits(torch.zeros(1, 32))


def test_what_is_saved_loads_again(nano, tmp_path):
    emu2.save(nano, tmp_path)
    again = emu2.load(emu2.open_folder(tmp_path), "again")
    assert again.config == nano.config
    for key, tensor in nano.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert (again.tokens, again.chat) == (nano.tokens, nano.chat)
    (elements,) = nano.encode_images([picture()], generated=True)
    assert np.array_equal(nano.decode_image(elements), again.decode_image(elements))
    opened = Checkpoint.open(tmp_path, subfolder="multimodal_encoder")
    assert opened.fingerprint == again.fingerprint


def test_nano_is_the_same_each_time(nano):
    assert emu2.nano().fingerprint == nano.fingerprint
    assert nano.context_length >= 256 and nano.widest == 2 and nano.kind == "continuous"


def test_the_released_sizes_are_the_defaults():
    with torch.device("meta"):
        model = emu2.Emu2Backbone(emu2_layouts.Emu2Config(32272), plain_tokenizer(32000), "Emu2")
        pixels = DiffusionDecoder(DiffusionConfig(emu2_layouts.UNET, emu2_layouts.VAE, emu2_layouts.SCHEDULER))
    assert sum(p.numel() for p in model.parameters()) == 36_906_513_152
    assert sum(p.numel() for p in pixels.unet.parameters()) == 2_525_520_644
    assert pixels.side == 1024
    assert pixels._added(torch.zeros(1, 64, 1792))["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]]
    assert (model.tokens.pad, model.tokens.begin_image, model.tokens.end_image) == (32000, 32001, 32002)
    assert (model.form.rows, model.form.cols, model.context_length) == (8, 8, 2048)
