"""What every generalist keeps to, whatever its family: one suite over the table."""

import pytest
import torch
from PIL import Image as PILImage

from weft.adapters import AdapterConfig, RingCache, adapter_parameters, attach, load_adapter, save_adapter
from weft.backbones import NANO, load_backbone, save_backbone
from weft.backbones.base import DecodingOptions, encode_document
from weft.data.collate import collate
from weft.document import Document, Image, Text, assistant, user
from weft.errors import UsageError
from weft.generation import Choice, Engine, ImageBegin, ImageReady, SamplingConfig, collect, generate, slots_for
from weft.generation.cache import SlotCache
from weft.images import encode_png
from weft.layout import FEATURE, ImageSpan, Modality, lay_out
from weft.synchronizer.sight import see
from weft.training import Objective

NAMES = ["nano", *NANO]
WARM = Choice(temperature=1.0)


@pytest.fixture(params=NAMES)
def backbone(request):
    return load_backbone(request.param)


@pytest.fixture(params=NAMES)
def adapted(request):
    return with_adapter(load_backbone(request.param))


def with_adapter(backbone, std=0.1):
    attach(backbone, AdapterConfig(kind="moss", rank=4))
    for i, parameter in enumerate(adapter_parameters(backbone).values()):
        torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(i))
    backbone.decoder.eval()
    return backbone


