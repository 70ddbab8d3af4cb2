"""Emu3: the same sequences, codes, logits and pixels as transformers' own classes, from every released layout."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import nn
from transformers import Emu3ForConditionalGeneration, Emu3ImageProcessor, Emu3Processor
from transformers.models.emu3.image_processing_emu3 import smart_resize

from weft.backbones import emu3
from weft.backbones.base import encode_document
from weft.backbones.checkpoint import Checkpoint, LoadOptions
from weft.document import Document, Image, assistant, user
from weft.errors import CheckpointError, UsageError
from weft.images import encode_png
from weft.layout import ImageSpan, Modality, TextSpan, lay_out

LAYOUTS = ("today", "older", "sharded")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, two layers; both sides run the same kernels on the same weights


@pytest.fixture(scope="module")
def nano():
    return emu3.nano()


@pytest.fixture(scope="module")
def reference(nano):
    """transformers' whole model, with random weights of its own and codes that are no run of the vocabulary."""
    config = type(nano.config).from_dict(nano.config.to_dict())
    names = [f"<|visual token {code:06d}|>" for code in range(nano.codes)]
    ids = [config.vocabulary_map[name] for name in names]
    config.vocabulary_map.update(zip(names, ids[5:] + ids[4::-1], strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Emu3ForConditionalGeneration(config).eval()
        for key, parameter in model.named_parameters():
            if "vqmodel" not in key and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


def write(reference, nano, folder, layout="today"):
    """A folder as the release has it, written without our loader or saver."""
    folder.mkdir()
    reference.config.save_pretrained(folder)
    ids = reference.config.vocabulary_map
    tokenizer = json.loads(nano.tokenizer.to_str())
    tokenizer["model"]["vocab"] = ids
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"min_pixels": 16, "max_pixels": 1024, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    weights = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    if layout != "today":
        weights = {older(key): tensor for key, tensor in weights.items()}
    if layout == "sharded":
        files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(weights)}
        for file in sorted(set(files.values())):
            save_file({key: weights[key] for key in weights if files[key] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def older(key):
    key = re.sub(r"^model\.text_model\.", "text_model.model.", key)
    return re.sub(r"^lm_head\.", "text_model.lm_head.", re.sub(r"^model\.vqmodel\.", "vqmodel.", key))


def read(folder, name="some-emu3", **options):
    return emu3.load(Checkpoint.open(folder), name, LoadOptions(**options))


@pytest.fixture(scope="module")
def folder(reference, nano, tmp_path_factory):
    return write(reference, nano, tmp_path_factory.mktemp("emu3") / "checkpoint")


@pytest.fixture(scope="module")
def backbone(folder):
    model = read(folder)
    model.use_area(400)
    return model


def photo(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return PILImage.fromarray(values).resize((width, height), PILImage.Resampling.NEAREST)


def part(width, height, seed=0):
    return Image(encode_png(photo(width, height, seed)))


TWO = Document((user("Draw", part(24, 16)), assistant("One", part(16, 16, 1), "two")))
"""Pictures of 8 x 12 and 8 x 8 codes."""


def encoded(backbone, document):
    """A batch of one: ids, layout, and the ids that transformers' model reads."""
    sequence = encode_document(backbone, document)
    return sequence, lay_out([sequence.spans]), own_ids(backbone, sequence.ids)


def own_ids(backbone, ids):
    is_code = ids >= backbone.vocabulary
    names = [f"<|visual token {code:06d}|>" for code in (ids[is_code] - backbone.vocabulary).tolist()]
    ids = ids.clone()
    ids[is_code] = torch.tensor([backbone.tokenizer.token_to_id(name) for name in names], dtype=torch.int64)
    return ids[None]


def hidden_states(backbone, ids, layout):
    return backbone.forward(backbone.embed(ids[None], layout), layout)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_released_layout_loads_completely(reference, nano, tmp_path, layout):
    model = read(write(reference, nano, tmp_path / "x", layout))
    stored = reference.state_dict()
    ours = {emu3._released(key): tensor for key, tensor in model.state_dict().items()}
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[key], stored[key]) for key in stored)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_reads_the_same_layouts(reference, nano, tmp_path, layout):
    """That the older key names above are the ones that transformers knows."""
    folder = write(reference, nano, tmp_path / "x", layout)
    theirs, info = Emu3ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in reference.state_dict().items())


def test_what_we_save_is_read_by_transformers_and_by_us(backbone, tmp_path):
    emu3.save(backbone, tmp_path)
    theirs, info = Emu3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    sequence, layout, own = encoded(backbone, TWO)
    hidden = hidden_states(backbone, sequence.ids, layout)
    torch.testing.assert_close(backbone.head(hidden), theirs.eval()(own).logits, **CLOSE)
    again = read(tmp_path)
    assert (again.area, again.form, again.chat, again.pixels) == (400, backbone.form, backbone.chat, backbone.pixels)
    torch.testing.assert_close(hidden_states(again, sequence.ids, layout), hidden, rtol=0, atol=0)


def test_reduced_precision_spares_the_codec_and_the_rotary_frequencies(folder, backbone):
    model = read(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in (*model.decoder.parameters(), *model.table.parameters(), *model.head.parameters())} == {
        torch.bfloat16
    }
    assert {p.dtype for p in model.codec.parameters()} == {torch.float32}
    torch.testing.assert_close(model.decoder.rotary_emb.inv_freq, backbone.decoder.rotary_emb.inv_freq, rtol=0, atol=0)
    sequence, layout, _ = encoded(model, TWO)
    assert torch.equal(sequence.ids, encoded(backbone, TWO)[0].ids)
    assert hidden_states(model, sequence.ids, layout).isfinite().all()


def test_nothing_is_trained_in_the_codec(folder):
    model = read(folder).train()
    assert model.decoder.training and not any(module.training for module in model.codec.modules())


def drop(key):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        del values[key]
        (folder / "config.json").write_text(json.dumps(values))

    return change


def put(**entries):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **entries}))

    return change


