"""Whatever the heads say, every answer keeps to the grammar, respects its budgets and ends with a clear reason."""

import itertools
import random

import pytest
import torch

from weft.backbones.tiny import load
from weft.document import Document, user
from weft.generation import Choice, Engine, Finished, ImageBegin, ImageReady, SamplingConfig, TextDelta, collect

PROMPT = Document((user("hi"),))
WARM = Choice(temperature=1.0)


@pytest.fixture(scope="module")
def nano():
    return load("nano")


class Rigged:
    """The backbone with other logits: `logits(head, logits)` gets "text" or "image" and what that head said.

    Refuses control tokens in text and pictures that are not P of their own elements.
    """

    def __init__(self, backbone, logits):
        self._backbone, self._logits = backbone, logits

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def text_logits(self, hidden):
        return self._masked("text", self._backbone.text_logits(hidden))

    def image_logits(self, hidden):
        return self._masked("image", self._backbone.image_logits(hidden))

    def _masked(self, head, logits):
        return self._logits(head, logits).masked_fill(logits == -torch.inf, -torch.inf)

    def detokenize(self, ids):
        assert not set(ids) & set(self.tokens)
        assert max(ids, default=0) < self.vocabulary
        return self._backbone.detokenize(ids)

    def decode_image(self, elements, options):
        assert len(elements.ids) == self.form.patches
        assert min(elements.ids) >= self.vocabulary
        return self._backbone.decode_image(elements, options)


def answers(backbone, configs, slots=8):
    engine = Engine(backbone, slots=slots)
    events = {engine.submit(PROMPT, config): [] for config in configs}
    for event in engine.run():
        events[event.request].append(event)
    assert engine.free_slots == slots
    for config, told in zip(configs, events.values(), strict=True):
        check(told, config)
    return [collect(told) for told in events.values()]


def check(events, config):
    *told, end = events
    assert isinstance(end, Finished)
    assert not any(isinstance(event, Finished) for event in told)
    begun = [event.index for event in told if isinstance(event, ImageBegin)]
    ready = [event.index for event in told if isinstance(event, ImageReady)]
    assert begun == list(range(len(begun)))
    for event, after in itertools.pairwise(events):
        if isinstance(event, ImageBegin) and not isinstance(after, ImageReady):
            assert after == end
            assert end.reason == "invalid_logits"
        assert not (isinstance(after, ImageReady) and not isinstance(event, ImageBegin))
    assert len(begun) <= config.max_images
    assert end.usage.text_tokens <= config.max_text_tokens
    used = end.usage.text_tokens + 6 * len(begun) + 1
    assert used <= (config.max_tokens or 512)
    if end.reason != "invalid_logits":
        assert ready == begun
        assert len(ready) >= config.owed_images
        assert end.usage.image_tokens == 4 * len(ready)
    if config.first == "image":
        assert not isinstance(events[0], TextDelta)


def favour(token, by=1e4):
    def logits(head, said):
        if head == "text":
            said = said.clone()
            said[..., token] += by
        return said

    return logits


def test_a_model_that_always_begins_pictures_begins_only_those_it_can_finish(nano):
    rigged = Rigged(nano, favour(nano.tokens.begin_image))
    many, few, tight = answers(
        rigged,
        [SamplingConfig(max_images=3), SamplingConfig(max_tokens=14), SamplingConfig(max_tokens=12, max_text_tokens=9)],
    )
    assert len(list(many.images)) == 3
    assert len(list(few.images)) == 2
    assert len(list(tight.images)) == 1


@pytest.mark.parametrize("choice", [Choice(), WARM])
def test_a_model_that_never_ends_is_cut(nano, choice):
    def endless(head, said):
        return favour(nano.tokens.separator, -torch.inf)(head, favour(nano.tokens.end, -torch.inf)(head, said))

    configs = [SamplingConfig(text=choice, max_text_tokens=n, max_images=2) for n in (0, 1, 17)]
    configs += [SamplingConfig(text=choice, max_tokens=n) for n in (1, 6, 7, 30)]
    assert {answer.reason for answer in answers(Rigged(nano, endless), configs)} == {"length"}


@pytest.mark.parametrize("special", ["pad", "begin", "end_image"])
def test_control_tokens_are_never_written(nano, special):
    rigged = Rigged(nano, favour(getattr(nano.tokens, special)))
    answers(rigged, [SamplingConfig(max_text_tokens=20), SamplingConfig(max_text_tokens=20, text=WARM)])


@pytest.mark.parametrize("head", ["text", "image"])
@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("choice", [Choice(), WARM])
def test_logits_without_a_choice_end_the_answer(nano, head, value, choice):
    rigged = Rigged(nano, lambda at, said: torch.full_like(said, value) if at == head else said)
    for answer in answers(rigged, [SamplingConfig(first="image", text=choice, image=choice, max_text_tokens=4)] * 3):
        assert answer.reason == "invalid_logits"
        assert len(list(answer.images)) == (head == "text")


def test_a_broken_row_leaves_its_neighbours_alone(nano):
    config = SamplingConfig(max_text_tokens=12, min_images=1, max_images=2)
    (alone,) = answers(nano, [config], slots=4)

    def break_first(head, said):
        said = said.clone()
        said[0] = torch.nan
        return said

    broken, *others = answers(Rigged(nano, break_first), [config] * 4, slots=4)
    assert broken.reason == "invalid_logits"
    assert others == [alone] * 3


def test_random_tables_always_give_a_well_formed_answer(nano):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)

    def random_table(head, said):
        """Every row and step another table; some favour structure, some lack most ids or hold no number at all."""
        table = torch.randn(said.shape, generator=generator) * rng.choice([0.1, 1.0, 30.0])
        for row in table:
            if rng.random() < 0.3:
                row[rng.choice([t for t in nano.tokens if t < len(row)])] += rng.choice([-100.0, 20.0, 100.0])
            if rng.random() < 0.1:
                row[torch.rand(row.shape, generator=generator) < 0.9] = -torch.inf
            if rng.random() < 0.003:
                row[:] = rng.choice([-torch.inf, torch.nan])
        return table

    def random_config(seed):
        low = rng.randint(0, 2)
        return SamplingConfig(
            text=rng.choice([Choice(), WARM, Choice(temperature=0.5, top_k=3, top_p=0.8)]),
            image=rng.choice([Choice(), WARM]),
            first=rng.choice(["any", "any", "image"]),
            min_images=low,
            max_images=rng.randint(max(low, 1), 4),
            max_text_tokens=rng.randint(0, 15),
            max_tokens=rng.choice([None, rng.randint(13, 40)]),
            guidance=rng.choice([1.0, 1.0, 3.0]),
            image_guidance=rng.choice([1.0, 1.0, 2.0]),
            seed=seed,
        )

    given = answers(Rigged(nano, random_table), [random_config(seed) for seed in range(250)], slots=16)
    assert {answer.reason for answer in given} == {"stop", "length", "invalid_logits"}
