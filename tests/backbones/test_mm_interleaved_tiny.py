"""The bundled MM-Interleaved: what its weights can do, on scenes that it was never shown."""

import functools
import random
from pathlib import Path

import pytest
import torch

import weft.backbones.mm_interleaved as family
from weft.backbones import load_backbone
from weft.backbones.base import DecodingOptions, encode_document
from weft.data.collate import collate
from weft.data.sources.picturebook import Reader, draw, held_out_scene, random_story
from weft.document import Document, Image, Text, user
from weft.generation import SamplingConfig, generate
from weft.images import encode_png
from weft.layout import TextSpan, TokenSequence
from weft.synchronizer.sight import see

FOLDER = Path(family.__file__).parent / "tiny"
COUNT = 6
DRAWN, NEXT, TOLD = 0.6, 0.25, 0.8
"""Bars for `COUNT` prompts, below what `pretraining/mm_interleaved/README.md` quotes of 200."""


@pytest.fixture(scope="module")
def model():
    return load_backbone("tiny-mm")


@functools.cache
def reader():
    return Reader()


def image(scene):
    return Image(encode_png(draw(scene)))


@functools.cache
def scenes():
    rng = random.Random(5)
    return [held_out_scene(rng) for _ in range(COUNT)]


@functools.cache
def stories():
    rng = random.Random(6)
    return [random_story(rng, held_out=True) for _ in range(COUNT)]


@torch.no_grad()
def painted(model, *parts):
    """The picture that follows a prompt, as the engine paints it."""
    prompt = encode_document(model, Document((user(*parts),)))
    ids = torch.cat((prompt.ids, torch.tensor([model.tokens.begin_image])))
    spans = (*prompt.spans, TextSpan(1))
    batch = collate([TokenSequence(ids, spans, ids < 0, pixels=prompt.pixels)], model.tokens.pad)
    pixels = None if batch.pictures is None else batch.pictures.seen
    layout, vectors, looks = see(model.synchronizer, pixels, batch.ids, batch.layout, model.tokens.begin)
    hidden = model.forward(model.embed(batch.ids, layout, vectors), layout)
    return model.paint(hidden[0], looks, DecodingOptions(seed=0))


def share(right):
    right = list(right)
    return sum(right) / len(right)


def test_the_weights_are_few():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12.5 * 2**20


def test_a_caption_becomes_its_picture(model):
    found = [reader().read(painted(model, scene.caption())) for scene in scenes()]
    assert share(seen == scene for seen, scene in zip(found, scenes(), strict=True)) >= DRAWN


@pytest.mark.slow
def test_the_sentence_after_a_picture_changes_it(model):
    wanted = [story.scenes[1] for story in stories()]
    prompts = [(story.scenes[0].caption(), image(story.scenes[0]), story.edits[0]) for story in stories()]
    found = [reader().read(painted(model, *parts)) for parts in prompts]
    assert share(seen == scene for seen, scene in zip(found, wanted, strict=True)) >= NEXT


def test_a_picture_is_told(model):
    asked = [Document((user(image(scene)),)) for scene in scenes()]
    answers = generate(model, asked, SamplingConfig(max_images=0, max_text_tokens=30), slots=COUNT, context=128)
    found = ["".join(part.text for part in answer.parts if isinstance(part, Text)) for answer in answers]
    assert share(said == scene.caption() for said, scene in zip(found, scenes(), strict=True)) >= TOLD
