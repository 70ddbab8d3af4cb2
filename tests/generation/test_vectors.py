"""Pictures that are written as vectors, and pictures of several sizes."""

import pytest
import torch
from PIL import Image as PILImage

from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.document import Document, Image, user
from weft.errors import UsageError
from weft.generation import Engine, SamplingConfig, collect, generate
from weft.images import decode_image, encode_png
from weft.layout import FEATURE

PROMPT = Document((user("a word", Image(encode_png(PILImage.new("RGB", (20, 20), "red")))),))
ONE = SamplingConfig(first="image", max_images=1, max_text_tokens=0)


class Watched:
    """The backbone, and what it was asked."""

    def __init__(self, backbone, spoil=None):
        self._backbone, self._spoil = backbone, spoil
        self.lengths, self.decoded, self.read = [], [], []

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def embed(self, ids, layout, features=None):
        self.read.append((ids.clone(), None if features is None else features.clone()))
        return self._backbone.embed(ids, layout, features)

    def forward(self, embeds, layout, step=None):
        self.lengths.append(embeds.shape[1])
        return self._backbone.forward(embeds, layout, step)

    def image_features(self, hidden):
        features = self._backbone.image_features(hidden)
        return features if self._spoil is None else self._spoil(features)

    def decode_image(self, elements, options):
        self.decoded.append((elements, options))
        return self._backbone.decode_image(elements, options)


@pytest.fixture(scope="module")
def emu2():
    return load_backbone("nano-emu2")


@torch.no_grad()
def by_recomputing_everything(backbone, sequence, patches):
    """The vectors that follow a prompt and [IMG], each from a full pass over all before it."""
    from dataclasses import replace

    from weft.layout import ImageSpan, TextSpan, lay_out

    ids = torch.cat((sequence.ids, torch.tensor([backbone.tokens.begin_image])))
    spans = (*sequence.spans[:-1], TextSpan(sequence.spans[-1].length + 1))
    given = [] if sequence.features is None else [*sequence.features]
    made = []
    for n in range(patches):
        all_ids = torch.cat((ids, torch.full((n,), FEATURE)))
        picture = ImageSpan(backbone.form.rows, backbone.form.cols, present=n)
        layout = lay_out([(*spans, picture)])
        rows = given + made
        whole = replace(sequence, ids=all_ids, features=torch.stack(rows) if rows else None)
        dense = whole.dense_features()
        hidden = backbone.forward(backbone.embed(all_ids[None], layout, None if dense is None else dense[None]), layout)
        made.append(backbone.image_features(hidden[0, -1]))
    return torch.stack(made)


def test_cached_vectors_equal_full_recomputation_and_cost_a_position_each(emu2):
    watched = Watched(emu2)
    generate(watched, [PROMPT], ONE.model_copy(update={"diffusion": ONE.diffusion.model_copy(update={"guidance": 1})}))
    ((elements, _),) = watched.decoded
    assert (elements.ids == FEATURE).all()
    prompt = encode_document(emu2, PROMPT, answer=True)
    full = by_recomputing_everything(emu2, prompt, emu2.form.patches)
    torch.testing.assert_close(elements.features, full, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    # the prompt but its last token at once; that token, [IMG], each vector, and [/IMG]
    assert watched.lengths == [len(prompt) - 1] + [1] * (1 + 1 + emu2.form.patches + 1)
    # of these, P wrote a vector: those that read [IMG] and the vectors before the last
    reading = [ids[0, 0].item() for ids, _ in watched.read[1:]]
    assert reading[1:-1] == [emu2.tokens.begin_image] + [FEATURE] * emu2.form.patches


def test_pixels_are_led_away_from_the_picture_of_no_prompt(emu2):
    watched = Watched(emu2)
    engine = Engine(watched, slots=2)
    for seed in (0, 5):
        engine.submit(PROMPT, ONE.model_copy(update={"seed": seed, "max_images": 2, "min_images": 2}))
    list(engine.run())
    start = torch.tensor(emu2.chat.start[:1])
    from weft.layout import TextSpan, TokenSequence

    nothing = TokenSequence(start, (TextSpan(1),), torch.zeros(1, dtype=torch.bool))
    expected = by_recomputing_everything(emu2, nothing, emu2.form.patches)
    assert sorted(options.seed for _, options in watched.decoded) == [0, 1, 5, 6]
    for _, options in watched.decoded:
        torch.testing.assert_close(options.negative, expected, rtol=1e-5, atol=1e-5)
    # it is written once
    assert sum(ids.shape == (1, 1) for ids, _ in watched.read) < 2 * emu2.form.length


def test_without_guidance_no_such_picture_is_written(emu2):
    watched = Watched(emu2)
    diffusion = ONE.diffusion.model_copy(update={"guidance": 1.0, "steps": 1})
    generate(watched, [PROMPT], ONE.model_copy(update={"diffusion": diffusion}))
    ((_, options),) = watched.decoded
    assert (options.steps, options.guidance, options.negative) == (1, 1.0, None)


def test_guidance_steps_and_seed_change_pixels_and_not_vectors(emu2):
    answers, vectors = [], []
    for change in ({}, {"diffusion": {"guidance": 6.0}}, {"diffusion": {"steps": 5}}, {"seed": 3}):
        watched = Watched(emu2)
        (answer,) = generate(watched, [PROMPT], SamplingConfig(**{**ONE.model_dump(), **change}))
        answers.append(answer.parts)
        vectors.append(watched.decoded[0][0].features)
    assert len(set(answers)) == 4
    assert all(torch.equal(found, vectors[0]) for found in vectors)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_vector_that_is_no_number_ends_the_answer_and_spares_its_neighbours(emu2, value):
    def spoil(features):
        if len(features) == 1:  # the picture of no prompt
            return features
        return torch.cat((torch.full_like(features[:1], value), features[1:]))

    engine = Engine(Watched(emu2, spoil), slots=2)
    events = {engine.submit(PROMPT, ONE): [] for _ in range(2)}
    for event in engine.run():
        events[event.request].append(event)
    broken, other = map(collect, events.values())
    (alone,) = generate(emu2, [PROMPT], ONE, slots=2)
    assert (broken.reason, list(broken.images)) == ("invalid_logits", [])
    assert other.parts == alone.parts


def test_a_model_that_can_write_no_picture_still_ends(emu2):
    (answer,) = generate(Watched(emu2, lambda features: features * torch.nan), [PROMPT], ONE)
    assert (answer.reason, list(answer.images)) == ("invalid_logits", [])


def test_pictures_of_several_sizes_are_written_side_by_side():
    backbone = load_backbone("nano-emu3")
    sizes = [None, (8, 4), (4, 8), (6, 6)]
    engine = Engine(backbone, slots=len(sizes))
    base = ONE.model_copy(update={"guidance": 1.0})
    events = {engine.submit(PROMPT, base.model_copy(update={"size": size})): [] for size in sizes}
    for event in engine.run():
        events[event.request].append(event)
    for size, told in zip(sizes, events.values(), strict=True):
        answer = collect(told)
        (image,) = answer.images
        form = backbone.form if size is None else backbone.form_of(size)
        assert size is None or decode_image(image.data).size == size
        assert answer.usage.image_tokens == form.rows * (form.cols - 1)  # line ends are not chosen
        (alone,) = generate(backbone, [PROMPT], base.model_copy(update={"size": size}), slots=len(sizes))
        assert alone == answer
    with pytest.raises(UsageError, match="3 x 5"):
        engine.submit(PROMPT, base.model_copy(update={"size": (3, 5)}))