def without_code(file, at):
    def change(folder):
        values = json.loads((folder / file).read_text())
        vocabulary = values
        for key in at:
            vocabulary = vocabulary[key]
        del vocabulary["<|visual token 000007|>"]
        if "added_tokens" in values:
            values["added_tokens"] = [t for t in values["added_tokens"] if "000007" not in t["content"]]
        (folder / file).write_text(json.dumps(values))

    return change


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "change, message",
    [
        (put(model_type="chameleon"), "'chameleon', not 'emu3'"),
        (put(model_type="Emu3"), r"'Emu3', not 'emu3'(.|\n)*BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (drop("vocabulary_map"), "no vocabulary_map"),
        (put(text_config={"vocab_size": "many"}), "not the configuration of an Emu3"),
        (put(weft={"chat": "loud"}), "loud"),
        (put(weft={"aera": 64}), "aera"),
        (put(vq_config={"codebook_size": 17}), r"no <\|visual token 000016\|>"),
        (without_code("tokenizer.json", ("model", "vocab")), r"no <\|visual token 000007\|>"),
        (without_code("config.json", ("vocabulary_map",)), r"<\|visual token 000007\|> is \d+ .* None"),
        (cut, "cut off"),
    ],
)
def test_a_wrong_checkpoint_is_named(folder, tmp_path, change, message):
    copy = shutil.copytree(folder, tmp_path / "x")
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        read(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("lm_head.weight"), r"missing: head\.weight"),
        (lambda weights: weights.update(surplus=torch.zeros(1)), "unexpected: surplus"),
        (
            lambda weights: weights.update({"model.text_model.norm.weight": torch.zeros(3)}),
            r"another shape: model\.text_model\.norm\.weight",
        ),
    ],
)
def test_a_wrong_tensor_is_named(reference, folder, tmp_path, change, message):
    copy = shutil.copytree(folder, tmp_path / "x")
    weights = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    change(weights)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read(copy)


# --- sequences --------------------------------------------------------------------------------------------------------


def test_a_document_with_two_sizes_is_the_processors_sequence(backbone, reference, tmp_path):
    emu3.save(backbone, tmp_path)
    processor = Emu3Processor.from_pretrained(tmp_path)
    processor.downsample_ratio = backbone.factor
    processor.image_processor.spatial_factor = backbone.factor
    pictures = [photo(24, 16), photo(16, 16, 1)]
    text = "You are a helpful assistant. USER: Draw<image> ASSISTANT: One<image> two<|extra_204|>"
    ids = processor(text=text, images=pictures, return_tensors="pt").input_ids
    is_picture = ids == processor.image_token_id
    assert is_picture.sum() == 104 + 72
    alone = [
        reference.model.get_image_tokens(one["pixel_values"], one["image_sizes"])
        for one in (processor.image_processor(picture, return_tensors="pt") for picture in pictures)
    ]
    ids[is_picture] = torch.cat(alone).long()
    sequence, _, own = encoded(backbone, TWO)
    assert own.tolist() == ids.tolist()
    assert int((sequence.ids >= backbone.vocabulary).sum()) == 96 + 64


