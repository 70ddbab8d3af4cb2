"""Janus: both layouts load, and everything it computes equals transformers' own model, read without our loader."""

import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from weft.backbones import janus
from weft.backbones.base import Elements, encode_document
from weft.backbones.checkpoint import Checkpoint, LoadOptions
from weft.document import Document, Image, Text, assistant, user
from weft.errors import CheckpointError, UsageError
from weft.images import encode_png
from weft.layout import FEATURE, ImageSpan, TextSpan, lay_out

load_nano = functools.cache(janus.nano)
TOKENIZER = load_nano().tokenizer
BEGIN, END, PAD, BEGIN_IMAGE, END_IMAGE, USER, ASSISTANT, PLACEHOLDER = range(8)
V, K, SIDE, PATCHES = 272, 24, 32, 4
"""More rows than the tokenizer has tokens, as in the released models."""


def config(**changes):
    """The released shape, narrow: the codec's five levels, a tower of 16 heads, 16 pixels per patch."""
    values = {
        "text_config": {
            "model_type": "llama", "vocab_size": V, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
        },
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 16, "image_size": SIDE, "patch_size": 16,
            "mlp_ratio": 2.0, "projection_dim": 48, "num_image_tokens": PATCHES,
        },
        "vq_config": {
            "embed_dim": 4, "num_embeddings": K, "latent_channels": 16, "base_channels": 32, "projection_dim": 48,
            "image_token_embed_dim": 48,
        },
        "image_token_id": PLACEHOLDER,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return JanusConfig(**values | changes)


@pytest.fixture(scope="module")
def theirs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = JanusForConditionalGeneration(config())
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.data = torch.randn_like(parameter) * spread + (parameter.dim() == 1) * parameter.data
    for parameter in (*model.model.generation_embeddings.parameters(), *model.model.generation_head.parameters()):
        parameter.data *= 4  # pictures depend on what stands before them
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    write(folder, theirs.state_dict(), theirs.config.to_dict())
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return read(folder)


def write(folder, tensors, values):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    TOKENIZER.save(str(folder / "tokenizer.json"))


def read(folder, **options):
    return janus.load(Checkpoint.open(folder), "a janus", LoadOptions(**options))


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(values)


def processor(**changes):
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    return JanusImageProcessorPil(**values | changes)


def one(sequence):
    """A sequence as a batch: ids, layout, features."""
    features = sequence.dense_features()
    return sequence.ids[None], lay_out([sequence.spans]), None if features is None else features[None]


# --- text -------------------------------------------------------------------------------------------------------------


@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_text_survives_the_tokenizer(text):
    model = load_nano()
    assert model.detokenize(model.tokenize(text)) == text


def test_text_that_spells_a_control_token_gives_none():
    model = load_nano()
    ids = model.tokenize(" ".join((*janus.SPECIAL, *janus.ROLES, "<image_placeholder>")))
    assert not set(ids) & set(model.tokens)


def test_a_conversation_reads_as_the_makers_write_it(ours):
    document = Document(
        (user(Text("Hi!")), assistant(Text("Hello.")), user(Text("Who are you?")), assistant(Text("A model.")))
    )
    bos, eos = janus.SPECIAL[:2]
    said = f"{bos}<|User|>: Hi!\n\n<|Assistant|>: Hello.{eos}<|User|>: Who are you?\n\n<|Assistant|>:"
    spell = lambda ids: ours.tokenizer.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    whole, prompt = encode_document(ours, document), encode_document(ours, Document(document.turns[:3]), answer=True)
    assert spell(prompt.ids) == said
    assert spell(whole.ids) == f"{said} A model.{eos}"
    assert spell(whole.ids[whole.is_target]) == f" Hello.{eos} A model.{eos}"


def test_a_model_without_role_tokens_spells_the_roles():
    words = json.loads(TOKENIZER.to_str())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] not in janus.ROLES]
    for role in janus.ROLES:
        words["model"]["vocab"].pop(role)
    tokenizer = type(TOKENIZER).from_str(json.dumps(words))
    model = janus.JanusBackbone(config(), tokenizer, "janus-1.3b", janus.Reading())
    assert tokenizer.decode(model.chat.user[0]) == "User:" and tokenizer.decode(model.chat.assistant[0]) == "Assistant:"


# --- both layouts -----------------------------------------------------------------------------------------------------


