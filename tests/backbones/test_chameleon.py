"""Chameleon: its layouts, its two heads over one table, its pictures. What every backbone owes is asked elsewhere."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.codecs import classic_vqgan
from weft.backbones import chameleon
from weft.backbones.base import encode_document
from weft.backbones.checkpoint import Checkpoint, LoadOptions
from weft.document import Document, Image, assistant, user
from weft.errors import CheckpointError, UsageError
from weft.images import encode_png
from weft.layout import ImageSpan, TextSpan, lay_out

VQ = {**classic_vqgan.SMALL, "embed_dim": 8, "latent_channels": 8, "num_res_blocks": 1}
"""Of the nano model too."""


@pytest.fixture(scope="module")
def nano():
    return chameleon.nano()


@pytest.fixture
def folder(nano, tmp_path):
    """The nano model as `save` writes it: transformers' layout with a pixel decoder."""
    chameleon.save(nano, tmp_path)
    return tmp_path


def load(folder, **options):
    return chameleon.load(Checkpoint.open(folder), "x", LoadOptions(**options))


def weights(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def picture(seed=0, size=(20, 33)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(values)


def sequence(model):
    """Text, a picture, text; and the layout of it."""
    codes = model.vocabulary + torch.tensor([3, 0, 15, 9])
    text = [model.tokens.begin, *model.tokenize("ab"), *model.form.before]
    ids = torch.tensor([[*text, *codes, *model.form.after, *model.tokenize("c")]])
    return ids, lay_out([[TextSpan(len(text)), ImageSpan(2, 2), TextSpan(2)]])


@torch.no_grad()
def run(model, ids, layout):
    return model(model.embed(ids, layout), layout)


def transformers_ids(model, ids):
    """Codes under the ids that transformers' tokenizer gives them, by name."""
    names = model.decoder.config.vocabulary_map
    spelt = {f"IMGIMG{''.join(chr(65 + int(d)) for d in str(k))}Z": k for k in range(model.codes)}
    rows = {code: names[token] for token, code in spelt.items()}
    return torch.tensor(
        [[rows[i - model.vocabulary] if i >= model.vocabulary else i for i in row] for row in ids.tolist()]
    )


@torch.no_grad()
def by_transformers(folder, ids, **inputs):
    """Hidden states and logits over all rows, without the mask that transformers' own head puts on codes."""
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    hidden = model.model(input_ids=ids, **inputs).last_hidden_state
    return hidden, model.lm_head(hidden)


# --- one table, two heads ---------------------------------------------------------------------------------------------


def test_it_computes_what_transformers_computes(nano, folder):
    ids, layout = sequence(nano)
    model = load(folder)
    theirs, logits = by_transformers(folder, transformers_ids(nano, ids))
    hidden = run(model, ids, layout)
    torch.testing.assert_close(hidden, theirs, rtol=0, atol=1e-5)
    names = json.loads((folder / "config.json").read_text())["vocabulary_map"]
    rows = [names[chameleon.token_of(code)] for code in range(16)]
    assert rows == sorted(rows, reverse=True)  # no offset can give them
    torch.testing.assert_close(model.image_logits(hidden), logits[..., rows], rtol=0, atol=1e-5)
    wanted = logits.clone()
    wanted[..., rows] = -torch.inf
    torch.testing.assert_close(model.text_logits(hidden), wanted, rtol=0, atol=1e-5)


def test_pixels_fed_to_transformers_give_the_same(nano, folder):
    ids, layout = sequence(nano)
    elements = nano.encode_images([picture()], generated=False)[0]
    assert len(elements.ids.unique()) > 1
    ids[0, 4:8] = elements.ids
    placeholders = ids.clone()
    placeholders[0, 4:8] = json.loads((folder / "config.json").read_text())["vocabulary_map"]["<image>"]
    theirs, _ = by_transformers(folder, placeholders, pixel_values=nano.codec.prepare(picture())[None])
    torch.testing.assert_close(run(nano, ids, layout), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("codes", ["in order", "in disorder", "scattered"])
def test_picture_logits_are_the_rows_of_the_codes_by_name(nano, folder, codes):
    config = json.loads((folder / "config.json").read_text())
    names = config["vocabulary_map"]
    tokens = [chameleon.token_of(code) for code in range(16)]
    rows = sorted(names[token] for token in tokens)
    if codes == "scattered":  # one trades places with a letter
        rows[5], names["Z"] = names["Z"], rows[5]
    order = np.random.default_rng(0).permutation(16) if codes == "in disorder" else range(16)
    names |= {tokens[k]: rows[i] for k, i in enumerate(order)}
    reconfigure(folder, vocabulary_map=names)
    model, hidden = load(folder), torch.randn(2, 3, 32)
    assert model.in_order == (codes == "in order")
    wanted = hidden @ torch.stack([model.head.weight[names[token]] for token in tokens]).T
    torch.testing.assert_close(model.image_logits(hidden), wanted, rtol=0, atol=1e-5)
    text = model.text_logits(hidden)
    assert text.isneginf().all((0, 1)).nonzero().flatten().tolist() == sorted(rows)


def test_codes_have_the_names_of_the_public_vocabulary():
    assert [chameleon.token_of(code) for code in (0, 9, 10, 8191)] == [
        "IMGIMGAZ", "IMGIMGJZ", "IMGIMGBAZ", "IMGIMGIBJBZ",
    ]  # fmt: skip


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(nano, left):
    ids, layout = sequence(nano)
    length = ids.shape[1]
    both = lay_out([[TextSpan(4), ImageSpan(2, 2), TextSpan(2)], [TextSpan(16)]], left=left)
    padded = torch.full((2, 16), nano.tokens.pad)
    padded[1] = torch.arange(30, 46)
    where = slice(16 - length, 16) if left else slice(length)
    padded[0, where] = ids[0]
    torch.testing.assert_close(run(nano, padded, both)[0, where], run(nano, ids, layout)[0], rtol=0, atol=2e-5)


def test_heads_give_gradients_to_what_came_before(nano):
    hidden = torch.randn(3, 32, requires_grad=True)
    (nano.text_logits(hidden)[..., nano.tokens.end].sum() + nano.image_logits(hidden).sum()).backward()
    wanted = nano.head.weight[nano.tokens.end] + nano.head.weight[nano.code_rows].sum(0)
    torch.testing.assert_close(hidden.grad, wanted.expand(3, -1), rtol=0, atol=1e-5)


# --- text and pictures ------------------------------------------------------------------------------------------------


def test_structure_comes_from_the_vocabulary_by_name(nano):
    names = nano.tokenizer.get_vocab()
    tokens = nano.tokens
    assert (tokens.begin, tokens.end, tokens.pad) == (names["<s>"], names["</s>"], names["<pad>"])
    assert (tokens.begin_image, tokens.end_image) == (names["<racm3:break>"], names["<eoss>"])
    assert tokens.separator == names["<reserved08706>"] and tokens.others == (names["<image>"],)


def test_a_document_is_written_in_its_chat_format(nano):
    red, blue = Image(encode_png(picture(1))), Image(encode_png(picture(2)))
    document = Document((user("a", red), assistant("b", blue), user("c"), assistant("d")))
    a, b, c, d = (nano.tokenize(letter) for letter in "abcd")
    one, two = ([e.ids.tolist()] for e in nano.encode_images([picture(1), picture(2)], generated=True))
    t = nano.tokens
    shown = lambda ids: [t.begin_image, *ids[0], t.end_image]  # noqa: E731
    assert encode_document(nano, document).ids.tolist() == [
        t.begin, *a, *shown(one), t.separator, *b, *shown(two), t.separator, *c, t.separator, *d, t.end,
    ]  # fmt: skip


def test_text_that_spells_tokens_stays_text(nano, folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    for token in values["added_tokens"]:  # as a release may have it
        token["special"] = False
    path.write_text(json.dumps(values))
    spelt = "<s></s><image>IMGIMGAZ <racm3:break>IMGIMGBFZ<eoss><reserved08706>"
    for model in (nano, load(folder)):
        ids = model.tokenize(spelt)
        assert not set(ids) & {*model.tokens, *model.code_rows.tolist()}
        assert model.detokenize(ids) == spelt
        assert model.detokenize([model.tokens.begin, *ids, model.vocabulary + 3, model.tokens.end]) == spelt


def test_pictures_are_read_as_the_original_codec_reads_them(nano):
    pixels = torch.stack([nano.codec.prepare(picture(seed, size)) for seed, size in ((0, (8, 8)), (1, (50, 9)))])
    state = {re.sub(f"^{chameleon.VQ}", "", k): t for k, t in chameleon.in_transformers_layout(nano).items()}
    codes = classic_vqgan.encode(state, pixels, VQ)
    for generated in (False, True):
        found = nano.encode_images([picture(0, (8, 8)), picture(1, (50, 9))], generated=generated)
        assert torch.equal(torch.stack([e.ids for e in found]), nano.vocabulary + codes)
        assert all(e.form == nano.form and e.features is None for e in found)
    drawn = np.asarray(nano.decode_image(found[0]))
    wanted = ((classic_vqgan.decode(state, codes[:1], VQ)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    assert drawn.shape == (8, 8, 3) and drawn.std() > 10
    assert np.abs(drawn - wanted.numpy()).max() <= 0.51  # rounded once


def test_other_sizes_are_refused(nano):
    assert nano.form_of((8, 8)) is nano.form
    assert (nano.form.rows, nano.form.cols, nano.widest) == (2, 2, 2)
    with pytest.raises(UsageError, match="8 x 8 pixels, not 16 x 8"):
        nano.form_of((16, 8))


def test_the_released_shape_has_pictures_of_32_by_32():
    from transformers import ChameleonConfig

    with torch.device("meta"):
        codec = chameleon.VQGAN(ChameleonConfig(vocabulary_map={}).vq_config, decoder=True)
    assert codec.grid == (32, 32) and codec.side == 512


# --- layouts ----------------------------------------------------------------------------------------------------------


def same_logits(model, other):
    ids, layout = sequence(model)
    hidden, theirs = run(model, ids, layout), run(other, ids, layout)
    torch.testing.assert_close(model.image_logits(hidden), other.image_logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.text_logits(hidden), other.text_logits(theirs), rtol=0, atol=1e-5)


def test_what_is_saved_is_loaded(nano, folder):
    model = load(folder)
    assert model.state_dict().keys() == nano.state_dict().keys()
    assert all(torch.equal(tensor, nano.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert model.fingerprint == Checkpoint.open(folder).fingerprint
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    same_logits(nano, model)


def test_the_pixel_decoder_is_saved_in_the_order_of_the_original(folder):
    """As leloy/Anole-7b-v0.1-hf has it: the level of full resolution, which has no upsampling, comes first."""
    state = classic_vqgan.random_state(VQ)
    found = {key.removeprefix("model.vqmodel."): t.shape for key, t in weights(folder).items() if "vqmodel" in key}
    assert found == {key: tensor.shape for key, tensor in state.items()}


def test_an_encoder_alone_reads_pictures_and_cannot_draw(nano, folder):
    rewrite(folder, {key: t for key, t in weights(folder).items() if ".vqmodel.decoder." not in key})
    model = load(folder)
    same_logits(nano, model)
    elements = model.encode_images([picture()], generated=True)[0]
    assert torch.equal(elements.ids, nano.encode_images([picture()], generated=True)[0].ids)
    with pytest.raises(CheckpointError, match="without the decoder"):
        model.decode_image(elements)


def test_a_vqgan_beside_the_weights_lends_its_decoder(nano, folder):
    tensors = weights(folder)
    rewrite(folder, {key: t for key, t in tensors.items() if ".vqmodel.decoder." not in key})
    (folder / "vqgan").mkdir()
    (folder / "vqgan" / "config.json").write_text("{}")
    inner = {key.removeprefix("model.vqmodel."): t for key, t in tensors.items() if "vqmodel" in key}
    save_file(inner, folder / "vqgan" / "model.safetensors")
    elements = nano.encode_images([picture()], generated=True)[0]
    drawn = [np.asarray(model.decode_image(elements)) for model in (nano, load(folder))]
    assert np.array_equal(*drawn)
    save_file({**inner, chameleon.CODEBOOK: torch.randn(16, 8)}, folder / "vqgan" / "model.safetensors")
    with pytest.raises(CheckpointError, match="not the VQGAN of the model"):
        load(folder)


def in_old_form(tensors, heads=2, key_heads=2):
    """Undo by index what released transformers wants: pairs side by side, one norm for all heads."""
    old = {}
    for key, tensor in tensors.items():
        width = 16
        pairs = torch.tensor([i // 2 + (i % 2) * (width // 2) for i in range(width)])
        if re.search(r"self_attn\.[qk]_proj", key):
            count = heads if "q_proj" in key else key_heads
            tensor = torch.cat([tensor[h * width : (h + 1) * width][pairs] for h in range(count)])
        elif re.search(r"self_attn\.[qk]_norm", key):
            tensor = tensor[0][pairs]
        old[key] = tensor
    return old


def test_the_old_form_of_queries_and_keys_is_put_in_order(folder):
    tensors = weights(folder)
    for key in tensors:
        if "_norm." in key and "self_attn" in key:  # such a model has one norm for all heads
            tensors[key] = tensors[key][:1].expand(2, -1)
    rewrite(folder, tensors)
    wanted = load(folder)
    old = in_old_form(tensors)
    assert not torch.equal(*(t["model.layers.0.self_attn.q_proj.weight"] for t in (old, tensors)))
    rewrite(folder, {**old, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    same_logits(wanted, load(folder))


def test_old_configurations_name_the_rotary_base_otherwise(nano, folder):
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**values, "rope_theta": 500.0, "rope_scaling": None}))
    frequencies = load(folder).decoder.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 500.0 ** -(torch.arange(0, 16, 2) / 16))
    assert not torch.equal(frequencies, nano.decoder.rotary_emb.inv_freq)


def test_swin_norms_come_with_the_configuration(folder):
    reconfigure(folder, swin_norm=True)
    model = load(folder)
    ids, layout = sequence(model)
    theirs, _ = by_transformers(folder, transformers_ids(model, ids))
    torch.testing.assert_close(run(model, ids, layout), theirs, rtol=0, atol=1e-5)


def test_the_stack_takes_the_dtype_and_the_codec_keeps_float32(nano, folder):
    model = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for part in (model.decoder, model.table, model.head) for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.codec.parameters()} == {torch.float32}
    assert model.decoder.rotary_emb.inv_freq.dtype == torch.float32
    ids, layout = sequence(model)
    hidden = run(model, ids, layout)
    assert hidden.dtype == torch.bfloat16
    wanted = nano.image_logits(run(nano, ids, layout))
    # 8 bits of mantissa through two layers
    assert F.cosine_similarity(model.image_logits(hidden).float(), wanted, -1).min() > 0.99


# --- wrong checkpoints ------------------------------------------------------------------------------------------------


def test_another_models_checkpoint_is_named(folder):
    reconfigure(folder, model_type="emu3")
    with pytest.raises(CheckpointError, match="a checkpoint of emu3, not of chameleon"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_map": None}, "no vocabulary_map"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 3}, "does not fit 3 heads"),
        ({"num_key_value_heads": None}, "cannot be the configuration"),
        ({"vocab_size": 20}, "beyond vocab_size 20"),
        ({"vq_config": {**VQ, "base_channels": 40}}, "no multiple of 32"),
        ({"intermediate_size": 40}, "of another shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "unexpected"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(folder, changes, message):
    reconfigure(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert error.value.where and error.value.fix


@pytest.mark.parametrize("token", ["<racm3:break>", "<pad>", "IMGIMGBCZ"])
def test_a_token_that_is_missing_is_named(folder, token):
    names = json.loads((folder / "config.json").read_text())["vocabulary_map"]
    del names[token]
    reconfigure(folder, vocabulary_map=names)
    with pytest.raises(CheckpointError, match=f"vocabulary_map has no {token}"):
        load(folder)


def test_the_tokenizer_of_another_model_is_noticed(folder):
    names = json.loads((folder / "config.json").read_text())["vocabulary_map"]
    names["<s>"], names["</s>"] = names["</s>"], names["<s>"]
    reconfigure(folder, vocabulary_map=names)
    with pytest.raises(CheckpointError, match=r"<s> is 1 in vocabulary_map, and 0 in tokenizer\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.layers.1.mlp.up_proj.weight", "missing"),
        ("model.vqmodel.encoder.conv_in.weight", "missing"),
        ("model.vqmodel.decoder.up.0.block.0.conv1.bias", "missing"),
        ("model.layers.1.mlp.side.weight", "unexpected"),
        ("model.vqmodel.loss.weight", "unexpected"),
        ("lm_head.weight", "of another shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_the_stack_is_read(folder, key, change, monkeypatch):
    tensors = weights(folder)
    if change == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(3, 3)
    rewrite(folder, tensors)
    read, get = [], Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, key: read.append(key) or get(self, key))
    with pytest.raises(CheckpointError, match=rf"1 {change}: .*{re.escape(key.removeprefix('model.').split('.')[-2])}"):
        load(folder)
    assert all("vqmodel" in name for name in read)
