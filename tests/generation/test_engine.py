import random
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from PIL import Image as PILImage

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones.base import encode_document
from weft.backbones.tiny import load
from weft.document import Document, Image, assistant, user
from weft.errors import ConfigError, ContextError, DocumentError, UsageError
from weft.generation import (
    Choice,
    Engine,
    Finished,
    ImageReady,
    SamplingConfig,
    TextDelta,
    collect,
    generate,
    slots_for,
)
from weft.images import encode_png
from weft.layout import ImageSpan, TextSpan, lay_out

WARM = Choice(temperature=1.0)


def picture(seed=0):
    return Image(data=encode_png(PILImage.frombytes("RGB", (16, 16), random.Random(seed).randbytes(3 * 16 * 16))))


def prompt(*parts, id=None):
    return Document((user(*parts),), id)


PROMPTS = [
    prompt("a"),
    prompt("Tell me of a cat, in two pictures."),
    prompt(picture(1), "and then?"),
    prompt("two", picture(2), picture(3)),
    Document((user("once", picture(4)), assistant("twice", picture(5)), user("thrice"))),
    prompt("long " * 30),
]
CONFIGS = [
    SamplingConfig(max_text_tokens=6, max_images=2),
    SamplingConfig(max_text_tokens=5, min_images=2, max_images=2),
    SamplingConfig(max_text_tokens=4, min_images=1, max_images=1, text=WARM, image=WARM, seed=3),
    SamplingConfig(max_text_tokens=3, first="image", max_images=1, image=Choice(temperature=2.0, top_k=5), seed=8),
    SamplingConfig(max_text_tokens=4, min_images=1, max_images=1, guidance=2.5, text=WARM, seed=5),
    SamplingConfig(max_text_tokens=4, min_images=2, max_images=2, guidance=2.5, image_guidance=1.5, seed=6),
]


BATCHES = {"none": 110, "lora": 20, "moe_lora": 30, "moss": 12}
"""Randomised batches for each kind of adapter, 200 in all."""