def makers_layout(tensors):
    """transformers' tensors under the names that the makers' modules give them."""
    vision = "vision_model.vision_tower."
    renamed = {
        f"{vision}attn_pool.latent": torch.zeros(1, 1, 32),
        f"{vision}attn_pool.mlp.norm.weight": torch.zeros(32),
        "gen_vision_model.quantize.codebook_used": torch.zeros(65536),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6),
    }
    for key, tensor in tensors.items():
        key = key.removeprefix("model.")
        layer = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if layer:
            number, part, kind = layer.groups()
            if part.endswith(("q_proj", "k_proj", "v_proj")):
                renamed.setdefault(f"{vision}blocks.{number}.attn.qkv.{kind}", []).append((part[-6], tensor))
                continue
            names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.projection_layer": "attn.proj"}
            key = f"{vision}blocks.{number}.{names.get(part, part)}.{kind}"
        elif key.startswith("vqmodel."):
            key = key.replace("vqmodel", "gen_vision_model").replace(".block.", ".res.")
            key = key.replace("encoder.down", "encoder.conv_blocks").replace("decoder.up", "decoder.conv_blocks")
            key = key.replace("mid.block_1", "mid.0").replace("mid.attn_1", "mid.1").replace("mid.block_2", "mid.2")
        elif key.endswith("position_embedding.weight"):
            key, tensor = f"{vision}pos_embed", tensor[None]
        else:
            for new, old in (
                ("vision_model.embeddings.patch_embedding.", f"{vision}patch_embed.proj."),
                ("vision_model.post_layernorm.", f"{vision}norm."), ("language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."), ("generation_embeddings.", "gen_embed."),
                ("generation_head.proj_out.", "gen_head.output_mlp_projector."), ("generation_head.", "gen_head."),
                ("generation_aligner.fc1.", "gen_aligner.layers.0."), ("aligner.fc1.", "aligner.layers.0."),
                ("generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
                ("aligner.hidden_layers.0.", "aligner.layers.2."),
            ):  # fmt: skip
                if key.startswith(new):
                    key = old + key.removeprefix(new)
                    break
        renamed[key] = tensor
    for key, value in renamed.items():
        if isinstance(value, list):
            renamed[key] = torch.cat([tensor for _, tensor in sorted(value, key=lambda pair: "qkv".index(pair[0]))])
    return renamed


MAKERS_CONFIG = {
    "model_type": "multi_modality",
    "aligner_config": {"params": {"depth": 2, "input_dim": 32, "n_embed": 48, "projector_type": "mlp_gelu"}},
    "gen_aligner_config": {"params": {"depth": 2, "input_dim": 4, "n_embed": 48, "projector_type": "mlp_gelu"}},
    "gen_head_config": {"params": {"image_token_embed": 48, "image_token_size": K, "n_embed": 48}},
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": K, "n_embed": 4}},
    "vision_config": {"params": {"image_size": SIDE, "model_name": "siglip_large_patch16_384", "select_layer": -1}},
    "language_config": {
        "model_type": "llama", "vocab_size": V, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
        "_attn_implementation": "flash_attention_2",
    },
}  # fmt: skip


def same_tensors(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_shards_load_as_one_file_does(theirs, ours, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_tensors(read(tmp_path), ours)


def test_the_makers_layout_gives_the_same_model(theirs, ours, tmp_path):
    tensors = makers_layout(theirs.state_dict())
    assert {
        "vision_model.vision_tower.blocks.1.attn.qkv.weight", "gen_vision_model.decoder.conv_blocks.4.res.2.conv1.bias",
        "gen_vision_model.encoder.mid.1.q.weight", "gen_aligner.layers.2.weight", "gen_embed.weight",
        "language_model.lm_head.weight", "language_model.model.embed_tokens.weight", "gen_head.vision_head.bias",
    } < tensors.keys()  # fmt: skip
    write(tmp_path, tensors, MAKERS_CONFIG)
    model = read(tmp_path)
    assert same_tensors(model, ours)
    first, second = (each.encode_images([noise(40, 30)], generated=False)[0] for each in (model, ours))
    assert torch.equal(first.features, second.features) and first.form == second.form
    assert model.context_length == ours.context_length == 256


def test_a_tied_head_is_read_from_the_table(tmp_path):
    tied = JanusForConditionalGeneration(config(tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).tensors
    model = read(tmp_path)
    assert torch.equal(model.head.weight, model.table.weight)


def test_what_is_saved_loads_in_transformers_and_here(ours, theirs, tmp_path):
    janus.save(ours, tmp_path)
    loaded, info = JanusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same_tensors(loaded, theirs) and same_tensors(read(tmp_path), ours)
    assert read(tmp_path).reading == ours.reading


def test_buffers_that_checkpoints_lack_are_computed(ours, theirs):
    assert torch.equal(ours.decoder.rotary_emb.inv_freq, theirs.model.language_model.rotary_emb.inv_freq)
    assert torch.equal(ours.vision.embeddings.position_ids, theirs.model.vision_model.embeddings.position_ids)
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))


def test_narrow_weights_leave_the_codec_wide(folder, ours):
    narrow = read(folder, dtype=torch.bfloat16)
    kinds = {key.split(".")[0]: tensor.dtype for key, tensor in narrow.named_parameters()}
    assert kinds.pop("codec") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    assert torch.equal(*(each.encode_images([noise(40, 30)], generated=True)[0].ids for each in (narrow, ours)))
    document = Document((user(Image(encode_png(noise(40, 30))), Text("What?")), assistant(Text("That."))))
    ids, layout, features = one(encode_document(narrow, document))
    hidden = narrow(narrow.embed(ids, layout, features), layout)
    wide = ours(ours.embed(ids, layout, features), layout)
    assert hidden.dtype == torch.bfloat16 and (hidden - wide).norm() < 0.03 * wide.norm()


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (50, 32), (31, 77), (400, 5), (3, 200), (1, 1)])
@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)])
def test_pictures_are_read_as_transformers_reads_them(size, mean):
    picture = noise(*size)
    expected = processor(image_mean=list(mean))(picture, return_tensors="pt").pixel_values[0]
    found = janus._to_read(picture, SIDE, janus.Reading(image_mean=mean))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 32), (48, 48), (33, 70)])
