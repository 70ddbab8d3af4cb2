import random

import pytest

from weft.backbones.base import PictureForm, SpecialTokens
from weft.generation import SamplingConfig
from weft.generation.state import AnswerState, May, room_needed

TOKENS = SpecialTokens(begin=1, end=2, pad=0, separator=3, begin_image=4, end_image=5)
WORD, PATCH = 10, 99
PATCHES = 4
FORM = PictureForm(2, 2, before=(4,), after=(5,))
TOKEN_OF = {May.TEXT: WORD, May.BEGIN_IMAGE: 4, May.END: 2, May.PATCH: PATCH}


def write(config, room, prefer, form=FORM):
    """Every token of an answer by a model that takes the first allowed kind of `prefer(step)`, and the final state."""
    state, written = AnswerState(config, TOKENS, form, room), []
    while state.reason is None:
        may = state.may()
        token = state.forced()
        if token is None:
            token = TOKEN_OF[next(kind for kind in prefer(len(written)) if kind in may)]
        kind = state.advance(token)
        if kind != May.END:
            written.append(token)
    return written, state


def always(*kinds):
    rest = [kind for kind in May if kind not in kinds]
    return lambda step: (*kinds, *rest)


def test_the_end_ends_it():
    written, state = write(SamplingConfig(), 100, always(May.END))
    assert (written, state.reason) == ([], "stop")


def test_the_separator_ends_it_too():
    state = AnswerState(SamplingConfig(), TOKENS, FORM, 100)
    assert state.advance(TOKENS.separator) == May.END
    assert state.reason == "stop"


def test_the_end_of_a_picture_is_not_a_choice():
    written, _ = write(SamplingConfig(max_images=1), 100, always(May.BEGIN_IMAGE, May.END))
    assert written == [4, PATCH, PATCH, PATCH, PATCH, 5]


def test_endless_text_is_cut_at_its_budget():
    written, state = write(SamplingConfig(max_text_tokens=7), 100, always(May.TEXT))
    assert (written, state.reason, state.text_tokens) == ([WORD] * 7, "length", 7)


def test_an_answer_that_just_fits_its_budget_has_stopped_by_itself():
    def five_words(step):
        return always(May.TEXT)(step) if step < 5 else always(May.END)(step)

    for config in (SamplingConfig(max_text_tokens=5), SamplingConfig(max_tokens=6)):
        assert write(config, 100, five_words)[1].reason == "stop"
    assert write(SamplingConfig(), 6, five_words)[1].reason == "stop"
    assert write(SamplingConfig(), 5, five_words)[1].reason == "length"


@pytest.mark.parametrize("room", range(1, 30))
def test_a_picture_that_cannot_be_finished_is_not_begun(room):
    written, state = write(SamplingConfig(), room, always(May.BEGIN_IMAGE))
    # the end has its place
    assert written == [4, *[PATCH] * PATCHES, 5] * ((room - 1) // (PATCHES + 2))
    assert state.reason == "length"


def test_a_picture_that_is_more_than_may_be_is_no_choice():
    state = write(SamplingConfig(max_images=2), 100, always(May.BEGIN_IMAGE, May.END))[1]
    assert (state.images, state.reason) == (2, "stop")


def test_text_makes_room_for_the_pictures_that_are_owed():
    config = SamplingConfig(min_images=2, max_tokens=20)
    written, state = write(config, 100, always(May.TEXT))
    assert written == [WORD] * 7 + [4, *[PATCH] * 4, 5] * 2
    assert (state.images, state.reason) == (2, "length")


def test_the_end_waits_for_the_pictures_that_are_owed():
    written, state = write(SamplingConfig(min_images=1), 100, always(May.END, May.TEXT))
    assert (state.images, state.reason) == (1, "stop")
    assert written[-1] == 5


def test_the_first_may_be_forced_to_be_a_picture():
    written, _ = write(SamplingConfig(first="image"), 100, always(May.TEXT))
    assert written[0] == 4
    assert WORD in written


def test_what_opens_a_picture_its_lines_and_what_closes_it_is_not_a_choice():
    form = PictureForm(2, 3, before=(4, 20, 21), after=(22, 5), line_end=23)
    written, state = write(SamplingConfig(max_images=1), 100, always(May.BEGIN_IMAGE, May.END), form)
    assert written == [4, 20, 21, PATCH, PATCH, 23, PATCH, PATCH, 23, 22, 5]
    assert (state.images, state.image_tokens) == (1, 4)


def test_a_picture_may_end_without_a_token():
    form = PictureForm(1, 2, before=(4,), after=())
    written, _ = write(SamplingConfig(min_images=2, max_images=2), 100, always(May.BEGIN_IMAGE, May.END), form)
    assert written == [4, PATCH, PATCH] * 2


def test_places_of_elements_follow_the_picture():
    form = PictureForm(1, 2, before=(4, 20), after=(5,))
    state, places = AnswerState(SamplingConfig(), TOKENS, form, 100), []
    for token in (WORD, 4, 20, PATCH, PATCH, 5, WORD):
        state.advance(token)
        places.append((state.last_raster, state.next_raster))
    assert places == [(None, None), (None, None), (None, 0), (0, 1), (1, None), (None, None), (None, None)]


def test_random_choices_always_make_a_well_formed_answer():
    for seed in range(2000):
        rng = random.Random(seed)
        cols, lines = rng.choice([1, 2, 3]), rng.random() < 0.3
        rows, before, after = rng.choice([1, 2, 3]), rng.choice([(), (20,)]), rng.choice([(5,), (21, 5)])
        form = PictureForm(rows, cols + lines, (4, *before), after, line_end=23 if lines else None)
        low = rng.randint(0, 3)
        config = SamplingConfig(
            min_images=low,
            max_images=rng.randint(max(low, 1), 4),
            max_text_tokens=rng.randint(0, 30),
            first=rng.choice(["any", "image"]),
        )
        room = room_needed(config, form) + rng.randint(0, 40)
        kinds = list(May)
        written, state = write(config, room, lambda _, rng=rng, kinds=kinds: rng.sample(kinds, len(kinds)), form)
        text = "".join({WORD: "w", PATCH: "p", 4: "[", 5: "]", 20: "", 21: "", 23: ""}[token] for token in written)
        blocks = [block.split("]")[0] for block in text.split("[")[1:]]
        assert blocks == ["p" * rows * cols] * state.images, seed
        assert text.count("[") == text.count("]")
        assert config.owed_images <= state.images <= config.max_images
        assert text.count("w") == state.text_tokens <= config.max_text_tokens
        assert len(written) + 1 <= room
        assert config.first == "any" or text.startswith("[")