def test_line_ends_are_the_last_column_of_a_picture(backbone):
    sequence, layout, _ = encoded(backbone, TWO)
    form = backbone.form_of((24, 16))
    assert (form.rows, form.cols, form.length) == (8, 13, len(form.before) + 104 + 2)
    opening = [backbone.tokenizer.id_to_token(i) for i in form.before]
    assert opening == ["<|image start|>", *"8*12", "<|image token|>"]
    pictures = [span for span in sequence.spans if isinstance(span, ImageSpan)]
    assert [(s.rows, s.cols, s.given, s.before, s.after) for s in pictures] == [
        (8, 13, True, 6, 2),
        (8, 9, False, 5, 2),
    ]
    assert [type(span) for span in sequence.spans] == [TextSpan, ImageSpan] * 2 + [TextSpan]
    plane, ids = layout.inputs, sequence.ids[None]
    is_patch = plane.modality == Modality.IMAGE
    tail = torch.tensor([12, 8])[plane.image.clamp_min(0)]
    assert torch.equal(is_patch & (plane.col < tail), ids >= backbone.vocabulary)
    assert torch.equal(ids[is_patch] == form.line_end, (plane.col == tail)[is_patch])
    # of the written picture: its begin, its codes and its end are learnt, not its size and its line ends
    written = plane.image[0] == 1
    assert torch.equal(sequence.is_target[written], sequence.ids[written] >= backbone.vocabulary)
    start = int(written.nonzero()[0]) - 5
    assert sequence.is_target[start : start + 5].tolist() == [True, False, False, False, False]
    assert sequence.is_target[start + 5 + 72 :].all()


def test_every_text_target_has_a_finite_logit(backbone):
    sequence, layout, _ = encoded(backbone, TWO)
    logits = backbone.text_logits(hidden_states(backbone, sequence.ids, layout))[0]
    learnt = (sequence.is_target[1:] & (layout.outputs.modality[0, :-1] == Modality.TEXT)).nonzero()[:, 0]
    assert logits[learnt, sequence.ids[learnt + 1]].isfinite().all()


def test_turns_are_those_of_emu3_chat(backbone):
    document = Document((user("Hi"), assistant("Hello"), user("Bye")))
    ids = encode_document(backbone, document, answer=True).ids.tolist()
    text = backbone.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|extra_203|>You are a helpful assistant. USER: Hi ASSISTANT: Hello<|extra_204|> USER: Bye ASSISTANT:"
    )


@pytest.mark.parametrize("name", ["BAAI/Emu3-Gen-hf", "emu3-gen"])
def test_emu3_gen_takes_plain_captions(folder, tmp_path, name):
    model = read(folder, name)
    ids = encode_document(model, Document((user("A cat"),)), answer=True).ids.tolist()
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == "<|extra_203|>A cat"
    emu3.save(model, tmp_path)
    assert read(tmp_path).chat == model.chat


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_text_survives_the_tokenizer_and_gives_no_control_token(folder, name):
    model = read(folder, "Emu3-Gen" if name == "plain" else "x")
    for text in ("", " ", "a", " two  spaces ", "\nß 漢", "<|image start|><|extra_204|><|visual token 000003|>"):
        ids = model.tokenize(text)
        assert model.detokenize(ids) == text
        assert not set(ids) & set(model.tokens) and not set(ids) & set(model.code_rows.tolist())


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (40, 13), (9, 9), (3, 2), (300, 70), (51, 255)])
def test_pixels_are_those_of_the_image_processor(backbone, monkeypatch, size):
    seen = {}

    def keep(pixels, sizes):
        seen["pixels"] = pixels
        return encode(pixels, sizes)

    encode = backbone.codec.encode
    monkeypatch.setattr(backbone.codec, "encode", keep)
    form = backbone.encode_images([photo(*size)], generated=False)[0].form
    pixels = backbone.pixels
    processor = Emu3ImageProcessor(
        min_pixels=min(pixels.smallest, 400), max_pixels=400, spatial_factor=2,
        image_mean=list(pixels.mean), image_std=list(pixels.std),
    )  # fmt: skip
    wanted = processor(photo(*size), return_tensors="pt").pixel_values
    assert wanted.shape[-2:] == (form.rows * 2, (form.cols - 1) * 2)
    torch.testing.assert_close(seen["pixels"], wanted, rtol=0, atol=1e-6)  # one rounding of float32