def test_a_picture_to_be_written_is_scaled_and_cropped_at_its_middle(size):
    picture, short = noise(*size), min(size)
    scaled = picture.resize((size[0] * 16 // short, size[1] * 16 // short), PILImage.Resampling.BICUBIC)
    left, top = (scaled.width - 16) // 2, (scaled.height - 16) // 2
    expected = np.asarray(scaled.crop((left, top, left + 16, top + 16))).astype(np.float32) / 127.5 - 1
    found = janus._to_write(picture, 16).permute(1, 2, 0).numpy()
    assert found.shape == (16, 16, 3) and found.min() >= -1 and found.max() <= 1
    if size[0] * 16 % short == size[1] * 16 % short == 0:
        assert np.array_equal(found, expected)


def test_reading_a_picture_gives_their_logits(ours, theirs):
    picture = noise(50, 30)
    document = Document((user(Image(encode_png(picture)), Text("What is it?")), assistant(Text("Noise."))))
    ids, layout, features = one(encode_document(ours, document))
    assert (ids == FEATURE).sum() == PATCHES
    hidden = ours(ours.embed(ids, layout, features), layout)
    expected = theirs(
        input_ids=ids.masked_fill(ids == FEATURE, PLACEHOLDER),
        pixel_values=processor()(picture, return_tensors="pt").pixel_values,
    ).logits
    found = ours.text_logits(hidden)
    never = [USER, ASSISTANT, PLACEHOLDER, *range(TOKENIZER.get_vocab_size(), V)]
    assert (found[..., never] == -torch.inf).all()
    kept = [i for i in range(V) if i not in never]
    torch.testing.assert_close(found[..., kept], expected[..., kept], rtol=0, atol=1e-5)
    assert expected.std() > 0.3


def test_the_loss_of_a_picture_is_what_is_put_together_by_hand(ours, theirs):
    document = Document((user(Text("Noise, please.")), assistant(Image(encode_png(noise(32, 32))))))
    ids, layout, _ = one(encode_document(ours, document))
    start = ids[0].tolist().index(BEGIN_IMAGE) + 1
    codes = ids[:, start : start + PATCHES] - V
    assert ids[0, start + PATCHES] == END_IMAGE and len(set(codes[0].tolist())) > 1
    hidden = ours(ours.embed(ids, layout), layout)[:, start - 1 : start - 1 + PATCHES]
    loss = F.cross_entropy(ours.image_logits(hidden)[0], codes[0])

    embeds = torch.cat(
        (theirs.get_input_embeddings()(ids[:, :start]), theirs.prepare_embeddings_for_image_generation(codes[:, :-1])),
        1,
    )
    states = theirs.model.language_model(inputs_embeds=embeds).last_hidden_state[:, start - 1 :]
    expected = F.cross_entropy(theirs.model.generation_head(states)[0], codes[0])
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def test_greedy_pictures_with_guidance_are_theirs(ours, theirs):
    texts = ("a red cross", "blue circle", "nothing at.")
    prompts = [[BEGIN, USER, *ours.tokenize(text), ASSISTANT, BEGIN_IMAGE] for text in texts]
    theirs.generation_config.generation_kwargs = {"boi_token_id": BEGIN_IMAGE}
    prompt = torch.tensor(prompts)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_mode="image", guidance_scale=5, do_sample=False,
        bos_token_id=BEGIN, pad_token_id=PAD,
    )  # fmt: skip

    empty = prompt.masked_fill((prompt != BEGIN) & (prompt != BEGIN_IMAGE), PAD)
    drawn = {scale: draw_greedily(ours, torch.cat((prompt, empty)), scale) for scale in (1, 5)}
    assert torch.equal(drawn[5], expected)
    assert not torch.equal(drawn[1], expected) and len(set(expected.flatten().tolist())) > 4


def draw_greedily(model, ids, scale):
    """Full recomputation at every step; the second half of the rows is what guidance leads away from."""
    length = ids.shape[1]
    for done in range(PATCHES):
        layout = lay_out([(TextSpan(length), ImageSpan(2, 2, present=done))] * len(ids))
        full, none = model.image_logits(model(model.embed(ids, layout), layout)[:, -1]).chunk(2)
        code = (none + scale * (full - none)).argmax(-1, keepdim=True)
        ids = torch.cat((ids, (code + V).repeat(2, 1)), 1)
    return ids[: len(ids) // 2, length:] - V


def test_codes_become_their_pixels(ours, theirs):
    codes = torch.tensor([3, 0, 23, 11])
    expected = ((theirs.decode_image_tokens(codes[None])[0].clamp(-1, 1) + 1) * 127.5).round()
    picture = ours.decode_image(Elements(ours.form, codes + V))
    assert picture.size == (SIDE, SIDE)
    assert np.array_equal(np.asarray(picture), expected.numpy().astype(np.uint8))
    assert np.asarray(picture).std() > 10


def test_codes_are_chosen_by_direction_as_the_codec_was_trained(ours, theirs):
    pixels = janus._to_write(noise(70, 50), SIDE)[None]
    latent = theirs.model.vqmodel.quant_conv(theirs.model.vqmodel.encoder(pixels))[0]
    book = theirs.model.vqmodel.quantize.embedding.weight
    expected = [
        max(range(K), key=lambda k: F.cosine_similarity(latent[:, row, col], book[k], dim=0).item())
        for row in range(2) for col in range(2)
    ]  # fmt: skip
    (elements,) = ours.encode_images([noise(70, 50)], generated=True)
    assert (elements.ids - V).tolist() == expected
    assert elements.features is None and elements.form == ours.form


def test_codes_are_transformers_where_the_codebook_has_unit_length(theirs, tmp_path):
    tensors = dict(theirs.state_dict())
    book = "model.vqmodel.quantize.embedding.weight"
    tensors[book] = F.normalize(tensors[book], dim=1)
    write(tmp_path, tensors, theirs.config.to_dict())
    ours, unit = read(tmp_path), JanusForConditionalGeneration.from_pretrained(tmp_path)
    for seed in range(5):
        expected = unit.model.vqmodel.encode(janus._to_write(noise(32, 32, seed), SIDE)[None]).image_tokens
        assert torch.equal(ours.encode_images([noise(32, 32, seed)], generated=True)[0].ids - V, expected)


def test_pictures_round_trip_through_codes(ours):
    (elements,) = ours.encode_images([noise(70, 50)], generated=True)
    assert ours.decode_image(elements).size == (SIDE, SIDE)
    assert int(elements.ids.min()) >= V and int(elements.ids.max()) < V + K


def test_one_picture_is_encoded_as_among_others(ours):
    pictures = [noise(32, 32, 1), noise(50, 20, 2)]
    for generated in (False, True):
        together = ours.encode_images(pictures, generated=generated)
        alone = [ours.encode_images([picture], generated=generated)[0] for picture in pictures]
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first.ids, second.ids)
            assert generated or torch.equal(first.features, second.features)


def test_an_element_of_each_kind_is_embedded_its_own_way(ours, theirs):
    ids = torch.tensor([[BEGIN, V + 5, FEATURE, V + K - 1, V - 1]])
    features = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
    layout = lay_out([(TextSpan(5),)])
    found = ours.embed(ids, layout, features)[0]
    table, code = theirs.get_input_embeddings(), theirs.prepare_embeddings_for_image_generation
    assert torch.equal(found[[0, 4]], table(torch.tensor([BEGIN, V - 1])))
    # one matrix product over the whole table rounds as one over two rows does, but for the last bit
    torch.testing.assert_close(found[[1, 3]], code(torch.tensor([5, K - 1])), rtol=0, atol=1e-6)
    assert torch.equal(found[2], features[0, 2])


def test_rows_of_codes_follow_their_weights(folder):
    model = read(folder)
    ids, layout = torch.tensor([[V, V + 1]]), lay_out([(TextSpan(2),)])
    before = model.embed(ids, layout)
    model.code_table.load_state_dict({"weight": model.code_table.weight * 2})
    frozen = model.embed(ids, layout)
    assert not torch.allclose(frozen, before)
    model.requires_grad_(True)
    trained = model.embed(ids, layout)
    torch.testing.assert_close(trained, frozen, rtol=0, atol=1e-6)
    trained.sum().backward()
    assert model.code_table.weight.grad[:2].abs().sum() > 0 and model.code_aligner.fc1.weight.grad is not None


def test_other_sizes_than_its_own_are_refused(ours):
    assert ours.form_of((SIDE, SIDE)) == ours.form
    with pytest.raises(UsageError, match="512 x 384") as refused:
        ours.form_of((512, 384))
    assert f"{SIDE} x {SIDE}" in refused.value.fix


# --- wrong checkpoints ------------------------------------------------------------------------------------------------


def damage(folder, tmp_path, *, tensors=lambda tensors: tensors, values=lambda values: values):
    """A copy of a good folder, changed."""
    checkpoint = Checkpoint.open(folder)
    write(tmp_path, tensors({key: checkpoint.get(key) for key in checkpoint.tensors}), values(checkpoint.config))
    return tmp_path


WRONG = {
    "another family": ({"values": lambda values: {**values, "model_type": "emu3"}}, "no Janus.*emu3"),
    "JanusFlow": ({"values": lambda _: {"model_type": "multi_modality"}}, "aligner_config"),
    "no family": ({"values": lambda _: {}}, "no Janus"),
    "a damaged configuration": ({"values": lambda values: {**values, "text_config": 3}}, "text_config"),
    "widths that disagree": (
        {"values": lambda values: {**values, "vq_config": {**values["vq_config"], "projection_dim": 8}}},
        "vq_config.projection_dim is 8",
    ),
    "a missing tensor": (
        {"tensors": lambda tensors: {k: t for k, t in tensors.items() if k != "model.aligner.fc1.bias"}},
        "1 missing: aligner.fc1.bias",
    ),
    "an unexpected tensor": (
        {"tensors": lambda tensors: {**tensors, "model.aligner.fc9.bias": torch.zeros(1)}},
        "1 unexpected: model.aligner.fc9.bias",
    ),
    "another size": (
        {"values": lambda values: {**values, "text_config": {**values["text_config"], "vocab_size": 300}}},
        "of another shape.*embed_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_checkpoint_is_named_before_a_tensor_is_read(folder, tmp_path, what, monkeypatch):
    changes, message = WRONG[what]
    damage(folder, tmp_path, **changes)
    monkeypatch.setattr(Checkpoint, "get", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_a_truncated_shard_is_named(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="400KB")
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off") as error:
        read(tmp_path)
    assert shard.name in error.value.where


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder, tmp_path, file):
    damage(folder, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        read(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    damage(folder, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<begin_of_image>", "<boi>"), encoding="utf8")
    with pytest.raises(CheckpointError, match="no <begin_of_image>"):
        read(tmp_path)


@pytest.mark.parametrize(
    "values", [{"image_mean": [0.4, 0.5, 0.6], "min_size": 3}, {"image_mean": None, "image_std": [0.25, 0.25, 0.25]}]
)
def test_the_image_processor_is_read_where_transformers_wrote_it(folder, tmp_path, values):
    damage(folder, tmp_path)
    for file, content in (("preprocessor_config.json", values), ("processor_config.json", {"image_processor": values})):
        (tmp_path / file).write_text(json.dumps(content))
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if value}
        assert read(tmp_path).reading == replace(janus.Reading(), **given)
        (tmp_path / file).unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(CheckpointError, match="three values"):
        read(tmp_path)


# --- nano -------------------------------------------------------------------------------------------------------------


def test_nano_is_the_same_every_time():
    first, second = janus.nano(), janus.nano()
    assert first.fingerprint == second.fingerprint and same_tensors(first, second)
    assert first.context_length >= 256 and first.form.patches == 4


def test_nano_survives_saving(tmp_path):
    model = load_nano()
    janus.save(model, tmp_path)
    assert same_tensors(read(tmp_path), model)