def picture(colour="red", size=(40, 30)):
    drawn = PILImage.new("RGB", size, colour)
    drawn.paste("white", (0, 0, size[0] // 2, size[1] // 3))
    return drawn


def part(colour, size=(40, 30)):
    return Image(encode_png(picture(colour, size)))


DOCUMENT = Document(
    (
        user(part("red"), "What is this?"),
        assistant("A thing.", part("green", (30, 40)), "And more:", part("blue")),
        user("Thank you."),
        assistant(part("black"), "Done."),
    ),
    "a document",
)


def seen(backbone, batch):
    """Features and layout of a batch, with what the model sees of its pictures."""
    if backbone.synchronizer is None:
        return batch.features, batch.layout
    pixels = None if batch.pictures is None else batch.pictures.seen
    layout, vectors, _ = see(backbone.synchronizer, pixels, batch.ids, batch.layout, backbone.tokens.begin)
    return vectors, layout


@torch.no_grad()
def forward(backbone, batch):
    features, layout = seen(backbone, batch)
    return backbone.forward(backbone.embed(batch.ids, layout, features), layout)


def hidden_of(backbone, sequence):
    return forward(backbone, collate([sequence], backbone.tokens.pad))[0]


def painted(backbone, hidden, seed=0):
    """A picture, painted from states."""
    return backbone.paint(hidden, None, DecodingOptions(seed))


def image_head(backbone):
    return backbone.image_logits if backbone.kind == "discrete" else backbone.image_features


def test_heads_have_the_widths_that_are_promised(backbone):
    hidden = hidden_of(backbone, encode_document(backbone, DOCUMENT))
    text = backbone.text_logits(hidden)
    assert text.shape == (len(hidden), backbone.vocabulary)
    if backbone.kind == "diffusion":
        assert painted(backbone, hidden).size == (backbone.canvas, backbone.canvas)
    else:
        image = image_head(backbone)(hidden)
        assert image.shape == (len(hidden), backbone.codes or backbone.feature_width)
        assert image.isfinite().all()
    assert not text.isnan().any()
    # what structures an answer can be chosen, what is never text cannot
    structure = [backbone.tokens.end, backbone.tokens.begin_image]
    assert text[:, structure].isfinite().all()
    assert backbone.text_logits(hidden[0]).shape == (backbone.vocabulary,)


def test_the_text_head_has_room_for_text_and_none_for_codes(backbone):
    hidden = hidden_of(backbone, encode_document(backbone, DOCUMENT))
    words = backbone.tokenize("A thing. And more: 0123456789")
    assert backbone.text_logits(hidden)[:, words].isfinite().all()
    assert all(0 <= word < backbone.vocabulary for word in words)


def test_text_survives_its_tokens(backbone):
    text = "A thing: 3 * 4, \u00e9t\u00e9 \U0001f600.\n\nAnd more"
    assert backbone.detokenize(backbone.tokenize(text)) == text
    spelled = " ".join(backbone.tokenizer.id_to_token(token) for token in backbone.tokens)
    assert not set(backbone.tokenize(spelled)) & set(backbone.tokens)


def test_a_document_becomes_elements_that_fit_their_layout(backbone):
    sequence = encode_document(backbone, DOCUMENT)
    assert sequence.ids[0] == backbone.chat.start[0]
    assert sequence.ids[-len(backbone.chat.end) :].tolist() == list(backbone.chat.end)
    layout, at, pictures = lay_out([sequence.spans]), 0, 0
    learnt = [False, True, True, True]
    for span in sequence.spans:
        ids = sequence.ids[at : at + span.length]
        if isinstance(span, ImageSpan):
            assert span.given != learnt[pictures]
            before = sequence.ids[at - span.before : at].tolist()
            after = sequence.ids[at + span.length : at + span.length + span.after].tolist()
            assert before[0] == backbone.tokens.begin_image
            assert after[-1:] == [backbone.tokens.end_image][: span.after]
            place = layout.inputs.row * span.cols + layout.inputs.col
            assert place[0, at : at + span.length].tolist() == list(range(span.rows * span.cols))
            is_code = ids >= backbone.vocabulary
            assert (is_code | (ids == FEATURE) | (ids == (backbone.form.line_end or FEATURE))).all()
            assert (ids < backbone.vocabulary + backbone.codes).all()
            # what is learnt of a picture is what is chosen in it
            chosen = is_code | (ids == FEATURE)
            assert torch.equal(sequence.is_target[at : at + span.length], chosen & learnt[pictures])
            assert bool(sequence.is_target[at - span.before]) == learnt[pictures]
            pictures += 1
        else:
            assert (ids < backbone.vocabulary).all()
            assert (ids >= 0).all()
        at += span.length
    assert pictures == 4
    vectors = 0 if sequence.features is None else len(sequence.features)
    if backbone.synchronizer is None:
        assert vectors == (sequence.ids == FEATURE).sum()
    else:  # they are made of the pictures, together with the text
        assert not vectors and [each.painted is not None for each in sequence.pixels] == learnt
    answers = backbone.tokenize("Done.")
    end = len(backbone.chat.end)
    assert sequence.ids[-len(answers) - end : -end].tolist() == answers
    assert sequence.is_target[-len(answers) - end :].all()


def test_pictures_make_the_round_trip_through_the_codec(backbone):
    encoded = backbone.encode_images([picture("red"), picture("blue", (16, 48))], generated=True)
    again = backbone.encode_images([picture("blue", (16, 48))], generated=True)[0]
    assert torch.equal(encoded[1].ids, again.ids)
    for elements in encoded:
        if backbone.kind == "diffusion":
            with pytest.raises(UsageError, match="paint it"):
                backbone.decode_image(elements)
            continue
        decoded = backbone.decode_image(elements)
        assert decoded.mode == "RGB"
        assert backbone.form_of(decoded.size) == elements.form
        # what was decoded is a picture like any other
        (back,) = backbone.encode_images([decoded], generated=True)
        assert back.form == elements.form
        assert back.ids.shape == elements.ids.shape == (elements.form.patches,)
        assert decoded.tobytes() == backbone.decode_image(elements).tobytes()
    with pytest.raises(UsageError, match="7 x 5"):
        backbone.form_of((7, 5))


def test_a_batch_is_as_each_alone(backbone):
    documents = [DOCUMENT, Document((user("short"), assistant("yes", part("blue")))), Document((user("no picture"),))]
    sequences = [encode_document(backbone, document) for document in documents]
    hidden = forward(backbone, collate(sequences, backbone.tokens.pad))
    for row, sequence in enumerate(sequences):
        # float32 sums in another order
        torch.testing.assert_close(hidden[row, : len(sequence)], hidden_of(backbone, sequence), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 30])
def test_cached_equals_full(adapted, prompt):
    sequence = encode_document(adapted, DOCUMENT)
    full, layout = hidden_of(adapted, sequence), lay_out([sequence.spans])
    dense, whole = seen(adapted, collate([sequence], adapted.tokens.pad))
    # a prefill ends in text
    reads, predicts = (plane.modality[0] == Modality.IMAGE for plane in (layout.inputs, layout.outputs))
    while predicts[prompt - 1] or reads[prompt]:
        prompt += 1
    cache, rings = SlotCache(2, adapted.context_length), RingCache(2, columns=int(layout.grids[..., 1].max()))
    found = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, len(sequence)))]:
        if sequence.ids[start] == adapted.tokens.begin_image:
            rings.reset([1])
        step = cache.step(
            torch.arange(start, stop)[None], reach=stop, rings=rings if stop - start == 1 else None, slots=[1]
        )
        ids, now = sequence.ids[None, start:stop], layout[start:stop]
        now = now.seeing(whole.sight and whole.sight[start:stop])
        with torch.no_grad():
            features = None if dense is None else dense[:, start:stop]
            found.append(adapted.forward(adapted.embed(ids, now, features), now, step)[0])
    torch.testing.assert_close(torch.cat(found), full, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_saved_and_loaded_it_is_the_same(backbone, tmp_path):
    save_backbone(backbone, tmp_path)
    again = load_backbone(str(tmp_path))
    sequence = encode_document(backbone, DOCUMENT)
    copied = encode_document(again, DOCUMENT)
    assert torch.equal(sequence.ids, copied.ids)
    assert torch.equal(hidden_of(backbone, sequence), hidden_of(again, copied))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert again.fingerprint
    if backbone.kind == "diffusion":
        states = hidden_of(backbone, sequence)
        assert painted(again, states).tobytes() == painted(backbone, states).tobytes()
    else:
        (elements,) = backbone.encode_images([picture()], generated=True)
        assert again.decode_image(elements).tobytes() == backbone.decode_image(elements).tobytes()
    save_backbone(again, tmp_path)
    assert load_backbone(str(tmp_path)).fingerprint == again.fingerprint


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_reloads(backbone, tmp_path):
    sequence = encode_document(backbone, DOCUMENT)
    before = hidden_of(backbone, sequence)
    attach(backbone, AdapterConfig(kind="moss", rank=4))
    assert torch.equal(hidden_of(backbone, sequence), before)
    for i, parameter in enumerate(adapter_parameters(backbone).values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    changed = hidden_of(backbone, sequence)
    assert not torch.equal(changed, before)
    save_adapter(backbone, tmp_path)
    other = load_backbone(backbone.name)
    load_adapter(other, tmp_path)
    assert torch.equal(hidden_of(other, sequence), changed)


def test_gradients_reach_the_adapter_and_nothing_else(adapted):
    batch = collate([encode_document(adapted, DOCUMENT)], adapted.tokens.pad)
    own = adapter_parameters(adapted)
    text, image = Objective(adapted)(batch)
    for loss in (text, image):
        assert loss > 0
        grads = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)
        # every layer but the last matters to both; the last one's branches only to what they predict
        assert sum(bool(grad.any()) for grad in grads) > len(grads) // 2
    (text + image).backward()
    trained = {id(parameter) for parameter in own.values()}
    for parameter in adapted.parameters():
        assert id(parameter) in trained or (parameter.grad is None and not parameter.requires_grad)
    assert all(parameter.grad.any() for parameter in own.values())


def test_it_learns(adapted):
    batch = collate([encode_document(adapted, DOCUMENT)], adapted.tokens.pad)
    objective, optimizer = Objective(adapted), torch.optim.AdamW(adapter_parameters(adapted).values(), lr=3e-3)

    def losses():
        torch.manual_seed(0)  # where noise is drawn, the same
        return objective(batch)

    first = losses().detach()
    for _ in range(10 if adapted.kind == "diffusion" else 20):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()
    # a frozen random U-Net hardly listens to what an adapter of the language model tells it
    enough = torch.tensor([0.9, 1.0 if adapted.kind == "diffusion" else 0.9])
    assert (losses() < enough * first).all()


CONFIGS = [
    SamplingConfig(min_images=2, max_images=2, max_text_tokens=9, text=WARM, image=WARM, seed=1, guidance=1),
    SamplingConfig(first="image", max_images=1, max_text_tokens=4, guidance=2, image_guidance=1),
    SamplingConfig(max_images=0, max_text_tokens=12, text=WARM),
    SamplingConfig(first="image", max_images=1, max_text_tokens=0, guidance=3, image_guidance=2, image=WARM, seed=4),
]
PROMPTS = [
    Document((user("hi"),)),
    Document((user(part("red"), part("blue"), "put both together"),)),
    Document((user("a", part("red")), assistant("b", part("green")), user("c"))),
]


def test_answers_are_well_formed_and_rows_do_not_disturb_each_other(adapted):
    # every setting and every prompt, more than there are slots
    pairs = [(PROMPTS[i % len(PROMPTS)], CONFIGS[i % len(CONFIGS)]) for i in range(6)]
    alone = [generate(adapted, [prompt], config, slots=4)[0] for prompt, config in pairs]
    engine = Engine(adapted, slots=4)
    events = {engine.submit(prompt, config): [] for prompt, config in pairs}
    for event in engine.run():
        events[event.request].append(event)
    together = [collect(told) for told in events.values()]
    assert together == alone
    for answer, (_, config) in zip(together, pairs, strict=True):
        images = list(answer.images)
        assert config.owed_images <= len(images) <= config.max_images
        assert answer.usage.text_tokens <= config.max_text_tokens
        assert answer.reason in ("stop", "length")
    assert engine.free_slots == 4


def test_interleaved_answers_from_every_family():
    told = {}
    for name in NANO:
        backbone = load_backbone(name)
        engine = Engine(backbone, slots=slots_for(backbone, SamplingConfig()))
        config = SamplingConfig(min_images=2, max_images=2, max_text_tokens=10, text=WARM, image=WARM, seed=2)
        engine.submit(PROMPTS[2], config)
        told[name] = list(engine.run())
    assert set(told) == {"nano-chameleon", "nano-janus", "nano-emu3", "nano-emu2", "nano-mm_interleaved"}
    for name, events in told.items():
        answer = collect(events)
        kinds = [type(part) for part in answer.parts]
        assert kinds.count(Image) == 2, name
        assert Text in kinds, name
        order = [event for event in events if isinstance(event, ImageBegin | ImageReady)]
        assert [event.index for event in order] == [0, 0, 1, 1]