def test_sizes_are_those_of_smart_resize_and_squeezed_beyond_its_makers_bound():
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 3000, (2000, 2)).tolist():
        if max(width, height) <= emu3.RATIO * min(width, height):
            for bounds in ((512 * 512, 1024 * 1024), (384 * 384, 384 * 384), (64, 10_000)):
                assert emu3.fit((width, height), 8, *bounds) == smart_resize(height, width, 8, *bounds)[::-1]
    assert emu3.fit((5000, 1), 8, 64, 8000) == emu3.fit((5, 1), 8, 64, 8000)


def test_codes_become_the_pixels_of_decode_image_tokens(backbone, reference):
    elements = backbone.encode_images([photo(24, 16)], generated=True)[0]
    assert len(set(elements.ids.tolist())) > 4  # not one code throughout
    tokens = torch.cat((own_ids(backbone, elements.ids), torch.zeros(1, 3, dtype=torch.int64)), dim=1)
    pixels = reference.decode_image_tokens(image_tokens=tokens, height=8, width=12)
    processor = Emu3ImageProcessor(image_mean=list(backbone.pixels.mean), image_std=list(backbone.pixels.std))
    theirs = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"][0]
    ours = backbone.decode_image(elements)
    assert ours.size == theirs.size == (24, 16)
    # theirs cuts fractions off, ours rounds
    difference = np.asarray(ours).astype(int) - np.asarray(theirs)
    assert difference.min() >= 0 and difference.max() <= 1


def test_a_picture_of_the_usual_form_keeps_it_through_the_codec(backbone):
    side = (backbone.form.cols - 1) * backbone.factor
    elements = backbone.encode_images([photo(side, side)], generated=True)[0]
    assert elements.form == backbone.form and elements.ids.shape == (backbone.form.patches,)
    picture = backbone.decode_image(elements)
    again = backbone.encode_images([picture], generated=False)[0]
    assert picture.size == (side, side) and again.form == elements.form


def test_a_picture_has_the_same_codes_beside_a_larger_one(backbone):
    small, large = photo(10, 10), photo(20, 20, 1)
    alone = backbone.encode_images([small], generated=False)[0]
    assert torch.equal(backbone.encode_images([small, large], generated=False)[0].ids, alone.ids)


def at_released_sizes(nano, area=None, context=9216):
    """Tiny, but with the release's context and spatial factor."""
    values = nano.config.to_dict()
    values["text_config"]["max_position_embeddings"] = context
    values["vq_config"]["channel_multiplier"] = [1, 1, 1, 1]
    return emu3.Emu3Backbone(type(nano.config).from_dict(values), nano.tokenizer, "x", emu3.Pixels(), area=area)


def test_three_pictures_of_the_usual_size_leave_room_for_text(nano):
    model = at_released_sizes(nano)
    assert model.factor == 8 and model.area == 384 * 384
    assert (model.form.rows, model.form.cols, model.form.length) == (48, 49, 2361)
    assert 3 * model.form.length < 0.8 * model.context_length


def test_a_longer_context_gives_no_larger_pictures_than_the_makers(nano):
    model = at_released_sizes(nano, context=131072)
    assert model.area == 720 * 720 and (model.form.rows, model.form.cols) == (90, 91)
    assert model.form_of((1024, 1024)).length <= model.context_length


def test_the_area_is_the_users_to_choose(nano):
    model = at_released_sizes(nano, area=518400)  # what its makers generate
    assert (model.form.rows, model.form.cols) == (90, 91)
    model.use_area(512 * 512)
    assert model.form == model.form_of((512, 512))
    with pytest.raises(UsageError, match="1024 x 1024"):
        model.use_area(1024 * 1024)