@pytest.fixture(
    scope="module", params=[pytest.param(k, marks=() if k == "moss" else pytest.mark.slow) for k in BATCHES]
)
def adapter(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(adapter):
    model = load("nano")
    if adapter != "none":
        attach(model, AdapterConfig(kind=adapter, rank=4))
        for i, parameter in enumerate(adapter_parameters(model).values()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        model.decoder.eval()
    return model


@pytest.fixture(scope="module")
def nano():
    return load("nano")


class Seen(NamedTuple):
    """One position that went through the stack."""

    token: int
    position: int
    reads: list[int]
    predicts: list[int]
    hidden: torch.Tensor

    @property
    def bits(self):
        return self.token, self.position, self.hidden.numpy().tobytes()


class Spy:
    """The backbone, and what went through its stack: for each slot, its real positions in order."""

    def __init__(self, backbone):
        self._backbone = backbone
        self.seen = defaultdict(list)

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def embed(self, ids, layout, features=None):
        self._ids = ids
        return self._backbone.embed(ids, layout, features)

    def forward(self, embeds, layout, step=None):
        hidden = self._backbone.forward(embeds, layout, step)
        for b, t in layout.is_real.nonzero().tolist():
            planes = (facts(layout.inputs, b, t), facts(layout.outputs, b, t))
            seen = Seen(self._ids[b, t].item(), step.positions[b, t].item(), *planes, hidden[b, t].clone())
            self.seen[step.slots[b].item()].append(seen)
        return hidden


def facts(plane, b, t):
    return [tensor[b, t].item() for tensor in (plane.modality, plane.image, plane.row, plane.col)]


def alone(backbone, document, config, slots=4):
    return generate(backbone, [document], config, slots=slots)[0]


def test_rows_that_join_and_leave_at_random_answer_as_if_alone(backbone, adapter):
    pairs = [(p, c) for p in range(len(PROMPTS)) for c in range(len(CONFIGS))]
    expected = {(p, c): alone(backbone, PROMPTS[p], CONFIGS[c]) for p, c in pairs}
    assert len({answer.parts for answer in expected.values()}) > len(pairs) // 2
    for seed in range(BATCHES[adapter]):
        rng = random.Random(seed)
        engine = Engine(backbone, slots=4)
        queue = rng.choices(pairs, k=rng.randint(3, 5))
        asked, cancelled, events = {}, set(), {}
        while queue or engine.waiting or engine.running:
            while queue and rng.random() < 0.5:
                pair = queue.pop()
                asked[engine.submit(PROMPTS[pair[0]], CONFIGS[pair[1]])] = pair
            if asked and rng.random() < 0.02:
                cancelled.add(victim := rng.choice(list(asked)))
                engine.cancel(victim)
            for event in engine.step():
                events.setdefault(event.request, []).append(event)
        for request, pair in asked.items():
            answer = collect(events[request])
            if answer.reason == "cancelled":
                assert request in cancelled
            else:
                assert answer == expected[pair], (seed, pair)
        assert engine.free_slots == 4


def test_neighbours_do_not_change_a_bit(backbone):
    lone = Spy(backbone)
    alone(lone, PROMPTS[3], CONFIGS[1])
    crowd = Spy(backbone)
    engine = Engine(crowd, slots=4)
    for step in range(3):
        engine.submit(PROMPTS[5], CONFIGS[2])
        if step == 1:
            engine.submit(PROMPTS[3], CONFIGS[1])
        engine.step()
    list(engine.run())
    in_crowd = {seen.bits for seens in crowd.seen.values() for seen in seens}
    assert {seen.bits for seen in lone.seen[0]} <= in_crowd


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_cached_decoding_equals_the_full_pass(backbone, number):
    spy = Spy(backbone)
    config = SamplingConfig(max_text_tokens=9, min_images=3, text=WARM, image=WARM, guidance=2.0, seed=number)
    alone(spy, PROMPTS[number], config, slots=2)
    assert len(spy.seen) == 2  # the answer and its shadow
    for seens in spy.seen.values():
        ids = torch.tensor([[seen.token for seen in seens]])
        layout = lay_out([spans_of(ids[0].tolist(), backbone)])
        for t, seen in enumerate(seens):
            assert (seen.position, seen.reads) == (t, facts(layout.inputs, 0, t))
            assert seen.predicts == facts(layout.outputs, 0, t)
        with torch.no_grad():
            hidden = backbone.forward(backbone.embed(ids, layout), layout)[0]
            for head in (backbone.text_logits, backbone.image_logits):
                cached = head(torch.stack([seen.hidden for seen in seens]))
                # the same sums in another order, fp32
                torch.testing.assert_close(cached, head(hidden), rtol=0, atol=1e-5)


def test_a_shadow_reads_the_pictures_and_no_text(nano):
    spy = Spy(nano)
    config = SamplingConfig(max_text_tokens=9, min_images=2, max_images=2, guidance=2.0, text=WARM)
    alone(spy, PROMPTS[2], config, slots=2)
    row, shadow = ([seen.token for seen in spy.seen[slot]] for slot in (0, 1))
    kept = {nano.tokens.begin, nano.tokens.begin_image, nano.tokens.end_image}
    assert shadow == [token for token in row if token in kept or token >= nano.vocabulary]
    assert len(shadow) < len(row)


def spans_of(ids, backbone):
    rows, cols = backbone.form.rows, backbone.form.cols
    spans, at = [], 0
    while at < len(ids):
        spans.append(TextSpan(1))
        at += 1
        if ids[at - 1] == backbone.tokens.begin_image:
            spans.append(ImageSpan(rows, cols))
            at += rows * cols
    return spans


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(nano):
    hot = SamplingConfig(max_text_tokens=20, min_images=1, text=WARM, image=WARM, seed=1)
    first, again = generate(nano, [PROMPTS[0]] * 2, hot)
    other = alone(nano, PROMPTS[0], hot.model_copy(update={"seed": 2}))
    assert first == again == alone(nano, PROMPTS[0], hot, slots=8)
    assert other.parts != first.parts


def test_text_that_spells_control_tokens_stays_text(nano):
    spelled = "<s></s><sep>[IMG][/IMG]<pad>"
    ids = encode_document(nano, prompt(spelled), answer=True).ids.tolist()
    assert not set(ids[1:-1]) & set(nano.tokens)
    assert alone(nano, prompt(spelled), CONFIGS[0]).reason in ("stop", "length")


def test_streamed_text_is_whole_characters_and_makes_the_answer(nano):
    # a picture is owed, so that the text, random bytes, goes on until only that picture fits
    config = SamplingConfig(min_images=1, max_images=1, max_tokens=200, text=Choice(temperature=0.8), seed=4)
    spy = Spy(nano)
    engine = Engine(spy, slots=1)
    engine.submit(PROMPTS[0], config)
    events = list(engine.run())
    texts = [event.text for event in events if isinstance(event, TextDelta)]
    tokens = [seen.token for seen in spy.seen[0]]
    run = tokens[tokens.index(nano.tokens.separator) + 1 : tokens.index(nano.tokens.begin_image)]
    assert len(texts) > 50
    assert all(texts)
    assert "".join(texts) == nano.detokenize(run) == collect(events).text
    assert any(len(char.encode()) == 2 for char in "".join(texts))


def test_guidance_away_from_pictures_does_nothing_where_there_are_none(nano):
    # the first picture after a prompt of text: both shadows are empty, so any scale mixes equal logits
    plain = SamplingConfig(first="image", max_images=1, max_text_tokens=0, guidance=2.0)
    guided = plain.model_copy(update={"image_guidance": 7.0})
    assert (slots_for(nano, plain), slots_for(nano, guided)) == (2, 3)
    assert alone(nano, PROMPTS[1], plain).parts == alone(nano, PROMPTS[1], guided).parts
    assert alone(nano, PROMPTS[3], plain).parts != alone(nano, PROMPTS[3], guided).parts


def test_the_last_shadow_forgets_the_pictures_before(nano):
    spy = Spy(nano)
    config = SamplingConfig(max_text_tokens=9, min_images=2, max_images=2, guidance=2.0, image_guidance=2.0)
    alone(spy, PROMPTS[2], config, slots=3)
    assert [seen.position for seen in spy.seen[2]] == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]


def test_guidance_of_zero_forgets_the_text_of_the_prompt(nano):
    def pictures(*parts):
        config = SamplingConfig(first="image", max_images=1, max_text_tokens=0, guidance=0.0)
        return list(alone(nano, prompt(*parts), config).images)

    assert pictures("one", picture(1)) == pictures("quite another", picture(1))
    assert len({pictures("one", picture(seed))[0].data for seed in range(6)}) > 1


def test_guidance_changes_pictures(nano):
    config = SamplingConfig(first="image", max_images=1, max_text_tokens=0)
    answers = [alone(nano, PROMPTS[1], config.model_copy(update={"guidance": scale})) for scale in (0.0, 1.0, 5.0)]
    assert len({answer.parts for answer in answers}) == 3


def test_cancelling_frees_the_slots_within_a_step(nano):
    engine = Engine(nano, slots=2)
    endless = SamplingConfig(min_images=16)
    guided = engine.submit(PROMPTS[0], endless.model_copy(update={"guidance": 2.0}))
    waiting = engine.submit(PROMPTS[0], endless)
    engine.step()
    assert (engine.running, engine.waiting, engine.free_slots) == (1, 1, 0)
    engine.cancel(guided)
    engine.cancel(12345)
    ends = [event for event in engine.step() if isinstance(event, Finished)]
    assert [(event.request, event.reason) for event in ends] == [(guided, "cancelled")]
    assert (engine.running, engine.waiting, engine.free_slots) == (1, 0, 1)
    queued = [engine.submit(PROMPTS[0], endless) for _ in range(2)][1]
    engine.cancel(queued)
    engine.cancel(waiting)
    assert {event.request for event in engine.step() if isinstance(event, Finished)} == {queued, waiting}
    assert (engine.running, engine.waiting, engine.free_slots) == (1, 0, 1)


def test_a_row_whose_hidden_states_break_does_not_spoil_its_slot(nano):
    class Broken(Spy):
        is_broken = False

        def embed(self, ids, layout, features=None):
            embeds = super().embed(ids, layout, features)
            return embeds.fill_(torch.nan) if self.is_broken else embeds

    broken = Broken(nano)
    engine = Engine(broken, slots=1)
    broken.is_broken = True
    engine.submit(PROMPTS[5], CONFIGS[0])
    ends = list(engine.run())
    broken.is_broken = False
    engine.submit(PROMPTS[0], CONFIGS[0])
    assert [event.reason for event in ends] == ["invalid_logits"]
    assert collect(engine.run()) == alone(nano, PROMPTS[0], CONFIGS[0], slots=1)


def test_a_model_in_training_is_sampled_without_its_dropout(nano):
    model = load("nano")
    attach(model, AdapterConfig(kind="lora", rank=4, dropout=0.5))
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model.decoder.eval()
    expected = alone(model, PROMPTS[1], CONFIGS[1])
    model.decoder.train()
    assert alone(model, PROMPTS[1], CONFIGS[1]) == expected
    assert model.decoder.training


def test_a_prompt_without_room_for_its_answer_is_refused_by_name(nano):
    engine = Engine(nano, context=64)
    with pytest.raises(ContextError, match="story-7"):
        engine.submit(prompt("x" * 100, id="story-7"), CONFIGS[0])
    fits = prompt("x" * 60)  # with <s>, the leading space and <sep>: 63 positions
    engine.submit(fits, SamplingConfig())
    with pytest.raises(ContextError, match="7 are kept"):
        engine.submit(fits, SamplingConfig(first="image"))
    assert engine.waiting == 1
    assert [event.reason for event in engine.run() if isinstance(event, Finished)] in (["stop"], ["length"])


def test_answers_fill_the_context_to_the_brim(nano):
    engine = Engine(nano, context=71)
    engine.submit(PROMPTS[0], SamplingConfig(min_images=11))  # 4 + 11 * 6 + 1
    with pytest.raises(ContextError):
        engine.submit(PROMPTS[0], SamplingConfig(min_images=12))
    assert sum(isinstance(event, ImageReady) for event in engine.run()) == 11


def test_requests_that_cannot_be_meant_are_refused(nano):
    with pytest.raises(DocumentError):
        Engine(nano).submit(Document((user("a"), assistant("b"))), CONFIGS[0])
    with pytest.raises(ConfigError):
        Engine(nano).submit(PROMPTS[0], SamplingConfig(min_images=2, max_tokens=12))
    with pytest.raises(UsageError):
        Engine(nano, slots=1).submit(PROMPTS[0], CONFIGS[4])
    with pytest.raises(UsageError):
        Engine(nano, slots=0)
    with pytest.raises(UsageError):
        Engine(nano, context=nano.context_length + 1)


def test_the_cache_has_room_for_what_rows_need_and_no_more(nano):
    engine = Engine(nano, slots=2)
    rooms = []
    for document in (PROMPTS[0], PROMPTS[5], prompt("long " * 60)):
        engine.submit(document, SamplingConfig(max_images=0, max_text_tokens=4))
        list(engine.run())
        rooms.append(engine._cache.layers[0].keys.shape[2])
    assert rooms == [64, 192, 384]  # a prompt of 300 tokens doubles what there was
    assert engine._cache.length == nano.context_length == 512


def test_a_prompt_and_its_shadows_are_read_in_one_forward(nano):
    calls = []

    class Counting(Spy):
        def forward(self, embeds, layout, step=None):
            calls.append((tuple(embeds.shape[:2]), step.slots.tolist(), layout.is_real.sum(1).tolist()))
            return super().forward(embeds, layout, step)

    engine = Engine(Counting(nano), slots=4)
    config = SamplingConfig(first="image", max_images=1, max_text_tokens=0, guidance=2.0, image_guidance=2.0)
    engine.submit(PROMPTS[2], config)
    engine.step()
    lengths = [
        len(encode_document(nano, PROMPTS[2], answer=True, keep=keep)) for keep in ("all", "pictures", "nothing")
    ]
    # the prompt's last token is read by the first step
    assert calls[0] == ((3, lengths[0] - 1), [0, 1, 2], [lengths[0] - 1, *lengths[1:]])
    assert len(calls) == 2
