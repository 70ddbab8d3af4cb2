"""The embedded generalist: what every backbone owes, and what the bundled weights can do."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from weft.backbones import load_backbone
from weft.backbones.base import check_fits, encode_document
from weft.backbones.tiny import SPECIAL, WEIGHTS, read, save
from weft.data.sources.picturebook import Reader, draw, held_out_scene, random_edit
from weft.document import Document, Image, Text, Turn, assistant, user
from weft.errors import CheckpointError, ContextError, UsageError
from weft.generation import SamplingConfig, generate
from weft.images import decode_image, encode_png
from weft.layout import ImageSpan, TextSpan, lay_out


@functools.cache
def load_cached(name):
    return load_backbone(name)


@pytest.fixture(scope="module")
def nano():
    return load_cached("nano")


@pytest.fixture(scope="module")
def tiny():
    return load_cached("tiny")


def picture(color, size=(16, 16)):
    return Image(encode_png(PILImage.new("RGB", size, color)))


@pytest.mark.parametrize("name", ["nano", "tiny"])
@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_text_survives_the_tokenizer(name, text):
    backbone = load_cached(name)
    assert backbone.detokenize(backbone.tokenize(text)) == text


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_text_that_spells_a_control_token_gives_none(name):
    backbone = load_cached(name)
    ids = backbone.tokenize(" ".join(SPECIAL))
    assert not set(ids) & set(backbone.tokens) and max(ids) < backbone.config.vocabulary


def test_heads_share_out_the_ids(nano):
    hidden = torch.randn(3, 32)
    text, image = nano.text_logits(hidden), nano.image_logits(hidden)
    assert (text.shape[-1], image.shape[-1]) == (nano.vocabulary, nano.codes)
    torch.testing.assert_close(torch.cat((text, image), -1), nano.head(hidden), rtol=0, atol=1e-6)


def test_a_document_becomes_tokens_spans_and_targets(nano):
    document = Document((user("a", picture("red")), assistant("b", picture("blue")), user("c"), assistant("d")))
    sequence = encode_document(nano, document)
    special, a, b, c, d = nano.tokens, *(nano.tokenize(letter) for letter in "abcd")
    red, blue = (
        nano.encode_images([decode_image(image.data)], generated=generated)[0].ids.tolist()
        for image, generated in zip(document.images, (False, True), strict=True)
    )
    open_, close, sep = special.begin_image, special.end_image, special.separator
    asked = [special.begin, *a, open_, *red, close, sep]
    answered = [*b, open_, *blue, close, sep]
    assert sequence.ids.tolist() == [*asked, *answered, *c, sep, *d, special.end]
    first, second = len(asked), len(asked) + len(answered)
    learnt = [*range(first, second), *range(second + len(c) + 1, len(sequence))]
    assert sequence.is_target.nonzero().flatten().tolist() == learnt
    assert [span for span in sequence.spans if isinstance(span, ImageSpan)] == [
        ImageSpan(2, 2, given=True),
        ImageSpan(2, 2),
    ]
    assert sum(span.length for span in sequence.spans) == len(sequence)


def test_loss_flags_and_prompts(nano):
    turns = (user("a"), Turn("assistant", (Text("b"),), loss=False), Turn("user", (Text("c"),), loss=True))
    sequence = encode_document(nano, Document(turns))
    assert sequence.is_target.sum() == len(nano.tokenize("c"))
    prompt = encode_document(nano, Document((user("a"),)), answer=True)
    assert prompt.ids[-1] == nano.tokens.separator and not prompt.is_target.any()
    with pytest.raises(ContextError, match="4 are kept"):
        check_fits(prompt, len(prompt) + 3, reserve=4)


def test_pictures_of_any_size_are_cropped_to_the_middle(nano):
    wide = PILImage.new("RGB", (64, 16), "red")
    wide.paste("blue", (24, 0, 40, 16))
    cropped, blue = nano.encode_images([wide, PILImage.new("RGB", (16, 16), "blue")], generated=True)
    assert torch.equal(cropped.ids, blue.ids)
    assert nano.decode_image(cropped).size == (16, 16)
    assert nano.form_of((16, 16)) == nano.form
    with pytest.raises(UsageError, match="16 x 16"):
        nano.form_of((32, 16))


def test_a_patch_has_the_same_code_whatever_stands_beside_it(tiny):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    other = pixels.clone()
    other[:, :, :8, :8] = 0
    changed = tiny.codec.encode(pixels)[0] != tiny.codec.encode(other)[0]
    assert not changed[1:].any()


def test_place_embeddings_follow_the_layout(nano):
    layout = lay_out([[TextSpan(2), ImageSpan(2, 2), TextSpan(1)]])
    ids = torch.full(layout.shape, 9)
    extra = nano.embed(ids, layout) - nano.table(ids)
    expected = torch.zeros_like(extra)
    for place in range(4):
        expected[0, 2 + place] += nano.place_in.weight[place]
        expected[0, 1 + place] += nano.place_out.weight[place]
    torch.testing.assert_close(extra, expected)


def broken(change):
    def apply(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tiny generalist"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "not a tiny generalist"),
        (broken(lambda t: {k: v for k, v in t.items() if k != "head.weight"}), "head.weight is missing"),
        (broken(lambda t: {**t, "extra": torch.zeros(1)}), "extra is not part"),
        (broken(lambda t: {**t, "head.weight": torch.zeros(2, 2)}), r"head.weight has shape \(2, 2\)"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(nano, tmp_path, damage, message):
    save(nano, tmp_path)
    assert read(tmp_path, "copy").fingerprint == nano.fingerprint
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "copy")


def test_bundled_weights_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 12_000_000


def test_bundled_codec_is_clean_and_readable(tiny):
    rng, reader = random.Random(11), Reader()
    scenes = [held_out_scene(rng) for _ in range(32)]
    rebuilt = [tiny.decode_image(e) for e in tiny.encode_images([draw(scene) for scene in scenes], generated=True)]
    assert [reader.read(picture) for picture in rebuilt] == scenes
    errors = [
        np.square(np.asarray(draw(s), float) - np.asarray(p, float)) for s, p in zip(scenes, rebuilt, strict=True)
    ]
    assert 10 * math.log10(255**2 / np.mean(errors)) >= 36


def only_picture(answer):
    (image,) = answer.images
    return decode_image(image.data)


def test_bundled_base_draws_tells_and_edits_but_does_not_interleave(tiny):
    # benchmarks/tiny.py measures this on 200 scenes; here only that the bundled files are the trained ones
    rng, reader = random.Random(12), Reader()
    scenes = [held_out_scene(rng) for _ in range(6)]
    edits = [random_edit(rng, scene) for scene in scenes]
    drawings = [Image(encode_png(draw(scene))) for scene in scenes]
    prompts = [
        *(user(scene.caption()) for scene in scenes),
        *(user(drawing) for drawing in drawings),
        *(user(drawing, sentence) for drawing, (sentence, _) in zip(drawings, edits, strict=True)),
    ]
    answers = generate(tiny, [Document((turn,)) for turn in prompts], SamplingConfig(), slots=18, context=256)
    drawn, told, edited = answers[:6], answers[6:12], answers[12:]
    right = [
        *(reader.read(only_picture(a)) == s for a, s in zip(drawn, scenes, strict=True)),
        *(a.text == s.caption() for a, s in zip(told, scenes, strict=True)),
        *(reader.read(only_picture(a)) == after for a, (_, after) in zip(edited, edits, strict=True)),
    ]
    assert sum(right) >= 16
    assert all(len(answer.parts) == 1 for answer in answers)


def test_large_pictures_are_encoded_one_after_the_other_to_the_same(monkeypatch):
    pictures = [Image(encode_png(PILImage.new("RGB", (40 + i, 30), (20 * i, 90, 7)))) for i in range(5)]
    document = Document((user(*pictures[:2], "a"), assistant(pictures[2], "b", pictures[3]), user(pictures[4])))
    backbone = load_backbone("nano")
    together = encode_document(backbone, document)
    sizes, encode = [], type(backbone).encode_images

    def spied(self, images, **named):
        sizes.append(len(images))
        return encode(self, images, **named)

    monkeypatch.setattr(type(backbone), "encode_images", spied)
    monkeypatch.setattr("weft.backbones.base.PIXELS_AT_ONCE", 1300)  # more than one of them has, less than two
    apart = encode_document(backbone, document)
    assert sizes == [2, 1, 2]
    assert torch.equal(apart.ids, together.ids)
    assert apart.spans == together.spans