@pytest.mark.parametrize("size", [(8, 8), (384, 256), (256, 1280), (1680, 336)])
def test_sizes_it_makes(nano, size):
    model = at_released_sizes(nano)
    form = model.form_of(size)
    assert (form.cols - 1, form.rows) == (size[0] // 8, size[1] // 8)
    assert form.cols <= model.widest and form.length <= model.context_length


@pytest.mark.parametrize("size", [(0, 0), (-8, 8), (384, 380), (1024, 1024), (48, 8), (8, 48)])
def test_sizes_it_does_not_make_are_refused(nano, size):
    with pytest.raises(UsageError, match=f"{size[0]} x {size[1]}") as error:
        at_released_sizes(nano).form_of(size)
    assert "multiples of 8" in error.value.fix


def test_no_form_is_wider_than_the_widest(nano):
    widths = [
        form.cols
        for cols in range(1, 60)
        for rows in range(1, 60)
        if nano._can_write(rows, cols) and (form := nano.form_of((2 * cols, 2 * rows)))
    ]
    assert max(widths) == nano.widest


# --- logits -----------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(backbone, reference):
    sequence, layout, own = encoded(backbone, TWO)
    hidden, wanted = hidden_states(backbone, sequence.ids, layout), reference(own).logits
    text, codes = backbone.text_logits(hidden), backbone.image_logits(hidden)
    assert codes.shape == (1, len(sequence), backbone.codes)
    torch.testing.assert_close(codes, wanted[..., backbone.code_rows], **CLOSE)
    written = ~backbone.unwritten
    torch.testing.assert_close(text[..., written], wanted[..., written], **CLOSE)
    assert (text[..., backbone.unwritten] == -math.inf).all() and backbone.unwritten[backbone.code_rows].all()
    assert wanted.std() > 0.5  # enough for a wrong layer to show


def test_what_is_written_as_text(nano):
    written = {nano.tokenizer.id_to_token(i) for i in (~nano.unwritten).nonzero()[:, 0].tolist()}
    special = {token for token in written if len(token) > 1}
    assert len(written - special) == 256
    assert special == {
        "<|endoftext|>", "<|extra_203|>", "<|extra_204|>", "<|image start|>", "<|image end|>", "<|extra_201|>"
    }  # fmt: skip


def test_consecutive_codes_are_a_view_of_the_head_and_scattered_ones_agree(nano, backbone):
    assert nano._first_row is not None and backbone._first_row is None
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for model in (nano, backbone):
        torch.testing.assert_close(model.image_logits(hidden), model.head(hidden)[:, model.code_rows], **CLOSE)


def test_the_greedy_picture_is_that_of_constrained_generate(backbone, reference):
    form = backbone.form_of((8, 6))
    height, width = form.rows, form.cols - 1
    prompt = encode_document(backbone, Document((user("A cat", part(8, 8)),)), answer=True)
    ids = torch.cat((prompt.ids, torch.tensor(form.before)))
    names = {token: backbone.tokenizer.token_to_id(token) for token in ("<|extra_200|>", "<|extra_201|>")}
    begin = len(ids)

    def allowed(_, written):
        done = len(written) - begin
        if done == form.patches:
            return [names["<|extra_201|>"]]
        if done > form.patches:
            return [backbone.tokens.end_image]
        return [names["<|extra_200|>"]] if done % (width + 1) == width else backbone.code_rows.tolist()

    theirs = reference.generate(
        own_ids(backbone, ids), prefix_allowed_tokens_fn=allowed, do_sample=False, use_cache=True,
        max_new_tokens=form.patches + 2, eos_token_id=None, pad_token_id=backbone.tokens.pad,
    )  # fmt: skip
    spans = (*prompt.spans, TextSpan(len(form.before)))
    for raster in range(height * (width + 1)):
        next_id = form.forced(raster)
        if next_id is None:
            layout = lay_out([(*spans, ImageSpan(form.rows, form.cols, present=raster))])
            hidden = hidden_states(backbone, ids, layout)[:, -1]
            next_id = backbone.vocabulary + int(backbone.image_logits(hidden).argmax())
        ids = torch.cat((ids, torch.tensor([next_id])))
    ids = torch.cat((ids, torch.tensor(form.after)))
    assert own_ids(backbone, ids).tolist() == theirs.tolist()
    assert len(set(theirs[0, begin:].tolist())) > 4  # not one code throughout


def test_nano_is_the_same_every_time_and_leaves_the_generator_alone(nano):
    state = torch.get_rng_state()
    again = emu3.nano()
    assert again.fingerprint == nano.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert nano.form.patches == 20 and nano.context_length >= 256
